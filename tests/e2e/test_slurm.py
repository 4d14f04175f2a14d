"""The batch file on a Slurm that is not there: two "nodes" on loopback, each with a real Ray."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.conftest import SWEEP
from tests.services import environment_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TREE = Path(__file__).parents[2]
SCRIPT = TREE / "infra" / "slurm" / "sweep.sbatch"
# What the batch file asks of Slurm: names of nodes, commands on one of them, and what `hostname`
# says there.
FAKES = {
    "scontrol": 'printf "%s\\n" one two\n',
    "srun": (
        "options=()\n"
        'while [ "${1#--}" != "$1" ]; do options+=("$1"); shift; done\n'
        'echo "${options[*]} :: $*" >>"$FAKE_SLURM_LOG"\n'
        'export FAKE_NODE="${options[-1]#--nodelist=}"\n'
        'exec "$@"\n'
    ),
    # Not 127.0.0.1, for which Ray puts in an address that others reach.
    "hostname": '[ "$FAKE_NODE" = one ] && echo 127.0.0.9 || echo 127.0.0.2\n',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + body)
        (folder / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    job = str(10_000 + os.getpid() % 9_000)
    (tmp_path / "submit").mkdir()
    return kept | {
        "BIN": f"{folder}:{Path(sys.executable).parent}",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(tmp_path / "submit"),
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_GPUS_ON_NODE": "0",
        "FAKE_SLURM_LOG": str(tmp_path / "slurm.log"),
        "PYTHONPATH": str(TREE),
        "OMP_NUM_THREADS": "1",
    }


def sweep_file(tmp_path: Path, iterations: int) -> Path:
    sweep = yaml.safe_load(yaml.safe_dump(SWEEP)) | {"storage": str(tmp_path / "out")}
    sweep["train"]["iterations"] = iterations
    sweep["prune"]["criteria"] = ["magnitude"]
    path = tmp_path / "submit" / "tiny.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def of_this_job(job: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if environment_of(process).get("SLURM_JOB_ID") == job:
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_left(slurm: dict[str, str]):
    yield
    left = of_this_job(slurm["SLURM_JOB_ID"])
    for process in left:
        process.kill()
    assert not [process for process in left if process.is_running() and "ray" in process.name()]


def test_the_sweep_runs_on_both_nodes_and_leaves_nothing(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    path = sweep_file(tmp_path, 12)
    done = subprocess.run(
        ["bash", str(SCRIPT), path.name],
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "hypervolume" in done.stdout
    assert done.stdout.count("Ray runtime started.") == 2
    log = Path(slurm["FAKE_SLURM_LOG"]).read_text()
    assert "--nodelist=one :: env -u RAY_ADDRESS ray start --head" in log
    assert "--nodelist=two :: env -u RAY_ADDRESS ray start --address=127.0.0.9:" in log
    assert len(list((tmp_path / "out").glob("trials/*/record.json"))) == 2
    assert not list((tmp_path / "submit").glob(".ray-token*"))
    ended = time.monotonic() + 60
    while of_this_job(slurm["SLURM_JOB_ID"]) and time.monotonic() < ended:
        time.sleep(0.5)
    assert not [p for p in of_this_job(slurm["SLURM_JOB_ID"]) if "raylet" in p.name()]


def test_a_term_before_the_time_is_up_saves_the_training(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    path = sweep_file(tmp_path, 100_000)
    batch = subprocess.Popen(["bash", str(SCRIPT), path.name], env=slurm)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("leases/training-*")):
        assert batch.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1)
    time.sleep(3)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(180) == 143
    assert list((tmp_path / "out").glob("running/*/state.safetensors"))
    assert not list((tmp_path / "submit").glob(".ray-token*"))
