"""A search on one trained model, step by step; whoever drives it runs the trials.

::

    search = Search(sweep, plan, store)
    step = search.advance([])             # the first trials, or what an earlier run left undone
    while not step.finished:
        …run some of step.trials…
        step = search.advance(ended)      # (key of a trial, None or why it failed) each

Trials are measured on validation rays. When all of them have ended, or the time of the search is
over, some of those that the first look stopped are measured in full (the *audit*); the last step's
trials are the final front, to be rendered on the held-out views.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from time import monotonic, perf_counter

from nerf.checkpoints import load_model
from nerf.files import read_tensors
from orchestrator.bridge import from_one
from orchestrator.plan import Look, SearchPlan, Trial, TrialConfig, searched_trial
from orchestrator.results import Record
from orchestrator.search import goals
from orchestrator.search.goals import Costs
from orchestrator.search.space import Parameters, Space
from orchestrator.search.starts import (
    Start,
    allocated_starts,
    plain_starts,
    starts_of_others,
)
from orchestrator.search.study import Entry, Proposal, Study
from orchestrator.search.summary import wanted
from orchestrator.spec import Sweep
from orchestrator.spec.sweep import Objective
from orchestrator.store import Store
from pruning import Statistics

Ended = tuple[str, str | None]
"""A trial's key, and why it failed or None."""


@dataclass(frozen=True)
class Step:
    """What a search wants now.

    Attributes:
        trials: to be run; they may come in any order.
        finished: whether nothing will come after these.
        proposing: seconds that the sampler took for this step.
    """

    trials: tuple[Trial, ...]
    finished: bool
    proposing: float = 0.0


def study_url(sweep: Sweep, store: Store) -> str:
    """Where the studies of a sweep are: as it says, or SQLite in the storage folder."""
    given = None if sweep.search is None else sweep.search.storage
    return given or f"sqlite:///{store.root / 'studies.db'}"


class Search:
    """The search on one trained model, which must be trained, evaluated and calibrated.

    Args:
        sweep: the sweep.
        plan: of this search.
        store: where results are.

    Raises:
        SearchError: the study's database cannot be used.
        StoreError: the model or its statistics cannot be read.
    """

    def __init__(self, sweep: Sweep, plan: SearchPlan, store: Store) -> None:
        self.sweep, self.plan, self.store = sweep, plan, store
        self.settings = plan.settings
        dense = store.read_record("training", plan.training.result)
        self.bounds = goals.bounds_of(self.settings.constraints, dense.metrics)
        self.space = Space(self.settings, sweep.shape, plan.sets)
        self.study = open_study(sweep, plan, store)
        self._looks: dict[int, Look] = {}
        self._exhausted = False
        self._audit: tuple[Trial, ...] | None = None
        self._missing: set[str] = set()  # of the audit
        self._final: list[Trial] | None = None
        self.proposing = 0.0
        self._spent_before = self.study.spent()
        self._began = monotonic()
        starts = self.study.starts()
        if starts is None:
            starts = self._unique(self._starts(dense))
            self.study.keep_starts(starts)
        self._starts_kept = starts
        self._entries = {entry.key: entry for entry in self.study.entries()}
        self._begun: set[str] = set()

    # --- one step --------------------------------------------------------------------------

    def advance(self, ended: Iterable[Ended]) -> Step:
        """Take in what ended, and say what to run next.

        Everything that has not ended is handed out once to each `Search` object: what an earlier
        run left undone comes with the first step.
        """
        for key, failure in ended:
            self._missing.discard(key)
            self._take(key, failure)
        trials: list[Trial] = []
        proposing = 0.0
        while True:
            trials += self._undone()
            if not self._may_propose():
                break
            started = perf_counter()
            self._propose()
            proposing += perf_counter() - started
        self.proposing += proposing
        running = any(entry.state == "running" for entry in self._entries.values())
        if running or trials:
            return Step(tuple(trials), False, proposing)
        if self._audit is None:
            self.study.keep_spent(self.spent())
            self._audit = self._audit_trials()
            todo = [t for t in self._audit if not self.store.has("trial", t.key)]
            self._missing = {trial.key for trial in todo}
            if todo:
                return Step(tuple(todo), False, proposing)
        if self._missing:
            return Step((), False, proposing)
        if self._final is None:
            self._final = self._final_trials()
        return Step(tuple(self._final), True, proposing)

    def spent(self) -> float:
        """Seconds since this search began, those of earlier runs included."""
        return self._spent_before + monotonic() - self._began

    def _over(self) -> bool:
        return self.settings.seconds is not None and self.spent() >= self.settings.seconds

    def _undone(self) -> list[Trial]:
        """Trials that nobody runs yet; those whose result is in the store are told at once."""
        found = []
        for entry in sorted(self._entries.values(), key=lambda e: (e.round, e.slot)):
            if entry.state != "running" or entry.key in self._begun:
                continue
            trial = self._trial(entry)
            self._begun.add(entry.key)
            if self.store.has("trial", trial.key):
                self._take(entry.key, None)
            else:
                found.append(trial)
        return found

    def _trial(self, entry: Entry) -> Trial:
        config = self.space.config(entry.parameters)
        return searched_trial(self.sweep, self.plan, config, self._look(entry.round))

    def _may_propose(self) -> bool:
        """Whether a round is due: the one before the last has ended; trials and time are left."""
        entries = self._entries.values()
        if self._exhausted or len(self._entries) >= self.settings.trials or self._over():
            return False
        last = max((entry.round for entry in entries), default=-1)
        if self._whole(last):
            return all(e.state != "running" for e in entries if e.round < last)
        return True  # a round that was written in part

    def _whole(self, round_: int) -> bool:
        slots = sum(entry.round == round_ for entry in self._entries.values())
        return round_ < 0 or slots >= self.settings.batch

    def _propose(self) -> None:
        """Propose the next round, or complete the last one where it was written in part."""
        entries = list(self._entries.values())
        last = max((entry.round for entry in entries), default=-1)
        round_ = last + 1 if self._whole(last) else last
        before = [entry for entry in entries if entry.round < round_]
        there = {entry.slot for entry in entries if entry.round == round_}
        past = [entry for entry in before if entry.round <= round_ - 2]
        # As far as this round knows, the trials of the one before are still running.
        running = [entry for entry in before if entry.round == round_ - 1]
        batch = self.settings.batch
        proposals = self._from_starts(before, batch)
        if len(proposals) < batch:
            proposals += self.study.propose(
                past,
                running,
                round_,
                batch - len(proposals),
                self.settings.sampler,
                self.settings.seed,
                self._finished,
                {p.key for p in proposals},
            )
        left = self.settings.trials - len(entries)
        new = [(slot, p) for slot, p in enumerate(proposals) if slot not in there][:left]
        for slot, proposal in new:
            entry = self.study.add(round_, slot, proposal)
            self._entries[entry.key] = entry
        self._exhausted = not new
        self.study.keep_spent(self.spent())

    def _finished(self, parameters: Mapping[str, object]) -> tuple[str, Parameters]:
        rounded = self.space.rounded(parameters)
        trial = searched_trial(
            self.sweep, self.plan, self.space.config(rounded), self._plain_look()
        )
        return trial.key, rounded

    def _from_starts(self, before: list[Entry], most: int) -> list[Proposal]:
        known = {entry.key for entry in before}
        found: list[Proposal] = []
        for origin, parameters in self._starts_kept:
            key, rounded = self._finished(parameters)
            if key not in known and len(found) < most:
                known.add(key)
                found.append(Proposal(key, origin, rounded))
        return found

    # --- looking at trials -----------------------------------------------------------------

    def _plain_look(self) -> Look:
        # What the first look costs, or says, cannot be had of a whole picture's SSIM.
        whole = "ssim" in {*self.settings.objectives, *(metric for metric, _, _ in self.bounds)}
        return Look(
            "",
            self.settings.objectives,
            self.bounds,
            (),
            0 if whole else self.settings.first_rays,
            self.settings.margin,
        )

    def _look(self, round_: int) -> Look:
        """How the trials of a round are measured: the bar is what the round knows."""
        if round_ not in self._looks:
            past = {
                entry.key: _costs(entry.measured["first"], self.settings.objectives)
                for entry in self._entries.values()
                if entry.round <= round_ - 2 and self._good(entry) and entry.measured.get("first")
            }
            bar = tuple(past[key] for key in goals.front(past))
            self._looks[round_] = replace(self._plain_look(), bar=bar)
        return self._looks[round_]

    def _good(self, entry: Entry) -> bool:
        """Whether a trial was measured in full and keeps to the constraints."""
        return (
            entry.state == "done"
            and entry.measured.get("stopped") is None
            and bool(entry.measured.get("feasible"))
        )

    def _take(self, key: str, failure: str | None) -> None:
        """A trial ended: its record, in full or of its first look, goes into the study."""
        entry = self._entries.get(key)
        if entry is None or entry.state != "running":
            return
        objectives = self.settings.objectives
        trial = self._trial(entry)
        record = None if failure is not None else self._record(trial)
        if record is None:
            measured: dict[str, object] = {"failure": failure or "its result is missing"}
            self.study.tell(entry, None, measured)
            self._entries[key] = replace(entry, state="failed", measured=measured)
            return
        first = goals.values(record.metrics, objectives, first=True)
        stopped = None
        if record.key != trial.key and trial.look is not None:
            stopped = goals.hopeless(record.metrics, trial.look) or "stopped"
        values = goals.values(record.metrics, objectives)
        if stopped:
            values = goals.corrected(first, self._looked(entry.round), objectives)
        broken = goals.violations(record.metrics, self.bounds, first=stopped is not None)
        good = all(math.isfinite(v) for v in (*values, *broken))
        measured = {
            "record": record.key,
            "stopped": stopped,
            "feasible": good and all(v <= 0.0 for v in broken),
            "first": list(first) if all(math.isfinite(v) for v in first) else None,
            "seconds": {n: s for n, s in record.provenance.seconds.items() if n in STAGES},
        }
        if not good:
            measured["failure"] = "an objective or constraint is not a number"
        texts = [c.text for c in self.settings.constraints]
        self.study.tell(
            entry, values if good else None, measured, dict(zip(texts, broken, strict=True))
        )
        self._entries[key] = replace(
            entry,
            state="done" if good else "failed",
            values=values if good else None,
            measured=measured,
        )

    def _looked(self, round_: int) -> list[tuple[Costs, Costs]]:
        """First look and full measurement of the trials that a round knows."""
        return [
            (tuple(entry.measured["first"]), entry.values or ())
            for entry in sorted(self._entries.values(), key=lambda e: (e.round, e.slot))
            if entry.round <= round_ - 2 and self._good(entry) and entry.measured.get("first")
        ]

    def _record(self, trial: Trial) -> Record | None:
        keys = [trial.key, *([trial.look.first_key] if trial.look else [])]
        for key in keys:
            if self.store.has("trial", key):
                return self.store.read_record("trial", key)
        return None

    # --- the ends --------------------------------------------------------------------------

    def _starts(self, dense: Record) -> list[Start]:
        found = list(plain_starts(self.space))
        if self.settings.start_sizes:
            key = self.plan.training.key
            model, info = load_model(self.store.verified_file("checkpoint", key, MODEL))
            found += allocated_starts(self.space, model, self._statistics, info)
        if self.settings.start_store:
            others = self.store.keys("trial") - self.plan.planned
            every = self.store.read_records("trial", sorted(others))
            found += starts_of_others(
                self.space, (r for r in every if r.training == dense.training)
            )
        return found

    def _statistics(self, config: TrialConfig) -> Mapping[str, Statistics] | None:
        """The calibration statistics that a pruning reads."""
        if config.calibration is None or not config.needs.moments:
            return None
        key = self.plan.statistics[config.calibration, config.needs.group]
        return from_one(read_tensors(self.store.file("statistics", key, STATS))[0])

    def _unique(self, starts: Iterable[Start]) -> list[Start]:
        seen: dict[str, Start] = {}
        for origin, parameters in starts:
            seen.setdefault(self._finished(parameters)[0], (origin, parameters))
        return list(seen.values())

    def _audit_trials(self) -> tuple[Trial, ...]:
        """What the first look stopped, nearest to the front first, to be measured in full."""
        objectives = self.settings.objectives
        best = {
            e.key: _costs(e.measured["first"], objectives)
            for e in self.front()
            if e.measured.get("first")
        }
        stopped = {
            e.key: _costs(e.measured["first"], objectives)
            for e in self._entries.values()
            if e.state == "done" and e.measured.get("stopped") not in (None, "infeasible")
        }
        found = []
        for key in goals.nearest(stopped, best.values())[: self.settings.audit]:
            trial = self._trial(self._entries[key])
            assert trial.look is not None
            found.append(replace(trial, look=replace(trial.look, bar=(), bounds=(), audit=True)))
        return tuple(found)

    def _audited(self) -> dict[str, Costs]:
        """What the audit measured, of trials that keep to the constraints."""
        found = {}
        for trial in self._audit or ():
            if trial.key in self._missing or not self.store.has("trial", trial.key):
                continue
            metrics = self.store.read_record("trial", trial.key).metrics
            values = goals.values(metrics, self.settings.objectives)
            broken = goals.violations(metrics, self.bounds, first=False)
            if all(math.isfinite(v) for v in values) and all(v <= 0.0 for v in broken):
                found[trial.key] = _costs(values, self.settings.objectives)
        return found

    def front(self) -> list[Entry]:
        """The trials that nothing dominates on the validation rays, of those measured in full."""
        found = self._costs()
        return [self._entries[key] for key in goals.front(found)]

    def _costs(self) -> dict[str, Costs]:
        return {
            entry.key: _costs(entry.values or (), self.settings.objectives)
            for entry in self._entries.values()
            if self._good(entry)
        }

    def _final_trials(self) -> list[Trial]:
        found = {**self._costs(), **self._audited()}
        keys = goals.spread(goals.front(found), found, self.settings.final)
        return [
            searched_trial(self.sweep, self.plan, self.space.config(self._entries[key].parameters))
            for key in keys
        ]

    def summary(self) -> dict[str, object]:
        """What the report needs of the search: keys of its records, the final front's, counts."""
        entries = sorted(self._entries.values(), key=lambda e: (e.round, e.slot))
        front = [entry.key for entry in self.front()]
        audited = self._audited()
        after = goals.front({**self._costs(), **audited}) if audited else front
        return {
            "study": self.plan.name,
            "training": self.plan.training.key,
            "sampler": self.settings.sampler,
            "objectives": list(self.settings.objectives),
            "finished": None if self._final is None else wanted(self.plan),
            "trials": [
                {
                    "key": entry.key,
                    "record": entry.measured.get("record"),
                    "origin": entry.origin,
                    "state": entry.state,
                    "stopped": entry.measured.get("stopped"),
                    "feasible": entry.measured.get("feasible"),
                }
                for entry in entries
            ],
            "proposing_seconds": self.proposing,
            "seconds": self.spent(),
            "saved": goals.saved(
                (e.measured.get("seconds", {}), e.measured.get("stopped") is not None)
                for e in entries
                if e.state == "done"
            ),
            "front": front,
            "audit": {
                "records": [trial.key for trial in self._audit or ()],
                "trials": len(audited),
                "joined": sorted(set(after) - set(front)),
                "left": sorted(set(front) - set(after)),
            },
            "final": [trial.key for trial in self._final or ()],
        }


STAGES = frozenset({"prune", "first look", "validate"})
MODEL = "model.safetensors"
STATS = "statistics.safetensors"


def open_study(sweep: Sweep, plan: SearchPlan, store: Store) -> Study:
    """The study of a search, made where it is not there yet.

    Raises:
        SearchError: its database cannot be used.
    """
    space = Space(plan.settings, sweep.shape, plan.sets)
    return Study(study_url(sweep, store), plan.name, plan.settings.objectives, space.dimensions)


def _costs(values: Iterable[float], objectives: tuple[Objective, ...]) -> Costs:
    return goals.costs(tuple(values), objectives)
