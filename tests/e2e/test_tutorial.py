"""The tutorial, from photos that COLMAP placed to a shipped model, with fewer iterations."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.unit.test_docs import ROOT, blocks
from tests.unit.test_scenes_colmap import write

pytestmark = pytest.mark.e2e

# What makes the tutorial's sweep small enough for a test; everything else is run as it stands.
SMALLER = {
    "factor: 8": "factor: 1",
    "preset: fast, precision: bfloat16": "preset: fast, iterations: 8, rays: 32, "
    "network: {depth: 3, width: 16, skip: 1, point_octaves: 3}, samples: {coarse: 8, fine: 8}",
    "[1.2MB, 500kB, 250kB]": "[9kB]",
    "[250kB, 100kB]": "[4kB]",
    "28_000, rays: 2048": "6, rays: 32",
}


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    write(tmp_path / "my-scene", binary=True)
    (text,) = blocks(ROOT / "docs" / "tutorial.md", "yaml")
    for ours, smaller in SMALLER.items():
        assert ours in text
        text = text.replace(ours, smaller)
    (tmp_path / "my-scene.yaml").write_text(text)
    commands = [b for b in blocks(ROOT / "docs" / "tutorial.md", "sh") if "not run" not in b]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env={**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Ship " in done.stdout
    assert "models:/prunefield@my-scene" in done.stdout
    assert (tmp_path / "small.safetensors").stat().st_size <= 10**6
    assert (tmp_path / "view.png").is_file()
    assert (tmp_path / "small.onnx").is_file()
    dense = [str(p) for p in tmp_path.glob("prunefield-out/checkpoints/*/model.safetensors")]
    assert len(dense) == 1
    for served in (
        ["ui", "my-scene.yaml"],
        ["view", *dense, "small.safetensors", "--scene", "my-scene", "--port", "8099"],
    ):
        answers(served, tmp_path, {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT)})


def answers(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """A command that serves a page until Ctrl-C: the page is there, and Ctrl-C ends it."""
    with subprocess.Popen(
        ["prunefield", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        found = (re.search(r"http://[\w.]+:\d+", line) for line in process.stdout)
        address = next(match[0] for match in found if match)
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130), command
