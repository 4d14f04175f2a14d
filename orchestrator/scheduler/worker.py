"""One actor that runs stages: Tune's trainable. It is reused, so what it loaded stays loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

from ray import tune

from orchestrator.plan import Calibration, Training, Trial
from orchestrator.provenance import Origin
from orchestrator.scheduler.exchange import Exchange
from orchestrator.scheduler.queue import Node
from orchestrator.spec import Sweep
from orchestrator.stages import Stopwatch, Update, Workbench, failure_of
from orchestrator.store import Store


class StageTrainable(tune.Trainable):
    """Runs the stage that its configuration names, one report of the stage a step.

    An error of a stage is a result (``succeeded`` false, with its stage and reason), not a crash:
    only a worker that dies is started again by Tune.
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: Sweep,
        store: Store,
        origin: Origin,
        nodes: Mapping[tuple[str, str], Node],
        exchange: Exchange,
    ) -> None:
        """Open the workbench; it stays open for every later trial of this actor."""
        self._nodes = nodes
        self._bench = Workbench(sweep, store, origin, exchange.find, exchange.publish)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._watch = Stopwatch()
        self._work = self._start(self._nodes[config["kind"], config["key"]])

    def _start(self, node: Node) -> Iterator[Update]:
        if isinstance(node, Training):
            return self._bench.train(node, self._watch)
        if isinstance(node, Calibration):
            return self._bench.calibrate(node, self._watch)
        assert isinstance(node, Trial)
        return self._bench.prune(node, self._watch)

    def step(self) -> dict[str, Any]:
        """Advance the stage to its next report, or to its end."""
        try:
            return {"done": False, **next(self._work)}
        except StopIteration:
            return {"done": True, "succeeded": True, "seconds": dict(self._watch.seconds)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded
            failure = failure_of(error, self._watch)
            return {
                "done": True,
                "succeeded": False,
                "failure": {"stage": failure.stage, "reason": failure.reason},
            }

    def cleanup(self) -> None:
        """Let a training that is stopped in the middle save its state."""
        work = getattr(self, "_work", None)
        if work is not None and hasattr(work, "close"):
            work.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: stages keep their own state in the store."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""
