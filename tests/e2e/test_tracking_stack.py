"""The tracking stack, really started, and sweeps that are logged to it.

By plain commands; and by the commands and settings of the compose file, without its containers.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.cli import main
from tests.e2e import marks
from tests.services import KEYS, Postgres, free_port, postgres, postgres_tools, s3_server

pytestmark = [*marks.SWEEP, pytest.mark.slow]

WriteSweep = Callable[..., Path]
SCRIPT = Path(__file__).parents[2] / "infra" / "tracking" / "serve.sh"
COMPOSE = SCRIPT.parent / "compose.yaml"
START_SECONDS = 180.0


def answers(address: str) -> bool:
    """Whether a page is there."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


class Stack:
    """What `serve.sh FOLDER` started.

    Attributes:
        folder: everything of it.
        mlflow, optuna: addresses.
    """

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder = folder
        ports = {f"{name}_PORT": free_port() for name in ("MLFLOW", "OPTUNA", "POSTGRES")}
        self.mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}"
        self.optuna = f"http://127.0.0.1:{ports['OPTUNA_PORT']}"
        self.data = folder / "data"
        # PostgreSQL does not run as root: here root is somebody else, with the same files.
        other = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
        enter = other if os.getuid() == 0 else ()
        with (folder / "said").open("wb") as said:
            self.process = subprocess.Popen(
                [*enter, str(SCRIPT), str(self.data)],
                cwd=folder,
                env={
                    **{name: str(port) for name, port in ports.items()},
                    "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                    "HOME": str(folder),
                    "POSTGRES_BIN": str(tools),
                    "PRUNEFIELD_STACK": str(folder),
                },
                stdout=said,
                stderr=said,
            )

    def wait(self) -> None:
        """Until both servers answer."""
        end = time.monotonic() + START_SECONDS
        for address in (f"{self.mlflow}/health", f"{self.optuna}/dashboard"):
            while not answers(address):
                assert self.process.poll() is None, self.said()
                assert time.monotonic() < end, f"nothing at {address}; {self.said()}"
                time.sleep(0.5)

    def said(self) -> str:
        """What the script and its servers have printed."""
        logs = [self.folder / "said", *self.data.glob("*.log")]
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)

    def processes(self) -> list[psutil.Process]:
        """Those of the stack that are left."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PRUNEFIELD_STACK") == str(self.folder):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def stack() -> Iterator[Stack]:
    tools = postgres_tools()
    if tools is None:
        pytest.skip("needs PostgreSQL 15 or later, which is not installed and could not be")
    folder = Path(tempfile.mkdtemp(prefix="stack."))  # a short path: a socket will be in it
    made = Stack(folder, tools)
    try:
        yield made
    finally:
        for process in made.processes():
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_sweep_is_logged_to_the_stack_that_plain_commands_start(
    stack: Stack, write_sweep: WriteSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    stack.wait()
    assert f"tracking: {{uri: {stack.mlflow}}}" in stack.said()
    path = write_sweep(tracking={"uri": stack.mlflow}, prune={"criteria": ["magnitude"]})
    assert main(["run", str(path)]) == 0
    assert main(["status", str(path)]) == 0
    assert "FINISHED" in capsys.readouterr().out
    client = MlflowClient(stack.mlflow)
    experiment = client.get_experiment_by_name("prunefield")
    runs = list(client.search_runs([experiment.experiment_id]))
    assert Counter(r.info.status for r in runs) == {"FINISHED": 4}
    assert list(stack.data.glob("artifacts/**/model.safetensors"))

    # The password is in one file that its owner alone may read, and in no command line.
    secret = stack.data / "password"
    assert secret.stat().st_mode & 0o077 == 0
    password = secret.read_text().strip()
    assert not [p for p in stack.processes() if password in " ".join(p.cmdline())]

    # Everything that listens does so on loopback.
    for process in stack.processes():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip == "127.0.0.1"

    # It ends as a whole, and the database with it.
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(90) == 0
    assert not [p for p in stack.processes() if p.is_running()]
    assert not (stack.data / "postgres" / "postmaster.pid").exists()


def variables(text: str, given: dict[str, str]) -> str:
    """A value of a compose file as compose hands it on: variables replaced, `$$` a dollar."""
    found = re.sub(r"\$\{(\w+)[^}]*\}", lambda match: given[match[1]], text)
    return found.replace("$$", "$")


@contextlib.contextmanager
def compose_service(name: str, secrets: dict[str, str], names: dict[str, str]) -> Iterator[None]:
    """Run what the compose file says of a service; `names` stand for those that containers have."""

    def here(text: str) -> str:
        text = variables(text, secrets)
        for there, instead in names.items():
            text = text.replace(there, instead)
        return text

    service = yaml.safe_load(COMPOSE.read_text())["services"][name]
    environment = {key: here(str(value)) for key, value in service["environment"].items()}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("wb") as said:
        process = subprocess.Popen(
            [here(part) for part in service["command"]],
            cwd=folder,
            env={
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "HOME": folder,
                **environment,
            },
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            yield
        except AssertionError as error:
            raise AssertionError((Path(folder) / "said").read_text()[-4000:]) from error
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def until_it_answers(address: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not answers(address):
        assert time.monotonic() < end, f"nothing at {address}"
        time.sleep(0.5)


def test_a_sweep_is_logged_to_the_services_of_the_compose_file(
    write_sweep: WriteSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from mlflow import MlflowClient

    secrets = {
        "POSTGRES_PASSWORD": Postgres.password,
        "AWS_ACCESS_KEY_ID": KEYS["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": KEYS["AWS_SECRET_ACCESS_KEY"],
    }
    mlflow, optuna = free_port(), free_port()
    with postgres() as database, s3_server() as s3:
        monkeypatch.setenv("PGPASSWORD", database.password)
        psql = [str(database.tools / "psql"), *database.where, "-v", "ON_ERROR_STOP=1", "-q"]
        subprocess.run([*psql, "-d", "postgres", "-c", "CREATE DATABASE mlflow"], check=True)
        subprocess.run([*psql, "-d", "mlflow", "-f", str(COMPOSE.parent / "init.sql")], check=True)
        names = {
            "@postgres/": f"@127.0.0.1:{database.port}/",
            "http://s3:9000": s3,
            "--host 0.0.0.0": "--host 127.0.0.1",
            "--port 5000": f"--port {mlflow}",
            "--port 8080": f"--port {optuna}",
        }
        address = f"http://127.0.0.1:{mlflow}"
        with (
            compose_service("mlflow", secrets, names),
            compose_service("optuna-dashboard", secrets, names),
        ):
            until_it_answers(f"{address}/health")
            until_it_answers(f"http://127.0.0.1:{optuna}/dashboard")
            path = write_sweep(tracking={"uri": address}, prune={"criteria": ["magnitude"]})
            assert main(["run", str(path)]) == 0
            client = MlflowClient(address)
            experiment = client.get_experiment_by_name("prunefield")
            runs = list(client.search_runs([experiment.experiment_id]))
            assert Counter(r.info.status for r in runs) == {"FINISHED": 4}
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        bucket = boto3.client("s3", endpoint_url=s3).list_objects_v2(Bucket="prunefield")
        kept = [entry["Key"] for entry in bucket["Contents"]]
        assert all(key.startswith("mlflow/") for key in kept)
        assert any(key.endswith("model.safetensors") for key in kept)
