"""One actor that runs stages: Tune's trainable. It is reused, so what it loaded stays loaded."""

import pickle
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from ray import tune

from nerf.devices import give_memory_back, share_memory
from orchestrator.log import logger
from orchestrator.plan import Calibration, Training
from orchestrator.provenance import Origin
from orchestrator.results import Failure
from orchestrator.scheduler.dispatch import Dispatcher
from orchestrator.scheduler.exchange import Exchange
from orchestrator.scheduler.limits import limited, reason
from orchestrator.scheduler.queue import LANE, Node, lost
from orchestrator.scheduler.table import Item, Loss
from orchestrator.spec import Sweep, relocated
from orchestrator.stages import Stopwatch, Update, Workbench, failure_of
from orchestrator.store import Store

# A lane reports to Tune about so often, with all that it ended since: the round trip through the
# driver then costs little to short prunings. What others wait for is told at once.
REPORT_SECONDS = 1.0
PATIENT = ("prune",)
# A lane without work asks again after so long, while more may come.
WAIT_SECONDS = 0.05

# Several workers share a GPU. What one keeps for later, the others cannot have.
KEPT_MEMORY = 4 * 2**30
# Seconds to wait before a stage that found no memory is tried once more.
MEMORY_WAIT = 5.0

BenchMaker = Callable[..., Workbench]
"""Makes a worker's bench; another than the real one serves to study the scheduler by itself."""
Work = Generator[Update, None, Update]  # reports, and returns the last one


class StageTrainable(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Runs one training, or a lane of calibrations and prunings.

    An error of a stage is a result (with its stage and reason), not a crash: only a worker that
    dies is started again by Tune.
    """

    def setup(
        self,
        config: dict[str, Any],
        sweep: Sweep,
        store: Store,
        origin: Origin,
        nodes: Mapping[Item, Node],
        exchange: Exchange,
        dispatcher: Dispatcher,
        gpus: Mapping[str, float],
        bench: BenchMaker = Workbench,
    ) -> None:
        """Open the workbench; it stays open for every later trial of this actor."""
        self._nodes = nodes
        self._gpus = gpus
        self._dispatcher = dispatcher
        here = relocated(sweep, store.root)
        self._bench = bench(here, store, origin, exchange.find, exchange.publish)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another training or lane."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        share_memory(min(self._gpus[config["kind"]], 1.0))
        if config["kind"] == LANE:
            self._work = self._lane(config["key"])
        else:
            self._work = self._training((config["kind"], config["key"]))

    def step(self) -> dict[str, Any]:
        """Go on to the next report."""
        try:
            return {"done": False, **next(self._work)}
        except StopIteration as stop:
            return {"done": True, **stop.value}

    def _training(self, item: Item) -> Work:
        watch = Stopwatch()
        node = self._nodes[item]
        assert isinstance(node, Training)
        if failure := self._dispatcher.why_overdue(item):  # an earlier worker took too long
            return {"ended": [lost(Loss(item, failure))]}
        work = self._bench.train(node, watch)
        started = time.monotonic()
        try:
            while True:
                with self._limit_training(item, watch, time.monotonic() - started):
                    update = next(work, None)
                if update is None:
                    break
                if "waiting" in update:  # for another sweep that trains the same model
                    return {"ended": [], "elsewhere": update["waiting"]}
                yield update
        except Exception as error:
            return {"ended": [_ended(item, error, watch)]}
        finally:
            work.close()
        return {"ended": [_ended(item, None, watch)]}

    def _limit_training(
        self, item: Item, watch: Stopwatch, spent: float
    ) -> AbstractContextManager[None]:
        limits = self._bench.sweep.limits
        left = None if limits.train is None else limits.train - spent
        if left is None or (limits.silence is not None and limits.silence < left):
            why = reason("gave no sign of life for", limits.silence or 0.0, "silence")
            return self._limited(item, watch, limits.silence, why)
        return self._limited(
            item, watch, left, reason("took longer than", limits.train or 0.0, "train")
        )

    def _limited(
        self, item: Item, watch: Stopwatch, seconds: float | None, why: str
    ) -> AbstractContextManager[None]:
        return limited(seconds, lambda: self._dispatcher.overdue(item, Failure(watch.stage, why)))

    def _lane(self, lane: str) -> Work:
        ended: list[dict[str, Any]] = []
        reported = time.monotonic()
        order = self._dispatcher.resume(lane)
        while True:
            ended += [lost(item) for item in order.lost]
            urgent = bool(order.lost)
            if order.item is not None:
                ended.append(self._run(order.item, order.node))
                urgent |= order.item[0] not in PATIENT
            elif order.wait:
                self._bench.warm()
                time.sleep(WAIT_SECONDS)
                urgent |= bool(ended)
            told = urgent or time.monotonic() - reported > REPORT_SECONDS
            if told:
                yield {"ended": ended}  # Tune has it when it asks for more
                ended, reported = [], time.monotonic()
            order = self._dispatcher.next(lane, self._bench.loaded_model, told)
            if order.item is None and not order.wait:
                return {"ended": ended}

    def _run(self, item: Item, pickled: bytes | None) -> dict[str, Any]:
        """One calibration, pruning or evaluation; once more if others had the GPU's memory."""
        watch = Stopwatch()
        node = self._nodes[item] if pickled is None else pickle.loads(pickled)
        try:
            try:
                self._once(item, node, watch)
            except torch.cuda.OutOfMemoryError as error:
                logger.warning("%s %s: %s; trying once more", *item, error)
                # The error's traceback holds what the stage had: it goes first.
                error.__traceback__ = None
                give_memory_back()
                time.sleep(MEMORY_WAIT)
                self._once(item, node, watch)
        except Exception as error:
            return _ended(item, error, watch)
        finally:
            give_memory_back(KEPT_MEMORY)
        return _ended(item, None, watch)

    def _once(self, item: Item, node: Node, watch: Stopwatch) -> None:
        limits = self._bench.sweep.limits
        if isinstance(node, Calibration):
            most = limits.calibrate
            why = reason("took longer than", most or 0.0, "calibrate")
            with self._limited(item, watch, most, why):
                self._bench.calibrate(node, watch)
        elif isinstance(node, Training):  # it is trained, what is missing is its evaluation
            why = reason("took longer than", limits.train or 0.0, "train")
            with self._limited(item, watch, limits.train, why):
                deque(self._bench.train(node, watch), maxlen=0)
        else:
            why = reason("took longer than", limits.prune or 0.0, "prune")
            with self._limited(item, watch, limits.prune, why):
                self._bench.prune(node, watch)

    def cleanup(self) -> None:
        """Let a training that is stopped in the middle save its state."""
        work = getattr(self, "_work", None)
        if work is not None:
            work.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: stages keep their own state in the store."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""


def _ended(item: Item, error: Exception | None, watch: Stopwatch) -> dict[str, Any]:
    failure = None if error is None else failure_of(error, watch)
    return {
        "kind": item[0],
        "key": item[1],
        "failure": failure and {"stage": failure.stage, "reason": failure.reason},
    }
