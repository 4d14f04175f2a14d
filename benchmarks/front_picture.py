"""The picture at the top of the README: a Pareto front, and renders of some of its models.

    python -m benchmarks.front_picture STORAGE [STORAGE …] -o docs/images/front.webp

Each STORAGE is the results folder of a sweep (``prunefield-out``); trials of all of them that
pruned the same dense model make one front. The pictures are the middle of the renders that the
sweeps kept of one held-out view; ``--render SCENE`` renders those that none kept (minutes a model
for a fern of 504×378 on two CPU cores). Photos are never shown.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import PIL.Image

from nerf.checkpoints import load_model
from nerf.evaluation import write_picture
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings
from nerf.scenes import load_scene
from orchestrator import pareto
from orchestrator.results import Record
from orchestrator.scene_info import settings_of
from orchestrator.store import Store

INK, SOFT, BLUE = "#1a1d21", "#8a9099", "#2f6fb5"
WIDTH, HEIGHT, DPI = 12.0, 6.6, 120
PART = 0.56


@dataclass(frozen=True)
class Model:
    """A model that may be shown.

    Attributes:
        record: of its evaluation.
        store: where its files are.
    """

    record: Record
    store: Store

    @property
    def size(self) -> float:
        """Bytes of its file."""
        return self.record.metrics["size_bytes"]

    @property
    def psnr(self) -> float:
        """Mean over held-out views, in dB."""
        return self.record.metrics["psnr"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the records, choose models, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("storage", type=Path, nargs="+", help="results folder of a sweep")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".webp or .png")
    parser.add_argument("--training", help="key of the dense model (that of most trials)")
    parser.add_argument("--view", type=int, default=0, help="held-out view (0)")
    parser.add_argument("--shown", type=int, default=5, help="pictures, the dense one included (5)")
    parser.add_argument("--render", type=Path, metavar="SCENE", help="render what was not kept")
    options = parser.parse_args(arguments)

    models = _read(options.storage)
    training = options.training or _commonest(models)
    models = {key: m for key, m in models.items() if m.record.training == training}
    evaluated = [m for m in models.values() if m.record.kind == "training"]
    dense = max(evaluated, key=lambda m: _kept(m, options.view) is not None)
    trials = [m for m in models.values() if m.record.kind == "trial"]
    controls = [m for m in models.values() if m.record.kind == "control"]
    front = [models[p.key] for p in pareto.front(pareto.points(m.record for m in trials))]
    worth = [m for m in front if m.psnr > dense.psnr - 4 or m.size < dense.size / 40]
    pictured = [m for m in worth if options.render or _kept(m, options.view)]
    shown = [dense, *_spread(pictured, options.shown - 1)]
    pictures = [_picture(m, options.view, options.render, options.output.parent) for m in shown]
    _draw(options.output, dense, trials, controls, front, list(zip(shown, pictures, strict=True)))
    for model in shown:
        print(f"{model.record.key}  {model.size:>9,.0f} bytes  {model.psnr:.2f} dB")
    print(options.output)


def _read(folders: Sequence[Path]) -> dict[str, Model]:
    found: dict[str, Model] = {}
    for folder in folders:
        store = Store(folder)
        for kind in ("training", "trial", "control"):
            for record in store.read_records(kind, sorted(store.keys(kind))):
                if record.failure is None and {"psnr", "size_bytes"} <= record.metrics.keys():
                    model = Model(record, store)
                    if record.key not in found or _kept(model, 0):
                        found[record.key] = model
    return found


def _commonest(models: dict[str, Model]) -> str:
    trainings = [m.record.training for m in models.values() if m.record.kind == "trial"]
    return max(set(trainings), key=trainings.count)


def _kept(model: Model, view: int) -> Path | None:
    record = model.record
    path = model.store.folder(record.kind, record.key) / f"renders/view_{view}.png"
    return path if path.is_file() else None


def _spread(models: Sequence[Model], count: int) -> list[Model]:
    """So many of them, largest first, spread over the sizes (as logarithms), with both ends."""
    left = sorted(models, key=lambda m: -m.size)
    if len(left) <= count:
        return left
    top, low = math.log(left[0].size), math.log(left[-1].size)
    chosen = []
    for place in range(count):
        wanted = top + (low - top) * place / max(count - 1, 1)
        nearest = min(left, key=lambda m: (abs(math.log(m.size) - wanted), -m.psnr))
        left.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen, key=lambda m: -m.size)


def _picture(model: Model, view: int, scene: Path | None, folder: Path) -> PIL.Image.Image:
    path = _kept(model, view)
    if path is None:
        if scene is None:
            raise SystemExit(f"no render of {model.record.key} was kept; give --render SCENE")
        record = model.record
        entry = (
            ("checkpoint", record.training)
            if record.kind == "training"
            else (record.kind, record.key)
        )
        loaded, info = load_model(model.store.file(*entry, "model.safetensors"))
        data = load_scene(settings_of(info, scene))
        settings = RenderSettings(data.near, data.far, data.white_background)
        path = folder / f".{record.key}.png"
        pose = loaded.fine.density.weight.new_tensor(data.poses[view])
        write_picture(path, Renderer(loaded, settings).view(data.camera, pose).cpu())
        picture = PIL.Image.open(path).convert("RGB")
        path.unlink()
        return picture
    return PIL.Image.open(path).convert("RGB")


def _draw(
    output: Path,
    dense: Model,
    trials: Sequence[Model],
    controls: Sequence[Model],
    front: Sequence[Model],
    shown: Sequence[tuple[Model, PIL.Image.Image]],
) -> None:
    mpl.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans", "axes.edgecolor": SOFT})
    figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    rows = figure.add_gridspec(2, 1, height_ratios=[1.0, 1.6], hspace=0.16)
    strip = rows[0].subgridspec(1, len(shown), wspace=0.03)
    for place, (model, picture) in enumerate(shown):
        axes = figure.add_subplot(strip[0, place])
        axes.imshow(_middle(picture))
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
        name = "dense" if model is dense else f"{dense.size / model.size:.0f} times smaller"
        axes.set_title(
            f"{_bytes(model.size)} · {model.psnr:.2f} dB", size=10.5, weight="bold", pad=4
        )
        axes.set_xlabel(f"{_letter(place)}  {name}", color=INK, labelpad=4)

    axes = figure.add_subplot(rows[1])
    axes.set_xscale("log")
    off = [m for m in trials if m not in front]
    axes.scatter([m.size for m in off], [m.psnr for m in off], 14, "#b9c0c9", lw=0)
    axes.axhline(dense.psnr, color=SOFT, lw=1, ls=(0, (2, 4)))
    xs, ys = [m.size for m in front], [m.psnr for m in front]
    axes.step([*xs, dense.size], [*ys, ys[-1]], where="post", color=BLUE, lw=2)
    axes.scatter(xs, ys, 30, BLUE, zorder=3)
    narrow = sorted(
        (m for m in controls if "narrow" in str(m.record.config.get("control"))),
        key=lambda m: m.size,
    )
    if narrow:
        axes.plot(
            [m.size for m in narrow],
            [m.psnr for m in narrow],
            ":",
            color=INK,
            lw=1,
            marker="*",
            ms=9,
            label="a narrow NeRF trained from scratch",
        )
    axes.scatter([dense.size], [dense.psnr], 60, INK, zorder=4)
    for place, (model, _) in enumerate(shown):
        axes.annotate(
            _letter(place),
            (model.size, model.psnr),
            (0, 9),
            textcoords="offset points",
            ha="center",
            weight="bold",
            color=INK,
        )
    axes.plot([], [], "o", color="#b9c0c9", ms=4, label="pruned models")
    axes.plot([], [], "o-", color=BLUE, lw=2, label="Pareto front")
    axes.set_xlabel("size of the model file")
    axes.set_ylabel("PSNR of held-out views (dB)")
    axes.xaxis.set_major_formatter(lambda v, _: _bytes(v))
    axes.xaxis.set_minor_formatter(lambda v, _: _bytes(v) if str(v)[0] in "25" else "")
    axes.tick_params(axis="x", which="minor", labelsize=11)
    axes.grid(color="#e8eaee", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(top=dense.psnr + 1.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="best", frameon=False)
    figure.savefig(output.with_suffix(".png"), bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)
    if output.suffix == ".webp":
        with PIL.Image.open(output.with_suffix(".png")) as picture:
            picture.convert("RGB").save(output, quality=80, method=6)
        output.with_suffix(".png").unlink()


def _middle(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A part large enough to see what was lost at the width of a page."""
    width, height = round(PART * picture.width), round(PART * picture.height)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _letter(place: int) -> str:
    return "ABCDEFGHIJ"[place]


def _bytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 999_500 else f"{size / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
