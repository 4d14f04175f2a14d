"""Opening a tracking store: every way it can be unusable becomes one clear error."""

import contextlib
import fcntl
import http.client
import logging
import os
import socket
import sqlite3
import ssl
import tempfile
import time
import urllib.parse
from collections.abc import Iterator

from orchestrator.databases import ask_postgresql, limit_silence
from orchestrator.errors import TrackingError
from orchestrator.tracking.names import shown, sqlite_path

# Neither call home nor print an emoji and an address at the end of every run. MLflow reads both
# when it is imported; whoever set them before keeps his choice.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# By itself MLflow waits for two minutes, eight times: the tracking logger tries again by itself.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.pool import NullPool

PROBE_SECONDS = 10
OPENING = 0x7072756E65  # names the advisory lock of whoever makes the tables
TURN_SECONDS = 180.0  # to wait for whoever makes them
TURN_DELAY = 0.2
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
AWAY = (429, 502, 503, 504)  # what MLflow and proxies answer when what is behind them is away
GONE = (
    OperationalError,
    InterfaceError,
    ConnectionError,
    TimeoutError,
    requests.ConnectionError,
    requests.Timeout,
)
NOISY = ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics")
# What MLflow says of a database that is away, with a traceback, before it raises what we tell of.
for _name in NOISY[1:]:
    logging.getLogger(_name).setLevel(logging.CRITICAL)
limit_silence()


def open_client(uri: str) -> MlflowClient:
    """A client on a usable store; a fresh database gets its tables, from one process at a time.

    Raises:
        TrackingError: the address is of no known kind, or the store cannot be reached or written.
    """
    scheme = urllib.parse.urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme in PORTS:
        if problem := unreachable(uri):
            raise TrackingError(
                f"the tracking server {shown(uri)} does not answer: {problem}; start it, or leave "
                "out `tracking.uri` to keep the runs in the storage folder"
            )
    else:
        raise TrackingError(
            f"{shown(uri)!r} is not a tracking store that prunefield can use; allowed are "
            "http(s)://HOST:PORT of an MLflow server, sqlite:///FILE and postgresql://…"
        )
    try:
        if scheme not in ("sqlite", "http", "https"):
            _probe_database(uri)
        with quiet():
            with _alone(uri):
                _make_sqlite(uri)
                client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"the tracking store {shown(uri)} cannot be used: {brief(error)}"
        ) from error
    return client


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """For the time of a block nobody else here opens this database.

    MLflow makes the tables of a fresh one without asking whether another process does so already.
    """
    path = sqlite_path(uri)
    if path is not None:
        with (path.parent / f".{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    elif uri.startswith("postgresql"):
        engine = create_engine(uri, poolclass=NullPool)  # the lock ends with its connection
        with engine.connect() as connection:
            _wait_for_turn(connection)
            yield
    else:
        yield


def _make_sqlite(uri: str) -> None:
    """Make a file of runs that is not there yet, with its tables: whole or not at all.

    SQLite keeps each table that MLflow makes at once. Of a process that is killed meanwhile a half
    would stay, which MLflow neither uses nor completes.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    from mlflow.store.db.utils import _initialize_tables  # noqa: PLC0415  servers do without

    new = path.with_name(f".{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    engine = create_engine(URL.create("sqlite", database=str(new)), poolclass=NullPool)
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    new.rename(path)


def _wait_for_turn(connection: Connection) -> None:
    """Take the lock of the tables; asked again and again, as each question must have an answer."""
    end = time.monotonic() + TURN_SECONDS
    ask = text("SELECT pg_try_advisory_lock(:key)")
    while not connection.execute(ask, {"key": OPENING}).scalar():
        if time.monotonic() > end:
            raise TimeoutError(f"another process has been making its tables for {TURN_SECONDS:g} s")
        time.sleep(TURN_DELAY)


def unreachable(uri: str) -> str | None:
    """Why a server cannot be spoken to now; None when it can be, or for a file.

    An MLflow server or PostgreSQL must answer something, since what hangs still takes connections.
    MLflow's own requests would take minutes to say the same.
    """
    parts = urllib.parse.urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    default = PORTS.get(scheme)
    if default is None or not parts.hostname:  # a file, or a socket of this machine
        return None
    try:
        host, port = parts.hostname, parts.port or default
        if scheme in ("http", "https"):
            _ask(scheme, host, port, f"{parts.path.rstrip('/')}/health")
        elif scheme == "postgresql":
            ask_postgresql(host, port, PROBE_SECONDS)
        else:
            socket.create_connection((host, port), PROBE_SECONDS).close()
    except TimeoutError:
        return f"no answer within {PROBE_SECONDS:g} s"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return brief(error)
    return None


def _ask(scheme: str, host: str, port: int, path: str) -> None:
    """Wait for any answer at all; nothing is told, so whose certificate it is does not matter."""
    connection = (
        http.client.HTTPSConnection(
            host, port, timeout=PROBE_SECONDS, context=ssl._create_unverified_context()
        )
        if scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=PROBE_SECONDS)
    )
    with contextlib.closing(connection):
        connection.request("GET", path)
        connection.getresponse()


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
        logger.setLevel(max(logger.level, logging.WARNING))
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
