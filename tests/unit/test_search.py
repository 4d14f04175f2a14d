"""The search step by step, without Ray: rounds, deaths, duplicates, failures, constraints.

Trials are not run: a formula stands for them, and its records go into a real store.
"""

import math
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from orchestrator.errors import SearchError
from orchestrator.plan import SearchPlan, Trial, make_plan
from orchestrator.scheduler.seeking import SearchFeed
from orchestrator.search import lasting
from orchestrator.search.lasting import LastingSearch
from orchestrator.search.search import Search, open_study, study_url
from orchestrator.search.study import Study
from orchestrator.search.summary import is_finished, searched, write_summary
from orchestrator.spec import Sweep
from orchestrator.store import Store
from tests.services import postgres
from tests.unit.record_builder import save, training_record, trial_record
from tests.unit.sweep_builder import sweep, with_scene

BASE: dict[str, Any] = {
    "trials": 16,
    "batch": 4,
    "sampler": "random",
    "networks": "fine",
    "criteria": "magnitude",
    "compensation": "none",
    "start": {"uniform": [0.0, 0.5]},
    "fidelity": {"rays": 64, "margin": 0.5},
}


class Desk:
    """A sweep with a search on a model that is there, and someone who makes its trials' results."""

    def __init__(self, folder: Path, scene: Path, **search: Any) -> None:
        made = sweep(prune=None, storage=str(folder / "out"), search={**BASE, **search})
        self.sweep: Sweep = with_scene(replace(made, storage=str(folder / "out")), scene)
        self.store = Store(folder / "out")
        self.store.prepare()
        self.ran: list[str] = []
        dense = training_record(psnr=25.0)
        (self.training,) = self.plan_of().trainings
        if not self.store.has("training", self.training.result):
            record = replace(dense, key=self.training.result, training=self.training.key)
            record = replace(record, metrics={**record.metrics, "validation_psnr": 25.0})
            save(self.store, record)

    def plan_of(self) -> Any:
        return make_plan(self.sweep, self.store)

    @property
    def plan(self) -> SearchPlan:
        return self.plan_of().searches[0]

    def search(self) -> Search:
        return Search(self.sweep, self.plan, self.store)

    def run(self, trial: Trial, psnr: float | None = None) -> None:
        """Write the record of a trial: more channels in the middle layer are worth most."""
        self.ran.append(trial.key)
        config = trial.config
        ratios = dict(zip(config.layers, config.layer_ratios, strict=True))
        size = 1000.0 + 1000.0 * sum(1 - r for r in ratios.values())
        loss = sum(r**2 * (9 if "trunk.1" in n else 1) for n, r in ratios.items())
        score = 25.0 - loss if psnr is None else psnr
        metrics = {"size_bytes": size, "first_psnr": score + 0.1, "validation_psnr": score}
        if trial.look is None:
            metrics = {"size_bytes": size, "psnr": score, "mse": 0.1}
        base = trial_record(training_record(), 0.5)
        save(
            self.store,
            replace(base, key=trial.key, training=trial.training, config=config.flat(),
                    metrics=metrics, views=()),
        )  # fmt: skip

    def drive(self, search: Search | LastingSearch, most: int | None = None) -> list[Trial]:
        """Run trials to the end, or so many of them; gives the final front."""
        step = search.advance([])
        todo = list(step.trials)
        while not step.finished:
            trial = todo.pop(0)
            if most is not None and len(self.ran) >= most:
                return []
            self.run(trial)
            step = search.advance([(trial.key, None)])
            todo += step.trials
        write_summary(self.plan, self.store, search.summary())
        return todo

    def study(self) -> optuna.Study:
        return optuna.load_study(
            study_name=self.plan.name, storage=study_url(self.sweep, self.store)
        )

    def told(self) -> list[tuple[Any, ...]]:
        return [
            (t.number, t.user_attrs["prunefield"], t.params, t.values, t.state)
            for t in self.study().trials
        ]


@pytest.fixture
def desk(tmp_path: Path, demo_folder: Path) -> Desk:
    return Desk(tmp_path, demo_folder)


def test_a_search_tries_its_starts_then_what_the_sampler_proposes(desk: Desk) -> None:
    final = desk.drive(desk.search())
    trials = desk.study().trials
    assert [t.state for t in trials] == [optuna.trial.TrialState.COMPLETE] * 16
    origins = [t.user_attrs["prunefield"]["origin"] for t in trials]
    assert origins == ["uniform 0", "uniform 0.5"] + ["random"] * 14
    rounds = Counter(t.user_attrs["prunefield"]["round"] for t in trials)
    assert rounds == dict.fromkeys(range(4), 4)
    assert len(set(desk.ran)) == len(desk.ran) == 16
    # The final front is what Optuna calls best, to be rendered on the held-out views.
    best = {t.user_attrs["prunefield"]["key"] for t in desk.study().best_trials}
    assert {e.key for e in desk.search().front()} == best
    assert all(trial.look is None for trial in final)
    assert len(final) == len(best)


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "nsga3", "qmc", "random"])
def test_every_sampler_goes_through_and_the_same_seed_gives_the_same_study(
    sampler: str, tmp_path: Path, demo_folder: Path
) -> None:
    studies = []
    for name in ("one", "two"):
        desk = Desk(tmp_path / name, demo_folder, sampler=sampler, trials=14)
        desk.drive(desk.search())
        studies.append(desk.told())
    assert studies[0] == studies[1]
    assert len({t[1]["key"] for t in studies[0]}) == 14


def test_another_seed_gives_another_study(tmp_path: Path, demo_folder: Path) -> None:
    desks = [Desk(tmp_path / str(s), demo_folder, seed=s, trials=4) for s in (0, 1)]
    for desk in desks:
        desk.search().advance([])
    assert [t[2] for t in desks[0].told()][2:] != [t[2] for t in desks[1].told()][2:]


@pytest.mark.parametrize("after", [0, 5, 9])
def test_a_search_that_died_goes_on_as_if_it_had_not(
    after: int, tmp_path: Path, demo_folder: Path
) -> None:
    whole = Desk(tmp_path / "whole", demo_folder, sampler="tpe")
    whole.drive(whole.search())
    desk = Desk(tmp_path / "died", demo_folder, sampler="tpe")
    desk.drive(desk.search(), most=after)
    again = Desk(tmp_path / "died", demo_folder, sampler="tpe")
    again.drive(again.search())
    assert again.told() == whole.told()
    assert not set(desk.ran) & set(again.ran)  # nothing that finished ran again
    assert len(desk.ran) + len(again.ran) == 16


def test_results_that_no_one_told_are_found_in_the_store(desk: Desk) -> None:
    step = desk.search().advance([])
    for trial in step.trials[:3]:
        desk.run(trial)  # and then the driver dies
    again = desk.search().advance([])
    assert {t.key for t in again.trials} == {t.key for t in step.trials[3:]}
    states = Counter(t.state.name for t in desk.study().trials)
    assert states == {"COMPLETE": 3, "RUNNING": 5}


def test_a_round_that_was_written_in_part_is_completed_with_the_same(
    desk: Desk, tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.search.study import Study

    whole = Desk(tmp_path / "whole", demo_folder)
    whole.drive(whole.search())
    add, count = Study.add, 0

    def dying(self: Study, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return add(self, *arguments)

    monkeypatch.setattr(Study, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        desk.drive(desk.search())
    assert len(desk.study().trials) == 6
    monkeypatch.setattr(Study, "add", add)
    desk.drive(desk.search())
    assert desk.told() == whole.told()


def test_more_trials_go_on_with_the_same_study(tmp_path: Path, demo_folder: Path) -> None:
    whole = Desk(tmp_path / "whole", demo_folder, trials=14)
    whole.drive(whole.search())
    desk = Desk(tmp_path / "more", demo_folder, trials=6)
    desk.drive(desk.search())
    assert is_finished(desk.plan, desk.store) is False  # its front is not rendered yet
    for trial in desk.drive(desk.search()):
        desk.run(trial)
    assert is_finished(desk.plan, desk.store)
    more = Desk(tmp_path / "more", demo_folder, trials=14)
    assert not is_finished(more.plan, more.store)
    more.drive(more.search())
    assert more.told() == whole.told()


def test_more_trials_are_counted_beside_those_that_are_known(
    tmp_path: Path, demo_folder: Path
) -> None:
    desk = Desk(tmp_path, demo_folder)
    assert SearchFeed(desk.sweep, desk.plan, desk.store).left == 16
    desk.drive(desk.search())
    more = Desk(tmp_path, demo_folder, trials=21)
    assert SearchFeed(more.sweep, more.plan, more.store).left == 5


def test_a_search_whose_time_is_over_ends_in_order_and_more_time_goes_on(
    tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("orchestrator.search.search.monotonic", lambda: clock[0])

    def drive(desk: Desk) -> list[Trial]:
        """A second for each trial."""
        run = desk.run
        monkeypatch.setattr(
            desk, "run", lambda *given: (clock.__setitem__(0, clock[0] + 1.0), run(*given))
        )
        return desk.drive(desk.search())

    whole = Desk(tmp_path / "whole", demo_folder)
    whole.drive(whole.search())
    short = Desk(tmp_path / "short", demo_folder, seconds=5.0)
    final = drive(short)
    # Two rounds are begun at once, the third at 4 s; at 8 s the time is over, and those end.
    assert short.told() == whole.told()[:12]
    assert final
    assert not is_finished(short.plan, short.store)
    for trial in final:
        short.run(trial)
    assert is_finished(short.plan, short.store)
    again = Desk(tmp_path / "short", demo_folder, seconds=5.0)
    assert again.search().advance([]).finished  # the time of earlier runs counts
    more = Desk(tmp_path / "short", demo_folder, seconds=1000.0)
    assert not is_finished(more.plan, more.store)
    drive(more)
    assert more.told() == whole.told()


def test_fewer_trials_end_a_search_that_was_stopped(tmp_path: Path, demo_folder: Path) -> None:
    desk = Desk(tmp_path, demo_folder)
    desk.drive(desk.search(), most=6)  # and then the driver is interrupted
    fewer = Desk(tmp_path, demo_folder, trials=4)
    final = fewer.drive(fewer.search())
    states = Counter(t.state.name for t in fewer.study().trials)
    assert states == {"COMPLETE": 12}  # what had been proposed is ended
    assert {t.config for t in final} == {
        fewer.search().space.config(e.parameters) for e in fewer.search().front()
    }


# The smallest model that there is: whatever is worse than it is dominated.
ENDS = {"uniform": [0.0, 0.95]}


def drive_stopping(desk: Desk, lost: int, given: int = 0) -> tuple[Search, list[Trial]]:
    """Stop each trial of the third round at the first look, `lost` of them wrongly so.

    Returns:
        The search and what the audit asked for.
    """
    search = desk.search()
    step = search.advance([])
    todo, audits = list(step.trials), []
    rounds = {entry.key: entry.round for entry in search.study.entries()}
    while not step.finished:
        trial = todo.pop(0)
        assert trial.look is not None
        if trial.look.audit:
            audits.append(trial)
            if len(audits) > given:
                desk.run(trial, psnr=99.0 if len(audits) - given <= lost else 1.0)
        elif rounds[trial.key] == 2:
            desk.run(replace(trial, key=trial.look.first_key), psnr=2.0)
        else:
            desk.run(trial)
        failure = (
            None if desk.store.has("trial", trial.key) or not trial.look.audit else "prune: no"
        )
        step = search.advance([(trial.key, failure)])
        rounds = {entry.key: entry.round for entry in search.study.entries()}
        todo += step.trials
    write_summary(desk.plan, desk.store, search.summary())
    return search, audits


@pytest.mark.parametrize("most", [0, 3, 16])
def test_stopped_trials_are_measured_in_full_when_the_search_is_over(
    most: int, tmp_path: Path, demo_folder: Path
) -> None:
    fidelity = {"rays": 64, "margin": 0.5, "audit": most}
    desk = Desk(tmp_path, demo_folder, fidelity=fidelity, start=ENDS)
    search, audits = drive_stopping(desk, lost=0)
    assert len(audits) == min(most, 4)
    stopped = [e for e in search.study.entries() if e.measured.get("stopped")]
    assert len(stopped) == 4
    assert {t.key for t in audits} <= {e.key for e in stopped}
    assert all(t.look is not None and t.look.bar == () for t in audits)
    sentence = searched(desk.plan, desk.store).sentence
    assert ("the front is the same" in sentence) == (most > 0)
    # Again: what was audited is not measured again.
    again = desk.search().advance([])
    assert again.finished


def test_what_the_audit_finds_joins_the_final_front(tmp_path: Path, demo_folder: Path) -> None:
    fidelity = {"rays": 64, "margin": 0.5, "audit": 4}
    desk = Desk(tmp_path, demo_folder, fidelity=fidelity, start=ENDS)
    search, audits = drive_stopping(desk, lost=1)
    found = audits[0]
    final = desk.search().advance([]).trials
    assert found.config in {t.config for t in final}
    assert found.key not in {e.key for e in search.front()}
    said = searched(desk.plan, desk.store)
    assert said.audit["joined"] == [found.key]
    assert "1 belong on the front" in said.sentence


def test_an_audit_that_fails_does_not_hold_the_search_up(tmp_path: Path, demo_folder: Path) -> None:
    fidelity = {"rays": 64, "margin": 0.5, "audit": 4}
    desk = Desk(tmp_path, demo_folder, fidelity=fidelity, start=ENDS)
    search, audits = drive_stopping(desk, lost=0, given=2)
    assert len(audits) == 4
    assert search.summary()["audit"]["trials"] == 2  # type: ignore[index]


def test_nothing_is_tried_twice_and_a_small_space_runs_out(
    tmp_path: Path, demo_folder: Path
) -> None:
    desk = Desk(
        tmp_path, demo_folder, trials=50, layers=[[0], [1]], ratios={"high": 0.5, "step": 0.25}
    )
    desk.drive(desk.search())
    assert len(desk.ran) == len(set(desk.ran)) == 9  # 3 × 3 ratios
    assert len(desk.study().trials) == 9


def test_failures_and_nan_are_told_as_failed_and_never_chosen(desk: Desk) -> None:
    search = desk.search()
    step = search.advance([])
    first, second, *rest = step.trials
    desk.run(second, psnr=math.nan)
    step = search.advance([(first.key, "prune: oops"), (second.key, None)])
    todo = [*rest, *step.trials]
    while not step.finished:
        trial = todo.pop(0)
        desk.run(trial)
        step = search.advance([(trial.key, None)])
        todo += step.trials
    trials = desk.study().trials
    assert Counter(t.state.name for t in trials) == {"FAIL": 2, "COMPLETE": 14}
    assert trials[0].user_attrs["measured"]["failure"] == "prune: oops"
    assert {first.key, second.key}.isdisjoint(e.key for e in search.front())
    again = desk.search().advance([])
    assert again.finished  # failed ones are not tried again


def test_constraints_are_told_and_keep_the_front(tmp_path: Path, demo_folder: Path) -> None:
    limits = ["size_bytes <= 4000", "psnr >= dense - 5"]
    desk = Desk(tmp_path, demo_folder, sampler="gp", constraints=limits)
    search = desk.search()
    desk.drive(search)
    for trial in desk.study().trials:
        size, psnr = trial.values
        broken = trial.constraints
        assert broken == {
            "size_bytes <= 4000": pytest.approx(size - 4000),
            "psnr >= dense - 5": pytest.approx(20.0 - psnr),
        }
    front = [entry.values for entry in search.front()]
    assert front
    assert all(values is not None and values[0] <= 4000 and values[1] >= 20 for values in front)


def test_the_bar_of_a_round_is_what_the_round_before_the_last_knew(desk: Desk) -> None:
    search = desk.search()
    step = search.advance([])
    assert all(trial.look is not None and trial.look.bar == () for trial in step.trials)
    todo = list(step.trials)
    seen = {}
    while not step.finished:
        trial = todo.pop(0)
        assert trial.look is not None
        seen[trial.key] = trial.look.bar
        desk.run(trial)
        step = search.advance([(trial.key, None)])
        todo += step.trials
    by_round: dict[int, set[Any]] = {}
    for entry in search.study.entries():
        by_round.setdefault(entry.round, set()).add(seen[entry.key])
    assert all(len(bars) == 1 for bars in by_round.values())
    assert by_round[1] == {()}
    (bar,) = by_round[2]
    assert 1 <= len(bar) <= 4  # the front of the first round, at its first look
    assert all(-psnr == pytest.approx(-psnr) and size > 0 for size, psnr in bar)


def test_what_the_first_look_stopped_is_told_by_that_look_and_kept_off_the_front(
    desk: Desk,
) -> None:
    search = desk.search()
    step = search.advance([])
    trial = step.trials[0]
    assert trial.look is not None
    record = trial_record(training_record(), 0.5)
    metrics = {"size_bytes": 10.0, "first_psnr": 99.0}  # better than all, but not measured in full
    save(desk.store, replace(record, key=trial.look.first_key, metrics=metrics, config={}))
    todo = list(step.trials[1:])
    step = search.advance([(trial.key, None)])
    todo += step.trials
    while not step.finished:
        other = todo.pop(0)
        desk.run(other)
        step = search.advance([(other.key, None)])
        todo += step.trials
    told = desk.study().trials[0]
    assert told.values == [10.0, 99.0]
    assert told.user_attrs["measured"]["stopped"]
    assert trial.key not in {entry.key for entry in search.front()}
    write_summary(desk.plan, desk.store, search.summary())
    assert searched(desk.plan, desk.store).stopped == 1


def test_trials_of_other_sweeps_on_the_model_are_tried_first(
    tmp_path: Path, demo_folder: Path
) -> None:
    one = Desk(tmp_path, demo_folder)
    one.drive(one.search())
    two = Desk(tmp_path, demo_folder, seed=5, batch=20, trials=20)
    step = two.search().advance([])
    origins = [t.user_attrs["prunefield"]["origin"] for t in two.study().trials]
    front = {e.key for e in one.search().front()}
    assert {o for o in origins if o.startswith("trial ")} <= {f"trial {k}" for k in front}
    assert any(o.startswith("trial ") for o in origins)
    # Their results are in the store: told at once, and not run.
    assert len(step.trials) < 20
    alone = Desk(tmp_path, demo_folder, seed=6, start={"store": False})
    alone.search().advance([])
    assert "trial" not in str([t.user_attrs for t in alone.study().trials])


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all/study.db", "nonsense", "postgresql+psycopg://u@h:1/d"]
)
def test_a_database_that_cannot_be_used_says_so(
    url: str, tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    desk = Desk(tmp_path, demo_folder, storage=url)
    with pytest.raises(SearchError, match="SQLAlchemy URL") as error:
        desk.search()
    assert "secret" not in str(error.value)


def test_a_database_that_is_away_for_a_while_changes_nothing(
    desk: Desk, tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.drive(desk.search())
    monkeypatch.setattr(lasting, "RETRY_SECONDS", 0.0)
    other, calls = Desk(tmp_path / "other", demo_folder), Counter[str]()

    def unsteady(name: str) -> None:
        real = getattr(Study, name)

        def call(*given: Any) -> Any:
            calls[name] += 1
            if calls[name] % 5 == 2:
                raise OperationalError("synthetic", {}, Exception("the database restarts"))
            found = real(*given)
            if calls[name] % 5 == 4:  # it was written, and nobody heard of it
                raise StorageInternalError("synthetic")
            return found

        monkeypatch.setattr(Study, name, call)

    for name in ("add", "tell", "entries"):
        unsteady(name)
    other.drive(LastingSearch(other.sweep, other.plan, other.store))
    monkeypatch.undo()
    assert min(calls.values()) > 3
    assert other.told() == desk.told()
    assert sorted(other.ran) == sorted(desk.ran)


def test_a_database_that_stays_away_ends_the_search_with_a_clear_error(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting, "AWAY_SECONDS", 0.05)
    monkeypatch.setattr(lasting, "RETRY_SECONDS", 0.02)
    search = LastingSearch(desk.sweep, desk.plan, desk.store)
    step = search.advance([])

    def away(*_: Any) -> None:
        raise OperationalError("synthetic", {}, Exception("the database restarts"))

    monkeypatch.setattr(Study, "tell", away)
    desk.run(step.trials[0])
    with pytest.raises(SearchError, match=r"cannot be used for .* s now.*run again"):
        search.advance([(step.trials[0].key, None)])


def test_a_postgresql_that_is_silent_or_restarts_changes_nothing(
    desk: Desk, tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.drive(desk.search())
    monkeypatch.setattr("orchestrator.databases.SILENT_SECONDS", 0.5)
    monkeypatch.setattr("orchestrator.databases.CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(lasting, "RETRY_SECONDS", 0.1)
    with postgres() as server:
        monkeypatch.setenv("PGPASSWORD", server.password)
        other = Desk(tmp_path / "other", demo_folder, storage=server.uri)
        search = LastingSearch(other.sweep, other.plan, other.store)
        step = search.advance([])
        todo = list(step.trials)
        for fault in ("silent sessions", "silence", "restart"):
            trial = todo.pop(0)
            other.run(trial)
            if fault == "restart":
                server.stop()
                back = threading.Timer(0.5, server.start)
                back.start()
                step = search.advance([(trial.key, None)])
                back.join()
            elif fault == "silent sessions":
                with server.silent(sessions_only=True):
                    step = search.advance([(trial.key, None)])
            else:
                with server.silent():
                    monkeypatch.setattr(lasting, "AWAY_SECONDS", 0.5)
                    with pytest.raises(SearchError, match=r"cannot be used for .* s now.*run agai"):
                        search.advance([(trial.key, None)])
                    with pytest.raises(SearchError, match="connection timeout expired"):
                        other.search()
                monkeypatch.setattr(lasting, "AWAY_SECONDS", 60.0)
                step = search.advance([(trial.key, None)])
            todo += step.trials
        while not step.finished:
            trial = todo.pop(0)
            other.run(trial)
            step = search.advance([(trial.key, None)])
            todo += step.trials
        search._drop()
        study = open_study(other.sweep, other.plan, other.store)
        assert study.entries() == open_study(desk.sweep, desk.plan, desk.store).entries()
        study.close()
        assert sorted(other.ran) == sorted(desk.ran)


def test_the_dashboard_opens_a_study_under_way(desk: Desk) -> None:
    import io
    import json

    from optuna_dashboard import wsgi

    desk.drive(desk.search(), most=6)
    app = wsgi(optuna.storages.RDBStorage(study_url(desk.sweep, desk.store)))
    asked = {
        "REQUEST_METHOD": "GET", "SERVER_NAME": "localhost", "SERVER_PORT": "80",
        "QUERY_STRING": "", "SCRIPT_NAME": "", "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(),
    }  # fmt: skip
    answered: list[str] = []

    def get(path: str) -> Any:
        body = app({**asked, "PATH_INFO": path}, lambda status, _, *__: answered.append(status))
        return json.loads(b"".join(body))

    assert "size_bytes" in str(get("/api/studies/1"))
    states = Counter(trial["state"] for trial in get("/api/studies/1")["trials"])
    assert states["Complete"] == 6
    assert states["Running"] > 0
    assert set(answered) == {"200 OK"}


def test_a_study_may_be_in_postgresql(
    tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.services import postgres

    with postgres() as server:
        monkeypatch.setenv("PGPASSWORD", server.password)
        ran = []
        for most in (5, None):
            desk = Desk(tmp_path, demo_folder, storage=server.uri)
            search = desk.search()
            desk.drive(search, most)
            ran += desk.ran
            states = Counter(entry.state for entry in search.study.entries())
            search.study.close()
        assert states == {"done": 16}
        assert len(ran) == len(set(ran)) == 16
