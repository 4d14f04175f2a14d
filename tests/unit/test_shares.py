"""Several sweeps on one cluster, and nodes that are not there yet: without a cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from orchestrator.errors import ClusterError
from orchestrator.scheduler import actors, cluster, desk, shares
from orchestrator.scheduler.queue import LANE
from orchestrator.scheduler.table import WorkTable
from orchestrator.spec import Resources, StageResources
from orchestrator.store import Lease, Store
from tests.unit.test_scheduler import Bench, plan, training, trial


class Cluster:
    """Plays `ray.nodes` and the autoscaler's configuration."""

    def __init__(self, *nodes: dict[str, float], groups: Any = None) -> None:
        self._nodes = nodes
        self._groups = groups

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": dict(node)} for node in self._nodes]

    def get_cluster_config(self) -> Any:
        if self._groups is None:
            return None
        groups = [SimpleNamespace(resources=r, max_count=n) for r, n in self._groups]
        return SimpleNamespace(node_group_configs=groups)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    def start(*nodes: dict[str, float], groups: Any = None) -> None:
        made = Cluster(*nodes, groups=groups)
        monkeypatch.setattr(cluster.ray, "nodes", made.nodes)
        monkeypatch.setattr(cluster.ray_state, "get_cluster_config", made.get_cluster_config)

    return start


HEAD = {"CPU": 0.0}
GPU = {"CPU": 16.0, "GPU": 1.0}


def test_workers_that_the_autoscaler_may_add_count(play) -> None:
    """A head without CPUs, and up to four GPU nodes of which none is there yet."""
    play(HEAD, groups=[(HEAD, 0), (GPU, 4)])
    wanted = cluster.requests(Resources())
    assert wanted == {"train": {"CPU": 2.0, "GPU": 1.0}, LANE: {"CPU": 1.0, "GPU": 0.25}}
    assert cluster.capacity(wanted["train"]) == 4
    assert cluster.capacity(wanted[LANE]) == 16


def test_a_node_that_is_there_is_not_counted_twice(play) -> None:
    play(HEAD, GPU, GPU, groups=[(HEAD, 0), (GPU, 4)])
    assert cluster.capacity({"GPU": 1.0}) == 4
    play(HEAD, GPU, GPU, groups=[(GPU, 1)])
    assert cluster.capacity({"GPU": 1.0}) == 2


def test_without_an_autoscaler_only_what_is_there_counts(play) -> None:
    play(HEAD, GPU)
    assert cluster.capacity({"GPU": 0.25}) == 4
    play(HEAD)
    with pytest.raises(ClusterError, match="no GPU"):
        cluster.requests(Resources(train=StageResources(1.0, 1.0)))
    with pytest.raises(ClusterError, match="no node"):
        cluster.requests(Resources())


def test_two_gpus_for_a_training_need_a_node_that_has_two(play) -> None:
    two = Resources(train=StageResources(2.0, 2.0))
    play(GPU, GPU)
    with pytest.raises(ClusterError, match="no node of the cluster has"):
        cluster.requests(two)
    play({"CPU": 32.0, "GPU": 2.0})
    assert cluster.requests(two)["train"] == {"CPU": 2.0, "GPU": 2.0}


# --- shares ------------------------------------------------------------------------------------


def test_the_register_counts_who_was_heard_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(desk.time, "monotonic", lambda: now)
    register = desk.Register()
    assert [register.count("a"), register.count("b"), register.count("a")] == [1, 2, 2]
    now += desk.SILENT_SECONDS / 2
    register.count("a")
    now += desk.SILENT_SECONDS / 2
    assert register.count("a") == 1  # b died without a word
    register.count("c")
    register.leave("c")
    assert register.count("a") == 1


def test_lanes_beyond_the_limit_end_after_their_item() -> None:
    table = WorkTable(2)
    table.offer(("model", ("prune", str(i))) for i in range(10))
    for lane in ("a", "b", "c"):
        assert table.next(lane, None).item is not None
    table.limit(2)
    assert table.next("a", None).item is None  # b and c hold theirs: a is the one too many
    assert table.next("b", None).item is not None
    assert table.next("c", None).item is not None
    table.limit(1)
    assert table.next("b", None).item is None
    table.limit(None)
    assert table.next("d", None).item is not None


def test_a_sweep_takes_its_share_and_all_of_it_when_it_is_alone_again() -> None:
    sweeps = 1
    bench = Bench(plan(training("m", True, True), *(trial(str(i), "m") for i in range(20))), 4)
    limits: list[int | None] = []
    bench.dispatch.limit = limits.append
    bench.queue.share(lambda: sweeps, 2)
    assert [bench.suggest()["kind"] for _ in range(3)] == [LANE] * 3
    sweeps = 2  # another one came: two lanes each
    assert bench.suggest() is None
    assert limits == [2]
    for lane in ("t1", "t2"):
        bench.queue.on_trial_complete(lane, {"ended": []})
    assert bench.suggest()["kind"] == LANE
    assert bench.suggest() is None
    sweeps = 9  # never less than one
    bench.suggest()
    assert limits == [2, 1]
    sweeps = 1
    assert [bench.suggest()["kind"] for _ in range(2)] == [LANE] * 2
    assert limits == [2, 1, None]


def test_trainings_are_shared_out_too() -> None:
    sweeps = 2
    bench = Bench(plan(*(training(str(i)) for i in range(6))))
    bench.dispatch.limit = lambda _: None
    bench.queue.share(lambda: sweeps, 4)
    begun = [bench.suggest() for _ in range(3)]
    assert [b and b["kind"] for b in begun] == ["train", "train", None]
    bench.end("t1", ("train", "0", None))
    assert bench.suggest()["kind"] == "train"
    assert bench.suggest() is None
    sweeps = 1
    assert [bench.suggest()["kind"] for _ in range(2)] == ["train", "train"]
    assert bench.suggest() is None


# --- a training that another sweep does ---------------------------------------------------------


def test_a_training_of_another_sweep_is_waited_for_without_a_worker() -> None:
    theirs = {"a"}
    bench = Bench(plan(training("a"), training("b"), trial("x", "b")))
    bench.queue._elsewhere = lambda training: training.key in theirs
    assert bench.suggest() == {"kind": "train", "key": "b"}
    assert bench.suggest() is None
    bench.end("t1", ("train", "b", None))
    assert bench.suggest()["kind"] == LANE  # whatever can be done is done meanwhile
    bench.end("t3", ("prune", "x", None))
    assert bench.suggest() is None
    assert bench.queue.total == 1
    theirs.clear()
    assert bench.suggest() == {"kind": "train", "key": "a"}


def test_a_worker_that_finds_its_training_taken_gives_its_place_back() -> None:
    bench = Bench(plan(training("a"), trial("x", "a")))
    bench.suggest()
    bench.queue.on_trial_complete("t1", {"ended": [], "elsewhere": "ada on far"})
    assert bench.ends == []
    assert bench.suggest() == {"kind": "train", "key": "a"}
    bench.end("t2", ("train", "a", None))
    assert bench.suggest()["kind"] == LANE


def test_who_does_a_training_is_asked_of_the_storage_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(shares.time, "monotonic", lambda: now)
    there = Store(tmp_path)
    elsewhere = shares.Elsewhere(Store(tmp_path))
    assert not elsewhere(training("a"))
    lease = there.lease(shares.lease_of_training("a"), "theirs")
    assert isinstance(lease, Lease)
    with lease:
        assert not elsewhere(training("a"))  # as it was a moment ago
        now += 2 * shares.ASK_SECONDS
        assert elsewhere(training("a"))
        assert not elsewhere(training("b"))
    now += 2 * shares.ASK_SECONDS
    assert not elsewhere(training("a"))


# --- calls to actors ---------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def next(self, step: int) -> int:
        self.count += step
        return self.count


class Connection:
    """Plays the handle of a desk whose answers may be lost on their way."""

    def __init__(self, *faults: Exception | None) -> None:
        self.desk = desk.Desk(Counter)
        self.faults = list(faults)
        self.do = SimpleNamespace(remote=self.call)

    def call(self, *arguments: Any) -> Any:
        answer = self.desk.do(*arguments)
        fault = self.faults.pop(0) if self.faults else None
        return answer if fault is None else fault


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(actors.ray, "get", get)
    monkeypatch.setattr(actors, "RETRY_SECONDS", 0.0)


@pytest.mark.usefixtures("wired")
def test_a_call_whose_answer_was_lost_is_repeated_and_done_once() -> None:
    gone = ActorUnavailableError("connection lost", None)
    wired: Any = Connection(None, gone, gone, None)
    assert [actors.ask(wired, "next", 2) for _ in range(3)] == [2, 4, 6]


@pytest.mark.usefixtures("wired")
def test_a_desk_that_is_no_more_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead: Any = Connection(ActorDiedError())
    with pytest.raises(ClusterError, match="run the sweep again"):
        actors.ask(dead, "next", 1)
    monkeypatch.setattr(actors, "UNAVAILABLE_SECONDS", -1.0)
    unreachable: Any = Connection(ActorUnavailableError("connection lost", None))
    with pytest.raises(ClusterError, match="connection lost"):
        actors.ask(unreachable, "next", 1)
