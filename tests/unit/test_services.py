"""What the tests with real servers rely on to end them."""

import os
import subprocess
import sys

import psutil

from tests.services import environment_of

TITLED = """
from ray._raylet import setproctitle
setproctitle("ray::Agent")
print("ready", flush=True)
input()
"""


def test_a_process_with_a_title_has_an_environment() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TITLED],
        env={**os.environ, "PRUNEFIELD_TEST_SERVICE": "this one"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = environment_of(psutil.Process(process.pid))
        assert found["PRUNEFIELD_TEST_SERVICE"] == "this one"
        process.communicate("\n")
