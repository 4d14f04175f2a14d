"""What the how-to and the README show is run here, or at least parsed, as it stands."""

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nerf.field import Field, FieldShape
from nerf.scenes import SCENE_FORMATS
from orchestrator.bridge import network_of
from orchestrator.cli import main
from orchestrator.cli.parser import build_parser
from orchestrator.spec import read_text
from orchestrator.sweep import results_of
from orchestrator.tracking import SweepInfo, TrackingLogger
from pruning import ALLOCATIONS, CRITERIA
from tests.unit.sweep_builder import TINY
from tests.unit.test_cli import COMMANDS

ROOT = Path(__file__).parents[2]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


def test_the_how_to_runs_from_the_first_block_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry in (CRITERIA, ALLOCATIONS, SCENE_FORMATS):
        for name in list(registry):
            monkeypatch.setitem(registry, name, registry[name])  # type: ignore[index]
    folder = tmp_path / "scene"
    folder.mkdir()
    (folder / "poses.json").write_text(json.dumps(np.eye(4)[None, :3].repeat(3, 0).tolist()))
    for view in range(3):
        Image.effect_noise((12, 8), 40).convert("RGB").save(folder / f"{view}.png")
    shape = FieldShape((8, 8, 8), None, 8, 4, point_octaves=2, direction_octaves=1)
    names: dict[str, Any] = {"network": network_of(Field(shape)), "folder": folder}
    pieces = blocks(ROOT / "docs" / "howto.md", "python")
    assert len(pieces) == 5
    try:
        for piece in pieces:
            exec(compile(piece, "docs/howto.md", "exec"), names)
    finally:
        CRITERIA.pop("spread", None)
        ALLOCATIONS.pop("spare-the-first", None)
        SCENE_FORMATS.pop("poses", None)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/clusters.md"])
def test_every_command_shown_is_one_that_there_is(page: str) -> None:
    shown = [
        line.split("#")[0]
        for block in blocks(ROOT / page, "sh")
        for line in block.splitlines()
        if line.startswith("prunefield ")
    ]
    assert len(shown) >= 4
    for line in shown:
        assert build_parser().parse_args(shlex.split(line)[1:]).command


ELSEWHERE = {
    "run": "e2e/test_tutorial.py",
    "ui": "e2e/test_tutorial.py",
    "submit": "e2e/test_submitting.py",
    "logs": "e2e/test_submitting.py",
    "stop": "e2e/test_submitting.py",
    "view": "e2e/test_tutorial.py",
    "fetch": "unit/test_download.py",
}
"""Commands of the README's table that another test runs, with what they need."""


def table_of_commands() -> list[str]:
    """Each command of the README's table: without its options, and with each of them."""
    rows = re.findall(r"^\| (`prunefield .*?) \|", (ROOT / "README.md").read_text(), re.M)
    found = []
    for text in (t for row in rows for t in re.findall(r"`(prunefield [^`]*)`", row)):
        plain = re.sub(r"\[([^]]*)\]", "", text)
        found.append(plain)
        for group in re.findall(r"\[([^]]*)\]", text):
            found += [f"{plain} {option}" for option in group.split(" / ")]
    return found


def test_every_command_of_the_table_runs(
    write_results: Callable[..., Path],
    files: dict[str, Path],
    fresh_database: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [write_results(name) for name in ("a", "b")]
    results, store = results_of(paths[0])
    (store.root / "mlflow.db").write_bytes(fresh_database)
    for record in results.trials:
        shutil.copyfile(files["model"], store.file("trial", record.key, "model.safetensors"))
    sweep = results.plan.sweep
    info = SweepInfo(sweep.name, sweep.hash, "", None, "none", 0, "2026-01-02T03:04:05")
    with TrackingLogger(
        None, sweep.tracking.experiment, info, store, system_metrics=False
    ) as tracking:
        for record in results.trials:
            tracking.record(record)
    stands_for = {
        "FILE": paths[0],
        "SWEEP": paths[0],
        "A": paths[0],
        "B": paths[1],
        "CHECKPOINT": files["model"],
        "N": 8,
        "300kB": "4MB",  # what the synthetic trials have
    }
    run = set()
    for line in table_of_commands():
        words = shlex.split(line)[1:]
        if words[0] in ELSEWHERE:
            test = (ROOT / "tests" / ELSEWHERE[words[0]]).read_text()
            tutorial = (ROOT / "docs" / "tutorial.md").read_text()  # whose commands are run
            assert f'"{words[0]}"' in test or f"\nprunefield {words[0]} " in tutorial
            continue
        given = []
        for before, word in itertools.pairwise(["", *words]):
            if before == "-o":
                kind = ".png" if words[0] == "render" else ".safetensors"
                name = {"DIR": "made", "OUT": f"{len(run)}{kind}"}.get(word, word)
                given.append(tmp_path / name)
            elif before == "--scene":
                given.append(files["scene"])
            else:
                given.append(stands_for.get(word, word))
        assert main([str(word) for word in given]) == 0, line
        assert capsys.readouterr().out, line
        run.add(line)
    assert {line.split()[1] for line in run} | set(ELSEWHERE) == set(COMMANDS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_command_of_ray_shown_is_one_that_ray_takes() -> None:
    from ray.scripts.scripts import cli

    pages = [ROOT / "docs" / "clusters.md", *(ROOT / "infra").rglob("*.yaml")]
    pages += (ROOT / "sweeps").glob("*.yaml")
    text = "\n".join(page.read_text() for page in pages)
    shown = set(re.findall(r"^(?:#  +)?(ray (?:up|submit|down|job submit) [^#\n]*)", text, re.M))
    assert len(shown) >= 5
    for line in shown:
        _, name, *arguments = shlex.split(line)
        command = cli.commands[name]
        if name == "job":
            command, arguments = command.commands[arguments[0]], arguments[1:]
        taken = command.make_context(name, arguments, resilient_parsing=False).params
        for file in (taken.get("cluster_config_file"), taken.get("script")):
            assert file is None or (ROOT / file).is_file(), line


def test_every_sweep_shown_is_valid(tmp_path: Path) -> None:
    for page in ("README.md", "docs/tutorial.md"):
        for text in blocks(ROOT / page, "yaml"):
            whole = "name:" in text
            parts = "" if whole else "name: shown\nscene: {format: demo}\n"
            read_text(parts + text, tmp_path / "shown.yaml")
    assert TINY
