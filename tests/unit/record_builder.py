"""Synthetic records for tests: deterministic numbers of no model, and tiny pictures of nothing."""

import math
from typing import Any

import numpy as np
from PIL import Image

from orchestrator.keys import content_key
from orchestrator.results import Failure, Provenance, Record, ViewScore
from orchestrator.store import Store

SYNTHETIC = "SYNTHETIC (made by a test, measured on nothing)"
DENSE_BYTES = 4_767_000
VIEWS = (0, 8)


def provenance() -> Provenance:
    return Provenance(
        commit="0123456789abcdef",
        hardware=SYNTHETIC,
        host="nowhere",
        versions={"prunefield": "0.0"},
        started="2026-01-02T03:04:05+00:00",
        seconds={"evaluate": 1.5},
    )


def views(psnr: float) -> tuple[ViewScore, ...]:
    scores = [psnr + 0.25 * (i - (len(VIEWS) - 1) / 2) for i in range(len(VIEWS))]
    return tuple(
        ViewScore(v, 10 ** (-s / 10), s, 0.3 + s / 60, tuple(s + 4 - 2.0 * k for k in range(5)))
        for v, s in zip(VIEWS, scores, strict=True)
    )


def metrics(psnr: float, size: float) -> dict[str, float]:
    scores = views(psnr)
    return {
        "mse": sum(v.mse for v in scores) / len(scores),
        "psnr": sum(v.psnr for v in scores) / len(scores),
        "ssim": sum(v.ssim or 0 for v in scores) / len(scores),
        "size_bytes": round(size),
        "nonzero_bytes": round(size * 0.99),
        "params": round(size / 4),
        "render_seconds": 0.5,
    }


def training_record(seed: int = 0, psnr: float = 25.0, **config: Any) -> Record:
    config = {"scene": "synthetic", "iterations": 100, "seed": seed, **config}
    return Record(
        kind="training",
        key=content_key({"evaluation": config}),
        training=content_key({"training": config}),
        config=config,
        metrics={**metrics(psnr, DENSE_BYTES), "train_seconds": 12.0, "iterations": 100},
        views=views(psnr),
        widths={"coarse": (256,) * 8, "fine": (256,) * 8},
        provenance=provenance(),
    )


def trial_record(
    training: Record,
    ratio: float,
    criterion: str = "activation",
    networks: str = "both",
    *,
    failure: Failure | None = None,
    **config: Any,
) -> Record:
    config = {
        "ratio": ratio,
        "criterion": criterion,
        "networks": networks,
        "schedule": "uniform",
        "calibration_views": 4,
        "calibration_rays": 1024,
        "seed": training.config["seed"],
        **config,
    }
    key = content_key({"trial": config, "training": training.training})
    loss = {"activation": 9.0, "magnitude": 11.0, "random": 13.0}[criterion]
    loss *= 1.0 if networks == "both" else 0.05
    share = 1.0 if networks == "both" else 0.5
    psnr = training.metrics["psnr"] - loss * math.sqrt(ratio)
    size = DENSE_BYTES * (1 - share * ratio * (1.6 - 0.7 * ratio))
    return Record(
        kind="trial",
        key=key,
        training=training.training,
        config=config,
        metrics={} if failure else {**metrics(psnr, size), "achieved_ratio": ratio},
        views=() if failure else views(psnr),
        widths={} if failure else {"fine": (round(256 * (1 - ratio)),) * 8},
        provenance=provenance(),
        failure=failure,
    )


def picture(seed: int, shift: float, width: int = 48, height: int = 36) -> Image.Image:
    """A smooth pattern with some noise: cheap, deterministic, and different for every seed."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(2 * math.pi * (f * x + y + shift)) for f in (1, 2, 3)]
    noise = np.random.default_rng(seed).normal(0, 0.02 + 0.3 * shift, (height, width, 3))
    rgb = 0.5 + 0.4 * np.stack(waves, axis=-1) + noise
    return Image.fromarray((rgb.clip(0, 1) * 255).astype(np.uint8))


def save(store: Store, record: Record, width: int = 48, height: int = 36) -> Record:
    """Write the entry of a record, with renders and a stand-in for the model; or its failure."""
    if record.failure:
        store.write_failure(record)
        return record
    shift = float(record.config.get("ratio", 0.0))
    with store.writing(record.kind, record.key) as folder:
        (folder / "renders").mkdir()
        for view in VIEWS:
            picture(view, shift, width, height).save(folder / f"renders/view_{view}.png")
            picture(view + 1, 1.0, width, height).save(folder / f"renders/error_{view}.png")
            if record.kind == "training":
                picture(view, 0.0, width, height).save(folder / f"renders/truth_{view}.png")
        if record.kind == "trial":
            (folder / "model.safetensors").write_bytes(SYNTHETIC.encode())
        store.write_record(folder, record)
    if record.kind == "training":
        with store.writing("checkpoint", record.training) as folder:
            (folder / "model.safetensors").write_bytes(SYNTHETIC.encode())
    return store.read_record(record.kind, record.key)
