"""Commands that take a checkpoint or a scene."""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError

MIN_COARSE = 2  # samples: fewer have no intervals between them


def evaluate(options: argparse.Namespace) -> int:
    """Measure a checkpoint on held-out views."""
    from nerf.evaluation import HeldOut

    model, scene, _ = open_model(options)
    held_out = HeldOut(scene, model.device, options.max_rays)
    result = held_out.evaluate(model, options.precision, backend=options.backend)
    views = [
        {"view": v.view, "mse": v.mse, "psnr": v.psnr, "ssim": v.ssim, "seconds": v.seconds}
        for v in result.views
    ]
    if options.json:
        data = {
            "mse": result.mse,
            "psnr": result.psnr,
            "ssim": result.ssim,
            "render_seconds": result.render_seconds,
            "rays_per_view": result.rays_per_view,
            "subset": not result.whole,
            "views": views,
        }
        print(json.dumps(data, indent=1))
        return 0
    if not result.whole:
        print(f"a seeded subset of {result.rays_per_view} rays a view; SSIM needs whole pictures")
    print(f"{'view':>5} {'PSNR dB':>8} {'MSE':>9} {'SSIM':>6} {'seconds':>8}")
    rows = [(str(v.view), v.psnr, v.mse, v.ssim, v.seconds) for v in result.views]
    rows.append(("mean", result.psnr, result.mse, result.ssim, result.render_seconds))
    for name, psnr, mse, ssim, seconds in rows:
        shown = "–" if ssim is None else f"{ssim:.4f}"
        print(f"{name:>5} {psnr:8.3f} {mse:9.6f} {shown:>6} {seconds:8.2f}")
    return 0


def prune(options: argparse.Namespace) -> int:
    """Prune a checkpoint outside any sweep."""
    from orchestrator.compress import Material, compress
    from orchestrator.plan import CalibrationSet
    from orchestrator.stages import BYTES_PER_PARAMETER, achieved_ratio, material_of, sizes
    from pruning import allocate

    model, scene, info = open_model(options)
    config = _pruning(options, model.fine.shape.parameters())
    check_output(options.output, ".safetensors")  # `load_model` goes by a file's name
    material = Material()
    if options.size is None:
        depth = _depth(model, config.networks, options)
        config = replace(config, layer_ratios=allocate(config.schedule, depth, config.ratio))
    if config.needs_data:
        views = options.calibration_views or len(scene.train)
        if views > len(scene.train):
            raise OrchestratorError(
                f"--calibration-views {views}: the scene has {len(scene.train)} training views"
            )
        wanted = CalibrationSet(views, options.calibration_rays, options.seed)
        config, left_out = replace(config, calibration=wanted), _validation(info)
        material = material_of(model, scene, config, left_out)
        material = replace(material, validate=_validate(scene, model, left_out))
    made = compress(options.output, model, config, material, {**info, "pruning": config.flat()})
    small, pruned, size = made.model, made.pruned, made.size
    networks: dict[str, dict[str, Any]] = {
        name: {
            "nonzero_bytes": BYTES_PER_PARAMETER * of.nonzero_parameters,
            "params": of.network.parameters(),
            "achieved_ratio": of.ratio,
            "widths": list(small.networks()[name].shape.trunk),
        }
        for name, of in pruned.items()
    }
    if options.json:
        data = {
            "output": str(options.output),
            "size_bytes": size,
            "achieved_ratio": achieved_ratio(pruned),
            "networks": networks,
            **sizes(small, pruned),
        }
        print(json.dumps(data, indent=1))
        return 0
    for name, row in networks.items():
        print(
            f"{name}: {row['params']:,} parameters kept, "
            f"{row['nonzero_bytes'] / 2**20:.3f} MB nonzero by the report's count, "
            f"{row['achieved_ratio']:.1%} of channels removed"
        )
    print(f"{options.output}: {size:,} bytes")
    return 0


def _pruning(options: argparse.Namespace, parameters: int) -> Any:
    """The options as a pruning; what was not given has the best setting known, or the report's.

    Args:
        options: of the command.
        parameters: of one dense network.

    Raises:
        OrchestratorError: options that make no sense together.
        PruningError: a name that does not exist.
    """
    from orchestrator.modelfile import AUTO, RATE, networks_for
    from orchestrator.plan import TrialConfig
    from orchestrator.spec.schema import BEST
    from pruning import ALLOCATIONS, BUDGETED, COMPENSATIONS, CRITERIA, SCHEMES
    from pruning.registry import lookup

    by_size = options.size is not None
    for given, name, instead in (
        (options.schedule if by_size else None, "--schedule", "--size is shared by --allocation"),
        (None if by_size else options.allocation, "--allocation", "--ratio is by --schedule"),
        (None if by_size else options.coarse_weight, "--coarse-weight", "it goes with --size"),
    ):
        if given is not None:
            raise OrchestratorError(f"{name} {given} has no meaning here: {instead}")
    method = (
        *(options.networks, options.criterion, options.compensation, options.allocation),
        *(options.coarse_weight, options.bits),
    )
    best: Mapping[str, Any] = BEST if by_size and not any(method) else {}
    bits = options.bits or best.get("bits", "fp32")
    networks: Any = options.networks or best.get("networks", "both")
    if networks == AUTO:
        if not by_size:
            raise OrchestratorError("--networks auto goes by the size of the file: give --size")
        networks = networks_for(options.size, bits, parameters)
    both = networks == "both"
    if options.coarse_weight is not None and not both:
        raise OrchestratorError("--coarse-weight has a meaning with --networks both alone")
    criterion = options.criterion or ("obs" if by_size else "activation")
    compensation = options.compensation or ("obs" if by_size else "none")
    schedule = options.allocation or "chain" if by_size else options.schedule or "uniform"
    lookup(CRITERIA, criterion, "criterion")
    lookup(COMPENSATIONS, compensation, "compensation")
    lookup(BUDGETED if by_size else ALLOCATIONS, schedule, "allocation")
    lookup({**SCHEMES, AUTO: None, RATE: None}, bits, "scheme")
    if bits == RATE and not (by_size and networks in ("both", "shared")):
        raise OrchestratorError(
            "--bits rate makes steps so fine that a whole file has its size: it goes with --size "
            "and --networks both or shared"
        )
    if bits == AUTO and not (by_size and schedule == "chain"):
        raise OrchestratorError(
            "--bits auto shares a size out among widths and bits: it goes with --size and chain"
        )
    weighs = by_size and both and BUDGETED[schedule].needs_paths
    return TrialConfig(
        networks=networks,
        criterion=criterion,
        ratio=options.ratio,
        schedule=schedule,
        layer_ratios=(),
        calibration=None,
        seed=options.seed,
        compensation=compensation,
        size=options.size,
        coarse_weight=(options.coarse_weight or 0.001) if weighs else None,
        bits=bits,
        errors=best.get("errors", "layer"),
    )


def _depth(model: Any, networks: str, options: argparse.Namespace) -> int:
    """Hidden layers of the networks to prune, which must agree."""
    of = {"both": ("coarse", "fine"), "shared": ("fine",)}.get(networks, (networks,))
    depths = {len(model.networks()[name].shape.trunk) for name in of}
    if len(depths) > 1:
        raise OrchestratorError(
            f"the networks of {options.checkpoint} have {sorted(depths)} hidden layers; prune them "
            "one after the other with --networks coarse and --networks fine"
        )
    return int(depths.pop())


def render(options: argparse.Namespace) -> int:
    """Render a view or the spiral path."""
    import torch

    from nerf.evaluation import write_picture, write_video
    from nerf.renderer import Renderer
    from nerf.rendering import RenderSettings

    model, scene, _ = open_model(options)
    settings = RenderSettings(scene.near, scene.far, scene.white_background)
    if options.spiral:
        poses = scene.spiral
        if options.frames is not None:
            step = max(1, len(poses) // options.frames)
            poses = poses[::step][: options.frames]
    elif 0 <= options.view < len(scene.poses):
        poses = scene.poses[options.view : options.view + 1]
    else:
        raise OrchestratorError(
            f"--view {options.view}: the scene has views 0 to {len(scene.poses) - 1}"
        )
    check_output(options.output, ".mp4" if options.spiral else ".png")
    renderer = Renderer(model, settings, options.precision, options.backend)
    pictures = []
    for number, pose in enumerate(poses, 1):
        picture = renderer.view(scene.camera, torch.as_tensor(pose))
        pictures.append(picture.cpu())
        if options.spiral:
            _show_progress(f"frame {number}/{len(poses)}", last=number == len(poses))
    if options.spiral:
        write_video(options.output, [p.numpy() for p in pictures], options.fps)
    else:
        write_picture(options.output, pictures[0])
    print(options.output)
    return 0


def fetch(options: argparse.Namespace) -> int:
    """Download a public scene."""
    from nerf.scenes import PUBLIC_SCENES, Progress, fetch_scene

    def progress(now: Progress) -> None:
        share = f" of {now.total / 2**20:.0f}" if now.total else ""
        _show_progress(
            f"{now.archive}: {now.done / 2**20:.0f}{share} MiB", last=now.done == now.total
        )

    folder = fetch_scene(
        options.scene, options.output, everything=options.everything, progress=progress
    )
    print(folder)
    print(PUBLIC_SCENES[options.scene].terms, file=sys.stderr)
    return 0


def open_model(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model on its device, the scene as the checkpoint saw it, and what the file says."""
    from nerf.checkpoints import load_model
    from nerf.devices import resolve_device
    from nerf.field import SampleCounts
    from nerf.scenes import load_scene
    from orchestrator.scene_info import settings_of

    device = resolve_device(options.device)
    if options.samples and options.samples[0] < MIN_COARSE:
        raise OrchestratorError(
            f"--samples {options.samples[0]} {options.samples[1]}: the coarse pass needs at least "
            f"{MIN_COARSE} samples a ray"
        )
    samples = SampleCounts(*options.samples) if options.samples else None
    model, info = load_model(options.checkpoint, samples)
    settings = settings_of(info, options.scene, options.factor, options.holdout, options.ndc)
    scene = load_scene(settings)
    return model.to(device), scene, info


def _validation(info: Mapping[str, Any]) -> float:
    """The fraction of pixels that a model's training left out, as its file says; else none."""
    training = info.get("training")
    value = training.get("validation", 0.0) if isinstance(training, dict) else 0.0
    return value if isinstance(value, float) and 0.0 <= value < 1.0 else 0.0


def _validate(scene: Any, model: Any, fraction: float) -> Any:
    """PSNR on the validation rays of a model's training; None where there are none."""
    from nerf.validation import ValidationRays

    if not fraction:
        return None
    rays = ValidationRays(scene, fraction, model.device)
    return lambda small: rays.score(small).psnr


def check_output(path: Path, ending: str | None = None) -> None:
    """Whether a file can be written, before the work whose result it is to hold.

    Args:
        path: the file.
        ending: that of what will be in it, if its name must not belie it.

    Raises:
        OrchestratorError: it cannot.
    """
    if ending and path.suffix.lower() not in ("", ending):
        raise OrchestratorError(
            f"-o {path}: what is written here is a {ending} file; give a name that ends so"
        )
    problem = "it is a folder" if path.is_dir() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise OrchestratorError(f"cannot write {path}: {problem}; give another file with -o")


def _show_progress(text: str, last: bool) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)
