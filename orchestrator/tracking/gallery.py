"""What a sweep's own run shows: pictures by ratio, the front as a table, views of the charts page.

The charts page of MLflow opens on the first ten runs, a chart for every metric; its table shows
when runs were made, and no result. A *shared view*, kept as a tag of the experiment where its Share
button keeps it, opens them on the runs that matter with the charts and columns that answer
something. Its format is MLflow's own and written down nowhere: read off version 3.17's page,
checked in a browser. A version that reads it otherwise says so and shows all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.tracking import names

SHARED_VIEW = "mlflow.sharedViewState."
SECTION = "prunefield"
TABLES = "mlflow.loggedArtifacts"
COLUMNS = ("size_bytes", "psnr", "ssim", "mse", "validation_psnr")


@dataclass(frozen=True)
class GridImage:
    """A picture on the sweep's own run.

    Attributes:
        key: the grid it belongs to.
        step: where the slider stands: how much was removed, in percent.
        path: the PNG.
    """

    key: str
    step: int
    path: Path


@dataclass(frozen=True)
class Gallery:
    """What the sweep's own run shows beside its report.

    Attributes:
        images: its grids of pictures.
        tables: by file name, rows by column.
        params: what to draw as axes of the parallel coordinates, besides size and PSNR.
        amounts: params that say how much was removed, for the table: ratio, size.
        side_by_side: a picture of each run of the front and of the dense models, by the record's
            key: all at step 0, so that the charts page shows them beside each other.
    """

    images: tuple[GridImage, ...] = ()
    tables: Mapping[str, Mapping[str, Sequence[Any]]] | None = None
    params: tuple[str, ...] = ()
    amounts: tuple[str, ...] = ()
    side_by_side: Mapping[str, GridImage] = field(default_factory=dict)


def view_key(sweep_hash: str, which: str) -> str:
    """Names a view of a sweep in addresses: its front, or all of it."""
    return f"prunefield-{sweep_hash}-{which}"


def views(parent: str, sweep_hash: str, gallery: Gallery) -> dict[str, str]:
    """Tags of the experiment: the shared views of a sweep.

    Args:
        parent: the sweep's run.
        sweep_hash: the sweep.
        gallery: what it shows.
    """
    everything = f"tags.`{names.PARENT}` = '{parent}'"
    front = f"{everything} AND tags.`{names.SHOWN}` = 'front'"
    return {
        SHARED_VIEW + view_key(sweep_hash, which): _view(where, gallery)
        for which, where in (("front", front), ("all", everything))
    }


def _view(where: str, gallery: Gallery) -> str:
    keys = sorted({image.key for image in gallery.side_by_side.values()})
    size, psnr = ({"key": k, "type": "METRIC"} for k in ("size_bytes", "psnr"))
    charts: list[dict[str, Any]] = [
        {"type": "SCATTER", "xaxis": size, "yaxis": psnr, "displayName": "size against PSNR"},
        {
            "type": "PARALLEL",
            "selectedParams": list(gallery.params),
            "selectedMetrics": ["size_bytes", "psnr"],
            "showAllRuns": False,
            "displayName": "what was done, size, PSNR",
        },
        {
            "type": "BAR",
            "metricKey": "psnr",
            "dataAccessKey": "psnr",
            "displayName": "PSNR",
        },
        {"type": "IMAGE", "imageKeys": keys, "step": 0, "showRunParams": False},
    ]
    for number, chart in enumerate(charts):
        chart |= {
            "uuid": f"{SECTION}-{number}",
            "metricSectionId": SECTION,
            "isGenerated": False,
            "deleted": False,
            "runsCountToCompare": 100,
        }
    section = {"uuid": SECTION, "name": "Size and quality", "display": True, "columns": 2}
    columns = [f"params.`{name}`" for name in (*gallery.params, *gallery.amounts)]
    state = {
        "searchFilter": where,
        "orderByKey": "metrics.`psnr`",
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": columns + [f"metrics.`{name}`" for name in COLUMNS],
        "compareRunCharts": charts,
        "compareRunSections": [
            {**section, "isReordered": False, "deleted": False, "isGenerated": False}
        ],
        "isAccordionReordered": True,
    }
    return json.dumps(state, separators=(",", ":"))
