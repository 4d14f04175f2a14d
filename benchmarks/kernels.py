"""Correctness and speed of the fused kernels on one GPU: variants side by side.

    python benchmarks/kernels.py --json kernels.json [--seconds 230] [--only render,train,widths]
    python benchmarks/kernels.py --only narrow --seconds 60   # kernels of one width (below 256)

First every variant is compared with float64 at full size; a variant that fails is not timed. Times
are medians (CUDA events; the steps of a training iteration also as one CUDA graph). FLOPs are those
of the merged network without padding (docs/results/speed-notes.md). A variant that does not compile
prints its error's first line and the run goes on.
"""

import argparse
import faulthandler
import itertools
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.functional import normalize

from nerf.cameras import Rays
from nerf.encoding import encode
from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.fused import FusedRenderer
from nerf.kernels import hopper, uniform
from nerf.kernels.hopper import Build
from nerf.kernels.mlp import HOPPER, FusedField, Launch, PackedField
from nerf.kernels.plan import plan_for
from nerf.kernels.uniform import Uniform, Width
from nerf.metrics import mse, pixels_by_detail, psnr_by_detail, ssim
from nerf.rendering import RenderSettings

IMAGE = 504 * 378 * 192  # evaluations of an image at 64 + 128 a ray
START = time.time()
VARIANTS = {
    "triton": Launch(),
    "hopper": HOPPER,
    "hopper no turns": replace(HOPPER, build=Build(turn=0, train_turn=0, backward_turn=0)),
    "hopper other turns": replace(HOPPER, build=Build(turn=2, train_turn=2, backward_turn=4)),
}
WIDTHS = (256, 243, 224, 192, 160, 128, 96, 64, 48, 32)
NARROW = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 243, 256)
# Warp groups to compare with those of `uniform.GROUPS`.
OTHER_GROUPS = {32: (4, 8), 64: (4, 5), 80: (5,), 96: (3,), 128: (2,), 160: (2,)}
# Networks whose layers are not all as wide as the kernel: odd, uneven, one layer, wide views.
CHECKED = (
    FieldShape(trunk=(45, 13, 33), skip=1, feature=9, view=20),
    FieldShape(trunk=(30, 31), skip=0, feature=9, view=32),
    FieldShape(trunk=(16,), skip=None, feature=2, view=3, point_octaves=3),
    FieldShape(trunk=(128, 120, 127), skip=1, feature=60, view=70),
    FieldShape(trunk=(61,) * 8, feature=61, view=30),
    FieldShape(trunk=(90,) * 8, feature=61, view=49, point_octaves=6),
    FieldShape(trunk=(217,) * 8, feature=217, view=108),
)


def shape_of(width: int) -> FieldShape:
    """The original network with every width scaled from 256."""
    return FieldShape(trunk=(width,) * 8, feature=width, view=max(1, width // 2))


def rays(count: int, samples: int, seed: int = 0) -> list[torch.Tensor]:
    """Random rays through the NDC cube: origins, directions, distances, unit directions."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, device="cuda", generator=generator) * 2 - 1

    origins, directions = uniform(count, 3), uniform(count, 3)
    distances = (uniform(count, samples) + 1) / 2
    return [origins, directions, distances.sort().values, normalize(uniform(count, 3), dim=-1)]


def field_of(shape: FieldShape, seed: int = 0) -> Field:
    """A field with random weights, on the GPU."""
    torch.manual_seed(seed)
    return Field(shape).cuda()


def median_ms(run: Callable[[], Any], seconds: float = 0.25) -> float:
    """Median time of a call in milliseconds, by events, after a warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = int(min(100, max(10, seconds / (time.perf_counter() - begin + 1e-6))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[len(times) // 2]


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """A call as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Euclidean norm; infinite if anything is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm())


def exact(field: Field, given: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Field]:
    """Density and colour in float64, and the float64 field."""
    wide = Field(field.shape).double().cuda()
    wide.load_state_dict(field.state_dict())
    origins, directions, distances, unit = (x.double() for x in given)
    density, rgb = wide(origins[:, None] + distances[..., None] * directions[:, None], unit)
    return density, rgb, wide


def check_render(launch: Launch) -> dict[str, float]:
    """Errors of the evaluation against float64, at a size that is not a multiple of any block."""
    field, given = field_of(FieldShape()), rays(701, 191)
    with torch.no_grad():
        density, rgb, _ = exact(field, given)
    packed = PackedField(field, launch)
    worst = {"density": 0.0, "rgb": 0.0}
    for _ in range(3):  # an error that moves between runs is a race
        out = packed(*given)
        worst["density"] = max(worst["density"], error(out[0], density))
        worst["rgb"] = max(worst["rgb"], error(out[1], rgb))
    return worst


def check_train(launch: Launch, count: int = 1024, samples: int = 64) -> dict[str, float]:
    """Errors of outputs and gradients against float64 autograd, for nearly all rays."""
    count -= 1  # rows are then no multiple of a block
    field, given = field_of(FieldShape()), rays(count, samples)
    density, rgb, wide = exact(field, given)
    # Gradients of one sign, as a loss gives: with random signs sums cancel and rounding dominates.
    g_density = torch.rand(count, samples, device="cuda") / count
    g_rgb = torch.rand(count, samples, 3, device="cuda") / count
    torch.autograd.backward((density, rgb), (g_density.double(), g_rgb.double()))
    fused = FusedField(field.shape, count, samples, "cuda", launch)
    fused.load(field)
    worst = {"density": 0.0, "rgb": 0.0}
    flat = []
    for _ in range(3):
        fused.activations.fill_(float("nan"))
        fused.partials.fill_(float("nan"))
        fused.forward(*given[:3], encode(given[3], 4))
        worst["density"] = max(worst["density"], error(fused.density, density.detach()))
        worst["rgb"] = max(worst["rgb"], error(fused.rgb, rgb.detach()))
        flat.append(fused.backward(g_density, g_rgb).clone())
    found = fused.plan.views(fused.extended_gradients)
    errors = {n: error(found[n], p.grad) for n, p in wide.named_parameters() if p.grad is not None}
    worst["worst gradient"] = max(errors.values())
    worst["all gradients"] = error(flat[0], _ordered(wide, fused))
    worst["same bits"] = float(all(torch.equal(flat[0], x) for x in flat))
    return worst


def _ordered(wide: Field, fused: FusedField) -> torch.Tensor:
    grads = {n: p.grad for n, p in wide.named_parameters()}
    parts = [grads[n] for n in fused.plan.parameters]
    return torch.cat([p.reshape(-1) for p in parts if p is not None])


def good(errors: dict[str, float]) -> bool:
    """Whether a variant computes the right function (bf16: between 1e-3 and 1e-2 a forward)."""
    return max(errors["density"], errors["rgb"]) < 0.02 and errors.get("all gradients", 0) < 0.15


def check_uniform(shape: FieldShape, width: Width) -> dict[str, float]:
    """Errors of a kernel of one width against float64, the worst of several sizes."""
    field = field_of(shape)
    worst = {"density": 0.0, "rgb": 0.0}
    packed = PackedField(field, HOPPER, Uniform(shape, width))
    for count, samples in ((1, 1), (5, 29), (301, 191), (4001, 64)):
        given = rays(count, samples)
        with torch.no_grad():
            density, rgb, _ = exact(field, given)
        for _ in range(2):  # an error that moves between runs is a race
            out = packed(*given)
            worst["density"] = max(worst["density"], error(out[0], density))
            worst["rgb"] = max(worst["rgb"], error(out[1], rgb))
    return worst


def picture(shape: FieldShape) -> dict[str, float]:
    """Time of a picture of both networks through the renderer, and of its networks."""
    model = NerfModel.create(shape, SampleCounts(), 0).cuda()
    renderer = FusedRenderer(model, RenderSettings(0.0, 1.0, white_background=False))
    count = 504 * 378
    origins, directions, _, unit = rays(count, 1)
    all_rays = Rays(origins, directions, unit)
    whole = median_ms(lambda: renderer(all_rays), 0.3)
    networks = 0.0
    for samples in (64, 192):
        packed, distances = PackedField(model.fine), torch.rand(count, samples, device="cuda")
        networks += median_ms(lambda p=packed, t=distances: p(origins, directions, t, unit), 0.2)
    return {"seconds": whole / 1000, "networks": networks / 1000}


def render(
    launch: Launch, shape: FieldShape, count: int = 24576, layout: Uniform | None = None
) -> dict[str, float]:
    """Time to evaluate `count` rays of 128 samples, projected to an image."""
    packed, given = PackedField(field_of(shape), launch, layout), rays(count, 128)
    ms = median_ms(lambda: packed(*given))
    evaluations = count * 128
    flops = packed.plan.flops()
    return {
        "ms": ms,
        "tflops": flops * evaluations / ms / 1e9,
        "padded_tflops": packed.plan.flops(padded=True) * evaluations / ms / 1e9,
        "image_s": ms / 1000 * IMAGE / evaluations,
        "flops": flops,
    }


def layers(shape: FieldShape, rows: int = 131_072 * 4) -> dict[str, float]:
    """The merged network layer by layer in bf16 (addmm, then ReLU), for comparison."""
    width = shape.trunk[0]
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / 16
    b = torch.randn(width, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        h = x
        for _ in range(7):
            h = torch.addmm(b, h, w).relu_()

    ms = median_ms(run)
    return {"ms": ms, "tflops": 2 * width * width * 7 * rows / ms / 1e9}


def train(launch: Launch) -> dict[str, float]:
    """Times of the parts of a training iteration at the report's batch, both networks."""
    fields, given, grads = [], [], []
    for samples in (64, 128):
        field = FusedField(FieldShape(), 1024, samples, "cuda", launch)
        field.load(field_of(FieldShape(), samples))
        fields.append(field)
        one = rays(1024, samples)
        given.append((*one[:3], encode(one[3], 4)))
        g = torch.rand(1024, samples, device="cuda"), torch.rand(1024, samples, 3, device="cuda")
        grads.append(g)
    found: dict[str, float] = {}
    for name, field, inputs, g in zip(("64", "128"), fields, given, grads, strict=True):

        def forward(field: FusedField = field, inputs: Any = inputs) -> None:
            field.forward(*inputs)

        def deltas(field: FusedField = field, g: Any = g) -> None:
            field.backward_deltas(*g)

        for part, run in (
            ("pack", field.pack),
            ("forward", forward),
            ("deltas", deltas),
            ("products", field.partial_sums),
            ("reduce", field.reduce),
            ("unmerge", field.unmerge),
        ):
            found[f"{part} {name}"] = median_ms(graphed(run), 0.1)

    def step() -> None:
        for field, inputs, g in zip(fields, given, grads, strict=True):
            field.pack()
            field.forward(*inputs)
            field.backward(*g)

    found["step"] = median_ms(graphed(step))
    evaluations = 1024 * (64 + 128)
    found["tflops"] = 3 * fields[0].plan.flops() * evaluations / found["step"] / 1e9
    found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def cublas() -> dict[str, float]:
    """One weight gradient of the fine network through cuBLAS, for comparison."""
    a, b = (torch.randn(131_072, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda: a.t() @ b)
    return {"ms": ms, "tflops": 2 * 131_072 * 256 * 256 / ms / 1e9}


def guarded(name: str, run: Callable[[], Any]) -> Any:
    """What a call returns, or None after printing its error's first line."""
    try:
        return run()
    except Exception as failure:
        lines = [line for line in str(failure).splitlines() if line.strip()]
        cause = failure.__cause__
        print(f"  {name}: {type(failure).__name__}: {lines[0][:160] if lines else ''}")
        if cause is not None:
            print(f"    from {type(cause).__name__}: {str(cause).strip()[-200:]}")
        where = traceback.extract_tb(failure.__traceback__)[-1]
        print(f"    at {Path(where.filename).name}:{where.lineno}")
        return None


def compile_variant(name: str) -> None:
    """Compile a variant's kernels into Triton's cache and run them (in a process of its own)."""
    launch = VARIANTS[name]
    field = field_of(FieldShape())
    given = rays(1024, 64)
    try:
        PackedField(field, launch)(*given)
        torch.cuda.synchronize()
        fused = FusedField(field.shape, 1024, 64, "cuda", launch)
        fused.load(field)
        fused.forward(*given[:3], encode(given[3], 4))
        g_density, g_rgb = torch.ones_like(fused.density), torch.ones_like(fused.rgb)
        fused.backward(g_density, g_rgb)
        torch.cuda.synchronize()
    except Exception:
        return  # the main process meets the same error and reports it


def compile_all(seconds: float) -> None:
    """Compile every variant at the same time; one that does not return is left out."""
    context = multiprocessing.get_context("spawn")
    processes = {name: context.Process(target=compile_variant, args=(name,)) for name in VARIANTS}
    for process in processes.values():
        process.start()
    until = time.time() + seconds
    for name, process in processes.items():
        process.join(max(0.1, until - time.time()))
        if process.is_alive():
            print(f"  {name}: did not return in {seconds:.0f} s, left out")
            process.kill()
            process.join()
            del VARIANTS[name]
    print(f"compiled in {time.time() - START:.0f} s")


def line(name: str, values: dict[str, float]) -> None:
    """Print one row."""
    print(f"  {name:18s} " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


class Run:
    """One run: what it found, and how much time is left."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "variants": {n: {k: str(v) for k, v in asdict(x).items()} for n, x in VARIANTS.items()},
        }

    def save(self) -> None:
        """Write what was found so far."""
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1))

    def time_left(self) -> bool:
        """Whether there is time for more; says so when there is not."""
        left = time.time() - START < self.seconds
        if not left:
            print("  (out of time)")
        return left

    def compare(
        self,
        part: str,
        key: str,
        check: Callable[[Launch], dict[str, float]],
        run: Callable[[Launch], Any],
    ) -> str | None:
        """Check every variant and time the correct ones; returns the one with the least `key`."""
        print(f"{part}: errors, then times")
        rows = self.found.setdefault(part, {})
        for name, launch in VARIANTS.items():
            if not self.time_left():
                break
            errors = guarded(name, lambda launch=launch: check(launch))
            torch.cuda.empty_cache()
            if errors is None:
                continue
            line(name, errors)
            rows[name] = {"errors": errors}
            if good(errors):
                times = guarded(name, lambda launch=launch: run(launch))
                if times is not None:
                    line(name, times)
                    rows[name] |= times
            torch.cuda.empty_cache()
            self.save()
        timed = {name: row[key] for name, row in rows.items() if key in row}
        return min(timed, key=lambda name: timed[name]) if timed else None

    def widths(self, name: str) -> None:
        """Time against FLOPs as the network narrows."""
        print(f"widths ({name})")
        rows = self.found.setdefault("widths", {})
        for width in WIDTHS:
            if not self.time_left():
                break
            row = guarded(str(width), lambda w=width: render(VARIANTS[name], shape_of(w)))
            if row:
                line(str(width), row)
                rows[width] = row
            self.save()

    def narrow(self) -> None:
        """The kernels of one width: correctness, time against FLOPs, whole pictures."""
        started = time.time()
        widths = [Width(w) for w in uniform.WIDTHS]
        widths += [Width(w, g) for w, groups in OTHER_GROUPS.items() for g in groups]
        names = [width.name for width in widths]
        guarded("compiling", lambda: hopper.kernels(Build(), 0, "render", *names))
        print(f"{len(names)} kernels compiled in {time.time() - started:.0f} s", flush=True)
        print("errors against float64")
        rows = self.found.setdefault("narrow", {})
        right: set[str] = set()
        for width in widths:
            shape = shape_of(width.width - width.width // 60)
            if self.checked(width.name, shape, width):
                right.add(width.name)
        for at, shape in enumerate(CHECKED):
            found = uniform.uniform_for(plan_for(shape))
            if found is not None:
                self.checked(f"network {at} {found.width.name}", shape, found.width)
        print("seconds of a picture's evaluations; of hopper_chain.cu; MFLOP; TFLOP/s", flush=True)
        for width in NARROW:
            shape = shape_of(width)
            row = {"flops": plan_for(shape).flops()}
            old = replace(HOPPER, uniform=False)
            before = guarded(f"chain {width}", lambda s=shape, x=old: render(x, s))
            if before:
                row["chain"] = before["image_s"]
            for kernel in widths:
                if kernel.width != next((w for w in uniform.WIDTHS if w >= width), None):
                    continue
                if kernel.name not in right:
                    continue
                layout = Uniform(shape, kernel)
                new = guarded(kernel.name, lambda s=shape, x=layout: render(HOPPER, s, layout=x))
                if new:
                    row[kernel.name] = new["image_s"]
            line(str(width), {k: v / 1e6 if k == "flops" else v for k, v in row.items()})
            rows[width] = row
            self.save()

    def checked(self, name: str, shape: FieldShape, width: Width) -> bool:
        """Whether the kernel of a width is right on a network; prints its errors."""
        errors = guarded(name, lambda: check_uniform(shape, width))
        if errors is None:
            return False
        line(name, errors)
        self.found.setdefault("narrow errors", {})[name] = errors
        self.save()
        return max(errors.values()) < 0.02

    def pictures(self) -> None:
        """Whole pictures through the renderer: what else there is than networks."""
        print("whole picture, 504x378: seconds by width; of it both networks")
        rows = self.found.setdefault("pictures", {})
        x, y = (torch.rand(378, 504, 3, device="cuda") for _ in range(2))
        order = pixels_by_detail(y)
        metrics = {
            "mse ms": median_ms(lambda: mse(x, y)),
            "ssim ms": median_ms(lambda: ssim(x, y)),
            "detail ms": median_ms(lambda: psnr_by_detail(x, y, order)),
        }
        line("metrics", metrics)
        self.found["metrics"] = metrics
        for width in NARROW:
            row = guarded(str(width), lambda w=width: picture(shape_of(w)))
            if row:
                line(str(width), row)
                rows[width] = row
        self.save()

    def baseline(self, name: str, measure: Callable[[], dict[str, float]]) -> None:
        """Time something to compare with."""
        row = guarded(name, measure)
        if row:
            line(name, row)
            self.found[name] = row


def main() -> None:
    """Run everything that the time allows."""
    parser = argparse.ArgumentParser(description="Correctness and speed of the fused kernels")
    parser.add_argument("--json", type=Path, help="where to write every number")
    parser.add_argument("--seconds", type=float, default=230, help="time allowed")
    parser.add_argument("--only", default="render,train,widths", help="parts to run")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = options.only.split(",")
    run = Run(options.json, options.seconds)
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True)  # a kernel that hangs
    if "narrow" in parts:
        run.narrow()
    if "pictures" in parts:
        run.pictures()
    if set(parts) <= {"narrow", "pictures"}:
        print(f"done in {time.time() - START:.0f} s")
        return
    compile_all(0.45 * options.seconds)
    best = next(reversed(VARIANTS))
    if "render" in parts:
        best = (
            run.compare("render", "image_s", check_render, lambda x: render(x, FieldShape()))
            or best
        )
        run.baseline("layer by layer", lambda: layers(FieldShape()))
    if "train" in parts:
        run.compare("train", "step", check_train, train)
        run.baseline("cuBLAS, 1 gradient", cublas)
    if "widths" in parts:
        run.widths(best)
    run.save()
    print(f"done in {time.time() - START:.0f} s")


if __name__ == "__main__":
    main()
