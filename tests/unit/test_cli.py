"""The console command: what it prints, its exit statuses, and that it never shows a traceback."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import imageio_ffmpeg
import pytest
import torch
from safetensors.torch import load_file, save_file

from nerf.checkpoints import load_model, save_model
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.scenes import SceneSettings, load_scene
from orchestrator.cli import main
from orchestrator.cli.models import open_model
from orchestrator.cli.parser import build_parser
from orchestrator.scene_info import scene_info
from orchestrator.scheduler.cluster import AUTO_GPUS
from pruning import CRITERIA
from tests.unit.sweep_builder import HOLDOUT, mapping, text

COMMANDS = (
    "validate",
    "plan",
    "run",
    "report",
    "front",
    "evaluate",
    "prune",
    "render",
    "fetch",
    "ui",
    "pick",
    "compare",
    "view",
    "export",
    "schema",
    "submit",
    "status",
    "logs",
    "stop",
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; gives its status, output and complaints."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, complaints = capsys.readouterr()
        return status, out, complaints

    return command


def refused(result: tuple[int, str, str], *said: str, status: int = 1) -> None:
    """The command ended with one clear message and printed nothing else."""
    found, out, complaints = result
    assert (found, out) == (status, "")
    assert "Traceback" not in complaints
    message = complaints.strip().splitlines()[-1]
    assert message.startswith("prunefield")
    for words in said:
        assert words in complaints, complaints


# --- help ----------------------------------------------------------------------------------------


def subparsers() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    (choices,) = [a.choices for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(choices)


def test_these_are_the_commands() -> None:
    assert tuple(sorted(subparsers())) == tuple(sorted(COMMANDS))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    example = out.split("example:")[1].replace("\\\n", " ").split()
    assert example[:2] == ["prunefield", command]
    assert build_parser().parse_args(example[1:]).command


def test_without_a_command_and_with_an_unknown_one(run: Run) -> None:
    refused(run(), "COMMAND", status=2)
    refused(run("prun"), "prun", status=2)
    assert run("--version")[1].startswith("prunefield ")


def test_python_minus_m_is_the_same_command() -> None:
    source = Path("orchestrator/__main__.py").read_text()
    assert "from orchestrator.cli import main" in source


# --- README --------------------------------------------------------------------------------------

README = Path("README.md")
NO_COMMANDS = {"COMMAND"}  # stands for any command


def commands_in(document: str) -> set[str]:
    """Every COMMAND that follows ``prunefield`` in a code span, a code block or a table."""
    spans = re.findall(r"```.*?```|`[^`\n]+`", document, flags=re.DOTALL)
    spans = [re.sub(r"(?m)\s#.*$", "", span) for span in spans]  # comments are prose
    found = {c for span in spans for c in re.findall(r"\bprunefield ([A-Za-z][\w-]*)", span)}
    return found - NO_COMMANDS


def examples_in(document: str) -> list[list[str]]:
    """Command lines of code blocks, without prompts and comments."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```", document, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    cut = [re.sub(r"\s#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [
        line.replace(".venv/bin/", "").split()[1:]
        for line in cut
        if re.match(r"(\.venv/bin/)?prunefield [a-z]", line)
    ]


def test_the_readme_names_every_command_and_no_other() -> None:
    assert commands_in(README.read_text()) == set(subparsers())


def test_the_readmes_examples_parse() -> None:
    for example in examples_in(README.read_text()):
        try:
            build_parser().parse_args(example)
        except SystemExit:
            pytest.fail(f"README.md shows `prunefield {' '.join(example)}`, which does not parse")


# --- validate and plan ---------------------------------------------------------------------------


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        changes.setdefault("storage", str(tmp_path / "out"))
        path = tmp_path / "tiny.yaml"
        path.write_text(text(mapping(**changes)))
        return path

    return write


def test_validate_says_that_a_sweep_is_valid(run: Run, sweep_file: Callable[..., Path]) -> None:
    path = sweep_file()
    status, out, complaints = run("validate", path)
    assert (status, complaints) == (0, "")
    assert "valid" in out
    assert [p.name for p in path.parent.iterdir()] == ["tiny.yaml"]


def test_validate_lists_all_mistakes(run: Run, sweep_file: Callable[..., Path]) -> None:
    path = sweep_file(trian={}, prune__0__ratios=[1.0], prune__0__criteria="activaton")
    status, out, complaints = run("validate", path)
    assert (status, out) == (2, "")
    lines = complaints.splitlines()
    assert lines[0] == f"prunefield: {path}: 3 mistakes"
    assert all(line.startswith("  ") for line in lines[1:])
    assert "did you mean 'activation'?" in complaints


@pytest.mark.parametrize("command", ["validate", "plan", "run", "report", "front", "ui"])
def test_a_missing_sweep_file(run: Run, tmp_path: Path, command: str) -> None:
    refused_text = run(command, tmp_path / "none.yaml")
    assert refused_text[0] == 2
    assert "no such file" in refused_text[2]
    assert "Traceback" not in refused_text[2]


def test_plan_runs_and_writes_nothing(run: Run, sweep_file: Callable[..., Path]) -> None:
    path = sweep_file()
    status, out, _ = run("plan", path, "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["trainings"] == {"total": 1, "cached": 0}
    assert plan["calibrations"] == {"total": 1, "cached": 0}
    assert plan["trials"]["total"] == 6
    assert plan["trials"]["cached"] == 0
    status, out, _ = run("plan", path)
    assert status == 0
    assert "trainings" in out
    assert [p.name for p in path.parent.iterdir()] == ["tiny.yaml"]


def test_plan_says_what_each_worker_takes(run: Run, sweep_file: Callable[..., Path]) -> None:
    _, out, _ = run("plan", sweep_file(resources={"train": {"cpus": 1, "gpus": 2}}))
    assert "each training: 1 CPU, 2 GPUs\n" in out
    assert "each pruning: 1 CPU, a quarter of a GPU where there is one\n" in out
    assert AUTO_GPUS == {"train": 1.0, "prune": 0.25}


def test_a_scene_that_is_nowhere_is_told_with_the_places(
    run: Run, sweep_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEFIELD_DATA", "/my/data")
    path = sweep_file(scene={"path": "no/fern"})
    here = Path.cwd()
    places = f"no/fern in {here}, {here / 'data'}, /my/data, {path.parent}; set scene.path"
    refused(run("plan", path), places, "COLMAP")


def test_commands_that_are_shown_can_be_typed(
    run: Run, sweep_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = sweep_file().rename(tmp_path / "my sweep.yaml")
    refused(run("front", path), f"prunefield run '{path}'")


def test_plan_names_the_controls(run: Run, sweep_file: Callable[..., Path]) -> None:
    recover = {"iterations": 10, "control_iterations": 500}
    status, out, _ = run("plan", sweep_file(prune__0__recover=recover))
    assert status == 0
    assert re.search(r"trials +7 +0 done", out)
    assert re.search(r"dense_longer 500 +1 +0 done", out)


def test_plan_refuses_more_views_than_there_are(run: Run, sweep_file: Callable[..., Path]) -> None:
    status, _, complaints = run("plan", sweep_file(prune__0__calibration__views=99))
    assert status == 2
    assert "prune[0].calibration.views" in complaints


@pytest.mark.parametrize("command", ["front", "report", "ui"])
def test_a_sweep_without_results(run: Run, sweep_file: Callable[..., Path], command: str) -> None:
    path = sweep_file()
    refused(run(command, path), "run it first: prunefield run", str(path))
    assert [p.name for p in path.parent.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("command", ["plan", "run", "front", "report"])
def test_a_storage_folder_that_cannot_be(
    run: Run, sweep_file: Callable[..., Path], tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(run(command, sweep_file(storage=str(tmp_path / "file" / "out"))), "Not a directory")


def test_a_scene_that_is_missing(run: Run, sweep_file: Callable[..., Path]) -> None:
    refused(run("plan", sweep_file(scene={"path": "/no/where"})), "/no/where")


# --- evaluate ------------------------------------------------------------------------------------


def evaluate(run: Run, files: dict[str, Path], *more: object, model: str = "model") -> Any:
    status, out, complaints = run(
        "evaluate", files[model], "--scene", files["scene"], "--json", *more
    )
    assert (status, complaints) == (0, "")
    return json.loads(out)


def test_evaluate_measures_held_out_views(run: Run, files: dict[str, Path]) -> None:
    found = evaluate(run, files)
    assert [view["view"] for view in found["views"]] == [0, HOLDOUT]
    for name in ("mse", "psnr", "ssim"):
        mean = sum(view[name] for view in found["views"]) / 2
        assert found[name] == pytest.approx(mean)
    assert found["subset"] is False
    assert found["rays_per_view"] == 96 * 72


def test_evaluate_reads_nerf_pytorchs_checkpoints(run: Run, files: dict[str, Path]) -> None:
    options = ("--max-rays", 200, "--samples", 8, 8)
    ours = evaluate(run, files, *options)
    theirs = evaluate(run, files, *options, "--holdout", HOLDOUT, model="tar")
    assert theirs["psnr"] == ours["psnr"]


def test_a_subset_of_rays_is_seeded_and_says_so(run: Run, files: dict[str, Path]) -> None:
    first, second = (evaluate(run, files, "--max-rays", 50) for _ in range(2))
    assert first["psnr"] == second["psnr"]
    assert first["subset"] is True
    assert first["rays_per_view"] == 50
    assert first["ssim"] is None
    status, out, _ = run("evaluate", files["model"], "--scene", files["scene"], "--max-rays", 50)
    assert status == 0
    assert "subset of 50 rays a view" in out
    assert "mean" in out


def test_scene_options_override_the_checkpoint(run: Run, files: dict[str, Path]) -> None:
    found = evaluate(run, files, "--max-rays", 20, "--holdout", 10)
    assert [view["view"] for view in found["views"]] == [0, 10]
    assert evaluate(run, files, "--factor", 2)["rays_per_view"] == 48 * 36
    assert evaluate(run, files, "--max-rays", 20, "--no-ndc")["rays_per_view"] == 20


def test_pictures_too_small_for_ssim_have_none(run: Run, files: dict[str, Path]) -> None:
    found = evaluate(run, files, "--factor", 8)
    assert found["rays_per_view"] == 12 * 9
    assert found["ssim"] is None


def test_a_scene_is_read_as_the_sweep_read_it(files: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load_model(files["model"])
    scene = load_scene(SceneSettings(path=files["scene"], holdout=HOLDOUT))
    settings = SceneSettings(path=files["scene"], holdout=HOLDOUT, bd_factor=0.25)
    said = scene_info(settings, scene)
    assert said["bd_factor"] == 0.25
    assert "test_skip" not in said  # as always: nothing to say
    other = tmp_path / "other.safetensors"
    save_model(other, model, {"scene": said})
    command = ["render", str(other), "--scene", str(files["scene"]), "--view", "0", "-o", "x.png"]
    _, found, _ = open_model(build_parser().parse_args(command))
    assert found.fingerprint == load_scene(settings).fingerprint != scene.fingerprint


def test_a_checkpoint_that_speaks_nonsense_of_its_scene_is_still_measured(
    run: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    model, _ = load_model(files["model"])
    odd = tmp_path / "odd.safetensors"
    for said in (
        "text",
        {"holdout": "8", "factor": 0.5, "ndc": 3},
        {"holdout": True, "test_skip": "2"},
    ):
        save_model(odd, model, {"scene": said})
        found = evaluate(run, {**files, "odd": odd}, "--max-rays", 5, model="odd")
        assert [view["view"] for view in found["views"]] == [0, 8, 16]


# --- prune ---------------------------------------------------------------------------------------

CALIBRATION = ("--calibration-views", 2, "--calibration-rays", 16)


@pytest.mark.parametrize(
    ("criterion", "networks"),
    [
        ("magnitude", "coarse"),
        ("activation", "fine"),
        *((name, "both") for name, rule in CRITERIA.items() if not rule.gradients),
    ],
)
def test_prune_writes_a_physically_smaller_model(
    run: Run, files: dict[str, Path], tmp_path: Path, criterion: str, networks: str
) -> None:
    out_file = tmp_path / "deep" / "small.safetensors"
    status, out, complaints = run(
        *("prune", files["model"], "--scene", files["scene"], "--ratio", 0.5, "-o", out_file),
        *("--criterion", criterion, "--networks", networks, "--json", *CALIBRATION),
    )
    assert (status, complaints) == (0, "")
    found = json.loads(out)
    names = ["coarse", "fine"] if networks == "both" else [networks]
    assert list(found["networks"]) == names
    assert found["size_bytes"] == out_file.stat().st_size < files["model"].stat().st_size
    assert found["achieved_ratio"] == 0.5
    tensors = load_file(out_file)
    for name, row in found["networks"].items():
        own = [t.numel() for key, t in tensors.items() if key.startswith(f"{name}.")]
        assert row["params"] == sum(own) == found[f"params_{name}"]
        assert row["nonzero_bytes"] == found[f"nonzero_bytes_{name}"]
        assert row["widths"] == [4, 4, 4]
    model, info = load_model(out_file)
    assert info["scene"] == {"holdout": HOLDOUT, "ndc": True, "factor": None}
    assert model.samples == SampleCounts(8, 8)
    assert [p.name for p in out_file.parent.iterdir()] == [out_file.name]


@pytest.mark.parametrize("criterion", [n for n, rule in CRITERIA.items() if rule.gradients])
def test_prune_by_criteria_that_need_gradients(
    run: Run, files: dict[str, Path], tmp_path: Path, criterion: str
) -> None:
    out_file = tmp_path / "small.safetensors"
    status, _, _ = run(
        *("prune", files["model"], "--scene", files["scene"], "--ratio", 0.5, "-o", out_file),
        *("--criterion", criterion, *CALIBRATION),
    )
    assert status == 0
    model, info = load_model(out_file)
    assert info["pruning"]["criterion"] == criterion
    assert model.parameters() < load_model(files["model"])[0].parameters()


def test_prune_also_speaks_to_people(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    status, out, _ = run(
        *("prune", files["tar"], "--scene", files["scene"], "--ratio", 0.25, "-o", small),
        *("--criterion", "random", "--schedule", "front-loaded"),
    )
    assert status == 0
    assert "parameters kept" in out
    assert f"{small.stat().st_size:,} bytes" in out


# --- render --------------------------------------------------------------------------------------


def test_render_a_view(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "deep" / "view.png"
    status, out, _ = run(
        "render", files["model"], "--scene", files["scene"], "--view", 3, "-o", picture
    )
    assert (status, out.strip()) == (0, str(picture))
    assert iio.imread(picture).shape == (72, 96, 3)
    assert [p.name for p in picture.parent.iterdir()] == ["view.png"]


def test_render_the_spiral(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    video = tmp_path / "spiral.mp4"
    status, out, _ = run(
        *("render", files["model"], "--scene", files["scene"], "--spiral", "--frames", 2),
        *("-o", video),
    )
    assert (status, out.strip()) == (0, str(video))
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
    assert frames == 2
    assert [p.name for p in tmp_path.iterdir()] == ["spiral.mp4"]


# --- bad input -----------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("malicious-code-ran",))


@pytest.fixture
def bad_checkpoint(files: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(what: str) -> Path:
        folder = tmp_path / "given"
        folder.mkdir()
        suffix = ".tar" if "tar" in what else ".safetensors"
        path = folder / f"bad{suffix}"
        if what == "folder":
            path.mkdir()
        elif what == "malicious tar":
            with path.open("wb") as stream:
                pickle.dump({"network_fn_state_dict": Malicious()}, stream)
        elif what == "malicious torch tar":
            torch.save({"network_fn_state_dict": {"x": Malicious()}}, path)
        elif what == "another tar":
            torch.save({"weights": torch.zeros(3)}, path)
        elif what == "another file":
            save_file({"x": torch.zeros(3)}, path)
        elif what.startswith("truncated"):
            whole = files["tar" if "tar" in what else "model"].read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        elif what == "flipped":
            whole = bytearray(files["model"].read_bytes())
            whole[-3] ^= 1
            path.write_bytes(whole)
        elif what == "empty":
            path.write_bytes(b"")
        return path

    return make


@pytest.mark.parametrize(
    "what",
    [
        "missing",
        "missing tar",
        "folder",
        "empty",
        "truncated",
        "truncated tar",
        "flipped",
        "malicious tar",
        "malicious torch tar",
        "another tar",
        "another file",
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "prune", "render"])
def test_a_bad_checkpoint_is_refused(
    run: Run,
    files: dict[str, Path],
    tmp_path: Path,
    bad_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    what: str,
) -> None:
    path = bad_checkpoint(what)
    monkeypatch.chdir(tmp_path)
    more = {
        "evaluate": (),
        "prune": ("--ratio", 0.5, "-o", tmp_path / "out"),
        "render": ("--view", 0, "-o", tmp_path / "out"),
    }
    refused(run(command, path, "--scene", files["scene"], *more[command]), str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["given"]  # nothing written, nothing run


EVALUATE = ("evaluate", "MODEL", "--scene", "SCENE")
PRUNE = ("prune", "MODEL", "--scene", "SCENE", "-o", "OUT", "--ratio")
RENDER = ("render", "MODEL", "--scene", "SCENE", "-o", "OUT")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("evaluate", "MODEL"), 2, "--scene"),
        (("evaluate", "MODEL", "--scene", "/no/where"), 1, "/no/where"),
        (("evaluate", "MODEL", "--scene", "MODEL"), 1, "is a file"),
        (("evaluate", "MODEL", "--scene", "EMPTY"), 1, "holds no scene"),
        ((*EVALUATE, "--max-rays", "0"), 2, "--max-rays"),
        ((*EVALUATE, "--max-rays", "many"), 2, "whole number from 1"),
        ((*EVALUATE, "--holdout", "1"), 2, "whole number from 2"),
        ((*EVALUATE, "--holdout", "x"), 2, "--holdout"),
        ((*EVALUATE, "--factor", "0"), 2, "--factor"),
        ((*EVALUATE, "--samples", "1", "8"), 1, "--samples 1 8"),
        ((*EVALUATE, "--samples", "8"), 2, "--samples"),
        ((*EVALUATE, "--precision", "float8"), 2, "bfloat16"),
        ((*EVALUATE, "--device", "tpu"), 1, "allowed are auto, cpu, cuda"),
        pytest.param((*EVALUATE, "--device", "cuda"), 1, "no CUDA GPU", marks=needs_no_gpu),
        pytest.param((*PRUNE, "0.5", "--device", "cuda:1"), 1, "no CUDA GPU", marks=needs_no_gpu),
        ((*PRUNE, "1.0"), 2, "from 0 up to, but not, 1"),
        ((*PRUNE, "-0.1"), 2, "--ratio"),
        ((*PRUNE, "nan"), 2, "--ratio"),
        ((*PRUNE, "half"), 2, "--ratio"),
        (PRUNE[:-1], 2, "--ratio"),
        ((*PRUNE, "0.5", "--criterion", "activaton"), 1, "did you mean 'activation'?"),
        ((*PRUNE, "0.5", "--schedule", "front"), 1, "front-loaded"),
        ((*PRUNE, "0.5", "--networks", "corse"), 2, "coarse"),
        ((*PRUNE, "0.5", "--seed", "-1"), 2, "whole number from 0"),
        ((*PRUNE, "0.5", "--seed", "9" * 30), 2, "--seed"),
        ((*PRUNE, "0.5", "--calibration-views", "99"), 1, "18 training views"),
        ((*PRUNE, "0.5", "--calibration-rays", "0"), 2, "--calibration-rays"),
        (RENDER, 2, "--view"),
        ((*RENDER, "--view", "0", "--spiral"), 2, "not allowed with"),
        (("render", *RENDER[1:4], "--view", "0", "-o", "x.mp4"), 1, "is a .png file"),
        (("render", *RENDER[1:4], "--spiral", "-o", "x.png"), 1, "is a .mp4 file"),
        (("prune", *PRUNE[1:4], "--ratio", "0.5", "-o", "x.tar"), 1, "is a .safetensors file"),
        (("pick", "x.yaml", "--min-psnr", "nan"), 2, "'nan' is not a number"),
        ((*RENDER, "--view", "20"), 1, "views 0 to 19"),
        ((*RENDER, "--view", "-1"), 1, "views 0 to 19"),
        ((*RENDER, "--spiral", "--frames", "0"), 2, "--frames"),
        ((*RENDER, "--spiral", "--fps", "0"), 2, "--fps"),
        (("render", *RENDER[1:4], "--view", "0"), 2, "-o"),
        (("fetch", "ferm"), 1, "fern"),
    ],
)
def test_bad_options_are_refused(
    run: Run,
    files: dict[str, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "MODEL": files["model"],
        "SCENE": files["scene"],
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty",
    }
    refused(run(*(places.get(a, a) for a in arguments)), said, status=status)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("where", ["below a file", "a folder", "/proc"])
@pytest.mark.parametrize("command", ["prune", "view", "spiral"])
def test_an_output_that_cannot_be_written(
    run: Run, files: dict[str, Path], tmp_path: Path, command: str, where: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    out_file = {
        "below a file": tmp_path / "file" / "out",
        "a folder": tmp_path / "folder",
        "/proc": Path("/proc/prunefield/out"),
    }[where]
    arguments = {
        "prune": ("prune", files["model"], "--ratio", 0.5, "--criterion", "magnitude"),
        "view": ("render", files["model"], "--view", 0),
        "spiral": ("render", files["model"], "--spiral", "--frames", 1),
    }[command]
    result = run(*arguments, "--scene", files["scene"], "-o", out_file)
    refused(result, f"cannot write {out_file}")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_what_was_there_stays_when_writing_fails(
    run: Run, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "before"  # without an ending, as both commands may write it
    small.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for arguments in (
        ("prune", files["model"], "--ratio", 0.5, "--criterion", "magnitude"),
        ("render", files["model"], "--view", 0),
    ):
        refused(
            run(*arguments, "--scene", files["scene"], "-o", small), "No space left", str(small)
        )
    assert small.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == [small.name]


def test_an_interruption_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.cli.sweeps.load", interrupted)
    refused(run("validate", "x.yaml"), "interrupted", status=130)


class Interrupted:
    """Ctrl-C while the parser, and PyTorch with it, is imported."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "orchestrator.cli.parser":
            raise KeyboardInterrupt


def test_nor_is_one_while_the_program_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "orchestrator.cli.parser")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    refused(run("validate", "x.yaml"), "interrupted", status=130)


def test_what_takes_seconds_to_import_is_imported_where_ctrl_c_is_awaited() -> None:
    slow = "import orchestrator.cli, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", slow], check=True)


def test_networks_of_different_depths_are_pruned_one_at_a_time(
    run: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    uneven = NerfModel(
        NerfModel.create(FieldShape((8, 8), None, 8, 4, 3, 1), SampleCounts(), 0).coarse,
        load_model(files["model"])[0].fine,
        SampleCounts(8, 8),
    )
    path = tmp_path / "uneven.safetensors"
    save_model(path, uneven, {})
    for networks in ("coarse", "fine"):
        status, out, complaints = run(
            *("prune", path, "--scene", files["scene"], "--ratio", 0.5, "--networks", networks),
            *("--criterion", "magnitude", "-o", tmp_path / "small.safetensors", "--json"),
        )
        assert (status, complaints) == (0, "")
        assert list(json.loads(out)["networks"]) == [networks]
    both = run("prune", path, "--scene", files["scene"], "--ratio", 0.5, "-o", tmp_path / "x")
    refused(both, "[2, 3] hidden layers", "--networks coarse")
