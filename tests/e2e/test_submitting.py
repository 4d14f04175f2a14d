"""Sweeps on a cluster that `ray up` makes on this machine, over ssh, with a token."""

import copy
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import SWEEP
from tests.e2e.head import TREE, Head

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PRUNEFIELD = (sys.executable, "-m", "orchestrator")
FILE = "sweeps/tiny.yaml"
MARK = "a change that was never committed"


def sweep_for(head: Head, **train: Any) -> dict[str, Any]:
    sweep = copy.deepcopy(SWEEP) | {"storage": str(head.folder / "out")}
    sweep["prune"] |= {"criteria": ["magnitude"]}
    sweep["train"] |= train
    # The head has two CPUs: one sweep's training leaves room for another's.
    sweep["resources"] = {"train": {"cpus": 1}}
    return sweep


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    made = Head.make(tmp_path_factory.mktemp("head"))
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def tree(head: Head) -> Path:
    """A working tree with a change in it, from which the cluster was brought up."""
    folder = head.folder / "tree"
    for package in ("nerf", "pruning", "orchestrator"):
        shutil.copytree(
            TREE / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    job = folder / "orchestrator" / "job.py"
    said = f"    print({MARK!r})\n    settle_here()\n"
    job.write_text(job.read_text().replace("    settle_here()\n", said))
    assert MARK in job.read_text()
    head.cluster_file(folder / FILE, sweep_for(head))
    up = head.run("ray", "up", "-y", "--no-restart", FILE, cwd=folder)
    assert up.returncode == 0, up.stdout
    return folder


def test_ray_submit_runs_the_sweep_of_the_cluster_end_to_end(head: Head, tree: Path) -> None:
    done = head.run("ray", "submit", FILE, "orchestrator/submit.py", cwd=tree)
    assert done.returncode == 0, done.stdout
    assert MARK in done.stdout
    assert "hypervolume" in done.stdout
    trials = list((head.folder / "out").glob("trials/*/record.json"))
    assert len(trials) == 2
    # No token in what anybody sees, nor anywhere but in the head's own file.
    token = (head.home / ".ray" / "auth_token").read_text()
    assert token not in done.stdout
    assert (head.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


def test_a_sweep_that_changed_since_ray_up_is_not_run(head: Head, tree: Path) -> None:
    """The file reached the head; what the cluster was brought up with did not follow."""
    try:
        head.cluster_file(tree / FILE, sweep_for(head, iterations=13))
        head.run("ray", "rsync-up", FILE, "sweeps/", "~/prunefield/sweeps/", cwd=tree)
        stale = head.run("ray", "submit", FILE, "orchestrator/submit.py", cwd=tree)
        assert stale.returncode != 0
        assert "differ (in train)" in stale.stdout
        assert f"ray up -y --no-restart {FILE}" in stale.stdout
        command = ("ray", "submit", FILE, "orchestrator/submit.py")
        expected = head.run(*command, "--", FILE, "--expect", "0123", cwd=tree)
        assert expected.returncode != 0
        assert "not 0123" in " ".join(expected.stdout.split())
        assert len(list((head.folder / "out").glob("trainings/*"))) == 1
    finally:
        head.cluster_file(tree / FILE, sweep_for(head))


def test_ray_submit_takes_the_path_of_another_sweep(head: Head, tree: Path) -> None:
    """On a cluster whose file holds a sweep of its own; the code and the file came by `ray up`."""
    other = sweep_for(head, iterations=15) | {"name": "other"}
    (tree / "sweeps" / "other.yaml").write_text(yaml.safe_dump(other))
    command = ("ray", "submit", FILE, "orchestrator/submit.py", "sweeps/other.yaml")
    absent = head.run(*command, cwd=tree)
    assert absent.returncode != 0
    assert "no such file" in " ".join(absent.stdout.split())
    refreshed = head.run("ray", "up", "-y", "--no-restart", FILE, cwd=tree)
    assert refreshed.returncode == 0, refreshed.stdout
    valid = head.run(*PRUNEFIELD, "validate", "sweeps/other.yaml", cwd=tree)
    expected = re.search(r"hash (\w+)", valid.stdout)
    assert expected is not None, valid.stdout
    done = head.run(*command, "--expect", expected.group(1), cwd=tree)
    assert done.returncode == 0, done.stdout
    assert f"sweep other ({expected.group(1)})" in " ".join(done.stdout.split())
    assert MARK in done.stdout


def test_prunefield_submit_refreshes_the_cluster_and_leaves_its_jobs_alone(
    head: Head, tree: Path
) -> None:
    """A long sweep goes on while another is submitted beside it; then it is stopped."""
    long = sweep_for(head, iterations=100_000) | {"name": "long"}
    (tree / "long.yaml").write_text(yaml.safe_dump(long))
    begun = head.run(*PRUNEFIELD, "submit", "long.yaml", "--cluster", FILE, "--detach", cwd=tree)
    assert begun.returncode == 0, begun.stdout
    job = re.search(r"job (prunefield-long-\S+)", begun.stdout)
    assert job is not None
    assert "prunefield status" in begun.stdout
    wait_for(head, tree, "long.yaml", "RUNNING")

    head.cluster_file(tree / FILE, sweep_for(head, iterations=13))
    other = head.run(*PRUNEFIELD, "submit", FILE, cwd=tree)
    assert other.returncode == 0, other.stdout
    said = head.run(*PRUNEFIELD, "status", FILE, "--json", cwd=tree)
    state = json.loads(said.stdout)
    assert (state["status"], state["finished"]) == ("FINISHED", {"training": 1, "trial": 2})
    assert state["cluster"] == f"test-{head.port}"
    assert "hypervolume" in head.run(*PRUNEFIELD, "logs", FILE, cwd=tree).stdout

    assert wait_for(head, tree, "long.yaml", "RUNNING")["job"] == job.group(1)
    stopped = head.run(*PRUNEFIELD, "stop", "long.yaml", cwd=tree)
    assert stopped.returncode == 0, stopped.stdout
    assert wait_for(head, tree, "long.yaml", "KILLED")["silent"] is False


def test_a_job_on_a_running_cluster_by_its_address(head: Head, tree: Path) -> None:
    sweep = sweep_for(head, iterations=14) | {"name": "by-address"}
    (tree / "by-address.yaml").write_text(yaml.safe_dump(sweep))
    command = (*PRUNEFIELD, "submit", "by-address.yaml", "--address", head.address)
    refused = head.run(*command, cwd=tree)
    assert refused.returncode == 1
    assert "asks for a token" in refused.stdout
    token = str(head.home / ".ray" / "auth_token")
    done = head.run(*command, cwd=tree, RAY_AUTH_TOKEN_PATH=token)
    assert done.returncode == 0, done.stdout
    job = re.search(r"job (prunefield-by-address-\S+)", done.stdout)
    assert job is not None
    look = ("by-address", "--job", job.group(1), "--address", head.address)
    state = head.run(*PRUNEFIELD, "status", *look, cwd=tree, RAY_AUTH_TOKEN_PATH=token)
    assert state.stdout.strip() == "SUCCEEDED"
    said = head.run(*PRUNEFIELD, "logs", *look, cwd=tree, RAY_AUTH_TOKEN_PATH=token)
    assert MARK in said.stdout
    assert "hypervolume" in said.stdout


def test_a_job_that_is_stopped_by_its_address_saves_its_training(head: Head, tree: Path) -> None:
    """Nobody needs the tracking server for it."""
    sweep = sweep_for(head, iterations=100_001) | {"name": "stopped"}
    (tree / "stopped.yaml").write_text(yaml.safe_dump(sweep))
    token = str(head.home / ".ray" / "auth_token")
    command = (*PRUNEFIELD, "submit", "stopped.yaml", "--address", head.address, "--detach")
    begun = head.run(*command, cwd=tree, RAY_AUTH_TOKEN_PATH=token)
    assert begun.returncode == 0, begun.stdout
    job = re.search(r"job (prunefield-stopped-\S+)", begun.stdout)
    assert job is not None
    wait_for(head, tree, "stopped.yaml", "RUNNING")
    look = ("stopped", "--job", job.group(1), "--address", head.address)
    deadline = time.monotonic() + 300
    while not list((head.folder / "out").glob("leases/training-*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    asked = head.run(*PRUNEFIELD, "stop", *look, cwd=tree, RAY_AUTH_TOKEN_PATH=token)
    assert asked.returncode == 0, asked.stdout
    assert wait_for(head, tree, "stopped.yaml", "KILLED")["silent"] is False
    assert list((head.folder / "out").glob("running/*/state.safetensors"))


def wait_for(head: Head, tree: Path, file: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    said = ""
    while time.monotonic() < deadline:
        done = head.run(*PRUNEFIELD, "status", file, "--json", cwd=tree)
        said = done.stdout
        if done.returncode == 0:
            state: dict[str, Any] = json.loads(said)
            if state["status"] == status and state["job"]:
                return state
        time.sleep(2)
    pytest.fail(f"{file} did not become {status}: {said}")
