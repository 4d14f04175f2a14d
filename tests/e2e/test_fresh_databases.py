"""Several drivers that start together on a database that has no tables yet."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.services import postgres

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TREE = Path(__file__).parents[2]
HALF = 60_000  # bytes; with all tables it is several times as large
# All of them have imported what they need before the first goes on.
OPEN = """
import sys
from orchestrator.tracking.stores import open_client
print("ready", flush=True)
sys.stdin.readline()
open_client(sys.argv[1])
"""


def start(uri: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, uri],
        cwd=TREE,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def say_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def open_together(uri: str, processes: int = 3, **environment: str) -> None:
    started = [start(uri, **environment) for _ in range(processes)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        say_go(process)
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said


def test_sqlite_gets_its_tables_once(tmp_path: Path) -> None:
    open_together(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_sqlite_gets_its_tables_after_a_driver_was_killed_that_made_them(tmp_path: Path) -> None:
    path, new = tmp_path / "mlflow.db", tmp_path / ".mlflow.db.new"
    uri = f"sqlite:///{path}"
    driver = start(uri)
    say_go(driver)
    end = time.monotonic() + 120
    while not (new.exists() and new.stat().st_size > HALF) and time.monotonic() < end:
        time.sleep(0.002)
    driver.kill()
    driver.communicate()
    assert new.exists()
    assert not path.exists()
    open_together(uri, 1)
    assert not new.exists()


def test_postgresql_gets_its_tables_once() -> None:
    with postgres() as database:
        open_together(database.uri, PGPASSWORD=database.password)
