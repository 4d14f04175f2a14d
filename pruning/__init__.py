"""Pruning of Linear + ReLU networks that are described as data.

One pruning, from calibration samples to a smaller network::

    statistics = collect(network, batches).subset()
    ratios = allocate("uniform", len(network.graph.prunable()), 0.5)
    pruned = prune(network, ratios, "activation", statistics)

Several networks cut to a budget by what we know to work best::

    statistics = {name: collect(n, batches[name], moments_for_budget()).subset() for name, n in …}
    pruned = shrink(networks, statistics, Budget.of("params", 300_000))
"""

from pruning.allocation import ALLOCATIONS, allocate, check_ratio, check_ratios
from pruning.budget import PRICES, Budget, Cost, Price, Widths
from pruning.calibration import (
    CalibrationBatch,
    Cell,
    NestedStatistics,
    Statistics,
    cells,
    collect,
)
from pruning.chain import Chain
from pruning.compensation import COMPENSATIONS, Compensation, compensate, sequential
from pruning.curvature import curvature_weights
from pruning.elimination import (
    Balance,
    OutputWeights,
    Path,
    compensated_weights,
    elimination_path,
    elimination_paths,
)
from pruning.errors import BudgetError, PruningError, RatioError, StatisticsError
from pruning.gradients import collect_gradients, probe
from pruning.joint import Choice, Choices, Joint, choices, jointly
from pruning.moments import GRADIENT_MOMENTS, MOMENTS, Moment, Seen
from pruning.network import Layer, LayerGraph, Network
from pruning.pipeline import Pruned, Ranking, cut, moments_for_budget, prune, rank, shrink
from pruning.quantization import SCHEMES, Quantized, Scheme, balance, price_of, quantize
from pruning.rate import RateNetwork, coded_bytes
from pruning.scores import (
    CRITERIA,
    Criterion,
    ScoredLayer,
    gradients_for,
    moments_for,
    needs_gradients,
    score,
)
from pruning.selection import keep_mask, removed_count, select
from pruning.simplify import merge_linear, narrow_linear
from pruning.size import bytes_of, mebibytes, nonzero_parameters
from pruning.sizing import BUDGETED, Sizing, cost_of, top, widths_within
from pruning.sparsity import SPARSE, Sparsified, sparsify, stored_bits
from pruning.surgery import mask, remove

__all__ = [
    "ALLOCATIONS",
    "BUDGETED",
    "COMPENSATIONS",
    "CRITERIA",
    "GRADIENT_MOMENTS",
    "MOMENTS",
    "PRICES",
    "SCHEMES",
    "SPARSE",
    "Balance",
    "Budget",
    "BudgetError",
    "CalibrationBatch",
    "Cell",
    "Chain",
    "Choice",
    "Choices",
    "Compensation",
    "Cost",
    "Criterion",
    "Joint",
    "Layer",
    "LayerGraph",
    "Moment",
    "NestedStatistics",
    "Network",
    "OutputWeights",
    "Path",
    "Price",
    "Pruned",
    "PruningError",
    "Quantized",
    "Ranking",
    "RateNetwork",
    "RatioError",
    "Scheme",
    "ScoredLayer",
    "Seen",
    "Sizing",
    "Sparsified",
    "Statistics",
    "StatisticsError",
    "Widths",
    "allocate",
    "balance",
    "bytes_of",
    "cells",
    "check_ratio",
    "check_ratios",
    "choices",
    "coded_bytes",
    "collect",
    "collect_gradients",
    "compensate",
    "compensated_weights",
    "cost_of",
    "curvature_weights",
    "cut",
    "elimination_path",
    "elimination_paths",
    "gradients_for",
    "jointly",
    "keep_mask",
    "mask",
    "mebibytes",
    "merge_linear",
    "moments_for",
    "moments_for_budget",
    "narrow_linear",
    "needs_gradients",
    "nonzero_parameters",
    "price_of",
    "probe",
    "prune",
    "quantize",
    "rank",
    "remove",
    "removed_count",
    "score",
    "select",
    "sequential",
    "shrink",
    "sparsify",
    "stored_bits",
    "top",
    "widths_within",
]
