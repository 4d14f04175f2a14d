"""What a report shows beside any sweep: the unpruned model in one network, and in few bits.

Another sweep of the same storage that measured them does for all: their keys say that model and
evaluation are the same. A sweep makes them itself with the grid

    ratios: 0
    criteria: magnitude
    networks: [both, shared]
    bits: [fp32, int8]
"""

from dataclasses import replace

from orchestrator.plan import Plan, Trial, make_plan
from orchestrator.results import Record
from orchestrator.spec import CalibrationAxes, PruneGrid
from orchestrator.store import Store

UNPRUNED = PruneGrid(
    networks=("both", "shared"),
    criteria=("magnitude",),
    ratios=(0.0,),
    schedules=("uniform",),
    calibration=CalibrationAxes(),
    bits=("fp32", "int8", "int6"),
)
RENDERS = (0, 1)
"""Other numbers of kept pictures to look for: they are part of a key, and measure nothing."""


def unpruned(plan: Plan, store: Store) -> tuple[Record, ...]:
    """Records of unpruned models that other sweeps left in the storage; none of the plan's own."""
    if not plan.trials and not plan.searches:
        return ()
    sweep = plan.sweep
    own = {trial.key for trial in plan.trials}
    has_one = {_what(trial) for trial in plan.trials if trial.config.ratio == 0}
    keys: dict[object, str] = {}
    for renders in dict.fromkeys((sweep.protocol.renders, *RENDERS)):
        protocol = replace(sweep.protocol, renders=renders)
        grids = replace(sweep, grids=(UNPRUNED,), search=None, protocol=protocol)
        for trial in make_plan(grids, store).trials:
            what = _what(trial)
            plain = (trial.config.networks, trial.config.bits) == ("both", "fp32")
            if trial.cached and trial.key not in own and what not in has_one and not plain:
                keys.setdefault(what, trial.key)
    return tuple(store.read_records("trial", list(keys.values())))


def _what(trial: Trial) -> tuple[str, str, str]:
    return trial.training, trial.config.networks, trial.config.bits
