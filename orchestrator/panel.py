"""How the state of a sweep looks: a panel for a terminal, a line for a log.

A state is the plain data of `orchestrator.progress.Progress.state`, made by the driver, here or on
another machine: ``prunefield status`` shows what it left with the tracking server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.units import counted

SHOWN_POINTS = 5

State = Mapping[str, Any]


def panel(state: State) -> Group:
    """Stage, bar, pace, trainings under way, and the front so far, over several lines."""
    done, total, failed = state["done"], state["total"], state["failed"]
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(f"{done}/{total} done", style="bold"),
        ProgressBar(total=max(total, 1), completed=done, width=30),
        Text(f"{state['running']} running") if state["running"] else "",
        Text(f"{failed} failed", style="red") if failed else "",
    )
    rows: list[Any] = [
        Text.assemble((state["stage"], "bold cyan"), ("  " + gpus(state["gpus"]), "dim")),
        head,
        Text(_pace(state)),  # lines of their own: beside bars they are too long for 80 columns
    ]
    for key, report in state["trainings"].items():
        row = Table.grid(padding=(0, 1))
        row.add_row(
            f"training {key[:8]}",
            ProgressBar(total=report["iterations"], completed=report["iteration"], width=30),
            f"{report['iteration']:,}/{report['iterations']:,}",
        )
        rows.append(row)
        rows.append(
            Text(
                f"  {report['rate']:.0f} it/s  loss {report['loss']:.4f}  "
                f"{report['train_psnr']:.2f} dB  {_training_left(report)}"
            )
        )
    if best := thinned(state["front"]):
        rays = " on validation rays" if state.get("front_rays") == "validation" else ""
        title = "front" if state["stage"] == "finished" else "front so far"
        rows.append(Text(f"{title}{rays}", style="italic"))
        table = Table(box=None, padding=(0, 1))
        table.add_column("size", justify="right")
        table.add_column("PSNR", justify="right")
        table.add_column("model")
        for point in best:
            table.add_row(
                f"{point['size_bytes'] / 1e3:,.0f} kB", f"{point['psnr']:.2f} dB", point["model"]
            )
        rows.append(table)
    return Group(*rows)


def line(state: State) -> str:
    """The same in one line."""
    parts = [f"{state['done']}/{state['total']} done"]
    if state["running"]:
        parts[0] += f", {state['running']} running"
    if state["failed"]:
        parts.append(f"{state['failed']} failed")
    parts += [
        f"training {key[:8]}: {report['iteration']:,}/{report['iterations']:,} "
        f"iterations, {report['train_psnr']:.1f} dB, {report['rate']:.0f} it/s"
        + (f", {left}" if (left := _training_left(report)) else "")
        for key, report in state["trainings"].items()
    ]
    parts.append(_pace(state))
    if front := state["front"]:
        best = front[-1]
        parts.append(
            f"front: {counted(len(front), 'point')}, best "
            f"{best['psnr']:.2f} dB at {best['size_bytes'] / 1e3:,.0f} kB"
            + (" (validation rays)" if state.get("front_rays") == "validation" else "")
        )
    return "; ".join(part for part in parts if part)


def thinned(front: Sequence[Any], most: int = SHOWN_POINTS) -> list[Any]:
    """At most so many points of a front, spread over it, with both ends."""
    if len(front) <= most:
        return list(front)
    if most == 1:
        return [front[-1]]
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]


def gpus(use: Sequence[Mapping[str, float]]) -> str:
    """How busy the driver's GPUs are."""
    return "  ".join(
        f"GPU {i}: {gpu['percent']:.0f} %, {gpu['memory_mib'] / 1024:.1f} of "
        f"{gpu['total_mib'] / 1024:.0f} GiB"
        for i, gpu in enumerate(use)
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _training_left(report: Mapping[str, Any]) -> str:
    """How long one training still takes; the sweep's own time left is another matter."""
    left = report["iterations"] - report["iteration"]
    return f"about {clock(left / report['rate'])} left" if left and report["rate"] > 0 else ""


def _pace(state: State) -> str:
    left, rate = state["left_seconds"], state["trials_per_minute"]
    text = f"{clock(state['elapsed_seconds'])} elapsed"
    if rate > 0:
        text += f", {rate:.0f} trials/min"
    return f"{text}, about {clock(left)} left" if left else text
