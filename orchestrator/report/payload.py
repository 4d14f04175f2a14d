"""What the page's own JavaScript works on: every model of a sweep as one block of JSON."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nerf.evaluation import ERROR_MAP_FULL_SCALE
from orchestrator import pareto
from orchestrator.pareto import Rays
from orchestrator.report import effects
from orchestrator.report.data import ReportData, number, render_command
from orchestrator.report.effects import FACETS, Facet
from orchestrator.report.pictures import Album
from orchestrator.results import Record, method_of

SHOWN_METRICS = (
    "size_bytes",
    "psnr",
    "mse",
    "ssim",
    "render_seconds",
    "flops_per_ray",
    "params",
    "validation_psnr",
)
ASSETS = Path(__file__).parent / "assets"
MAX_PARALLEL = 6
MAX_COLOURS = 12
MAX_SHARES = 12
LLFF = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
DIGITS = 6


def payload(data: ReportData, album: Album) -> str:
    """The block of JSON, safe to stand inside a script element."""
    facets = effects.varying(data.done)
    models = _models(data)
    quality = quality_of(data)
    content = {
        "sweep": {"name": data.name, "hash": data.hash},
        "filters": [_facet(data, facet) for facet in facets],
        "parallel": [_facet(data, f) for f in _parallel(data, facets, quality)],
        "layers": _layers(data, quality),
        "quality": quality,
        "colour": _colour(data, facets),
        "models": models,
        "first": _first(data, models),
        "history": [_rounded(v) for v in _in_kilobytes(effects.history(data, rays_of(data)))],
        "history_unit": "kB·dB",
        "importance": {
            "psnr": _shares(effects.importance(data.done, lambda r: number(r, quality))),
            "gap": _shares(effects.importance(data.done, effects.below_front(data, quality))),
        },
        "published": _published(data, album),
        "error_white": ERROR_MAP_FULL_SCALE,
        "views": album.views,
        "pictures": album.renders,
        "truth": album.truth,
    }
    text = json.dumps(_finite(content), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def quality_of(data: ReportData) -> str:
    """What most trials have: a search measures most of its trials on validation rays alone."""
    searched = [t for t in data.done if number(t, "psnr") is None]
    return "validation_psnr" if len(searched) > len(data.done) / 2 else "psnr"


def rays_of(data: ReportData) -> Rays:
    """What most trials were measured on."""
    return "validation" if quality_of(data) == "validation_psnr" else "held-out"


def _colour(data: ReportData, facets: Sequence[Facet]) -> str:
    """What marks are coloured by: the method, or what matters most if there is one or too many."""
    if 1 < len({_method(trial) for trial in data.done}) <= MAX_COLOURS:
        return "method"
    shares = dict(effects.importance(data.done, effects.below_front(data, quality_of(data))))
    few = [f for f in facets if len({f.value(t) for t in data.done}) <= MAX_COLOURS]
    return max(few, key=lambda f: shares.get(f.label, 0.0)).key if few else "method"


def _layers(data: ReportData, quality: str) -> list[dict[str, str]]:
    """The searched ratios that explain most of the quality, in the order of the layers."""
    shares = dict(effects.importance(data.done, lambda r: number(r, quality)))
    names = effects.layer_ratios(data.done)
    best = sorted(names, key=lambda n: -shares.get(effects.layer_name(n), 0.0))[:MAX_PARALLEL]
    return [{"key": name, "label": effects.layer_name(name)} for name in names if name in best]


def _models(data: ReportData) -> list[dict[str, Any]]:
    groups = Counter(effects.seedless_group(trial) for trial in data.done)
    dense = [r for r in data.dense if r.failure is None]
    beside = {record.key for record in data.baselines}
    found = []
    for record in (*dense, *data.baselines, *data.done):
        group = effects.seedless_group(record)
        found.append(
            {
                "id": record.key,
                "kind": "control" if record.key in beside else record.kind,
                "training": record.training,
                "name": _name(record),
                "role": _role(record),
                "front": record.key in data.front_keys,
                "group": group,
                "seeds": groups[group] if record.kind == "trial" else 1,
                "f": {f.key: f.value(record) for f in FACETS} | {"method": _method(record)},
                "config": {k: v for k, v in record.config.items() if v is not None},
                "m": {n: _rounded(v) for n in SHOWN_METRICS if (v := number(record, n))},
                "views": [{"view": v.view, "psnr": v.psnr, "ssim": v.ssim} for v in record.views],
                "detail": _detail(record),
                "widths": {name: list(widths) for name, widths in record.widths.items()},
                "command": _command(data, record),
            }
        )
    return found


def _role(record: Record) -> str:
    """What a baseline is called on the plots; empty for everything else."""
    config = record.config
    if record.kind == "training":
        return "dense"
    if "control" in config:
        name = {"narrow": "narrow, from scratch", "dense_longer": "dense, trained longer"}
        return name.get(str(config["control"]), str(config["control"]))
    unpruned = config.get("ratio") == 0 and not config.get("recover_iterations")
    if not unpruned or "size" in config:
        return ""
    parts = ["one network"] if config.get("networks") == "shared" else []
    if config.get("bits", "fp32") != "fp32":
        parts.append(str(config["bits"]))
    return ", ".join(parts)


def _name(record: Record) -> str:
    if record.kind != "trial":
        return _role(record)
    parts = [_method(record), str(record.config.get("networks", "")), effects.amount_of(record)]
    bits, allocation = record.config.get("bits", "fp32"), effects.allocation_of(record)
    parts += [str(bits)] * (bits != "fp32") + [allocation] * (allocation != "uniform")
    return ", ".join(part for part in parts if part)


def _method(record: Record) -> str:
    """The method without its bits, which have a filter of their own."""
    if record.kind != "trial":
        return _role(record)
    return method_of({**record.config, "bits": "fp32"}) or "?"


def _detail(record: Record) -> list[float] | None:
    """Mean PSNR over the views by detail; None where it was not measured."""
    parts = [view.detail for view in record.views if view.detail]
    if not parts or len({len(part) for part in parts}) > 1:
        return None
    return [_rounded(math.fsum(column) / len(column)) for column in zip(*parts, strict=True)]


def _command(data: ReportData, record: Record) -> str | None:
    kinds = {"trial": ("trial", record.key), "training": ("checkpoint", record.training)}
    if record.kind not in kinds:
        return None
    model = data.store.folder(*kinds[record.kind]) / "model.safetensors"
    return render_command(model, data.scene_path, min((v.view for v in record.views), default=0))


def _first(data: ReportData, models: list[dict[str, Any]]) -> str | None:
    """The model to show first: the knee of the front, as `prunefield pick` chooses it."""
    points = data.candidates(data.chosen_by)
    if points:
        return pareto.knee(pareto.front(points), max(p.size_bytes for p in points)).key
    return models[0]["id"] if models else None


def _facet(data: ReportData, facet: Facet) -> dict[str, Any]:
    values = {facet.value(trial) for trial in data.done}
    return {"key": facet.key, "label": facet.label, "values": sorted(values, key=_natural)}


def _parallel(data: ReportData, facets: tuple[Facet, ...], quality: str) -> tuple[Facet, ...]:
    """The parameters that explain most, in their usual order."""
    shares = dict(effects.importance(data.done, lambda r: number(r, quality)))
    best = sorted(facets, key=lambda f: -shares.get(f.label, 0.0))[:MAX_PARALLEL]
    return tuple(facet for facet in facets if facet in best)


def _published(data: ReportData, album: Album) -> list[dict[str, Any]]:
    """Published models of the scene; what is of another resolution, or a mean, is marked so."""
    if data.scene not in LLFF:
        return []
    entries = json.loads((ASSETS / "published.json").read_text())
    return [
        {**entry, "same": (entry.get("width"), entry.get("height")) == album.size}
        for entry in entries
        if entry["scene"] in (data.scene, "LLFF")
    ]


def _natural(text: str) -> tuple[Any, ...]:
    """Orders 2 before 10."""
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return (*(int(part) for part in digits[:2]), text) if digits else (-1, text)


def _shares(shares: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"name": name, "share": round(share, 4)} for name, share in shares[:MAX_SHARES]]


def _in_kilobytes(values: list[float]) -> list[float]:
    return [v / 1000 for v in values]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
