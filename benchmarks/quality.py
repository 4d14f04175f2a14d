"""Does a fast training learn as well? The same seed, trained by several backends, and their PSNR.

    export PRUNEFIELD_DATA=…                        # holds nerf_llff_data/fern
    python benchmarks/quality.py --iterations 20000 --json quality.json

Trains the real fern by each of `--runs` (backend:precision) one after another from the same seed,
on the same rays with the same random numbers, and measures whole held-out views in fp32 with plain
PyTorch, at the end and at `--checkpoints` on the way. A run that was interrupted goes on: states
are kept in `--folder`, whatever `--iterations` then says.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nerf.devices import describe_device, resolve_device
from nerf.evaluation import HeldOut
from nerf.field import FieldShape, SampleCounts
from nerf.recipe import Recipe
from nerf.scenes import SceneSettings, load_scene
from nerf.training import Trainer


def main() -> None:
    """Train each, evaluate each, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="eager:float32,fused:bfloat16")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument(
        "--checkpoints", type=lambda text: [int(x) for x in text.split(",")], default=[],
        help="iterations at which views are measured besides the last, with commas between",
    )  # fmt: skip
    parser.add_argument("--rays", type=int, default=1024, help="rays an iteration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scene", type=Path, help="LLFF folder ($PRUNEFIELD_DATA's fern)")
    parser.add_argument("--folder", type=Path, default=Path("prunefield-out/quality"))
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--max-rays", type=int, help="rays a view instead of whole views")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = Path(os.environ.get("PRUNEFIELD_DATA", "data"))
    scene = load_scene(SceneSettings(path=options.scene or data / "nerf_llff_data" / "fern"))
    device = resolve_device(options.device)
    held_out = HeldOut(scene, device, options.max_rays)
    stops = sorted({*options.checkpoints, options.iterations})
    rows: list[dict[str, Any]] = []
    print(f"{describe_device(device)}, {options.iterations:,} iterations, seed {options.seed}")
    print(
        "run                 iterations   PSNR dB   SSIM   train PSNR   seconds    it/s", flush=True
    )
    for name in options.runs.split(","):
        backend, precision = name.split(":")
        recipe = Recipe(iterations=options.iterations, rays=options.rays, precision=precision)
        trainer = Trainer(
            scene, FieldShape(), SampleCounts(), recipe, options.seed, device, backend
        )
        if trainer.backend != backend:
            print(f"{name:18} falls back to {trainer.backend}")
            continue
        for row in follow(trainer, name, stops, held_out, options):
            rows.append(row)
            show(row)
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1))
    for stop in stops:
        at = [row for row in rows if row["iterations"] == stop]
        for row in at[1:]:
            difference = row["psnr"] - at[0]["psnr"]
            print(f"{stop:,} iterations: {row['run']} {difference:+.3f} dB of {at[0]['run']}")


def follow(
    trainer: Trainer,
    name: str,
    stops: list[int],
    held_out: HeldOut,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Train, or go on, and measure at each stop; those that lie behind are left out."""
    stem = name.replace(":", "-") + f"-{options.rays}-{options.seed}"
    state, clock = options.folder / f"{stem}.state", options.folder / f"{stem}.json"
    options.folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {"seconds": 0.0, "rows": []}

    def keep() -> None:
        trainer.save(state)
        clock.write_text(json.dumps(kept))

    if state.is_file():
        trainer.load(state)
        kept.update(json.loads(clock.read_text()))
    yield from kept["rows"]
    saved, train_psnr = time.monotonic(), math.nan
    known = {row["iterations"] for row in kept["rows"]}
    for stop in stops:
        if stop in known or trainer.iteration > stop:
            continue
        while trainer.iteration < stop:
            progress = trainer.advance(min(500, stop - trainer.iteration))
            kept["seconds"] += progress.seconds
            train_psnr = progress.train_psnr
            if time.monotonic() - saved > options.save_seconds:
                keep()
                saved = time.monotonic()
        result = held_out.evaluate(trainer.model, "float32", backend="eager")
        kept["rows"].append(
            {
                "run": name,
                "iterations": stop,
                "psnr": result.psnr,
                "ssim": result.ssim,
                "train_psnr": train_psnr,
                "seconds": kept["seconds"],
                "rate": stop / max(kept["seconds"], 1e-9),
            }
        )
        keep()
        yield kept["rows"][-1]


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    ssim = "     –" if row["ssim"] is None else f"{row['ssim']:6.4f}"
    print(
        f"{row['run']:18} {row['iterations']:11,} {row['psnr']:9.3f} {ssim} "
        f"{row['train_psnr']:12.3f} {row['seconds']:9.1f} {row['rate']:7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
