"""What the benchmarks import from this project exists: nothing else runs most of them."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nerf.recovery  # the nerf that other tests check shapes of, before what Triton reads

if importlib.util.find_spec("triton") is not None:
    import triton_interpreter

    triton_interpreter.use_interpreter_without_gpu()
    with triton_interpreter.unchecked_imports():
        import nerf.fused_recovery  # noqa: F401

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(FOLDER.rglob("*.py"))
OURS = ("nerf", "pruning", "orchestrator", "benchmarks")
Import = tuple[int, str, str | None]


def imports(source: str) -> Iterator[Import]:
    """Line, module and name (None for a whole module) of each import of ours, wherever it is."""
    for node in ast.walk(ast.parse(source)):
        found: list[tuple[str, str | None]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found = [(str(node.module), alias.name) for alias in node.names]
        for module, name in found:
            # A script that is run finds those beside it without their folder.
            beside = (FOLDER / f"{module}.py").is_file()
            if beside or module.split(".")[0] in OURS:
                yield node.lineno, f"benchmarks.{module}" if beside else module, name


def fault(module: str, name: str | None) -> str | None:
    """Why an import fails; None where it works, or needs Triton and that is missing."""
    try:
        there = importlib.import_module(module)
        if name is not None and not hasattr(there, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        missing_triton = error.name is not None and error.name.split(".")[0] == "triton"
        return None if missing_triton else str(error)
    return None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_what_a_benchmark_imports_exists(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])  # scripts add to it
    faults = [
        f"{script.name}:{line}: {module} {name or ''}: {why}"
        for line, module, name in imports(script.read_text())
        if (why := fault(module, name)) is not None
    ]
    assert not faults


def test_imports_are_found_wherever_they_are() -> None:
    source = """
import torch, nerf.field
from pruning import allocate, gone
def late():
    from speed import NDC
    from run_nerf import network
"""
    found = sorted(imports(source))
    assert found == [
        (2, "nerf.field", None),
        (3, "pruning", "allocate"),
        (3, "pruning", "gone"),
        (5, "benchmarks.speed", "NDC"),
    ]
    assert [fault(module, name) is None for _, module, name in found] == [True, True, False, True]
