"""What runs next, without a cluster: the queue that Tune asks and the table that lanes ask."""

import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher

from nerf.training import Recipe
from orchestrator.errors import ClusterError
from orchestrator.plan import Calibration, CalibrationSet, Plan, Training, Trial, TrialConfig
from orchestrator.results import Failure
from orchestrator.scheduler import cluster
from orchestrator.scheduler.queue import LANE, Node, PlanQueue, item_of
from orchestrator.scheduler.table import Item, Loss, Order, WorkTable
from tests.unit.sweep_builder import sweep

SWEEP = sweep()
OOPS = {"stage": "evaluate", "reason": "oops"}


def training(key: str, trained: bool = False, evaluated: bool = False) -> Training:
    return Training(key, f"{key}-dense", Recipe(iterations=5), 0, trained, evaluated)


def calibration(model: str, cached: bool = False, seed: int = 0, sets: int = 1) -> Calibration:
    keys = {CalibrationSet(i + 1, 8, seed): f"{model}-s{seed}-{i}" for i in range(sets)}
    return Calibration(model, seed, keys, cached)


def trial(key: str, model: str, statistics: str | None = None, cached: bool = False) -> Trial:
    config = TrialConfig("both", "random", 0.5, "uniform", (0.5,) * 3, None, 0)
    return Trial(key, model, statistics, config, cached)


def plan(*nodes: Node) -> Plan:
    def of(kind: type) -> tuple[Any, ...]:
        return tuple(node for node in nodes if isinstance(node, kind))

    return Plan(SWEEP, "scene", of(Training), of(Calibration), of(Trial), len(of(Trial)))


@dataclass
class FakeDispatch:
    """Remembers what it was offered."""

    offered: list[tuple[str, Item]] = field(default_factory=list)
    lost: tuple[Loss, ...] = ()
    dropped: list[str] = field(default_factory=list)

    nodes: dict[Item, Node] = field(default_factory=dict)
    expecting: bool = False

    def offer(
        self, work: Iterable[tuple[str, Item]], nodes: Mapping[Item, Node] | None = None
    ) -> None:
        self.offered += work
        self.nodes |= nodes or {}

    def expect(self, more: bool) -> None:
        self.expecting = more

    def drop_lane(self, lane: str) -> tuple[Loss, ...]:
        self.dropped.append(lane)
        return self.lost

    @property
    def keys(self) -> list[str]:
        return [item[1] for _, item in self.offered]


class Bench:
    """A queue with everything it says."""

    def __init__(self, made: Plan, lanes: int = 2, dispatch: Any = None, feeds: Any = ()) -> None:
        self.ends: list[tuple[Item, Failure | None]] = []
        self.progress: list[tuple[str, dict[str, Any]]] = []
        self.queue = PlanQueue(
            made,
            lambda node, report: self.progress.append((node.key, report)),
            lambda node, failure: self.ends.append((item_of(node), failure)),
            feeds,
        )
        self.dispatch = FakeDispatch() if dispatch is None else dispatch
        self.queue.connect(self.dispatch, lanes)
        self.count = 0

    def suggest(self) -> Any:
        self.count += 1
        return self.queue.suggest(f"t{self.count}")

    def end(self, tune_id: str, *ended: tuple[str, str, Any]) -> None:
        self.queue.on_trial_complete(tune_id, {"ended": [report(*e) for e in ended]})

    @property
    def ended(self) -> dict[str, Failure | None]:
        return {key: failure for (_, key), failure in self.ends}


def report(kind: str, key: str, failure: Any = None) -> dict[str, Any]:
    return {"kind": kind, "key": key, "failure": failure}


@dataclass
class FakeFeed:
    """A search of three trials, two of them at once."""

    needs: frozenset[str]
    left: int = 3
    finished: bool = False
    begun: bool = False
    failed: str | None = None
    ready: list[Trial] = field(default_factory=list)
    ends: list[tuple[str, Failure | None]] = field(default_factory=list)

    def begin(self) -> None:
        self.begun = True
        self.ready = [trial("f1", "a"), trial("f2", "a")]

    def fail(self, reason: str) -> None:
        self.failed, self.finished, self.left = reason, True, 0

    def poll(self) -> Sequence[Trial]:
        given, self.ready = self.ready, []
        return given

    def ended(self, trial: Trial, failure: Failure | None) -> None:
        self.ends.append((trial.key, failure))
        self.left -= 1
        if len(self.ends) == 2:
            self.ready = [globals()["trial"]("f3", "a")]
        self.finished = len(self.ends) == 3


# --- the queue ---------------------------------------------------------------------------------


def test_trainings_come_first() -> None:
    bench = Bench(plan(training("a"), training("b"), trial("x", "a"), trial("y", "b")))
    assert bench.suggest() == {"kind": "train", "key": "a"}
    assert bench.suggest() == {"kind": "train", "key": "b"}
    assert bench.suggest() is None  # everything left waits for a model
    assert bench.dispatch.offered == []


def test_prunings_start_when_their_model_is_ready_while_others_still_train() -> None:
    bench = Bench(plan(training("a"), training("b"), trial("x", "a"), trial("y", "b")))
    bench.suggest(), bench.suggest()
    bench.end("t1", ("train", "a", None))
    assert bench.dispatch.offered == [("a", ("prune", "x"))]
    assert bench.suggest() == {"kind": LANE, "key": "t3"}
    assert bench.suggest() is None  # one lane is enough for one pruning


def test_prunings_of_a_model_that_is_there_start_at_once() -> None:
    bench = Bench(plan(training("a", trained=True), trial("x", "a")))
    # The evaluation that is missing needs no whole GPU, and nothing waits for it.
    assert bench.dispatch.offered == [("a", ("train", "a")), ("a", ("prune", "x"))]
    assert [bench.suggest() for _ in range(3)] == [
        {"kind": LANE, "key": "t1"},
        {"kind": LANE, "key": "t2"},
        None,
    ]
    bench.queue.on_trial_result("t1", {"ended": [report("train", "a", OOPS)]})
    assert bench.ended == {"a": Failure("evaluate", "oops")}
    bench.end("t2", ("prune", "x", None))
    assert bench.ended["x"] is None


def test_a_dispatcher_may_start_with_what_is_ready() -> None:
    done = training("a", trained=True)
    queue = Bench(plan(done, calibration("a"), trial("x", "a", "a-s0-0"))).queue
    assert queue.take_ready() == []  # offered already
    queue = PlanQueue(plan(done, calibration("a")), print, print)
    ready = queue.take_ready()
    assert ready == [("a", ("train", "a"))]  # nobody needs the statistics
    assert WorkTable(1, ready).next("l", None) == Order(("train", "a"))


def test_lanes_start_while_the_statistics_that_they_need_are_collected() -> None:
    done = training("a", trained=True, evaluated=True)
    waiting = [trial(f"x{i}", "a", "a-s0-0") for i in range(5)]
    bench = Bench(plan(done, calibration("a"), *waiting), lanes=3)
    assert [bench.suggest() is not None for _ in range(4)] == [True] * 3 + [False]
    assert bench.dispatch.keys == ["a-0"]
    assert bench.dispatch.expecting
    bench.queue.on_trial_result("t2", {"ended": [report("calibrate", "a-0")]})
    assert not bench.dispatch.expecting
    assert len(bench.dispatch.keys) == 6


def test_lanes_start_without_an_answer_of_the_dispatcher() -> None:
    done = training("a", trained=True, evaluated=True)
    made = plan(done, calibration("a"), trial("x", "a", "a-s0-0"), trial("y", "a"))
    queue = PlanQueue(made, lambda *_: None, lambda *_: None)
    expecting = queue.expecting
    table = WorkTable(1, queue.take_ready(), expecting)
    silent = object()  # its process is not up: any call would wait for it
    queue.connect(silent, 3, expecting)  # type: ignore[arg-type]
    assert [queue.suggest(f"t{i}") is not None for i in range(4)] == [True] * 3 + [False]
    assert [table.next(lane, None).item for lane in "ab"] == [("calibrate", "a-0"), ("prune", "y")]
    assert table.next("c", None) == Order(None, wait=True)


@pytest.mark.parametrize("failure", [None, OOPS])
def test_a_lane_waits_for_statistics_no_longer_than_they_may_come(failure: Any) -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, calibration("a"), trial("x", "a", "a-s0-0")), lanes=2)
    assert [bench.suggest() is not None for _ in range(3)] == [True, True, False]
    assert bench.dispatch.expecting
    bench.end("t1", ("calibrate", "a-0", failure))
    assert not bench.dispatch.expecting


def test_no_lane_starts_for_statistics_of_a_model_that_still_trains() -> None:
    bench = Bench(plan(training("a"), calibration("a"), trial("x", "a", "a-s0-0")))
    assert bench.suggest() == {"kind": "train", "key": "a"}
    assert bench.suggest() is None
    assert not bench.dispatch.expecting


def test_prunings_that_need_statistics_wait_for_them() -> None:
    bench = Bench(
        plan(
            training("a"),
            calibration("a", sets=2),
            trial("x", "a", "a-s0-0"),
            trial("y", "a", "a-s0-1"),
            trial("z", "a"),
        )
    )
    bench.suggest()
    bench.end("t1", ("train", "a", None))
    assert bench.dispatch.keys == ["a-0", "z"]
    bench.suggest()
    bench.queue.on_trial_result("t2", {"ended": [report("calibrate", "a-0")]})
    assert bench.dispatch.keys == ["a-0", "z", "x", "y"]


def test_statistics_that_are_there_are_not_waited_for() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, calibration("a", cached=True), trial("x", "a", "a-s0-0")))
    assert bench.dispatch.keys == ["x"]


def test_statistics_that_no_missing_trial_needs_are_not_collected() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, calibration("a"), trial("x", "a", "a-s0-0", cached=True)))
    assert bench.queue.total == 0
    assert bench.suggest() == Searcher.FINISHED


def test_nothing_missing_is_finished_at_once() -> None:
    done = training("a", trained=True, evaluated=True)
    assert Bench(plan(done, trial("x", "a", cached=True))).suggest() == Searcher.FINISHED


@pytest.mark.parametrize("where", ["result", "complete", "both"])
def test_ends_are_heard_once_however_they_are_reported(where: str) -> None:
    bench = Bench(plan(training("a")))
    bench.suggest()
    ended = {"ended": [report("train", "a")]}
    if where != "complete":
        bench.queue.on_trial_result("t1", ended)
    bench.queue.on_trial_complete("t1", ended if where != "result" else None)
    assert bench.ends == [(("train", "a"), None)]
    assert bench.suggest() == Searcher.FINISHED
    bench.queue.on_trial_complete("t1", ended)
    assert len(bench.ends) == 1


def test_progress_is_passed_on() -> None:
    bench = Bench(plan(training("a")))
    bench.suggest()
    bench.queue.on_trial_result("t1", {"iteration": 3})
    bench.queue.on_trial_result("unknown", {"iteration": 4})
    assert bench.progress == [("a", {"iteration": 3})]


def test_a_failed_training_fails_all_that_needs_it_with_its_reason() -> None:
    bench = Bench(
        plan(
            training("a"),
            training("b"),
            calibration("a"),
            trial("x", "a", "a-s0-0"),
            trial("y", "a"),
            trial("z", "b"),
        )
    )
    bench.suggest(), bench.suggest()
    bench.end("t1", ("train", "a", OOPS))
    assert set(bench.ended) == {"a", "a-0", "x", "y"}
    assert bench.ended["a"] == Failure("evaluate", "oops")
    for key in ("a-0", "y"):
        failure = bench.ended[key]
        assert failure == Failure("evaluate", "it needs train a, which failed: oops")
    assert "calibrate a-0, which failed: it needs train a" in str(bench.ended["x"])
    assert bench.queue.total == 2  # the other model goes on
    assert bench.dispatch.offered == []


def test_a_failed_calibration_fails_the_prunings_that_need_it_only() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, calibration("a"), trial("x", "a", "a-s0-0"), trial("y", "a")))
    bench.suggest()
    bench.queue.on_trial_result("t1", {"ended": [report("calibrate", "a-0", OOPS)]})
    assert bench.ended == {
        "a-0": Failure("evaluate", "oops"),
        "x": Failure("evaluate", "it needs calibrate a-0, which failed: oops"),
    }


@pytest.mark.parametrize(("lanes", "work"), [(1, 5), (3, 5), (8, 5), (3, 1)])
def test_lanes_exceed_neither_capacity_nor_ready_work(lanes: int, work: int) -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, *(trial(f"x{i}", "a") for i in range(work))), lanes)
    got = [bench.suggest() for _ in range(lanes + work)]
    assert sum(g is not None for g in got) == min(lanes, work)
    assert all(g is None or g["kind"] == LANE for g in got)


def test_a_lane_that_ends_makes_room_for_another() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, trial("x", "a"), trial("y", "a")), lanes=1)
    assert bench.suggest()["kind"] == LANE
    assert bench.suggest() is None
    bench.end("t1", ("prune", "x", None))
    assert bench.suggest()["kind"] == LANE
    bench.end("t3", ("prune", "y", None))
    assert bench.suggest() == Searcher.FINISHED


def test_a_lane_that_dies_gives_its_work_back_and_another_takes_its_place() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, trial("x", "a")), lanes=1)
    bench.suggest()
    bench.queue.on_trial_complete("t1", error=True)
    assert bench.dispatch.dropped == ["t1"]
    assert bench.ends == []
    assert bench.suggest() == {"kind": LANE, "key": "t2"}


def test_what_a_dead_lane_lost_is_a_failure() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, trial("x", "a"), trial("y", "a")), lanes=1)
    bench.dispatch.lost = (Loss(("prune", "x")),)
    bench.suggest()
    bench.queue.on_trial_complete("t1", error=True)
    ((item, failure),) = bench.ends
    assert item == ("prune", "x")
    assert failure is not None
    assert "resources.retries" in failure.reason


def test_a_training_whose_worker_keeps_dying_is_a_failure() -> None:
    bench = Bench(plan(training("a"), trial("x", "a")))
    bench.suggest()
    bench.queue.on_trial_complete("t1", error=True)
    assert "resources.retries" in str(bench.ended["a"])
    assert "it needs train a" in str(bench.ended["x"])
    assert bench.suggest() == Searcher.FINISHED


def test_workers_that_die_one_after_another_end_the_sweep() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, trial("x", "a"), trial("y", "a")), lanes=1)
    for died in range(1, 20):
        if bench.suggest() == Searcher.FINISHED:
            break
        bench.queue.on_trial_complete(f"t{died}", error=True)
    assert died < 10
    assert {failure.stage for failure in bench.ended.values() if failure} == {"start"}
    assert set(bench.ended) == {"x", "y"}


def test_deaths_between_successes_do_not_end_the_sweep() -> None:
    done = training("a", trained=True, evaluated=True)
    bench = Bench(plan(done, *(trial(f"x{i}", "a") for i in range(30))), lanes=1)
    for i in range(30):
        lane = bench.suggest()["key"]
        bench.queue.on_trial_result(lane, {"ended": [report("prune", f"x{i}")]})
        bench.queue.on_trial_complete(lane, error=True)
    assert bench.suggest() == Searcher.FINISHED
    assert list(bench.ended.values()) == [None] * 30


# --- the work table ----------------------------------------------------------------------------


def work(*pairs: str) -> list[tuple[str, Item]]:
    """``"a1"`` stands for item 1 on model a."""
    return [(pair[0], ("prune", pair)) for pair in pairs]


def taken(order: Order) -> str | None:
    return None if order.item is None else order.item[1]


def test_lanes_get_work_on_the_model_they_have_loaded() -> None:
    table = WorkTable(retries=1)
    table.offer(work("a1", "b1", "a2", "b2"))
    assert taken(table.next("l", "b")) == "b1"
    assert taken(table.next("l", "b")) == "b2"
    assert taken(table.next("l", "b")) == "a1"  # nothing of b is left
    assert taken(table.next("m", None)) == "a2"
    assert table.next("l", "a") == Order(None)
    assert table.next("m", "a") == Order(None)


def test_no_item_is_handed_out_twice() -> None:
    table = WorkTable(retries=1)
    table.offer(work("a1", "a2", "a3"))
    got = [taken(table.next(lane, "a")) for lane in ("l", "m", "n", "o")]
    assert got == ["a1", "a2", "a3", None]


def test_a_lane_that_died_takes_up_what_it_held() -> None:
    table = WorkTable(retries=2)
    assert table.resume("l") == Order(None)
    table.offer(work("a1"))
    table.next("l", None)
    assert taken(table.resume("l")) == "a1"
    assert table.next("l", None) == Order(None)
    assert table.resume("l") == Order(None)
    assert taken(table.next("l", None)) == "a1"  # it had ended, but nobody has heard how
    assert table.next("l", None, reported=True) == Order(None)
    assert table.resume("l") == Order(None)
    assert table.next("l", None) == Order(None)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_what_kills_its_worker_is_retried_so_often_and_then_lost(retries: int) -> None:
    table = WorkTable(retries)
    table.offer(work("a1", "a2"))
    table.next("l", None)
    for _ in range(retries):
        assert taken(table.resume("l")) == "a1"
    order = table.resume("l")
    assert order == Order(None, lost=(Loss(("prune", "a1")),))
    assert taken(table.next("l", None)) == "a2"
    # It dies again before it could tell that a1 is lost.
    assert table.resume("l").lost[0] == Loss(("prune", "a1"))
    table.next("l", None, reported=True)
    assert table.resume("l").lost == ()


def test_what_ended_unreported_is_handed_out_again_and_not_held_against_it() -> None:
    table = WorkTable(retries=0)
    table.offer(work("a1", "a2", "a3"))
    table.next("l", None)
    table.next("l", None, reported=True)  # a1 is told
    table.next("l", None)  # a2 is not
    assert table.resume("l") == Order(None, lost=(Loss(("prune", "a3")),))
    assert taken(table.next("l", None)) == "a2"
    assert table.drop_lane("l") == (Loss(("prune", "a3")), Loss(("prune", "a2")))


def test_a_dropped_lane_gives_its_work_to_another() -> None:
    table = WorkTable(retries=1)
    table.offer(work("a1", "a2"))
    table.next("l", None)
    table.next("l", None)
    assert table.drop_lane("l") == ()
    assert {taken(table.next("m", None)), taken(table.next("n", None))} == {"a1", "a2"}
    assert table.drop_lane("never seen") == ()


def test_a_dropped_lane_gives_up_what_has_been_tried_too_often() -> None:
    table = WorkTable(retries=0)
    table.offer(work("a1"))
    table.next("l", None)
    assert table.drop_lane("l") == (Loss(("prune", "a1")),)
    assert table.next("m", None) == Order(None)


# --- both together, whatever happens -------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    nodes: list[Node] = []
    for model in draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
        trained = draw(st.booleans())
        nodes.append(training(model, trained, trained and draw(st.booleans())))
        known = [None]
        for seed in range(draw(st.integers(0, 2))):
            made = calibration(
                model, trained and draw(st.booleans()), seed, draw(st.integers(1, 2))
            )
            nodes.append(made)
            known += made.sets.values()
        for i in range(draw(st.integers(0, 5))):
            statistics = draw(st.sampled_from(known))
            nodes.append(trial(f"{model}{i}", model, statistics, trained and draw(st.booleans())))
    return plan(*nodes)


@dataclass
class Worker:
    """What Tune and one of its actors would do with one suggestion."""

    kind: str
    key: str
    deaths: int = 0
    item: Item | None = None
    unreported: list[dict[str, Any]] = field(default_factory=list)


class Simulation:
    """Tune, its workers and the dispatcher, in an order that a random number generator chooses."""

    def __init__(self, made: Plan, lanes: int, retries: int, deadly: float, seed: int) -> None:
        self.random = random.Random(seed)
        self.retries, self.lanes, self.deadly = retries, lanes, deadly
        self.table = WorkTable(retries)
        self.bench = Bench(made, lanes, self.table)
        self.expected = set(self.bench.queue._open)
        self.needs = self._needs(made)
        self.workers: dict[str, Worker] = {}
        self.outcome = {item: self.random.random() < 0.2 for item in self.expected}
        self.began: Counter[Item] = Counter()

    def _needs(self, made: Plan) -> dict[Item, set[Item]]:
        by_key = {key: item_of(c) for c in made.calibrations for key in c.sets.values()}
        by_key |= {t.key: item_of(t) for t in made.trainings}
        needs: dict[Item, set[Item]] = {}
        for node in (*made.calibrations, *made.trials):
            untrained = {t.key for t in made.trainings if not t.trained}
            keys = {node.training} & untrained
            if isinstance(node, Trial) and node.statistics is not None:
                keys.add(node.statistics)
            needs[item_of(node)] = {by_key[key] for key in keys} & self.expected
        return needs

    def run(self) -> None:
        for _ in range(20_000):
            if not self.workers or self.random.random() < 0.3:
                suggestion = self.bench.suggest()
                if suggestion == Searcher.FINISHED and not self.workers:
                    return
                if isinstance(suggestion, dict):
                    self.start(f"t{self.bench.count}", Worker(**suggestion))
                else:
                    assert self.workers, "told to wait for nothing"
            if self.workers:
                self.advance(self.random.choice(list(self.workers)))
        pytest.fail("it never ends")

    def start(self, tune_id: str, worker: Worker) -> None:
        self.workers[tune_id] = worker
        lanes = sum(w.kind == LANE for w in self.workers.values())
        assert lanes <= self.lanes
        if worker.kind == LANE:
            self.take_up(worker, self.table.resume(worker.key))
        else:
            self.begin((worker.kind, worker.key))

    def begin(self, item: Item) -> None:
        self.began[item] += 1
        done = {i for i, failure in self.bench.ends if failure is None}
        assert self.needs.get(item, set()) <= done, "begun before what it needs"

    def take_up(self, worker: Worker, order: Order) -> None:
        worker.item = order.item
        worker.unreported += [report(*loss.item, OOPS) for loss in order.lost]
        if order.item is not None:
            self.begin(order.item)

    def advance(self, tune_id: str) -> None:
        worker = self.workers[tune_id]
        if self.random.random() < self.deadly:
            self.die(tune_id, worker)
        elif worker.kind == LANE:
            self.advance_lane(tune_id, worker)
        elif self.random.random() < 0.2:  # another sweep was first
            del self.workers[tune_id]
            self.began[(worker.kind, worker.key)] -= 1
            self.bench.queue.on_trial_complete(tune_id, {"ended": [], "elsewhere": "another"})
        else:
            item = (worker.kind, worker.key)
            failure = OOPS if self.outcome[item] else None
            self.complete(tune_id, [report(*item, failure)])

    def advance_lane(self, tune_id: str, worker: Worker) -> None:
        if worker.item is not None:
            failed = self.outcome.get(worker.item, False)
            worker.unreported.append(report(*worker.item, OOPS if failed else None))
        told = self.random.random() < 0.5
        if told:
            self.bench.queue.on_trial_result(tune_id, {"ended": worker.unreported})
            worker.unreported = []
        order = self.table.next(worker.key, None, told)
        self.take_up(worker, order)
        if worker.item is None and not order.wait:
            self.complete(tune_id, worker.unreported)

    def complete(self, tune_id: str, ended: list[dict[str, Any]]) -> None:
        del self.workers[tune_id]
        if self.random.random() < 0.5:
            self.bench.queue.on_trial_result(tune_id, {"ended": ended})
        self.bench.queue.on_trial_complete(tune_id, {"ended": ended})

    def die(self, tune_id: str, worker: Worker) -> None:
        worker.deaths += 1
        if worker.deaths > self.retries:
            del self.workers[tune_id]
            self.bench.queue.on_trial_complete(tune_id, error=True)
        elif worker.kind == LANE:
            worker.unreported = []
            self.take_up(worker, self.table.resume(worker.key))


@settings(max_examples=300)
@given(
    made=plans(),
    lanes=st.integers(1, 4),
    retries=st.integers(0, 2),
    deadly=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_whatever_happens_every_node_ends_exactly_once(
    made: Plan, lanes: int, retries: int, deadly: float, seed: int
) -> None:
    simulation = Simulation(made, lanes, retries, deadly, seed)
    simulation.run()
    ends = Counter(item for item, _ in simulation.bench.ends)
    assert set(ends) == simulation.expected
    assert set(ends.values()) <= {1}
    if deadly == 0.0:
        assert set(simulation.began.values()) <= {1}
        ended = dict(simulation.bench.ends)
        for item, failure in ended.items():
            fails = simulation.outcome[item] or any(
                ended[n] is not None for n in simulation.needs.get(item, ())
            )
            assert (failure is not None) == fails


# --- which cluster -----------------------------------------------------------------------------


def test_a_private_cluster_starts_no_api_server() -> None:
    start = cluster.services.start_api_server
    with cluster._no_api_server():
        assert cluster.services.start_api_server(False, port=1) == (None, None)
    assert cluster.services.start_api_server is start


@pytest.mark.parametrize(
    ("variable", "recorded", "alive", "joins"),
    [
        ("", None, set(), False),
        ("", None, {"127.0.0.1:1"}, False),  # another sweep's private cluster
        ("", "127.0.0.1:2", {"127.0.0.1:1"}, False),  # what `ray start` recorded is gone
        ("", "127.0.0.1:1", {"127.0.0.1:1", "127.0.0.1:2"}, True),
        ("10.0.0.1:6379", None, set(), True),
        ("local", "127.0.0.1:1", {"127.0.0.1:1"}, False),
    ],
)
def test_only_a_cluster_that_is_meant_is_joined(
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    recorded: str | None,
    alive: set[str],
    joins: bool,
) -> None:
    def join(**_: Any) -> None:
        raise ConnectionError("reached")

    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(cluster.services, "find_bootstrap_address", lambda _: recorded)
    monkeypatch.setattr(cluster.services, "find_gcs_addresses", lambda: alive)
    tried: list[str] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **_: tried.append("init") or join())
    if variable not in ("", "local"):
        with pytest.raises(ClusterError, match="no Ray cluster answers"):
            cluster._join()
    else:
        assert cluster._join() is False
    assert bool(tried) == joins


# --- limits ------------------------------------------------------------------------------------

SLOW = Failure("prune", "took longer than 2 h")


def test_what_takes_too_long_is_given_up_at_once_whatever_the_retries() -> None:
    table = WorkTable(retries=5)
    table.offer(work("a1", "a2"))
    table.next("l", None)
    assert table.why_overdue(("prune", "a1")) is None
    table.overdue(("prune", "a1"), SLOW)
    assert table.resume("l") == Order(None, lost=(Loss(("prune", "a1"), SLOW),))
    assert taken(table.next("l", None)) == "a2"
    assert table.why_overdue(("prune", "a1")) == SLOW


def test_what_takes_too_long_is_given_up_with_its_lane_too() -> None:
    table = WorkTable(retries=5)
    table.offer(work("a1"))
    table.next("l", None)
    table.overdue(("prune", "a1"), SLOW)
    assert table.drop_lane("l") == (Loss(("prune", "a1"), SLOW),)
    assert table.next("m", None) == Order(None)


def test_lanes_that_give_something_up_do_not_count_as_dying_for_nothing() -> None:
    done = training("a", trained=True, evaluated=True)
    nodes = [trial(f"x{i}", "a") for i in range(20)]
    bench = Bench(plan(done, *nodes), lanes=1)
    for i in range(19):
        bench.suggest()
        bench.dispatch.lost = (Loss(("prune", f"x{i}"), SLOW),)
        bench.queue.on_trial_complete(f"t{i + 1}", error=True)
    assert {f.reason for f in bench.ended.values() if f} == {SLOW.reason}
    assert len(bench.ended) == 19
    assert bench.suggest()["kind"] == LANE


LIMITED = """
import ctypes, sys, time
from orchestrator.scheduler import limits
limits.GRACE_SECONDS = 0.3
def tell(): print("overdue", flush=True)
with limits.limited(60.0, tell): pass
with limits.limited(None, tell): pass
with limits.limited(0.4, tell): {block}
print("went on", flush=True)
time.sleep(0.6)
"""


@pytest.mark.parametrize(
    ("block", "says", "ends"),
    [
        ("time.sleep(0.01)", "went on\n", 0),
        ("time.sleep(30)", "overdue\n", -signal.SIGKILL),
        ("exec('while True: pass')", "overdue\n", -signal.SIGKILL),
        # It holds Python's lock: no thread can tell, and the kernel ends it.
        ("ctypes.PyDLL(None).sleep(30)", "", -signal.SIGALRM),
    ],
)
def test_a_block_that_takes_too_long_ends_its_process(block: str, says: str, ends: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(block=block)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == (says, ends)


# --- trials that the plan cannot know ------------------------------------------------------------


def test_a_search_begins_when_its_model_and_statistics_are_there() -> None:
    feed = FakeFeed(frozenset({"a", "a-s0-0"}))
    bench = Bench(plan(training("a"), calibration("a")), feeds=[feed])
    assert bench.queue.total == 5
    bench.suggest()
    bench.end("t1", ("train", "a", None))
    bench.suggest()
    assert bench.dispatch.keys == ["a-0"]  # nobody else needs these statistics
    assert not feed.begun
    bench.end("t2", ("calibrate", "a-0", None))
    assert bench.suggest() == {"kind": LANE, "key": "t3"}
    assert feed.begun
    assert bench.dispatch.keys == ["a-0", "f1", "f2"]
    assert set(bench.dispatch.nodes) == {("prune", "f1"), ("prune", "f2")}
    assert bench.dispatch.expecting


def test_a_search_is_told_what_ended_and_the_sweep_waits_for_the_rest() -> None:
    feed = FakeFeed(frozenset({"a"}))
    bench = Bench(plan(training("a", trained=True, evaluated=True)), lanes=1, feeds=[feed])
    assert bench.suggest() == {"kind": LANE, "key": "t1"}
    bench.queue.on_trial_result(
        "t1", {"ended": [report("prune", "f1"), report("prune", "f2", OOPS)]}
    )
    assert feed.ends == [("f1", None), ("f2", Failure(**OOPS))]
    assert bench.dispatch.keys == ["f1", "f2", "f3"]
    bench.queue.on_trial_result("t1", {"ended": []})
    assert bench.suggest() is None
    bench.end("t1", ("prune", "f3", None))
    assert bench.suggest() == Searcher.FINISHED
    assert not bench.dispatch.expecting
    assert bench.queue.total == 0


def test_a_search_whose_model_fails_ends() -> None:
    feed = FakeFeed(frozenset({"a"}))
    bench = Bench(plan(training("a")), feeds=[feed])
    bench.suggest()
    bench.end("t1", ("train", "a", OOPS))
    assert feed.failed is not None
    assert "oops" in feed.failed
    assert bench.suggest() == Searcher.FINISHED


def test_processes_beside_the_driver_do_without_what_workers_import() -> None:
    code = (
        "import sys, orchestrator.scheduler.desk, orchestrator.scheduler.table; "
        "sys.exit(' '.join({'torch', 'pandas', 'mlflow', 'pydantic', 'ray.tune'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_lanes_wait_while_more_may_come_and_get_the_nodes_that_they_lack() -> None:
    table, node = WorkTable(retries=1), trial("f1", "a")
    assert not table.next("l1", None).wait
    table.expect(True)
    assert table.next("l1", None) == Order(None, wait=True)
    table.offer([("a", item_of(node))], {item_of(node): pickle.dumps(node)})
    order = table.next("l1", None)
    assert order.node is not None
    assert pickle.loads(order.node) == node
    assert table.resume("l1").node == order.node  # its worker died once
    table.next("l1", None)
    table.expect(False)
    assert not table.next("l1", None).wait
