"""How fast prunefield trains and renders here: one table, and every number as JSON.

    python benchmarks/speed.py --json speed.json [--only train,image,widths,…] [--seconds 180]

The shapes are those of the real fern (20 views of 504×378, 1,024 rays an iteration, 64 + 128
evaluations a ray, two networks of 595,844 parameters); the photos are made up, which changes no
time. On a CPU a run takes fewer rays and pixels and says so. FLOPs are those of the original
network (1.187 MFLOP an evaluation, three times that in training); the floor is what they would take
at the rate of one large bf16 (or, asked for float32, fp32) matrix product, measured here first.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from nerf.backends import Backend
from nerf.cameras import Camera, view_rays
from nerf.devices import Precision, describe_device, resolve_device
from nerf.evaluation import HeldOut
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.recipe import Recipe
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings
from nerf.scenes import Scene
from nerf.training import Trainer
from orchestrator.provenance import git_commit

START = time.monotonic()
WIDTHS = (256, 243, 224, 192, 160, 128, 112, 96, 80, 64, 48, 32)
KINDS: tuple[tuple[Backend, Precision], ...] = (
    ("eager", "float32"),
    ("eager", "tf32"),
    ("eager", "bfloat16"),
    ("fused", "bfloat16"),
)
COMPILED: tuple[tuple[Backend, Precision], ...] = (("compiled", "bfloat16"),)
NDC = RenderSettings(0.0, 1.0, white_background=False)


def fern_shapes(height: int = 378, width: int = 504) -> Scene:
    """A scene with fern's cameras, roughly, and photos that are smooth noise."""
    random = np.random.default_rng(0)
    views = 20
    coarse = random.random((views, height // 18, width // 18, 3), dtype=np.float32)
    images = coarse.repeat(18, axis=1).repeat(18, axis=2)
    poses = np.concatenate((np.eye(3), np.zeros((3, 1))), axis=1)[None].repeat(views, axis=0)
    poses[:, :, 3] = 0.2 * random.standard_normal((views, 3))
    return Scene(
        name="fern's shapes",
        images=images,
        poses=poses.astype(np.float32),
        camera=Camera(*images.shape[1:3], focal=407.6 * width / 504, ndc=True),
        near=0.0,
        far=1.0,
        train=tuple(v for v in range(views) if v % 8),
        test=tuple(v for v in range(views) if v % 8 == 0),
        white_background=False,
        fingerprint="none",
        spiral=poses[:2].astype(np.float32),
    )


def shape_of(width: int) -> FieldShape:
    """The original network with every width scaled from 256."""
    return FieldShape(trunk=(width,) * 8, feature=width, view=max(1, width // 2))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median wall time of a call, once it is warm."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 7)


class Bench:
    """One run: what it measures on, what it found, how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = resolve_device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.path, self.budget = options.json, options.seconds
        self.rays = options.rays or (1024 if self.on_gpu else 128)
        shrink = 1 if self.on_gpu else 7
        self.scene = fern_shapes(378 // shrink, 504 // shrink)
        self.rates = {
            "bfloat16": matmul_rate(self.device, torch.bfloat16),
            "float32": matmul_rate(self.device, torch.float32),
        }
        self.found: dict[str, Any] = {
            "commit": git_commit(Path(__file__).parent),
            "hardware": describe_device(self.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rays": self.rays,
            "picture": [self.scene.camera.width, self.scene.camera.height],
            "matmul_tflops": {name: rate / 1e12 for name, rate in self.rates.items()},
            "train": [],
            "image": [],
            "widths": [],
            "trials": [],
        }
        say(
            f"{self.found['hardware']}, torch {torch.__version__}, commit {self.found['commit']}; "
            + ", ".join(f"{n} product {r / 1e12:.1f} TFLOP/s" for n, r in self.rates.items())
        )

    def rate(self, precision: Precision) -> float:
        """What the floor is worked out from."""
        return self.rates["float32" if precision == "float32" else "bfloat16"]

    def keep(self, part: str, row: dict[str, Any]) -> None:
        """Keep a row, in memory and in the file."""
        self.found[part].append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.found, indent=1))

    def over(self) -> bool:
        """Whether the time is up; says so."""
        late = time.monotonic() - START > self.budget
        if late:
            say("  (out of time)")
        return late

    def peak(self) -> float | None:
        """Most GPU memory since the last call, in GiB."""
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    # --- parts -----------------------------------------------------------------------------

    def train(self, kinds: Sequence[tuple[Backend, Precision]] | None = None) -> None:
        """Iterations a second by backend and precision."""
        say("training          it/s   ms/it  TFLOP/s  floor ms  of floor  peak GiB  first s")
        for backend, precision in kinds or self.kinds():
            if self.over():
                return
            recipe = Recipe(rays=self.rays, precision=precision)
            self.peak()
            started = time.perf_counter()
            trainer = guarded(
                f"{backend} {precision}",
                lambda b=backend, r=recipe: Trainer(
                    self.scene, FieldShape(), SampleCounts(), r, 0, self.device, b
                ),
            )
            if trainer is None:
                continue
            if trainer.backend != backend:
                say(f"  {backend:8} {precision:9} falls back to {trainer.backend}")
                continue
            trainer.advance(12 if self.on_gpu else 1)
            first = time.perf_counter() - started
            count = max(2, int(3 * trainer.advance(20 if self.on_gpu else 1).rate))
            progress = trainer.advance(count)
            n_all = trainer.model.samples.coarse + trainer.model.samples.fine
            flops = 3 * (trainer.model.samples.coarse + n_all) * FieldShape().flops() * self.rays
            row = {
                "backend": backend,
                "precision": precision,
                "rate": progress.rate,
                "ms": 1000 / progress.rate,
                "tflops": flops * progress.rate / 1e12,
                "floor_ms": 1000 * flops / self.rate(precision),
                "of_floor": flops * progress.rate / self.rate(precision),
                "first_seconds": first,
                "loss": progress.loss,
            }
            del trainer
            row["peak_gib"] = self.peak()
            self.keep("train", row)
            say(
                f"  {backend:8} {precision:9} {row['rate']:7.2f} {row['ms']:7.2f} "
                f"{row['tflops']:8.2f} {row['floor_ms']:9.2f} {row['of_floor']:8.0%}  "
                f"{shown(row['peak_gib'])} {first:8.1f}"
            )

    def image(self, kinds: Sequence[tuple[Backend, Precision]] | None = None) -> None:
        """Seconds a whole held-out view, by backend and precision."""
        say("one image            seconds  TFLOP/s   floor s  of floor  peak GiB")
        for backend, precision in kinds or self.kinds():
            if self.over():
                return
            self.picture("image", backend, precision, FieldShape(), f"{backend:8} {precision:9}")

    def compiled(self) -> None:
        """The same through `torch.compile`: last, as compiling takes the longest."""
        self.image(COMPILED)
        self.train(COMPILED)

    def widths(self) -> None:
        """Seconds a view against FLOPs, dense networks of a width, on the fastest backend."""
        say("width    MFLOP/eval  seconds  TFLOP/s   floor s  of floor  peak GiB")
        backend: Backend = "auto"
        for width in WIDTHS:
            if self.over():
                return
            shape = shape_of(width)
            self.picture(
                "widths", backend, "bfloat16", shape, f"{width:3} {shape.flops() / 1e6:12.3f}  "
            )

    def picture(
        self, part: str, backend: Backend, precision: Precision, shape: FieldShape, name: str
    ) -> None:
        """One row of `image` or `widths`."""
        model = NerfModel.create(shape, SampleCounts(), 0).to(self.device)
        self.peak()
        renderer = guarded(name, lambda: Renderer(model, NDC, precision, backend))
        if renderer is None:
            return
        if backend not in ("auto", renderer.backend):
            say(f"  {name} falls back to {renderer.backend}")
            return
        camera = self.scene.camera
        pose = torch.as_tensor(self.scene.poses[0], device=self.device)
        rays = view_rays(camera, pose)
        seconds = seconds_of(lambda: renderer.colors(rays), self.device)
        flops = model.flops_per_ray() * camera.height * camera.width
        row = {
            "backend": renderer.backend,
            "precision": precision,
            "width": shape.trunk[0],
            "mflop_per_evaluation": shape.flops() / 1e6,
            "seconds": seconds,
            "tflops": flops / seconds / 1e12,
            "floor_seconds": flops / self.rate(precision),
            "of_floor": flops / seconds / self.rate(precision),
            "peak_gib": self.peak(),
        }
        self.keep(part, row)
        say(
            f"  {name} {seconds:8.4f} {row['tflops']:8.2f} {row['floor_seconds']:9.4f} "
            f"{row['of_floor']:8.0%}  {shown(row['peak_gib'])}"
        )

    def trials(self) -> None:
        """Prune and evaluate three whole held-out views, one after another in this process."""
        from orchestrator.bridge import calibrate  # noqa: PLC0415
        from orchestrator.compress import prune_model  # noqa: PLC0415
        from pruning import allocate  # noqa: PLC0415

        say("trials            a minute  prune s  evaluate s")
        model = NerfModel.create(FieldShape(), SampleCounts(), 0).to(self.device)
        held_out = HeldOut(self.scene, self.device)
        views, rays = 2, 16
        nested = calibrate(model, self.scene, [views], [rays], 0, ("mean",))
        statistics = {name: of.subset((views, rays)) for name, of in nested.items()}
        ratios = [0.02 + 0.9 * i / 12 for i in range(12 if self.on_gpu else 2)]

        def trial(ratio: float) -> tuple[float, float]:
            synchronize(self.device)
            started = time.perf_counter()
            layers = allocate("uniform", 8, ratio)
            small, _ = prune_model(model, "both", "activation", layers, statistics, None)
            synchronize(self.device)
            middle = time.perf_counter()
            held_out.evaluate(small, "bfloat16")
            return middle - started, time.perf_counter() - middle

        if guarded("trials", lambda: trial(0.5)) is None:
            return
        times = [trial(ratio) for ratio in ratios]
        prune, evaluate = (sum(part) / len(times) for part in zip(*times, strict=True))
        row = {"per_minute": 60 / (prune + evaluate), "prune": prune, "evaluate": evaluate}
        self.keep("trials", {**row, "ratios": ratios})
        say(f"  prune + 3 views  {row['per_minute']:8.1f} {prune:8.4f} {evaluate:11.4f}")

    def kinds(self) -> list[tuple[Backend, Precision]]:
        """What is worth measuring here."""
        if self.on_gpu:
            return list(KINDS)
        return [(b, p) for b, p in KINDS if b != "fused" and p != "tf32"]


def guarded(name: str, make: Callable[[], Any]) -> Any:
    """What a call returns, or None after printing where it failed."""
    try:
        return make()
    except Exception as failure:
        lines = [line for line in str(failure).splitlines() if line.strip()]
        where = traceback.extract_tb(failure.__traceback__)[-1]
        print(f"  {name}: {type(failure).__name__}: {lines[0][:200] if lines else ''}")
        print(f"    at {Path(where.filename).name}:{where.lineno}", flush=True)
        return None


def shown(value: float | None) -> str:
    """A number of GiB, or nothing on a CPU."""
    return "       –" if value is None else f"{value:8.2f}"


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="Training and rendering speed, one table")
    parser.add_argument("--json", type=Path, help="where to write every number")
    parser.add_argument(
        "--only", default="train,image,widths,trials,compiled", help="parts to measure"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rays", type=int, help="rays an iteration (1,024; 128 on a CPU)")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing after so long")
    options = parser.parse_args()
    bench = Bench(options)
    for part in options.only.split(","):
        getattr(bench, part)()
        if bench.on_gpu:
            torch.cuda.empty_cache()
    say(f"done in {time.monotonic() - START:.0f} s")


if __name__ == "__main__":
    main()
