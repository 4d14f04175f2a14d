"""What can go wrong when a model is pruned.

A message says what happened, what was given, what is allowed and what to do.
The whole tree of the project is drawn in `orchestrator.errors`.
"""


class PruningError(Exception):
    """A pruning cannot be carried out as asked; the message says what to do."""


class RatioError(PruningError):
    """A sparsity ratio or a per-layer list of them is out of range or of the wrong length."""


class StatisticsError(PruningError):
    """Calibration statistics are missing, unusable (NaN, infinite) or of another network."""


class BudgetError(PruningError):
    """A budget is below what the smallest networks possible cost."""
