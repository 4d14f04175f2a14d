"""Databases behind an address: whoever asks one gets an answer or an error, and in finite time.

A server may take connections and say nothing: its disk hangs, its machine is stopped, a firewall
forgot the connection. The system below still acknowledges what is sent to it, so no setting of TCP
notices, and a limit that the server keeps (``statement_timeout``) stops with the server. So it is
the client that counts here, on every connection to PostgreSQL that SQLAlchemy opens in this
process: those of MLflow and of Optuna, too.
"""

import socket
import struct
import time
from collections.abc import Generator
from functools import lru_cache
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 30.0
# What a PostgreSQL client may ask before it says who it is: whether there is TLS.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def ask_postgresql(host: str, port: int, timeout: float) -> None:
    """Wait until a PostgreSQL server says anything at all.

    Args:
        host: of the server, or of what stands before it.
        port: of the same.
        timeout: seconds to wait, twice: for the connection and for the answer.

    Raises:
        OSError: it cannot be reached, or ends the connection without an answer.
        TimeoutError: it takes connections and says nothing.
    """
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(SSL_REQUEST)
        if not connection.recv(1):
            raise ConnectionError("it ends connections without an answer")


def limit_silence() -> None:
    """From now on connections of this process to PostgreSQL do not wait for ever."""
    if not event.contains(Engine, "do_connect", _connect):
        event.listen(Engine, "do_connect", _connect)


def _connect(dialect: Dialect, _: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    """Open a connection in SQLAlchemy's place; None leaves it to SQLAlchemy."""
    if dialect.driver != "psycopg" or dialect.is_async:
        return None
    options.setdefault("connect_timeout", int(CONNECT_SECONDS))
    return _patient().connect(*arguments, **options)


@lru_cache(maxsize=1)
def _patient() -> Any:
    """The class of connections; psycopg is there only if a database asks for it."""
    import psycopg  # noqa: PLC0415  an optional dependency

    class Patient(psycopg.Connection[Any]):
        """A connection that is closed when its server has said nothing for `SILENT_SECONDS`."""

        def wait(self, gen: Generator[Any, Any, Any], *given: Any, **named: Any) -> Any:
            return super().wait(self._counting(gen), *given, **named)

        def _counting(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            """As `gen`, which is told every 0.1 s (with 0) that nothing has come."""
            heard = time.monotonic()
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    if ready:
                        heard = time.monotonic()
                    elif time.monotonic() - heard > SILENT_SECONDS:
                        self.close()
                        raise psycopg.OperationalError(
                            f"the database has said nothing for {SILENT_SECONDS:g} s"
                        )
                    wanted = gen.send(ready)
            except StopIteration as stop:
                return stop.value

    return Patient
