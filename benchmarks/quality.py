"""Does a fast training learn as well? The same seed, trained by several backends, and their PSNR.

    export PRUNEFIELD_DATA=…                        # holds nerf_llff_data/fern
    python benchmarks/quality.py --iterations 20000 --json quality.json

Trains the real fern by each of `--runs` (backend:precision) one after another from the same seed,
on the same rays with the same random numbers, and measures whole held-out views in fp32 with plain
PyTorch. A run that was interrupted goes on: states are kept in `--folder`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

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
    rows = []
    print(f"{describe_device(device)}, {options.iterations:,} iterations, seed {options.seed}")
    print("run                  PSNR dB   SSIM   train PSNR   seconds    it/s", flush=True)
    for name in options.runs.split(","):
        backend, precision = name.split(":")
        recipe = Recipe(iterations=options.iterations, rays=options.rays, precision=precision)
        trainer = Trainer(
            scene, FieldShape(), SampleCounts(), recipe, options.seed, device, backend
        )
        if trainer.backend != backend:
            print(f"{name:18} falls back to {trainer.backend}")
            continue
        stem = f"{backend}-{precision}-{options.iterations}-{options.rays}-{options.seed}"
        state, clock = options.folder / f"{stem}.state", options.folder / f"{stem}.json"
        seconds, saved, train_psnr = 0.0, time.monotonic(), float("nan")
        if state.is_file():
            trainer.load(state)
            seconds = json.loads(clock.read_text())["seconds"]
        while not trainer.done:
            progress = trainer.advance(500)
            seconds, train_psnr = seconds + progress.seconds, progress.train_psnr
            if trainer.done or time.monotonic() - saved > options.save_seconds:
                trainer.save(state)
                clock.write_text(json.dumps({"seconds": seconds}))
                saved = time.monotonic()
        result = held_out.evaluate(trainer.model, "float32", backend="eager")
        rows.append(
            {
                "run": name,
                "psnr": result.psnr,
                "ssim": result.ssim,
                "train_psnr": train_psnr,
                "seconds": seconds,
                "rate": options.iterations / max(seconds, 1e-9),
            }
        )
        ssim = "     –" if result.ssim is None else f"{result.ssim:6.4f}"
        print(
            f"{name:18} {result.psnr:9.3f} {ssim} {train_psnr:12.3f} {seconds:9.1f} "
            f"{rows[-1]['rate']:7.1f}",
            flush=True,
        )
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1))
    if len(rows) > 1:
        print(f"difference to the first: {rows[-1]['psnr'] - rows[0]['psnr']:+.3f} dB")


if __name__ == "__main__":
    main()
