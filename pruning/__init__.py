"""Pruning of Linear + ReLU networks that are described as data.

One pruning, from calibration samples to a smaller network::

    statistics = collect(network, batches).subset()
    ratios = allocate("uniform", len(network.graph.prunable()), 0.5)
    pruned = prune(network, ratios, "activation", statistics)
"""

from pruning.allocation import ALLOCATIONS, allocate, check_ratio, check_ratios
from pruning.calibration import (
    CalibrationBatch,
    Cell,
    NestedStatistics,
    Statistics,
    cells,
    collect,
)
from pruning.compensation import COMPENSATIONS, Compensation, compensate, sequential
from pruning.elimination import (
    Path,
    compensated_weights,
    elimination_path,
    elimination_paths,
)
from pruning.errors import PruningError, RatioError, StatisticsError
from pruning.gradients import GRADIENT_MOMENTS, collect_gradients
from pruning.moments import MOMENTS, Moment, Seen
from pruning.network import Layer, LayerGraph, Network
from pruning.pipeline import Pruned, prune
from pruning.scores import CRITERIA, Criterion, ScoredLayer, moments_for, needs_gradients, score
from pruning.selection import keep_mask, removed_count, select
from pruning.size import bytes_of, mebibytes, nonzero_parameters
from pruning.surgery import mask, remove

__all__ = [
    "ALLOCATIONS",
    "COMPENSATIONS",
    "CRITERIA",
    "GRADIENT_MOMENTS",
    "MOMENTS",
    "CalibrationBatch",
    "Cell",
    "Compensation",
    "Criterion",
    "Layer",
    "LayerGraph",
    "Moment",
    "NestedStatistics",
    "Network",
    "Path",
    "Pruned",
    "PruningError",
    "RatioError",
    "ScoredLayer",
    "Seen",
    "Statistics",
    "StatisticsError",
    "allocate",
    "bytes_of",
    "cells",
    "check_ratio",
    "check_ratios",
    "collect",
    "collect_gradients",
    "compensate",
    "compensated_weights",
    "elimination_path",
    "elimination_paths",
    "keep_mask",
    "mask",
    "mebibytes",
    "moments_for",
    "needs_gradients",
    "nonzero_parameters",
    "prune",
    "remove",
    "removed_count",
    "score",
    "select",
    "sequential",
]
