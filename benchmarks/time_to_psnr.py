"""How long until a PSNR? Recipes of different batches, by training time to given held-out PSNRs.

    export PRUNEFIELD_DATA=…                        # holds nerf_llff_data/fern
    python benchmarks/time_to_psnr.py --seconds 40 --json time_to_psnr.json

Trains the real fern by each of `--recipes` from the same seed for `--seconds` of training and
measures whole held-out views (bfloat16, the backend of `--backend`) every `--every` seconds of it;
measuring and compiling do not count. A recipe is a preset of `train.preset`; or rays:learning rate,
with the decay that keeps to the rays seen; or rays:learning rate:iterations, by Muon along a
cosine. The time to a level is interpolated between the two measurements around it. Where the
learning rate falls exponentially, a recipe's own end (its iterations) does not matter here: it
falls as it would on the way there. Along a cosine the end is where most is gained, so such a recipe
is run to it.
"""

import argparse
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nerf.devices import describe_device, resolve_device
from nerf.evaluation import HeldOut
from nerf.field import FieldShape, SampleCounts
from nerf.recipe import PRESETS, Recipe
from nerf.scenes import Scene, SceneSettings, load_scene
from nerf.training import Trainer

ENDLESS = 10**9  # iterations: time ends a training here
WARM = 20  # iterations before the clock starts: kernels compile, a graph is captured


def recipe_of(name: str, precision: str) -> Recipe:
    """A preset, rays:learning rate, or rays:learning rate:iterations."""
    values: dict[str, Any]
    if name in PRESETS:
        values = dict(PRESETS[name])
    else:
        rays, rate, *iterations = name.split(":")
        values = {"rays": int(rays), "learning_rate": float(rate)}
        if iterations:
            values |= {"iterations": int(iterations[0]), "optimizer": "muon", "anneal": "cosine"}
        else:
            decay = round(Recipe().decay_iterations * Recipe().rays / int(rays))
            values["decay_iterations"] = decay
    if values.get("anneal") != "cosine":
        values["iterations"] = ENDLESS
    return Recipe(**{**values, "precision": precision})


def curve(
    scene: Scene,
    held_out: HeldOut,
    recipe: Recipe,
    device: torch.device,
    options: argparse.Namespace,
) -> list[dict[str, float]]:
    """Seconds of training, iterations and held-out PSNR of one training."""
    trainer = Trainer(
        scene, FieldShape(), SampleCounts(), recipe, options.seed, device, options.backend
    )
    trainer.advance(WARM)
    rate = trainer.advance(WARM).rate
    seconds, points = 2 * WARM / rate, []
    cosine = recipe.anneal == "cosine"
    while not points or (not trainer.done if cosine else seconds < options.seconds):
        progress = trainer.advance(max(1, round(rate * options.every)))
        seconds, rate = seconds + progress.seconds, progress.rate
        result = held_out.evaluate(trainer.model, options.precision, backend=options.backend)
        points.append(
            {
                "seconds": seconds,
                "iterations": trainer.iteration,
                "rate": progress.rate,
                "psnr": result.psnr,
                "train_psnr": progress.train_psnr,
            }
        )
    return points


def seconds_to(level: float, points: list[dict[str, float]]) -> float | None:
    """When a curve first reaches a level, between two points by a straight line."""
    if points and points[0]["psnr"] >= level:
        return points[0]["seconds"]
    for a, b in pairwise(points):
        if b["psnr"] >= level:
            part = (level - a["psnr"]) / (b["psnr"] - a["psnr"])
            return a["seconds"] + part * (b["seconds"] - a["seconds"])
    return None


def main() -> None:
    """Train by each recipe and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="report,large-batch,fast")
    parser.add_argument("--levels", default="22,23,24,24.5,25,25.5")
    parser.add_argument(
        "--seconds", type=float, default=40, help="of each training whose rate falls exponentially"
    )
    parser.add_argument("--every", type=float, default=2, help="seconds between measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-rays", type=int, help="rays a view instead of whole views")
    parser.add_argument("--scene", type=Path, help="LLFF folder ($PRUNEFIELD_DATA's fern)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    data = Path(os.environ.get("PRUNEFIELD_DATA", "data"))
    scene = load_scene(SceneSettings(path=options.scene or data / "nerf_llff_data" / "fern"))
    device = resolve_device(options.device)
    held_out = HeldOut(scene, device, options.max_rays)
    levels = [float(level) for level in options.levels.split(",")]
    print(f"{describe_device(device)}, seed {options.seed}; seconds of training to a held-out PSNR")
    print(
        "recipe           it/s   Mrays/s"
        + "".join(f"{x:8.1f} dB" for x in levels)
        + "   at the end"
    )
    found: dict[str, Any] = {"hardware": describe_device(device), "seed": options.seed}
    for name in options.recipes.split(","):
        recipe = recipe_of(name, options.precision)
        points = curve(scene, held_out, recipe, device, options)
        times = [seconds_to(level, points) for level in levels]
        rate = sorted(p["rate"] for p in points)[len(points) // 2]
        found[name] = {
            "rays": recipe.rays,
            "learning_rate": recipe.learning_rate,
            "decay_iterations": recipe.decay_iterations,
            "optimizer": recipe.optimizer,
            "anneal": recipe.anneal,
            "rate": rate,
            "seconds_to": dict(zip(levels, times, strict=True)),
            "points": points,
        }
        shown = "".join("          –" if t is None else f"{t:9.1f} s" for t in times)
        end = points[-1]
        print(
            f"{name:14} {rate:7.1f} {rate * recipe.rays / 1e6:9.3f}{shown}   "
            f"{end['psnr']:.2f} dB, {end['iterations']:,} iterations, {end['seconds']:.0f} s",
            flush=True,
        )
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
