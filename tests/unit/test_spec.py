"""A sweep file is understood whole, or every mistake in it is named at once."""

import copy
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import Mistake, SpecError
from orchestrator.spec import Sweep, load, read_text
from orchestrator.spec.load import MAX_DEPTH, MAX_NODES
from pruning import CRITERIA, SPARSE
from tests.unit.sweep_builder import TINY, mapping, sweep, text

SWEEPS = sorted(Path("sweeps").glob("*.yaml"))
NAN, INF = float("nan"), float("inf")


def refused(content: str | dict[str, Any]) -> list[Mistake]:
    with pytest.raises(SpecError) as caught:
        read_text(content if isinstance(content, str) else text(content), Path("x.yaml"))
    message = str(caught.value)
    assert message.startswith(f"x.yaml: {len(caught.value.mistakes)} mistake")
    assert all(f"  {m.path}: " in message for m in caught.value.mistakes)
    return list(caught.value.mistakes)


def only(content: str | dict[str, Any]) -> Mistake:
    found = refused(content)
    assert len(found) == 1, [str(m) for m in found]
    return found[0]


# --- one mistake, wherever it is ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shown", "near"),
    [
        ("prun", "prun", "prune"),
        ("scene__holdut", "scene.holdut", "holdout"),
        ("train__iteratons", "train.iteratons", "iterations"),
        ("train__network__widht", "train.network.widht", "width"),
        ("train__samples__coars", "train.samples.coars", "coarse"),
        ("prune__0__criterion", "prune[0].criterion", "criteria"),
        ("prune__0__calibration__view", "prune[0].calibration.view", "views"),
        ("evaluate__render", "evaluate.render", "renders"),
        ("resources__trian", "resources.trian", "train"),
        ("resources__train__gpu", "resources.train.gpu", "gpus"),
        ("tracking__url", "tracking.url", "uri"),
        ("report__ratio", "report.ratio", "ratios"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(
    path: str, shown: str, near: str
) -> None:
    mistake = only(mapping(**{path: 1}))
    assert mistake.path == shown
    assert "unknown key; allowed are " in mistake.message
    assert mistake.message.endswith(f"did you mean {near!r}?")


@pytest.mark.parametrize(
    ("path", "value", "shown", "near"),
    [
        ("scene__format", "lff", "scene.format", "llff"),
        ("train__precision", "bfloat", "train.precision", "bfloat16"),
        ("evaluate__precision", "float23", "evaluate.precision", "float32"),
        ("prune__0__networks", ["both", "corse"], "prune[0].networks[1]", "coarse"),
        ("prune__0__criteria", ["activaton"], "prune[0].criteria[0]", "activation"),
        ("prune__0__criteria", "magntude", "prune[0].criteria", "magnitude"),
        ("prune__0__schedules", ["front-load"], "prune[0].schedules[0]", "front-loaded"),
        ("prune__0__schedules", "unifrm", "prune[0].schedules", "uniform"),
    ],
)
def test_an_unknown_name_is_shown_with_what_is_allowed_and_the_nearest(
    path: str, value: Any, shown: str, near: str
) -> None:
    mistake = only(mapping(**{path: value}))
    assert mistake.path == shown
    assert mistake.value == (value[-1] if isinstance(value, list) else value)
    assert "allowed are " in mistake.message
    assert near in mistake.message.split("; did you mean")[0]
    assert mistake.message.endswith(f"did you mean {near!r}?")


@pytest.mark.parametrize("ratio", [1, 1.0, 1.5, -0.1, NAN, INF, True, "0.5", None, [0.5], 10**400])
def test_a_ratio_that_is_none_is_refused_in_its_place(ratio: Any) -> None:
    mistake = only(mapping(prune__0__ratios=[0.3, ratio]))
    assert mistake.path == "prune[0].ratios[1]"
    assert "from 0 up to, but not, 1" in mistake.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train__iterations", True),
        ("train__iterations", 0),
        ("train__iterations", 1.5),
        ("train__iterations", "10"),
        ("train__iterations", 10**30),
        ("train__iterations", []),
        ("train__seeds", -1),
        ("train__seeds", 2**31),
        ("train__learning_rate", True),
        ("train__learning_rate", 0),
        ("train__learning_rate", NAN),
        ("train__learning_rate", "fast"),
        ("train__decay", INF),
        ("train__density_noise", -1),
        ("train__density_noise", False),
        ("train__samples__coarse", 3),
        ("train__network__width", 5000),
        ("train__network__depth", 65),
        ("scene__holdout", 1),
        ("scene__ndc", "yes"),
        ("evaluate__max_rays", 0),
        ("evaluate__renders", -1),
        ("prune__0__calibration__views", "every"),
        ("prune__0__calibration__views", True),
        ("prune__0__calibration__rays", 0),
        ("resources__train__gpus", 1.5),
        ("resources__train__gpus", "many"),
        ("resources__train__gpus", True),
        ("resources__train__cpus", True),
        ("resources__train__cpus", NAN),
        ("resources__retries", -1),
        ("resources__checkpoint_seconds", 0),
        ("report__ratios", [1]),
        ("report__reference_psnr", True),
        ("name", "a/b"),
        ("name", ""),
        ("name", 7),
        ("storage", ""),
        ("storage", "~no-such-user/out"),
        ("storage", "a\0b"),
        ("scene__path", "\ud800"),
        ("description", 3),
        ("train", 5),
        ("train__network", [1]),
        ("prune", "all"),
        ("prune", []),
    ],
)
def test_a_value_out_of_range_or_of_another_kind_is_refused(path: str, value: Any) -> None:
    mistake = refused(mapping(**{path: value}))[0]
    assert mistake.path.startswith(path.replace("__0__", "[0].").replace("__", "."))
    assert mistake.message


@pytest.mark.parametrize("key", ["name", "scene", "prune", "prune__0__ratios"])
def test_a_missing_key_is_named(key: str) -> None:
    mistake = only(mapping(**{key: None}))
    assert mistake.path == key.replace("__0__", "[0].")
    assert "required" in mistake.message


@pytest.mark.parametrize("scene", [{}, {"format": "llff"}, {"path": None}])
def test_a_real_scene_needs_a_path(scene: dict[str, Any]) -> None:
    assert only(mapping(scene=scene)).path == "scene.path"


@pytest.mark.parametrize("depth", [None, 3, 8])
def test_a_schedule_needs_one_ratio_a_layer(depth: int | None) -> None:
    wanted = depth or 8
    network = {"width": 8, "skip": 1, **({"depth": depth} if depth else {})}
    right, wrong = [0.5] * wanted, [0.5] * (wanted + 1)
    made = sweep(train__network=network, prune__0__schedules=["uniform", right])
    assert made.grids[0].schedules == ("uniform", tuple(right))
    mistake = only(mapping(train__network=network, prune__0__schedules=["uniform", right, wrong]))
    assert mistake.path == "prune[0].schedules[2]"
    assert f"{wanted + 1} ratios for {wanted} hidden layers" in mistake.message


def test_a_lone_schedule_needs_no_list_around_it() -> None:
    assert sweep(prune__0__schedules=[0.1, 0.2, 0.3]).grids[0].schedules == ((0.1, 0.2, 0.3),)
    assert sweep(prune__0__schedules="back-loaded").grids[0].schedules == ("back-loaded",)
    assert only(mapping(prune__0__schedules=[0.1, 0.2])).path == "prune[0].schedules"


def test_a_bad_ratio_inside_of_a_schedule_is_counted_out() -> None:
    mistake = only(mapping(prune__0__schedules=[[0.1, 1.0, True]]))
    assert mistake.path == "prune[0].schedules[0]"
    assert "wrong at places 1, 2" in mistake.message


def test_the_skip_must_fit_the_depth() -> None:
    assert only(mapping(train__network={"depth": 4})).path == "train.network.skip"
    assert "null" in only(mapping(train__network={"depth": 1})).message
    assert sweep(train__network={"depth": 1, "skip": False} | {"skip": 0, "depth": 2})


def test_a_depth_that_is_itself_wrong_causes_no_further_complaints() -> None:
    for depth in (True, 0, "8", 3.0):
        assert only(mapping(train__network__depth=depth)).path == "train.network.depth"


# --- many mistakes ---------------------------------------------------------------------------


def test_every_mistake_is_reported_at_once() -> None:
    data = mapping(
        name="no good",
        scene__holdout=0,
        train__iterations=[1, -1],
        train__network__skip=2,
        evaluate__rendrs=1,
        storage="",
    )
    data["prune"].append({"criteria": "magic", "ratios": [0.5, 1.0], "schedules": [[0.5]]})
    assert {m.path for m in refused(data)} == {
        "name",
        "scene.holdout",
        "train.iterations[1]",
        "train.network.skip",
        "evaluate.rendrs",
        "storage",
        "prune[1].criteria",
        "prune[1].ratios[1]",
        "prune[1].schedules[0]",
    }


def test_a_mistake_shows_path_value_and_what_is_allowed() -> None:
    message = str(only(mapping(prune__0__criteria="activaton")))
    names = ", ".join(sorted({*CRITERIA, *SPARSE}))
    assert message == (
        f"prune[0].criteria: unknown criterion; allowed are {names}; "
        "did you mean 'activation'? (got 'activaton')"
    )


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("name", "a/b", "allowed are up to 64 letters"),
        ("name", 5, "a text belongs here"),
        ("scene__factor", 65, "must be at most 64"),
        ("scene__ndc", "maybe", "allowed are true and false"),
        ("train__iterations", "2e4", "20000 or 20_000"),  # a text to YAML
        ("train__iterations", 0, "must be at least 1"),
        ("train__iterations", 4.5, "a whole number belongs here"),
        ("train__iterations", [], "at least 1 item belongs here"),
        ("train__learning_rate", 0, "must be above 0"),
        ("train__learning_rate", NAN, "a finite number belongs here"),
        ("train__learning_rate", "fast", "a number belongs here"),
        ("train__validation", 1.5, "a fraction: a number from 0 up to, but not, 1"),
        ("train__samples", [8, 8], "a mapping (key: value) belongs here"),
        ("prune__0__recover", {"iterations": 5, "rounding_from": 2}, "must be below 1"),
        ("tracking__experiment", "", "at least 1 character belongs here"),
        ("tracking__uri", "htp://db:5000", "did you mean 'http'?"),
        ("tracking__uri", "mlruns", "allowed are http(s)://HOST:PORT of an MLflow server"),
    ],
)
def test_what_a_value_must_be_is_said_in_the_words_of_a_sweep_file(
    path: str, value: Any, said: str
) -> None:
    mistake = only(mapping(**{path: value}))
    assert said in mistake.message
    assert "should" not in mistake.message  # pydantic's own sentences


def test_lone_values_and_a_lone_grid_show_no_index() -> None:
    grid = {"ratios": 2.0, "networks": "none", "criteria": "x", "calibration": {"seeds": -1}}
    assert {m.path for m in refused(mapping(prune=grid))} == {
        "prune.ratios",
        "prune.networks",
        "prune.criteria",
        "prune.calibration.seeds",
    }


def test_long_values_are_cut() -> None:
    mistake = only(mapping(prune__0__criteria="x" * 100_000))
    assert len(str(mistake)) < 400


def test_keys_that_are_no_strings_are_refused() -> None:
    found = refused("1: 2\nname: a\nscene: {format: demo, ~: 1}\nprune: {true: 1, ratios: 0.5}")
    assert [m.message for m in found] == ["Keys should be strings"] * 3


# --- YAML --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "a sweep file is a mapping"),
        ("# nothing\n", "a sweep file is a mapping"),
        ("- a\n- b", "a sweep file is a mapping"),
        ("name: 'open", "unexpected end of stream"),
        ("a: [1, 2", "expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("name: a\nscene: {format: demo}\nname: b", "key 'name' is given twice"),
        ("train: {rays: 1, rays: 2}", "key 'rays' is given twice"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !custom 3", "tag"),
        ("? [a]\n: b", "unhashable"),
        ("a: 2020-99-99", "not YAML"),
        ("a: 0b_", "not YAML"),
        ("a: \x00", "not YAML"),
        ("a: &a [*a]", "an alias inside of what it stands for"),
        ("a: &a {b: *a}", "an alias inside of what it stands for"),
        ("a: *missing", "undefined alias"),
        ("[" * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("{a: " * 10_000, f"nested more than {MAX_DEPTH} deep"),
        ("prune: {ratios: 0x" + "f" * 20_000 + "}", "from 0 up to, but not, 1"),
    ],
)
def test_what_is_not_yaml_of_ours_is_refused(content: str, said: str) -> None:
    assert any(said in m.message for m in refused(content))


def test_a_yaml_mistake_says_where() -> None:
    assert only("name: a\nname: b").path == "line 2, column 1"


def test_aliases_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert f"more than {MAX_NODES:,} values" in only("\n".join(lines)).message


def test_anchors_and_merge_keys_are_plain_yaml() -> None:
    made = read_text(
        "name: a\nscene: {format: demo}\n"
        "prune:\n"
        "- &grid {ratios: &ratios [0.1, 0.2], criteria: magnitude}\n"
        "- {<<: *grid, criteria: random}\n"
        "- {ratios: *ratios}\n",
        Path("x.yaml"),
    )
    assert [g.criteria for g in made.grids] == [("magnitude",), ("random",), ("activation",)]
    assert {g.ratios for g in made.grids} == {(0.1, 0.2)}


def test_lists_that_multiply_to_billions_of_trials_are_refused() -> None:
    many = list(range(2000))
    data = mapping(train__seeds=many, prune__0__calibration__seeds=many)
    assert "fan out to 2,000 trainings" in only(data).message


def test_controls_that_multiply_to_millions_are_refused() -> None:
    many = [*range(1, 2001)]
    recover = {"iterations": 10, "control_iterations": many, "control_learning_rate": many}
    data = mapping(prune__0__recover=recover)
    assert "1 trainings × 6 prunings and 4,000,000 controls" in only(data).message


# --- files -------------------------------------------------------------------------------------


def refused_file(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load(path)
    assert [m.path for m in caught.value.mistakes] == ["(file)"]
    assert str(path) in str(caught.value)
    return caught.value.mistakes[0].message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused_file(tmp_path / "none.yaml").startswith("no such file")
    assert "directory" in refused_file(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: café".encode("latin-1"))
    assert "UTF-8" in refused_file(latin)
    huge = tmp_path / "huge.yaml"
    huge.write_text("#" * 2_000_000)
    assert "larger than 1 MB" in refused_file(huge)
    assert "Not a directory" in refused_file(huge / "inner.yaml")
    assert refused_file(Path("a\0b"))
    assert "larger than 1 MB" in refused_file(Path("/dev/zero"))


def test_a_sweep_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text(TINY),))
    writer.start()
    made = load(pipe)
    writer.join()
    assert made.name == "tiny"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_the_sweeps_of_the_project_are_valid(path: Path) -> None:
    assert load(path).grids


def test_there_are_sweeps() -> None:
    assert {"demo.yaml", "fern.yaml", "report.yaml"} <= {path.name for path in SWEEPS}


# --- the Ray cluster form ------------------------------------------------------------------------


def cluster(inner: Any) -> dict[str, Any]:
    return {
        "cluster_name": "x",
        "provider": {"type": "local", "head_ip": "127.0.0.1"},
        "metadata": {"sweep": inner, "other": 1},
    }


def test_both_forms_give_the_same_sweep() -> None:
    plain = sweep()
    wrapped = read_text(text(cluster(TINY)), Path("tiny.yaml"))
    assert wrapped.text != plain.text
    assert wrapped.hash == plain.hash
    assert vars(wrapped) | {"text": plain.text} == vars(plain)


def test_paths_of_mistakes_in_a_cluster_file_begin_at_its_top() -> None:
    data = mapping(nmae="x", prune__0__ratios=[1], prune__0__schedules=[[0.5]], scene={"ndc": True})
    assert {m.path for m in refused(cluster(data))} == {
        "metadata.sweep.nmae",
        "metadata.sweep.prune[0].ratios[0]",
        "metadata.sweep.prune[0].schedules[0]",
        "metadata.sweep.scene.path",
    }


@pytest.mark.parametrize(
    "data",
    [
        {"cluster_name": "x", "provider": {"type": "local"}},
        {"cluster_name": "x", "metadata": None},
        {"cluster_name": "x", "metadata": [1]},
        cluster("sweep"),
    ],
)
def test_a_cluster_file_without_a_sweep_says_where_it_belongs(data: dict[str, Any]) -> None:
    mistake = only(data)
    assert mistake.path == "metadata.sweep"
    assert "Ray cluster file" in mistake.message


# --- the hash ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"resources": {"train": {"cpus": 7, "gpus": 0.5}, "retries": 9}},
        {"storage": "elsewhere"},
        {"tracking": {"uri": "http://localhost:1", "experiment": "other"}},
        {"report": {"ratios": [0.1], "reference_psnr": 3}},
        {"description": "in other words"},
        {"prune__0__networks": ["both"]},
        {"train__iterations": [6]},
        {"train__decay": 0.1},
    ],
)
def test_the_hash_ignores_what_decides_no_result(changes: dict[str, Any]) -> None:
    assert sweep(**changes).hash == sweep().hash


def test_the_hash_ignores_comments_and_the_order_of_keys() -> None:
    backwards = yaml.safe_dump(TINY, sort_keys=True)
    assert read_text(f"# words\n{backwards}# more", Path("y.yaml")).hash == sweep().hash


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"scene__holdout": 4},
        {"scene__ndc": False},
        {"scene__path": "folder"},
        {"train__iterations": 7},
        {"train__iterations": [6, 7]},
        {"train__seeds": 1},
        {"train__rays": 33},
        {"train__learning_rate": 1e-3},
        {"train__decay": 0.2},
        {"train__decay_iterations": 7},
        {"train__density_noise": 0.5},
        {"train__precision": "bfloat16"},
        {"train__validation": 0},
        {"train__network__width": 9},
        {"train__network__skip": 0},
        {"train__samples__fine": 5},
        {"prune__0__networks": "coarse"},
        {"prune__0__criteria": "random"},
        {"prune__0__ratios": [0.25, 0.51]},
        {"prune__0__schedules": "front-loaded"},
        {"prune__0__schedules": [0.1, 0.2, 0.3]},
        {"prune__0__calibration__views": "all"},
        {"prune__0__calibration__rays": 17},
        {"prune__0__calibration__seeds": 1},
        {"evaluate__max_rays": 10},
        {"evaluate__precision": "tf32"},
    ],
)
def test_the_hash_follows_all_that_decides_results(changes: dict[str, Any]) -> None:
    assert sweep(**changes).hash != sweep().hash


# --- what a sweep says ---------------------------------------------------------------------------


def test_lists_fan_out_once_for_each_distinct_value() -> None:
    made = sweep(
        train__iterations=[5, 6, 5], train__learning_rate=[1e-3, 2e-3], train__seeds=[1, 1]
    )
    assert len(made.recipes) == 4
    assert made.train_seeds == (1,)


def test_numbers_written_as_5e_minus_4_are_numbers() -> None:
    content = text(mapping()).replace("learning_rate: 0.002", "learning_rate: 5e-4")
    assert "5e-4" in content
    assert read_text(content, Path("x")).recipes[0].learning_rate == 5e-4


def test_a_relative_scene_is_found_in_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: tmp_path / name for name in ("cwd", "cwd/data", "env", "beside")}
    for folder in places.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(places["cwd"])
    monkeypatch.setenv("PRUNEFIELD_DATA", str(places["env"]))
    file = places["beside"] / "s.yaml"
    file.write_text(text(mapping(scene={"path": "photos"})))
    assert load(file).scene.path == Path("photos")  # nowhere: left as written
    for name in ("beside", "env", "cwd/data", "cwd"):  # from the last place to the first
        (places[name] / "photos").mkdir()
        assert load(file).scene.path == places[name] / "photos"
    absolute = mapping(scene={"path": str(tmp_path / "cwd")})
    assert read_text(text(absolute), file).scene.path == tmp_path / "cwd"


# --- fuzz --------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 10**40, 10**400, -(2**70)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["all", "auto", "both", "activation", "uniform", "demo", "~root", "0.5"]),
    st.dates(),
    st.binary(max_size=3),
)
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.none(), st.booleans(), st.floats())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
BASES: list[dict[str, Any]] = [
    copy.deepcopy(TINY),
    cluster(copy.deepcopy(TINY)),
    *(yaml.safe_load(path.read_text()) for path in SWEEPS),
]


def places_in(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested plain data."""
    items = list(data.items() if isinstance(data, dict) else enumerate(data))
    found = [(data, key) for key, _ in items]
    for _, value in items:
        if isinstance(value, dict | list):
            found += places_in(value)
    return found


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sampled_from(BASES),
    seed=st.integers(0, 2**32),
    changes=st.lists(st.tuples(st.sampled_from("rdki"), VALUES, KEYS), min_size=1, max_size=3),
)
def test_whatever_happens_to_a_sweep_it_is_a_sweep_or_a_list_of_mistakes(
    base: dict[str, Any], seed: int, changes: list[tuple[str, Any, Any]]
) -> None:
    data, draw = copy.deepcopy(base), random.Random(seed)
    for kind, value, name in changes:
        places = places_in(data)
        if not places:
            break
        container, key = draw.choice(places)
        if kind == "d":
            del container[key]
        elif kind == "k" and isinstance(container, dict):
            container[name] = container.pop(key)
        elif kind == "i" and isinstance(container, list):
            container.insert(key, value)
        else:
            container[key] = value
    read_or_refuse(yaml.safe_dump(data))


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sampled_from([text(TINY), *(path.read_text() for path in SWEEPS)]),
    cut=st.tuples(st.integers(0, 3000), st.integers(0, 40)),
    put=st.text(
        st.sampled_from("&*!<>{}[]:,-?|'\"%@`#\n\t ab1.~é\\x0") | st.characters(), max_size=8
    ),
)
def test_whatever_happens_to_the_text_it_is_a_sweep_or_a_list_of_mistakes(
    base: str, cut: tuple[int, int], put: str
) -> None:
    start = cut[0] % len(base)
    read_or_refuse(base[:start] + put + base[start + cut[1] :])


def read_or_refuse(content: str) -> None:
    made, refusal = None, None
    try:
        made = read_text(content, Path("x.yaml"))
    except SpecError as error:
        refusal = error
    if refusal is None:
        assert isinstance(made, Sweep)
        assert len(made.hash) == 16
    else:
        assert refusal.mistakes
        assert all(m.path and m.message for m in refusal.mistakes)
        assert not any(m.message.startswith("Input should") for m in refusal.mistakes)
        str(refusal).encode()  # printable anywhere
