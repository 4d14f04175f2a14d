"""Commands that look at what sweeps found, and at the sweep file itself."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cli import values
from orchestrator.errors import OrchestratorError, SweepError
from orchestrator.units import show_bytes, typed

SWEEP_FILES = (".yaml", ".yml")


def add_commands(command: Callable[..., Any]) -> None:
    """Add the commands of this module to the parser."""
    picking = command(
        "pick",
        pick,
        "say which model of a sweep to ship, and how to render it",
        "prunefield pick sweeps/demo.yaml --max-size 300kB",
    )
    picking.add_argument("sweep", type=Path, help="sweep file")
    add_rule(picking)
    picking.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it: .safetensors, .tar, .onnx"
    )
    picking.add_argument(
        "--register", action="store_true", help="in MLflow's registry, under the sweep's alias"
    )
    picking.add_argument("--json", action="store_true", help="as JSON")

    comparing = command(
        "compare",
        compare,
        "compare two sweeps, or two trials: what changed, which is ahead, by how much",
        "prunefield compare sweeps/demo.yaml sweeps/fern.yaml",
    )
    for name in ("first", "second"):
        comparing.add_argument(
            name, help="sweep file, or FILE:ID for a trial (the first digits of its id are enough)"
        )
    comparing.add_argument("--json", action="store_true", help="as JSON")

    schema_ = command(
        "schema",
        schema,
        "print the JSON Schema of the sweep file, for editors, or its reference",
        "prunefield schema -o sweep.schema.json",
    )
    schema_.add_argument("--markdown", action="store_true", help="the reference, as Markdown")
    schema_.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write")


def add_rule(parser: Any) -> None:
    """Which model is asked for; the knee of the front by default."""
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument(
        "--max-size", type=values.size, metavar="BYTES", help="the best of at most this"
    )
    rule.add_argument(
        "--min-psnr", type=values.finite, metavar="DB", help="the smallest of at least this"
    )
    parser.add_argument(
        "--by",
        choices=("validation", "held-out"),
        help="whose PSNR decides: that of the validation rays (the default where all models have "
        "one: the held-out views then judge a model that they did not choose) or of the held-out "
        "views; the answer tells both",
    )
    rule.add_argument(
        "--knee", action="store_true", help="where more bytes stop paying (the default)"
    )


def pick(options: argparse.Namespace) -> int:
    """Which model to ship."""
    from orchestrator.pick import pick as choose
    from orchestrator.pick import write_model

    data, sweep, store = _read(options.sweep)
    chosen = choose(data, options.max_size, options.min_psnr, sweep.scene.path, options.by)
    more: dict[str, Any] = {}
    if options.output:
        write_model(chosen.model, options.output)
        more["output"] = str(options.output)
    if options.register:
        more |= _register(sweep, store, chosen, options.output)
    if options.json:
        print(json.dumps({**chosen.to_json(), **more}, indent=1))
        return 0
    print(chosen.sentence)
    print(f"model:  {chosen.model}")
    print(f"render: {chosen.render_command}")
    for what, value in more.items():
        print(f"{what + ':':<7} {value}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a model, or the one to ship of a sweep, in a format that other programs read."""
    from nerf.checkpoints import load_model
    from orchestrator.cli.models import check_output
    from orchestrator.export import export as write
    from orchestrator.export import form_of
    from orchestrator.pick import pick as choose

    form = options.format or form_of(options.output)
    source, said = options.model, {}
    of_sweep = source.suffix in SWEEP_FILES
    asked = options.max_size is not None or options.min_psnr is not None
    asked = asked or options.knee or options.by is not None
    if not of_sweep and (asked or options.register is not None):
        raise OrchestratorError(
            f"{source} is a model: --max-size, --min-psnr, --knee, --by and --register choose "
            "and register one of a sweep, whose file ends with .yaml"
        )
    if of_sweep:
        data, sweep, store = _read(source)
        chosen = choose(data, options.max_size, options.min_psnr, sweep.scene.path, options.by)
        source, said = chosen.model, chosen.to_json()
    check_output(options.output)
    size = write(options.output, *load_model(source), form)
    said |= {"output": str(options.output), "format": form, "size_bytes": size}
    if of_sweep and options.register is not False:
        said |= _register(sweep, store, chosen, options.output)
    if options.json:
        print(json.dumps(said, indent=1))
        return 0
    if of_sweep:
        print(chosen.sentence)
    print(f"{options.output}: {size:,} bytes")
    if "registered" in said:
        print(f"registered: {said['registered']}, version {said['version']}")
    return 0


def _register(sweep: Any, store: Any, chosen: Any, file: Path | None) -> dict[str, Any]:
    """Put a picked model into MLflow's registry, with the file that was written of it."""
    from orchestrator.tracking import tracking_uri
    from orchestrator.tracking.registry import register

    found = register(
        tracking_uri(sweep.tracking.uri, store),
        sweep.tracking.experiment,
        sweep.name,
        chosen.record.key,
        chosen.sentence,
        [file] if file else [],
    )
    return {"registered": found.uri, "version": found.version}


def compare(options: argparse.Namespace) -> int:
    """Two sweeps or two trials side by side."""
    from orchestrator.compare import compare_sweeps, compare_trials

    sides = [_side(text) for text in (options.first, options.second)]
    (first, first_sweep, one), (second, second_sweep, other) = sides
    found: Any
    if one is not None and other is not None:
        found = compare_trials(one, other)
    elif one is None and other is None:
        found = compare_sweeps(first, second, (first_sweep.identity, second_sweep.identity))
    else:
        raise OrchestratorError("compare two sweeps, or two trials (FILE:ID), not one of each")
    print(json.dumps(found.to_json(), indent=1) if options.json else found.table())
    return 0


def view(options: argparse.Namespace) -> int:
    """Serve the viewer until interrupted."""
    import threading

    from nerf.checkpoints import load_model
    from nerf.field import SampleCounts
    from orchestrator.cli.models import open_model
    from orchestrator.viewer import Viewer

    options.checkpoint = options.checkpoints[0]
    first, scene, _ = open_model(options)
    samples = SampleCounts(*options.samples) if options.samples else None
    others = [load_model(path, samples)[0].to(first.device) for path in options.checkpoints[1:]]
    names = [
        f"{path.parent.name if path.stem == 'model' else path.stem}, "
        f"{show_bytes(path.stat().st_size)}"
        for path in options.checkpoints
    ]
    viewer = Viewer(names, [first, *others], scene, options.precision, options.port)
    print(f"{viewer.address}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        viewer.stop()
    return 0


def schema(options: argparse.Namespace) -> int:
    """The sweep file's schema."""
    from orchestrator.spec.reference import json_schema, reference

    text = reference() if options.markdown else json.dumps(json_schema(), indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
        print(options.output)
    return 0


def _read(path: Path) -> tuple[Any, Any, Any]:
    """A sweep as its report shows it, the sweep, its store."""
    from orchestrator.sweep import report_data, results_of

    results, store = results_of(path)
    return report_data(results, store), results.plan.sweep, store


def _side(text: str) -> tuple[Any, Any, Any]:
    """A sweep and, where the text names one, a record of it.

    Raises:
        SweepError: no record or several have an id that begins so.
    """
    path, _, wanted = text.rpartition(":") if not Path(text).is_file() else (text, "", "")
    data, sweep, _ = _read(Path(path or text))
    if not path or not wanted:
        return data, sweep, None
    found = [r for key, r in data.by_key.items() if key.startswith(wanted) and r.failure is None]
    if len(found) != 1:
        raise SweepError(
            f"{len(found) or 'no'} result{'s' * (len(found) != 1)} of the sweep {data.name} "
            f"begin with {wanted!r}; `prunefield front {typed(path)}` lists the ids"
        )
    return data, sweep, found[0]
