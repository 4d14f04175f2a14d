"""A cluster of two nodes, one of which is lost in the middle of a sweep."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan import Training
from orchestrator.progress import Progress
from orchestrator.results import Record
from orchestrator.sweep import run
from tests.e2e import marks
from tests.e2e.test_sweep import mlflow_runs

pytestmark = marks.SWEEP

WriteSweep = Callable[..., Path]
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
# A node that is gone is known to be so after seconds, not after a minute.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_failure_threshold": 3}


class Watcher(Progress):
    """Notes what trainings report, and acts once."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.iterations: list[int] = []
        self._act: Callable[[], None] | None = act

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.iterations.append(int(report["iteration"]))
        if self._act is not None and len(self.iterations) > 3:
            act, self._act = self._act, None
            threading.Thread(target=act, daemon=True).start()

    def ended(self, record: Record | None) -> None:  # noqa: ARG002
        return


def test_a_sweep_goes_on_when_a_node_is_lost(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private.state import available_resources_per_node
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    path = write_sweep(
        train={"iterations": 4000},
        prune={"criteria": ["magnitude"], "ratios": RATIOS},
        resources={"checkpoint_seconds": 0.2, "train": {"cpus": 1}},
    )
    out = tmp_path / "out"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "_system_config": {**HEALTH}},
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    def lose_the_node_that_trains() -> None:
        while not list(out.glob("running/*/state.safetensors")):
            time.sleep(0.05)
        free = available_resources_per_node()
        busy = {node.node_id for node in nodes if not free.get(node.node_id, {}).get("CPU")}
        for node in nodes:
            if node.node_id in busy:
                cluster.remove_node(node, allow_graceful=False)
                lost.append(node.node_id)
                return

    lost: list[str] = []
    watcher = Watcher(lose_the_node_that_trains)
    try:
        finished = run(path, watcher)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(lost) == 1
    assert finished.results.complete
    assert not finished.results.failed
    # It went on from a checkpoint: reports fall back once, and not to the start.
    falls = [b for a, b in zip(watcher.iterations, watcher.iterations[1:], strict=False) if b < a]
    assert len(falls) <= 1
    assert all(iteration > watcher.iterations[0] for iteration in falls)
    runs = mlflow_runs(out)
    assert Counter(r.info.status for r in runs) == {"FINISHED": 2 + len(RATIOS)}
