"""Downloads that go on where they stopped.

A file under way is a `.part` file with a note beside it: where it comes from, how long it will be,
and which version of it the server has. The next attempt asks for the rest of that version by HTTP
Range; a server that cannot resume, or has another version, sends the whole file again.
"""

import hashlib
import http.client
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nerf.errors import DownloadError

_CHUNK = 1 << 20
_PAUSE = 1.0  # seconds before the first new attempt; doubles
_OK, _PARTIAL, _RANGE_REFUSED = 200, 206, 416
_ABSENT = (403, 404, 410)
_TRY_LATER = (408, 425, 429, 500, 502, 503, 504)

_log = logging.getLogger(__name__)


class UnavailableError(DownloadError):
    """The server does not have the file, or cannot be reached at all."""


class _InterruptedError(Exception):
    """The transfer stopped; another attempt may go on."""


@dataclass(frozen=True)
class Progress:
    """How far a download is.

    Attributes:
        archive: file name.
        done: bytes on disk, earlier attempts included.
        total: bytes in all, None when the server does not say.
    """

    archive: str
    done: int
    total: int | None


@dataclass(frozen=True)
class _Note:
    """What is known of a partial file.

    Attributes:
        url: where it comes from.
        total: bytes of the whole file. Without it nothing tells whether the file is whole, so
            that there is no note and no resuming.
        validator: the server's name for this version of the file (ETag or date), if it gives one.
    """

    url: str
    total: int
    validator: str | None


@dataclass(frozen=True)
class Transfer:
    """One file to download.

    Attributes:
        url: http or https address.
        part: where to put it.
        size: bytes, where known beforehand.
        sha256: where known beforehand.
        progress: called after each piece that arrives.
        attempts: how often to try in vain before giving up.
        timeout: seconds to wait for an answer.
    """

    url: str
    part: Path
    size: int | None = None
    sha256: str | None = None
    progress: Callable[[Progress], None] | None = None
    attempts: int = 4
    timeout: float = 30.0

    def run(self) -> None:
        """Bring `part` to its full length and check its hash.

        Raises:
            UnavailableError: nothing of it could be had.
            DownloadError: it stopped half-way for good (what there is stays for the next run), or
                came out wrong (it is deleted).
            OSError: it cannot be written.
        """
        in_vain = 0
        while True:
            before = self._have()
            try:
                self._attempt()
                break
            except _InterruptedError as error:
                in_vain = in_vain + 1 if self._have() <= before else 0
                if in_vain >= self.attempts:
                    self._give_up(error)
                _log.warning("%s: %s; trying again", self.url, error)
                time.sleep(_PAUSE * 2 ** max(in_vain - 1, 0))
        if self.sha256 is not None and (actual := file_sha256(self.part)) != self.sha256:
            self.forget()
            raise DownloadError(
                f"{self.url} has SHA-256 {actual}, but {self.sha256} is known to be right; the "
                "download was thrown away: try again, or use another mirror"
            )

    def forget(self) -> None:
        """Delete what was downloaded."""
        self.part.unlink(missing_ok=True)
        self._note_file.unlink(missing_ok=True)

    @property
    def _note_file(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _give_up(self, error: _InterruptedError) -> NoReturn:
        if self._have() == 0:
            raise UnavailableError(f"{self.url}: {error}") from error
        raise DownloadError(
            f"the download of {self.url} stopped at {self._have():,} bytes: {error}; run the same "
            "command again to go on from there"
        ) from error

    def _attempt(self) -> None:
        """One request: the rest of the file, or all of it if the server cannot resume."""
        note = self._read_note()
        if note is None:
            self.forget()
        elif self._have() == note.total:
            return
        request = urllib.request.Request(
            self.url, headers={"User-Agent": "prunefield", "Accept-Encoding": "identity"}
        )
        if note is not None and self._have():
            request.add_header("Range", f"bytes={self._have()}-")
            if note.validator is not None:
                request.add_header("If-Range", note.validator)
        try:
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            self._explain(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _InterruptedError(f"no answer ({reason})") from error
        except ValueError as error:
            raise UnavailableError(f"{self.url} is no address: {error}") from error
        with response:
            if response.status == _PARTIAL:
                total: int | None = self._resume(response, note)
            else:
                total = self._start(response)
            self._receive(response, total)

    def _explain(self, error: urllib.error.HTTPError) -> NoReturn:
        """Say what a status of 400 or more means here."""
        with error:
            status = f"HTTP {error.code} {error.reason}"
        if error.code == _RANGE_REFUSED:
            # The file changed or shrank since: what we have is of no use.
            self.forget()
            raise _InterruptedError(f"{status}: starting over") from error
        if error.code in _TRY_LATER:
            raise _InterruptedError(status) from error
        if error.code in _ABSENT:
            raise UnavailableError(f"{self.url}: {status}") from error
        raise DownloadError(f"{self.url} answered {status}; try another mirror") from error

    def _resume(self, response: http.client.HTTPResponse, note: _Note | None) -> int:
        """Check that the answer goes on where `part` ends."""
        given = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", given)
        if (
            note is None
            or match is None
            or (int(match[1]), int(match[2])) != (self._have(), note.total)
        ):
            self.forget()
            raise _InterruptedError(f"the server resumed at the wrong place ({given})")
        return note.total

    def _start(self, response: http.client.HTTPResponse) -> int | None:
        """Empty `part` and note what it will be; returns the length, if the server says."""
        if response.status != _OK:
            raise DownloadError(f"{self.url} answered HTTP {response.status}; try another mirror")
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        if self.size is not None and total is not None and total != self.size:
            raise DownloadError(
                f"{self.url} is {total:,} bytes long, but {self.size:,} is known to be right; the "
                "file there is another one: use another mirror"
            )
        self.forget()
        self.part.touch()
        if total is not None:
            etag = response.headers.get("ETag", "")
            # A weak ETag (W/"…") does not promise the same bytes.
            validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
            note = {"url": self.url, "total": total, "validator": validator}
            self._note_file.write_text(json.dumps(note) + "\n")
        return total

    def _receive(self, response: http.client.HTTPResponse, total: int | None) -> None:
        name = self.part.name.removesuffix(".part")
        with self.part.open("ab") as file:
            while True:
                try:
                    # read1 hands over what has arrived, so that an interruption loses nothing.
                    piece = response.read1(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _InterruptedError(f"the connection broke ({error})") from error
                if not piece:
                    break
                file.write(piece)
                if self.progress is not None:
                    self.progress(Progress(name, file.tell(), total))
        if total is not None and self._have() < total:
            raise _InterruptedError(f"the connection ended at {self._have():,} of {total:,} bytes")

    def _read_note(self) -> _Note | None:
        """The note beside `part`, if there is one for this address."""
        try:
            note = json.loads(self._note_file.read_bytes())
            url, total, validator = note["url"], note["total"], note["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        usable = url == self.url and isinstance(total, int) and self._have() <= total
        return _Note(url, total, validator) if usable else None


def file_sha256(file: Path) -> str:
    """A file's SHA-256 in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
