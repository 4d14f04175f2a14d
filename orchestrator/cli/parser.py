"""What each command takes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cli import analysis, models, remote, sweeps, values
from orchestrator.provenance import package_version

Command = Callable[[argparse.Namespace], int | None]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the console command; each command's function is in ``command``."""
    parser = argparse.ArgumentParser(
        prog="prunefield",
        description="How small can a neural radiance field get before its pictures suffer?",
        epilog="`prunefield COMMAND --help` shows an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"prunefield {package_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Command, summary: str, example: str) -> Any:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("-v", "--verbose", action="count", default=0, help="say more")
        added.set_defaults(command=function)
        return added

    _sweep_commands(command)
    _remote_commands(command)
    _model_commands(command)
    analysis.add_commands(command)
    return parser


def _sweep_commands(command: Callable[..., Any]) -> None:
    validate = command(
        "validate",
        sweeps.validate,
        "check a sweep file and list every mistake in it",
        "prunefield validate sweeps/fern.yaml",
    )
    validate.add_argument("file", type=Path, help="sweep file, or Ray cluster file with a sweep")

    plan = command(
        "plan",
        sweeps.plan,
        "show what a sweep would run, running nothing",
        "prunefield plan sweeps/fern.yaml --json",
    )
    plan.add_argument("file", type=Path, help="sweep file")
    plan.add_argument("--json", action="store_true", help="as JSON")

    run = command(
        "run",
        sweeps.run,
        "run what a sweep misses, on this machine or the Ray cluster it stands on",
        "prunefield run sweeps/demo.yaml",
    )
    run.add_argument("file", type=Path, help="sweep file")
    run.add_argument(
        "--json",
        action="store_true",
        help="as JSON: progress in lines on standard error, in the end what `front --json` prints",
    )

    report = command(
        "report",
        sweeps.report,
        "write the Pareto report of a sweep",
        "prunefield report sweeps/demo.yaml -o report",
    )
    report.add_argument("sweep", type=Path, help="sweep file")
    report.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write to")

    front = command(
        "front",
        sweeps.front,
        "list the non-dominated trials of a sweep and the hypervolume",
        "prunefield front sweeps/demo.yaml --json",
    )
    front.add_argument("sweep", type=Path, help="sweep file")
    front.add_argument("--all", action="store_true", help="every trial, not the front alone")
    front.add_argument("--json", action="store_true", help="as JSON")

    ui = command(
        "ui",
        sweeps.ui,
        "open the MLflow UI on a sweep's tracking store",
        "prunefield ui sweeps/demo.yaml --port 5000",
    )
    ui.add_argument("sweep", type=Path, help="sweep file")
    ui.add_argument("--port", type=int, help="port on 127.0.0.1; a free one by default")


def _remote_commands(command: Callable[..., Any]) -> None:
    submit = command(
        "submit",
        remote.submit,
        "run a sweep on a Ray cluster, brought up if its file says how",
        "prunefield submit sweeps/demo.yaml --address http://127.0.0.1:8265 --detach",
    )
    submit.add_argument("file", type=Path, help="sweep file, or Ray cluster file with a sweep")
    submit.add_argument(
        "--address", metavar="URL", help="dashboard of a running cluster: send a Ray job there"
    )
    submit.add_argument(
        "--cluster", type=Path, metavar="FILE", help="Ray cluster file, if the sweep's is none"
    )
    submit.add_argument("--detach", action="store_true", help="do not wait; say how to look again")

    status = command(
        "status",
        remote.status,
        "say how a sweep stands, from anywhere that reaches its tracking server",
        "prunefield status sweeps/fern.yaml --json",
    )
    status.add_argument("-f", "--follow", action="store_true", help="live, until the sweep ends")
    status.add_argument("--json", action="store_true", help="as JSON")
    logs = command(
        "logs",
        remote.logs,
        "show what the driver of a submitted sweep prints",
        "prunefield logs sweeps/fern.yaml --follow",
    )
    logs.add_argument("-f", "--follow", action="store_true", help="until the sweep ends")
    stop = command(
        "stop",
        remote.stop,
        "end a submitted sweep as Ctrl-C would; what is finished stays",
        "prunefield stop sweeps/fern.yaml",
    )
    for added in (status, logs, stop):
        added.add_argument("sweep", help="sweep file, or name of a sweep with --tracking")
        added.add_argument("--tracking", metavar="URI", help="MLflow server (that of the file)")
        added.add_argument("--experiment", help="MLflow experiment (that of the file)")
        added.add_argument("--job", metavar="ID", help="ask the Ray cluster instead, for this job")
        added.add_argument("--address", metavar="URL", help="dashboard of the cluster, with --job")


def _model_commands(command: Callable[..., Any]) -> None:
    _evaluate_command(command)
    _prune_command(command)
    _view_command(command)
    _render_command(command)
    _export_command(command)
    _fetch_command(command)


def _evaluate_command(command: Callable[..., Any]) -> None:
    evaluate = command(
        "evaluate",
        models.evaluate,
        "measure a checkpoint on the held-out views of a scene",
        "prunefield evaluate model.safetensors --scene data/nerf_llff_data/fern --json",
    )
    _add_model(evaluate)
    evaluate.add_argument(
        "--max-rays", type=values.count, metavar="N", help="a seeded subset of N rays a view"
    )
    evaluate.add_argument("--json", action="store_true", help="as JSON")


def _prune_command(command: Callable[..., Any]) -> None:
    prune = command(
        "prune",
        models.prune,
        "prune a checkpoint and write the physically smaller model",
        "prunefield prune fern_200000.tar --scene data/nerf_llff_data/fern --ratio 0.5 "
        "-o small.safetensors",
    )
    _add_model(prune)
    target = prune.add_mutually_exclusive_group(required=True)
    target.add_argument("--ratio", type=values.ratio, help="fraction of channels to remove")
    target.add_argument(
        "--size",
        type=values.size,
        metavar="BYTES",
        help="the most that the model file may have, e.g. 500kB; without more said of the method, "
        "the best one known",
    )
    prune.add_argument("--criterion", help="scoring rule (activation; obs with --size)")
    prune.add_argument(
        "--networks",
        choices=("coarse", "fine", "both", "shared", "auto"),
        help="which; shared: the fine one alone, for both passes; auto: one of these two, by the "
        "size (both)",
    )
    prune.add_argument("--schedule", help="spread of a ratio over the layers (uniform)")
    prune.add_argument("--allocation", help="how a size is shared out (chain)")
    prune.add_argument(
        "--compensation", help="what replaces what was removed (none; obs with --size)"
    )
    prune.add_argument(
        "--coarse-weight",
        type=values.coarse_weight,
        metavar="X",
        help="how much errors of the coarse network count, with --size; auto: chosen on "
        "validation rays (0.001)",
    )
    prune.add_argument(
        "--bits",
        help="how weights are stored: fp16, int8, auto, rate, … (fp32; rate with --size alone)",
    )
    prune.add_argument(
        "--calibration-views", type=values.count, metavar="N", help="training views (all of them)"
    )
    prune.add_argument(
        "--calibration-rays",
        type=values.count,
        default=1024,
        metavar="N",
        help="rays a view (1024)",
    )
    prune.add_argument("--seed", type=values.seed, default=0, help="of the calibration set (0)")
    prune.add_argument("-o", "--output", type=Path, required=True, help="model file to write")
    prune.add_argument("--json", action="store_true", help="as JSON")


def _view_command(command: Callable[..., Any]) -> None:
    view = command(
        "view",
        analysis.view,
        "look at models side by side in the browser, from where the mouse leads",
        "prunefield view dense.safetensors small.safetensors --scene data/nerf_llff_data/fern",
    )
    view.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="model files")
    _add_scene(view)
    view.add_argument("--port", type=values.count, default=8080, help="on 127.0.0.1 (8080)")


def _render_command(command: Callable[..., Any]) -> None:
    render = command(
        "render",
        models.render,
        "render one view as a PNG, or the spiral path as an mp4",
        "prunefield render model.safetensors --scene data/nerf_llff_data/fern --view 0 -o fern.png",
    )
    _add_model(render)
    what = render.add_mutually_exclusive_group(required=True)
    what.add_argument("--view", type=int, metavar="N", help="view of the scene")
    what.add_argument("--spiral", action="store_true", help="the scene's camera path, as a video")
    render.add_argument("--frames", type=values.count, metavar="N", help="frames of the video")
    render.add_argument(
        "--fps", type=values.count, default=30, help="frames a second of the video (30)"
    )
    render.add_argument("-o", "--output", type=Path, required=True, help="file to write")


def _export_command(command: Callable[..., Any]) -> None:
    export = command(
        "export",
        analysis.export,
        "write a model, or the one to ship of a sweep, for other programs",
        "prunefield export sweeps/demo.yaml --max-size 300kB -o small.onnx",
    )
    export.add_argument(
        "model",
        type=Path,
        metavar="MODEL_OR_SWEEP",
        help="model.safetensors, a nerf-pytorch .tar checkpoint, or a sweep file (.yaml)",
    )
    analysis.add_rule(export)
    export.add_argument(
        "--format",
        choices=("safetensors", "tar", "onnx"),
        help="as the file's name ends, if not given. safetensors: float32 weights, both networks; "
        "tar: where all hidden layers are of one width; onnx: density and colour of both networks, "
        "the encoding included",
    )
    export.add_argument(
        "--register",
        action=argparse.BooleanOptionalAction,
        help="a sweep's model in MLflow's registry, under the sweep's alias (yes)",
    )
    export.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    export.add_argument("--json", action="store_true", help="as JSON")


def _fetch_command(command: Callable[..., Any]) -> None:
    fetch = command(
        "fetch",
        models.fetch,
        "download a public scene from its authors' archive",
        "prunefield fetch fern -o data",
    )
    fetch.add_argument("scene", help="fern and the other LLFF scenes, lego and the other Blender")
    fetch.add_argument(
        "-o", "--output", type=Path, default=Path("data"), metavar="DIR", help="folder (data)"
    )
    fetch.add_argument(
        "--everything", action="store_true", help="unpack photos of every size, not only ÷8"
    )


def _add_model(parser: Any) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="model.safetensors, or a nerf-pytorch .tar checkpoint"
    )
    _add_scene(parser)


def _add_scene(parser: Any) -> None:
    parser.add_argument(
        "--scene", type=Path, required=True, metavar="DIR", help="LLFF, COLMAP or Blender scene"
    )
    parser.add_argument(
        "--factor", type=values.count, help="downsampling of the photos (that of the checkpoint)"
    )
    parser.add_argument(
        "--holdout",
        type=values.holdout,
        help="every n-th view is held out (as the checkpoint; else 8)",
    )
    parser.add_argument(
        "--ndc",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="rays in normalised device coordinates (as the checkpoint)",
    )
    parser.add_argument(
        "--samples",
        type=values.count,
        nargs=2,
        metavar=("COARSE", "FINE"),
        help="samples a ray (those of the checkpoint; 64 64 for a .tar)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32", "bfloat16"),
        help="arithmetic of the linear layers (float32)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "eager", "compiled", "fused"),
        help="how networks are run; fused: bfloat16 kernels on a GPU (auto)",
    )
