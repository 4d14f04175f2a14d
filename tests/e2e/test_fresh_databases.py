"""Several drivers that start together on a database that has no tables yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import postgres

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TREE = Path(__file__).parents[2]
# All of them have imported what they need before the first goes on.
OPEN = """
import sys
from orchestrator.tracking.stores import open_client
print("ready", flush=True)
sys.stdin.readline()
open_client(sys.argv[1])
"""


def open_together(uri: str, processes: int = 3, **environment: str) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, uri],
            cwd=TREE,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said


def test_sqlite_gets_its_tables_once(tmp_path: Path) -> None:
    open_together(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_postgresql_gets_its_tables_once() -> None:
    with postgres() as database:
        open_together(database.uri, PGPASSWORD=database.password)
