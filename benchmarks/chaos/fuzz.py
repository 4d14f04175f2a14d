"""Inputs that look for ways through the code: atheris (libFuzzer) mutates, coverage guides it.

    python -m benchmarks.chaos.fuzz                         every kind of input, 2,000 each
    python -m benchmarks.chaos.fuzz sweep --runs 20000

Needs ``pip install "prunefield[fuzz]"``. What must hold is in `benchmarks.chaos.inputs`; beside it,
an audit hook of Python sees to it that no input starts a process, opens a connection, or opens a
file for writing elsewhere. Prints one line of JSON a kind; every fault once, with its place and the
input that leads there, which is kept. Status 1 if there is one.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "sweep",
    "sweep-values",
    "damaged",
    "model",
    "packed",
    "tar",
    "llff",
    "blender",
    "colmap",
    "colmap-text",
)
SLOW_SECONDS = 10.0
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn")
FORBIDDEN += ("socket.connect", "socket.bind", "os.remove", "os.rename", "os.rmdir", "os.mkdir")
MEMORY = 16 << 30


class Guard:
    """What the code does meanwhile, as Python's audit events tell."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._on = str(folder), False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of a block."""
        self.seen, self._on = [], True
        try:
            yield
        finally:
            self._on = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else False
            writes = writes or any(letter in (mode or "") for letter in "wax+")
            if writes and not str(path).startswith((self._folder, "/dev/null")):
                self.seen.append(f"open {path!r} {mode!r} {flags!r}")


def child(name: str, work: Path, options: list[str]) -> None:
    """Feed one kind of input to this process; libFuzzer ends it."""
    import atheris  # noqa: PLC0415  only the child needs it

    with atheris.instrument_imports(include=["orchestrator", "nerf", "pruning", "yaml", "PIL"]):
        from benchmarks.chaos import inputs  # noqa: PLC0415  only now is it instrumented

        kind = inputs.make(name)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(kind.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = [_quoted(word) for word in kind.words if 0 < len(word) <= 64]
    (work / "words").write_text("\n".join(words) + "\n")
    guard = Guard(kind.folder)
    counts, faults = {"inputs": 0, "valid": 0, "slowest_s": 0.0}, {}

    warnings.simplefilter("error", RuntimeWarning)  # arithmetic that overflows

    def feed(data: bytes) -> None:
        started = time.monotonic()
        try:
            with guard.watching():
                counts["valid"] += kind.feed(data)
            fault = guard.seen[0] if guard.seen else None
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
            fault = f"{type(error).__name__} at {place.filename}:{place.lineno}"
            fault += f" from {ours[-1].filename}:{ours[-1].lineno}: {error!s:.200}"
            known = f"{type(error).__name__} {ours[-1].filename}:{ours[-1].lineno}"
        else:
            known = fault
        took = time.monotonic() - started
        if took > SLOW_SECONDS and fault is None:
            fault, known = f"took {took:.0f} s", "slow"
        counts["inputs"] += 1
        counts["slowest_s"] = max(counts["slowest_s"], round(took, 2))
        if fault is not None and known not in faults:
            kept = work / f"fault-{len(faults)}"
            kept.write_bytes(data)
            faults[known] = {"fault": fault, "input": str(kept)}
        said = {**counts, "faults": list(faults.values())}
        (work / "said.json").write_text(json.dumps(said))

    longest = max(64, 2 * max(map(len, kind.seeds)))
    atheris.Setup(
        [
            *(sys.argv[0], *options, f"-dict={work / 'words'}", f"-max_len={longest}"),
            *("-len_control=0", "-timeout=120", "-rss_limit_mb=0", str(corpus)),
        ],
        feed,
    )
    atheris.Fuzz()


def _quoted(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def fuzz(name: str, runs: int, seed: int) -> dict[str, Any]:
    """Feed so many inputs of a kind, in a process of its own."""
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}.work."))
    command = [sys.executable, "-m", "benchmarks.chaos.fuzz", name, "--child", str(work)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(work),
    }
    done = subprocess.run(
        [*command, "--runs", str(runs), "--seed", str(seed)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    (work / "log").write_text(done.stdout + done.stderr)
    covered = [int(found) for found in re.findall(r"cov: (\d+)", done.stderr)]
    try:
        said = json.loads((work / "said.json").read_text())
    except OSError:
        said = {"inputs": 0, "faults": []}
    if done.returncode or said["inputs"] < runs:
        said["faults"].append({"fault": f"ended with {done.returncode}", "input": str(work)})
    places = {"places_at_first": covered[0], "places_reached": covered[-1]} if covered else {}
    return {**said, **places}


def main() -> int:
    """Feed the kinds that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--runs", type=int, default=2000, help="inputs of each kind (2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.kinds[0], options.child, [f"-runs={options.runs}", f"-seed={options.seed}"])
        return 0
    try:
        import atheris  # noqa: F401, PLC0415  an optional dependency
    except ImportError:
        print('atheris is not installed: pip install "prunefield[fuzz]"', file=sys.stderr)
        return 2
    faults = 0
    for name in options.kinds or NAMES:
        said = fuzz(name, options.runs, options.seed)
        faults += len(said["faults"])
        print(name, json.dumps(said), flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
