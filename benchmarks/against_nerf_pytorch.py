"""prunefield beside nerf-pytorch, at the same shapes in the same process conditions.

    git clone https://github.com/yenchenlin/nerf-pytorch
    python benchmarks/against_nerf_pytorch.py --checkout nerf-pytorch --json against.json

The two take turns, each turn a process of its own with the same number of threads, the same rays an
iteration, the same samples a ray, and random weights and rays. A row is the median over the rounds;
the ratio is the median of the rounds' ratios, so a machine whose speed drifts harms both alike.
Besides wall time, CPU seconds are given: on a machine that others use too, they say more.

nerf-pytorch is imported from the checkout as it is; nothing of it is changed or kept. Packages that
only its scene loaders use are replaced by empty modules where they are missing. It computes in
fp32, prunefield in what `--precision` says.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve()
N_COARSE, N_FINE = 64, 64


def timed(run: Callable[[], Any], count: int, device: str) -> dict[str, float]:
    """Wall and CPU seconds of one call, mean over `count` of them, after a warm-up."""
    import torch  # noqa: PLC0415

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        run()
    wait()
    return {
        "wall": (time.perf_counter() - wall) / count,
        "cpu": (time.process_time() - cpu) / count,
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Measure prunefield."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch  # noqa: PLC0415
    from speed import NDC, fern_shapes  # noqa: PLC0415

    from nerf.field import FieldShape, SampleCounts  # noqa: PLC0415
    from nerf.recipe import Recipe  # noqa: PLC0415
    from nerf.renderer import Renderer  # noqa: PLC0415
    from nerf.training import Trainer  # noqa: PLC0415

    scene = fern_shapes(90, 126)
    device = torch.device(options.device)
    samples = SampleCounts(N_COARSE, N_FINE)
    recipe = Recipe(rays=options.rays, precision=options.precision)
    trainer = Trainer(scene, FieldShape(), samples, recipe, 0, device, options.backend)
    rays = trainer.pool.rays[: options.picture_rays]
    renderer = Renderer(trainer.model, NDC, options.precision, options.backend)
    return {
        "backend": trainer.backend,
        "train": timed(lambda: trainer.advance(1), options.count, options.device),
        "render": timed(lambda: renderer.colors(rays), options.count, options.device),
    }


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """Measure nerf-pytorch: its own functions, with the arguments of its fern configuration."""
    sys.path.insert(0, str(options.checkout))
    for name in ("cv2", "imageio", "matplotlib", "matplotlib.pyplot", "tqdm"):
        if importlib.util.find_spec(name.split(".")[0]) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(tqdm=None, trange=None)
    import numpy as np  # noqa: PLC0415
    import run_nerf as nerf  # noqa: PLC0415
    import torch  # noqa: PLC0415

    if options.device == "cuda":
        torch.set_default_tensor_type("torch.cuda.FloatTensor")  # as its own main does
    empty = tempfile.TemporaryDirectory()
    (Path(empty.name) / "none").mkdir()
    arguments = argparse.Namespace(
        multires=10, multires_views=4, i_embed=0, use_viewdirs=True, netdepth=8, netwidth=256,
        netdepth_fine=8, netwidth_fine=256, N_importance=N_FINE, N_samples=N_COARSE,
        netchunk=1024 * 64, lrate=5e-4, ft_path=None, basedir=empty.name, expname="none",
        no_reload=True, perturb=1.0, white_bkgd=False, raw_noise_std=1.0, dataset_type="llff",
        no_ndc=False, lindisp=False,
    )  # fmt: skip
    train_options, test_options, _, _, optimizer = nerf.create_nerf(arguments)
    bounds = {"near": 0.0, "far": 1.0}
    height, width, focal = 378, 504, 407.6
    camera = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])

    def rays(count: int) -> Any:
        directions = torch.rand(count, 3, device=options.device) - 0.5
        directions[:, 2] = -1.0
        return torch.stack((torch.zeros_like(directions), directions))

    batch, picture = rays(options.rays), rays(options.picture_rays)
    target = torch.rand(options.rays, 3, device=options.device)

    def step() -> None:
        rgb, _, _, extras = nerf.render(
            height, width, camera, chunk=1024 * 32, rays=batch, retraw=True, **bounds,
            **train_options,
        )  # fmt: skip
        optimizer.zero_grad()
        loss = ((rgb - target) ** 2).mean() + ((extras["rgb0"] - target) ** 2).mean()
        loss.backward()
        optimizer.step()

    def render() -> None:
        with torch.no_grad():
            nerf.render(
                height, width, camera, chunk=1024 * 32, rays=picture, **bounds, **test_options
            )

    return {
        "backend": "nerf-pytorch",
        "train": timed(step, options.count, options.device),
        "render": timed(render, options.count, options.device),
    }


def one(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One turn of one side, in a process of its own."""
    command = [sys.executable, str(HERE), "--side", side, *options.given]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Take turns and print the table; with --side, measure one side and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="folder of nerf-pytorch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rays", type=int, default=1024, help="an iteration")
    parser.add_argument("--picture-rays", type=int, default=4096)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--count", type=int, default=2, help="calls a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.given = sys.argv[1:]
    if options.side is not None:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](options)))
        return
    rounds = []
    for number in range(options.rounds):
        turn = {side: one(side, options) for side in ("theirs", "ours")}
        rounds.append(turn)
        said = [f"{w} {ratio(turn, w, 'wall'):.2f}×" for w in ("train", "render")]
        print(f"round {number + 1}: " + ", ".join(said), flush=True)
    print(f"{options.threads} threads, {options.rays} rays, ours in {options.precision}")
    print("            nerf-pytorch s   prunefield s   ratio (wall)   ratio (CPU time)")
    table = {}
    for what in ("train", "render"):
        table[what] = {
            "theirs": statistics.median(r["theirs"][what]["wall"] for r in rounds),
            "ours": statistics.median(r["ours"][what]["wall"] for r in rounds),
            "ratio": statistics.median(ratio(r, what, "wall") for r in rounds),
            "cpu_ratio": statistics.median(ratio(r, what, "cpu") for r in rounds),
        }
        row = table[what]
        print(
            f"{what:8} {row['theirs']:17.3f} {row['ours']:14.3f} {row['ratio']:14.2f} "
            f"{row['cpu_ratio']:18.2f}"
        )
    if options.json is not None:
        given = {k: str(v) for k, v in vars(options).items() if k != "given"}
        options.json.write_text(json.dumps({"options": given, "table": table, "rounds": rounds}))


def ratio(turn: dict[str, Any], what: str, clock: str) -> float:
    """How many times as fast as nerf-pytorch."""
    return float(turn["theirs"][what][clock] / turn["ours"][what][clock])


if __name__ == "__main__":
    main()
