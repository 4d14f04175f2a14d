"""Read a sweep file, whichever of its two forms it has."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nerf.errors import SceneError
from nerf.field import FieldShape, SampleCounts
from nerf.scenes import SceneSettings
from nerf.training import Recipe
from orchestrator.errors import Mistake, SpecError
from orchestrator.provenance import bundle_info, code_folder
from orchestrator.spec.cluster import CLUSTER_KEYS, cluster_mistakes, is_cluster_file
from orchestrator.spec.combinations import combinations
from orchestrator.spec.mistakes import mistakes_of, path_of, shown
from orchestrator.spec.recover import RecoverAxes
from orchestrator.spec.schema import (
    MAX_LAYERS,
    PruneSection,
    RecoverSection,
    StageSection,
    SweepFile,
    listed_schedules,
)
from orchestrator.spec.search import search_identity, search_mistakes, search_settings
from orchestrator.spec.sweep import (
    LATER_OF_TRAINING,
    CalibrationAxes,
    Limits,
    Protocol,
    PruneGrid,
    ReportSettings,
    Resources,
    StageResources,
    Sweep,
    TrackingSettings,
)

# Limits far above any sweep, so that a file that is none of ours is refused at once.
MAX_FILE_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 40
MAX_TRIALS = 1_000_000


def load(path: Path | str) -> Sweep:
    """Read and validate a sweep file.

    Args:
        path: a sweep, or a Ray cluster file that holds one under ``metadata.sweep``.

    Raises:
        SpecError: the file cannot be read or holds mistakes; all of them are listed.
    """
    source = Path(path)
    return read_text(_read(source), source)


def read_text(text: str, source: Path) -> Sweep:
    """Validate the text of a sweep file; `source` is its name in messages.

    Raises:
        SpecError: the text holds mistakes; all of them are listed.
    """
    whole = _parse(text, source)
    data, prefix = _sweep_part(whole, source)
    mistakes: list[Mistake] = []
    parsed = None
    try:
        parsed = SweepFile.model_validate(data)
    except ValidationError as error:
        mistakes = mistakes_of(error, SweepFile, data, prefix)
    mistakes += _across(data, prefix)
    if prefix:
        mistakes += cluster_mistakes(whole)
    if parsed is not None:
        mistakes += _size(parsed, prefix)
        mistakes += _search(parsed, prefix)
    if parsed is None or mistakes:
        raise SpecError(str(source), mistakes)
    return _build(parsed, text, source)


def place_of(sweep: Sweep, *location: int | str) -> str:
    """Where something stands in a sweep's file, as messages write it.

    Args:
        sweep: the sweep.
        location: keys and list positions, e.g. ``"prune", 0, "ratios", 2``; lists that the file
            does not write show no position.
    """
    data, prefix = _sweep_part(_parse(sweep.text, sweep.source), sweep.source)
    return path_of(location, data, prefix)


def cluster_part(sweep: Sweep) -> dict[str, Any] | None:
    """The Ray cluster file that a sweep's file is too, whole; None if it says nothing of Ray."""
    whole = _parse(sweep.text, sweep.source)
    return whole if is_cluster_file(whole) else None


def load_cluster(path: Path | str) -> dict[str, Any]:
    """Read a Ray cluster file, with a sweep in it or without.

    Raises:
        SpecError: it cannot be read, is none, or holds what a shell would read otherwise.
    """
    source = Path(path)
    whole = _parse(_read(source), source)
    if not isinstance(whole, dict) or not is_cluster_file(whole):
        keys = ", ".join(sorted(CLUSTER_KEYS))
        raise SpecError(
            str(source), [Mistake("(top)", None, f"not a Ray cluster file: it has none of {keys}")]
        )
    if mistakes := cluster_mistakes(whole):
        raise SpecError(str(source), mistakes)
    return whole


def given_scene_path(sweep: Sweep) -> Path | None:
    """The path of the scene as the file gives it, only `~` expanded; None if it gives none."""
    data, _ = _sweep_part(_parse(sweep.text, sweep.source), sweep.source)
    path = data["scene"].get("path")
    return None if path is None else Path(path).expanduser()


def check_scene_folder(sweep: Sweep) -> None:
    """Raise if a relative path of the scene leads nowhere, with all places where it might have.

    Raises:
        SceneError: it does.
    """
    given, path = given_scene_path(sweep), sweep.scene.path
    made = sweep.scene.format == "demo"  # where it is missing
    if made or given is None or given.is_absolute() or (path is not None and path.exists()):
        return
    places = ", ".join(dict.fromkeys(map(str, _scene_places(sweep.source))))
    raise SceneError(
        f"there is no scene folder {given} in {places}; set scene.path to the folder of an LLFF, "
        "COLMAP or Blender scene (`prunefield fetch fern` downloads one to data/)"
    )


def relocated(sweep: Sweep, root: Path) -> Sweep:
    """The sweep with its scene where this machine has it: a worker may keep it elsewhere.

    Args:
        sweep: the sweep.
        root: this machine's folder of the storage, which holds the scenes that prunefield makes.
    """
    path, given = sweep.scene.path, given_scene_path(sweep)
    if given is None:
        path = root / "scenes" / "demo"
    elif path is None or not path.is_dir():
        path = _find_scene(str(given), sweep.source)
    return replace(sweep, scene=replace(sweep.scene, path=path))


def _read(source: Path) -> str:
    try:
        with source.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) <= MAX_FILE_BYTES:
            return content.decode("utf-8")
        message = f"larger than {MAX_FILE_BYTES // 1_000_000} MB: not a sweep file"
    except FileNotFoundError:
        message = f"no such file (working directory: {Path.cwd()})"
    except UnicodeDecodeError:
        message = "not a text file in UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise SpecError(str(source), [Mistake("(file)", None, message)])


class _Loader(yaml.SafeLoader):
    """Plain YAML only (no tags that build objects), of a sane size; no key given twice.

    Aliases are counted as what they stand for: a few lines of them can stand for billions of
    values.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        before = self._nodes
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"nested more than {MAX_DEPTH} deep: not a sweep file", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        elif id(node) in self._sizes:
            self._nodes += self._sizes[id(node)]
        else:
            raise _refusal("an alias inside of what it stands for", mark)
        if self._nodes > MAX_NODES:
            raise _refusal(f"more than {MAX_NODES:,} values: not a sweep file", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _refusal(f"key {key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, problem, mark)


def _parse(text: str, source: Path) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # the loader is derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "(file)"
        problem = ", ".join(filter(None, (error.context, error.problem))) or "not YAML"
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        place, problem = "(file)", f"not YAML: {' '.join(str(error).split())}"
    raise SpecError(str(source), [Mistake(place, None, problem)])


def _sweep_part(data: Any, source: Path) -> tuple[dict[str, Any], str]:
    if not isinstance(data, dict):
        message = "a sweep file is a mapping with at least name, scene and prune"
        raise SpecError(str(source), [Mistake("(top)", None, message)])
    if not {*CLUSTER_KEYS, "metadata"} & set(data):
        return data, ""
    metadata = data.get("metadata")
    sweep = metadata.get("sweep") if isinstance(metadata, dict) else None
    if not isinstance(sweep, dict):
        message = (
            "this is a Ray cluster file; its sweep belongs here as a mapping with at least "
            "name, scene and prune"
        )
        raise SpecError(str(source), [Mistake("metadata.sweep", sweep, message)])
    return sweep, "metadata.sweep"


def _across(data: dict[str, Any], prefix: str) -> list[Mistake]:
    """Mistakes that lie between keys; silent about parts that are already wrong by themselves."""

    def at(path: str) -> str:
        return f"{prefix}.{path}" if prefix else path

    def section(parent: Any, key: str) -> dict[str, Any]:
        child = parent.get(key) if isinstance(parent, dict) else None
        return child if isinstance(child, dict) else {}

    found = []
    scene = data.get("scene")
    if (
        isinstance(scene, dict)
        and scene.get("format", "auto") in ("auto", "llff", "colmap", "blender")
        and scene.get("path") in (None, "")
    ):
        found.append(
            Mistake(at("scene.path"), None, "this key is required (only `format: demo` needs none)")
        )
    if not {"prune", "search"} & set(data):
        found.append(Mistake(at("prune"), None, "this key is required (or `search`)"))
    network = section(section(data, "train"), "network")
    depth, skip = network.get("depth", 8), network.get("skip", 4)
    if type(depth) is not int or not 1 <= depth <= MAX_LAYERS:
        return found
    if type(skip) is int and skip >= depth - 1:
        allowed = f"0 to {depth - 2}, or null for none" if depth > 1 else "null, for none"
        message = f"must name a hidden layer before the last of {depth}: {allowed}"
        found.append(Mistake(at("train.network.skip"), skip, message))
    grids = data.get("prune")
    for number, grid in enumerate(grids if isinstance(grids, list) else [grids]):
        if isinstance(grid, dict):
            where = at(f"prune[{number}]" if isinstance(grids, list) else "prune")
            found += _of_grid(grid, where, depth)
    return found


def _of_grid(grid: dict[str, Any], where: str, depth: int) -> Iterator[Mistake]:
    """Mistakes of a grid for networks of so many hidden layers."""
    given = grid.get("schedules")
    schedules = listed_schedules(given)
    for place, schedule in enumerate(schedules if isinstance(schedules, list) else []):
        if isinstance(schedule, list) and schedule and len(schedule) != depth:
            here = f"{where}.schedules" + (f"[{place}]" if schedules is given else "")
            message = f"{len(schedule)} ratios for {depth} hidden layers; give one ratio a layer"
            yield Mistake(here, shown(schedule), message)
    for key, why in combinations(grid):
        yield Mistake(f"{where}.{key}", None, why)


def _search(parsed: SweepFile, prefix: str) -> list[Mistake]:
    """Mistakes of the search; its layers are those of the network."""
    if parsed.search is None:
        return []
    where = f"{prefix}.search" if prefix else "search"
    found = search_mistakes(parsed.search, parsed.train.network.depth, parsed.train.validation)
    return [replace(m, path=where if m.path == "(section)" else f"{where}.{m.path}") for m in found]


def _size(parsed: SweepFile, prefix: str) -> list[Mistake]:
    """A mistake if the lists fan out to more trials than anyone can mean."""
    train = parsed.train
    trainings = _product(train.iterations, train.rays, train.learning_rate, train.seeds)
    prunings = sum(
        _product(grid.networks, grid.criteria, grid.compensation, grid.bits, grid.errors)
        * max(
            _product(grid.ratios, grid.schedules),
            _product(grid.sizes, grid.allocations, grid.coarse_weight),
            len(grid.masks),
        )
        * _product(
            grid.calibration.views,
            grid.calibration.rays,
            grid.calibration.seeds,
            grid.calibration.weighting,
        )
        * _product(
            grid.recover.iterations,
            grid.recover.from_,
            grid.recover.learning_rate,
            grid.recover.rays,
            grid.recover.rounding_from,
            grid.recover.steps,
            grid.recover.squeeze,
            grid.recover.density_noise or [None],
            grid.recover.optimizer,
        )
        for grid in parsed.prune
    )
    controls = sum(_controls(grid) for grid in parsed.prune)
    if trainings * (prunings + controls) <= MAX_TRIALS:
        return []
    message = (
        f"the lists fan out to {trainings:,} trainings × {prunings:,} prunings"
        f"{f' and {controls:,} controls' if controls else ''}; "
        f"at most {MAX_TRIALS:,} trials fit one sweep: shorten them or split the sweep"
    )
    return [Mistake(prefix or "(top)", None, message)]


def _controls(grid: PruneSection) -> int:
    """How many controls are trained beside the recoveries of a grid, at most."""
    recover = grid.recover
    if not any(recover.iterations):
        return 0
    of_each = _product(grid.sizes, grid.networks, grid.bits)
    return sum(of_each if name == "narrow" else 1 for name in recover.controls) * _product(
        recover.control_iterations or recover.iterations,
        recover.control_learning_rate or recover.learning_rate,
        recover.rays,
        recover.rounding_from,
        recover.density_noise or [None],
        recover.optimizer,
    )


def _product(*axes: Sequence[Any]) -> int:
    return math.prod(len(axis) for axis in axes)


def _build(parsed: SweepFile, text: str, source: Path) -> Sweep:
    train, network = parsed.train, parsed.train.network
    recipes = tuple(
        Recipe(
            iterations=iterations,
            rays=rays,
            learning_rate=rate,
            decay=train.decay,
            decay_iterations=train.decay_iterations,
            density_noise=train.density_noise,
            precision=train.precision,
            validation=train.validation,
            optimizer=train.optimizer,
            anneal=train.anneal,
        )
        for iterations, rays, rate in itertools.product(
            dict.fromkeys(train.iterations),
            dict.fromkeys(train.rays),
            dict.fromkeys(train.learning_rate),
        )
    )
    identity = _without_later_defaults(
        parsed.model_dump(include={"name", "scene", "train", "prune", "evaluate"})
    )
    if parsed.search is not None:
        identity["search"] = search_identity(parsed.search)
    resources = parsed.resources
    return Sweep(
        name=parsed.name,
        description=parsed.description,
        source=source,
        text=text,
        scene=SceneSettings(
            **{
                **parsed.scene.model_dump(exclude={"path"}),
                "path": _find_scene(parsed.scene.path, source),
            }
        ),
        shape=FieldShape(
            trunk=(network.width,) * network.depth,
            skip=network.skip,
            feature=network.width,
            view=network.view or max(1, network.width // 2),
            point_octaves=network.point_octaves,
            direction_octaves=network.direction_octaves,
        ),
        samples=SampleCounts(train.samples.coarse, train.samples.fine),
        recipes=recipes,
        train_seeds=tuple(dict.fromkeys(train.seeds)),
        grids=tuple(_grid(section) for section in parsed.prune),
        protocol=Protocol(**parsed.evaluate.model_dump()),
        resources=Resources(
            train=_stage(resources.train, Resources().train),
            prune=_stage(resources.prune, Resources().prune),
            backend=resources.backend,
            retries=resources.retries,
            checkpoint_seconds=resources.checkpoint_seconds,
        ),
        limits=Limits(**parsed.limits.model_dump()),
        tracking=TrackingSettings(**parsed.tracking.model_dump()),
        storage=parsed.storage,
        report=ReportSettings(
            ratios=None if parsed.report.ratios is None else tuple(parsed.report.ratios),
            reference_psnr=parsed.report.reference_psnr,
        ),
        identity=identity,
        search=None if parsed.search is None else search_settings(parsed.search, network.depth),
    )


# Settings that came later: a file that does not use them keeps its hash.
_LATER: dict[str, Any] = {
    "compensation": ["none"],
    "sizes": [],
    "allocations": ["chain"],
    "coarse_weight": [0.001],
    "bits": ["fp32"],
    "masks": [],
    "errors": ["layer"],
    "recover": RecoverSection().model_dump(),
}


def _without_later_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    train = identity["train"]
    for name, default in LATER_OF_TRAINING.items():
        if train[name] == default:
            del train[name]
    for grid in identity["prune"]:
        for name, default in _LATER.items():
            if grid[name] == default:
                del grid[name]
        for name in ("control_iterations", "control_learning_rate"):
            if not grid.get("recover", {}).get(name, True):
                del grid["recover"][name]
        if grid["calibration"]["weighting"] == ["uniform"]:
            del grid["calibration"]["weighting"]
    return identity


def _grid(section: PruneSection) -> PruneGrid:
    calibration, recover = section.calibration, section.recover
    return PruneGrid(
        networks=tuple(section.networks),
        criteria=tuple(section.criteria),
        ratios=tuple(section.ratios),
        schedules=tuple(section.schedules),
        calibration=CalibrationAxes(
            views=tuple(calibration.views),
            rays=tuple(calibration.rays),
            seeds=tuple(calibration.seeds),
            weightings=tuple(calibration.weighting),
        ),
        compensations=tuple(section.compensation),
        sizes=tuple(section.sizes),
        allocations=tuple(section.allocations),
        coarse_weights=tuple(section.coarse_weight),
        bits=tuple(section.bits),
        masks=tuple(section.masks),
        errors=tuple(section.errors),
        recover=RecoverAxes(
            iterations=tuple(dict.fromkeys(recover.iterations)),
            sources=tuple(dict.fromkeys(recover.from_)),
            learning_rates=tuple(dict.fromkeys(recover.learning_rate)),
            rays=tuple(dict.fromkeys(recover.rays)),
            rounding_from=tuple(dict.fromkeys(recover.rounding_from)),
            steps=tuple(dict.fromkeys(recover.steps)),
            squeezes=tuple(dict.fromkeys(recover.squeeze)),
            density_noises=tuple(dict.fromkeys(recover.density_noise)) or (None,),
            optimizers=tuple(dict.fromkeys(recover.optimizer)),
            controls=tuple(dict.fromkeys(recover.controls)),
            control_iterations=tuple(dict.fromkeys(recover.control_iterations)) or (None,),
            control_learning_rates=tuple(dict.fromkeys(recover.control_learning_rate)) or (None,),
        ),
    )


def _stage(section: StageSection, default: StageResources) -> StageResources:
    cpus = default.cpus if section.cpus is None else section.cpus
    return StageResources(cpus=cpus, gpus=section.gpus)


def _find_scene(path: str | None, source: Path) -> Path | None:
    """The scene folder: the first place that has it, else the plain path (its loader complains)."""
    if path is None:
        return None
    given = Path(path).expanduser()
    if given.is_absolute():
        return given
    found = (place / given for place in _scene_places(source) if (place / given).is_dir())
    return next(found, given)


def _scene_places(source: Path) -> list[Path]:
    """Where a relative scene path is looked for, in this order."""
    places = [Path.cwd(), Path.cwd() / "data", source.resolve().parent]
    if os.environ.get("PRUNEFIELD_DATA"):
        places.insert(2, Path(os.environ["PRUNEFIELD_DATA"]))
    if bundle_info() is not None:  # this code was shipped with the scene
        places.insert(0, code_folder() / "data")
    return places
