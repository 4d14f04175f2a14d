"""The study: every trial of a search in a database, and what Optuna's samplers propose next.

Only this module and `samplers` import Optuna. The database is the truth: a study opened again, by
whichever process, knows what was proposed, what ended how, and what did not end.

Trials are proposed in **rounds** of a fixed size. Round r sees the results of the rounds up to
r − 2 and treats those of round r − 1 as running, so that workers are busy with round r − 1 while
round r is thought out. Each proposal of a round is a function of the seed, the round and those
results, not of who was faster: the same results give the same study, interrupted or not.

A round is thought out in memory, on a copy of the study, and written trial by trial when it is
whole: a death before leaves nothing behind, a death in the middle leaves a beginning that the next
run completes with the same proposals.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
import sqlalchemy
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator.databases import limit_silence
from orchestrator.errors import SearchError
from orchestrator.search.goals import UP
from orchestrator.search.samplers import make_sampler
from orchestrator.search.space import Choice, Parameters, Range
from orchestrator.spec.sweep import Objective, Sampler

NOTE = "prunefield"
MEASURED = "measured"
STARTS = "starts"
SPENT = "seconds"
# A Gaussian process sees at most so many trials, those on the front and others from the whole of
# the study: its cost grows with their cube. The newest in their place lie near the front; where the
# bad ones are, it then forgets, and proposes them again.
GP_TRIALS = 384
ATTEMPTS = 3

State = Literal["running", "done", "failed"]
_STATES: Mapping[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "done",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "failed",
}


@dataclass(frozen=True)
class Entry:
    """One trial of a study.

    Attributes:
        number: in the study.
        round: that proposed it.
        slot: its place in the round.
        key: content address of its trial.
        origin: who proposed it: the sampler's name, or where a start comes from.
        parameters: rounded.
        state: running (or never begun), done, failed.
        values: the objectives; None unless done.
        measured: what it was told with: metrics of the record, key of the record.
    """

    number: int
    round: int
    slot: int
    key: str
    origin: str
    parameters: Parameters
    state: State
    values: tuple[float, ...] | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """One pruning to try.

    Attributes:
        key: content address of its trial.
        origin: see `Entry`.
        parameters: rounded.
        attributes: of the sampler, kept with the trial.
    """

    key: str
    origin: str
    parameters: Parameters
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Study:
    """A study in a database; it is made when it is not there.

    Args:
        url: SQLAlchemy URL.
        name: of the study.
        objectives: what is minimised or maximised, see `orchestrator.search.goals`.
        dimensions: what is searched.

    Raises:
        SearchError: the database cannot be used, or holds another study of that name.
    """

    def __init__(
        self,
        url: str,
        name: str,
        objectives: Sequence[Objective],
        dimensions: Mapping[str, Range | Choice],
    ) -> None:
        _quiet()
        limit_silence()
        self.name = name
        self.objectives = tuple(objectives)
        self.distributions: dict[str, BaseDistribution] = {
            n: FloatDistribution(d.low, d.high)
            if isinstance(d, Range)
            else CategoricalDistribution(d.of)
            for n, d in dimensions.items()
        }
        directions: list[Literal["maximize", "minimize"]] = [
            "maximize" if o in UP else "minimize" for o in self.objectives
        ]
        try:
            storage = self._storage = RDBStorage(url, engine_kwargs=_engine(url))
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=directions,
                load_if_exists=True,
                sampler=RandomSampler(),  # proposals come from `propose`
            )
            if self._study.metric_names is None:
                self._study.set_metric_names(list(self.objectives))
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as e:
            reason = str(e.__cause__ or e).splitlines()[0]
            raise SearchError(
                f"the study's database {_without_password(url)} cannot be used: {reason}; give a "
                "SQLAlchemy URL such as sqlite:////path/study.db or "
                "postgresql+psycopg://user@host/database as `search.storage`"
            ) from e
        self._directions = directions

    def close(self) -> None:
        """Give the connections to the database back."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def starts(self) -> list[tuple[str, Parameters]] | None:
        """What was written with `keep_starts`; None before."""
        kept = self._study.user_attrs
        if STARTS not in kept:
            return None
        found = [kept[f"{STARTS}:{i}"] for i in range(int(kept[STARTS]))]
        return [(start["origin"], start["parameters"]) for start in found]

    def keep_starts(self, starts: Sequence[tuple[str, Parameters]]) -> None:
        """Write what is to be tried first, so that the study begins alike whenever it goes on."""
        for i, (origin, parameters) in enumerate(starts):
            value = {"origin": origin, "parameters": parameters}
            self._study.set_user_attr(f"{STARTS}:{i}", value)
        self._study.set_user_attr(STARTS, len(starts))

    def spent(self) -> float:
        """Seconds of this search in all its runs, as far as they were kept."""
        return float(self._study.user_attrs.get(SPENT, 0.0))

    def keep_spent(self, seconds: float) -> None:
        """Write how many seconds this search took so far."""
        self._study.set_user_attr(SPENT, round(seconds, 3))

    def entries(self) -> list[Entry]:
        """Every trial of the study, in the order of their proposal."""
        found = [_entry(trial) for trial in self._study.get_trials(deepcopy=False)]
        return sorted((e for e in found if e is not None), key=lambda e: (e.round, e.slot))

    def add(self, round_: int, slot: int, proposal: Proposal) -> Entry:
        """Write a proposal as a running trial."""
        note = {
            "key": proposal.key,
            "round": round_,
            "slot": slot,
            "origin": proposal.origin,
        }
        trial = create_trial(
            state=TrialState.RUNNING,
            params=proposal.parameters,
            distributions=self.distributions,
            user_attrs={NOTE: note},
            system_attrs=dict(proposal.attributes),
        )
        self._study.add_trial(trial)
        # One driver a study: the newest trial is the one just added.
        number = len(self._study.get_trials(deepcopy=False)) - 1
        return Entry(
            number, round_, slot, proposal.key, proposal.origin, proposal.parameters, "running"
        )

    def tell(
        self,
        entry: Entry,
        values: Sequence[float] | None,
        measured: Mapping[str, Any],
        violations: Mapping[str, float] | None = None,
    ) -> None:
        """Say how a trial ended; telling it twice changes nothing.

        Args:
            entry: the trial.
            values: its objectives; None, or a NaN among them, is a failure.
            measured: kept with the trial.
            violations: by constraint, above 0 where it is broken.
        """
        trial = self._study.get_trials(deepcopy=False)[entry.number]
        if trial.state.is_finished():
            return
        live = optuna.trial.Trial(self._study, trial._trial_id)
        live.set_user_attr(MEASURED, dict(measured))
        good = values is not None and all(math.isfinite(value) for value in values)
        if not good:
            self._study.tell(entry.number, state=TrialState.FAIL)
            return
        for name, value in (violations or {}).items():
            live.set_constraint(name, value)
        self._study.tell(entry.number, list(values or ()))

    def propose(
        self,
        history: Iterable[Entry],
        running: Iterable[Entry],
        round_: int,
        count: int,
        sampler: Sampler,
        seed: int,
        finish: Callable[[Parameters], tuple[str, Parameters]],
        taken: Iterable[str] = (),
    ) -> list[Proposal]:
        """What to try next: a function of its arguments alone.

        Args:
            history: trials that ended.
            running: trials that have not, as far as this round knows.
            round_: number of the round.
            count: how many.
            sampler: who proposes.
            seed: of the sampler.
            finish: rounds parameters and gives the key of the trial that they stand for.
            taken: keys that were tried already; none is proposed twice.

        Returns:
            `count` proposals, fewer where the space holds no more.
        """
        ended, others = list(history), list(running)
        everything = {t.number: t for t in self._study.get_trials(deepcopy=False)}
        known = {*taken, *(entry.key for entry in (*ended, *others))}
        copy = optuna.create_study(directions=self._directions)
        copy.sampler = make_sampler(sampler, _mix(seed, round_))
        chosen = self._for_model(ended) if sampler == "gp" else ended
        for entry in (*chosen, *others):
            copy.add_trial(self._copied(everything[entry.number], entry, entry in others))
        if sampler == "qmc":  # a fixed sequence: what earlier rounds took of it is passed over
            passed = sum(e.origin == "qmc" for e in (*ended, *others))
            for _ in range(passed):
                copy.ask(self.distributions)
        chance = RandomSampler(seed=_mix(seed, round_) ^ 1)
        found: list[Proposal] = []
        for _ in range(count):
            for attempt in range(ATTEMPTS + 40):
                if attempt == ATTEMPTS:
                    copy.sampler = chance
                with _one_thread():
                    asked = copy.ask(self.distributions)
                key, parameters = finish(asked.params)
                if key not in known:
                    break
                copy.tell(asked, state=TrialState.FAIL)
            else:
                break
            known.add(key)
            made = copy.get_trials(deepcopy=False)[asked.number].system_attrs
            attributes = {n: v for n, v in made.items() if not n.startswith("gp:")}
            found.append(Proposal(key, sampler, parameters, attributes))
        return found

    def _for_model(self, ended: list[Entry]) -> list[Entry]:
        """The trials that a Gaussian process sees: the front and every n-th of the others."""
        done = [entry for entry in ended if entry.state == "done"]
        if len(done) <= GP_TRIALS:
            return done
        copy = optuna.create_study(directions=self._directions)
        for entry in done:
            copy.add_trial(create_trial(values=entry.values))
        if len(self._directions) > 1:
            best = {trial.number for trial in copy.best_trials}
        else:
            best = {copy.best_trial.number}
        kept = [entry for i, entry in enumerate(done) if i in best]
        rest = [entry for i, entry in enumerate(done) if i not in best]
        room = min(max(GP_TRIALS - len(kept), GP_TRIALS // 4), len(rest))
        spread = [rest[i * len(rest) // room] for i in range(room)]
        chosen = {entry.number for entry in (*kept, *spread)}
        return [entry for entry in done if entry.number in chosen]

    def _copied(self, trial: FrozenTrial, entry: Entry, running: bool) -> FrozenTrial:
        failed = entry.state == "failed"
        state = TrialState.RUNNING if running else TrialState.COMPLETE
        return create_trial(
            state=TrialState.FAIL if failed and not running else state,
            values=None if running or failed else entry.values,
            params=entry.parameters,
            distributions=self.distributions,
            system_attrs=trial.system_attrs,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold PyTorch to one thread.

    A Gaussian process of 200 trials gains nothing from more, and its sums do not depend on them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _entry(trial: FrozenTrial) -> Entry | None:
    note = trial.user_attrs.get(NOTE)
    if not isinstance(note, dict):
        return None
    return Entry(
        number=trial.number,
        round=note["round"],
        slot=note["slot"],
        key=note["key"],
        origin=note["origin"],
        parameters=dict(trial.params),
        state=_STATES[trial.state],
        values=None if trial.values is None else tuple(trial.values),
        measured=trial.user_attrs.get(MEASURED, {}),
    )


def why_away(error: BaseException) -> str | None:
    """Why a study's database cannot be used now; None if the error says nothing of one."""
    away = sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, SearchError
    if not isinstance(error, away):
        return None
    said = str(error.__cause__ or error).strip() or type(error).__name__
    return said.splitlines()[0]


def _mix(seed: int, round_: int) -> int:
    return (seed * 1_000_003 + round_ * 7_919 + 1) % 2**31


def _engine(url: str) -> dict[str, Any]:
    """Wait for a SQLite file that the dashboard is reading."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}


def _without_password(url: str) -> str:
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return json.dumps(url)


def _quiet() -> None:
    """Optuna's own lines about each trial are ours to tell."""
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
