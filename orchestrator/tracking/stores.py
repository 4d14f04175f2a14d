"""Opening a tracking store: every way it can be unusable becomes one clear error."""

import contextlib
import logging
import os
import socket
import sqlite3
import tempfile
import urllib.parse
from collections.abc import Iterator

from orchestrator.errors import TrackingError
from orchestrator.tracking.names import shown, sqlite_path

# Neither call home nor print an emoji and an address at the end of every run. MLflow reads both
# when it is imported; whoever set them before keeps his choice.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import create_engine
from sqlalchemy.exc import InterfaceError, OperationalError

PROBE_SECONDS = 5.0
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
AWAY = (502, 503, 504)  # what MLflow and proxies answer when what is behind them is away
GONE = (
    OperationalError,
    InterfaceError,
    ConnectionError,
    TimeoutError,
    requests.ConnectionError,
    requests.Timeout,
)
NOISY = ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics")


def open_client(uri: str) -> MlflowClient:
    """A client on a usable store; a fresh database gets its tables.

    MLflow's own lock file keeps two processes from migrating one fresh SQLite file at once.

    Raises:
        TrackingError: the address is of no known kind, or the store cannot be reached or written.
    """
    scheme = urllib.parse.urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme in ("http", "https"):
        if problem := unreachable(uri):
            raise TrackingError(
                f"the tracking server {shown(uri)} does not answer: {problem}; start it, or leave "
                "out `tracking.uri` to keep the runs in the storage folder"
            )
    elif scheme not in DATABASES:
        raise TrackingError(
            f"{shown(uri)!r} is not a tracking store that prunefield can use; allowed are "
            "http(s)://HOST:PORT of an MLflow server, sqlite:///FILE and postgresql://…"
        )
    try:
        if scheme in DATABASES and scheme != "sqlite":
            _probe_database(uri)
        with quiet():
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"the tracking store {shown(uri)} cannot be used: {brief(error)}"
        ) from error
    return client


def unreachable(uri: str) -> str | None:
    """Why nothing listens at a server's address; None when something does, or for a file.

    One TCP connection: MLflow's own retries would take four minutes to say the same.
    """
    parts = urllib.parse.urlsplit(uri)
    default = PORTS.get(parts.scheme.partition("+")[0])
    if default is None or not parts.hostname:  # a file, or a socket of this machine
        return None
    try:
        with socket.create_connection((parts.hostname, parts.port or default), PROBE_SECONDS):
            return None
    except (OSError, ValueError) as error:
        return brief(error)


def is_outage(error: BaseException, uri: str) -> bool:
    """Whether an error says that a server is away for a while, not that it refuses.

    A database that restarts breaks connections, then refuses them, then says that it starts up.
    """
    if uri.startswith("sqlite"):
        return False
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GONE):
            return True
        if isinstance(seen, MlflowException) and seen.get_http_status_code() in AWAY:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def brief(error: BaseException) -> str:
    """The first line of what an error says, without passwords."""
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the migrations' progress lines; warnings and errors still show."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _probe_database(uri: str) -> None:
    """Connect once: MLflow itself would try for almost two minutes to learn of a wrong password."""
    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None:
        raise TrackingError(
            f"{uri!r} names no file; write sqlite:///relative/path or sqlite:////absolute/path"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            with path.open("r+b"):
                pass
            with contextlib.closing(sqlite3.connect(path, timeout=PROBE_SECONDS)) as database:
                database.execute("SELECT name FROM sqlite_master LIMIT 1")
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the tracking store {path} cannot be written: {brief(error)}; give another "
            "`tracking.uri`, or make the folder writable"
        ) from error
