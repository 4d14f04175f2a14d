"""One training on several devices of one machine: a process each, gradients summed at every step.

All of them draw the same batch and the same random numbers, and each works on its part of the rays.
So the result is that of one device but for the order in which floating-point numbers are summed;
the number of devices decides how fast a model is trained, not which. A state saved by any number of
processes is continued by any other.

The processes are children of this one, talk to it through a pipe each, and to each other through
NCCL (GPUs) or gloo (CPUs) on loopback. If one dies, all are ended.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from nerf.errors import NerfError, TrainingError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.scenes.scene import Scene
from nerf.training import Backend, Progress, Recipe

END_SECONDS = 10.0


class ParallelTrainer:
    """A `Trainer` on several devices; use it as a context manager, or close it.

    Args:
        scene: what to train on.
        shape: widths of both networks.
        samples: samples a ray.
        recipe: how; its ``rays`` are those of all processes together.
        seed: of weights, ray order and jitter.
        devices: one process each, all of one kind.
        backend: see `Trainer`.

    Raises:
        TrainingError: fewer than one ray a device, or a process could not be started.
    """

    def __init__(
        self,
        scene: Scene,
        shape: FieldShape,
        samples: SampleCounts,
        recipe: Recipe,
        seed: int,
        devices: Sequence[torch.device],
        backend: Backend = "auto",
    ) -> None:
        if not 1 <= len(devices) <= recipe.rays:
            raise TrainingError(
                f"{recipe.rays} rays an iteration cannot be shared by {len(devices)} devices"
            )
        self.recipe = recipe
        self.iteration = 0
        self._shape, self._samples, self._seed = shape, samples, seed
        self._folder = tempfile.TemporaryDirectory(prefix="prunefield-parallel-")
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, device in enumerate(devices):
                self._start(len(devices))
                meeting = str(Path(self._folder.name) / "meeting")
                place = (rank, len(devices), str(device), meeting)
                what = (scene, shape, samples, recipe, seed, backend)
                self._pipes[rank].send((*place, *what))
            self._answers()
        except BaseException:
            self.close()
            raise

    def _start(self, count: int) -> None:
        ours, theirs = Pipe()
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            # What the processes say to each other stays on this machine.
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path),
        }
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "nerf.parallel_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which then saves their state
            )
        )
        theirs.close()
        self._pipes.append(ours)

    # --- what a Trainer does -----------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the recipe's iterations are through."""
        return self.iteration >= self.recipe.iterations

    @property
    def model(self) -> NerfModel:
        """The networks as they are now, on the CPU."""
        model = NerfModel.create(self._shape, self._samples, self._seed)
        weights = self._ask("weights", everybody=False)[0]
        for name, field in model.networks().items():
            field.load_state_dict({k: torch.from_numpy(v) for k, v in weights[name].items()})
        return model

    def advance(self, iterations: int) -> Progress:
        """Run some iterations (fewer when the recipe ends before).

        Raises:
            TrainingError: the loss became NaN or infinite, or a process died.
        """
        progress: Progress = self._ask("advance", iterations)[0]
        self.iteration = progress.iteration
        return progress

    def save(self, path: Path) -> None:
        """Write everything needed to go on, see `Trainer.save`.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._ask("save", path, everybody=False)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, here or in a `Trainer`.

        Raises:
            CheckpointError: the file is missing, damaged, or of another training.
        """
        self.iteration = self._ask("load", path)[0]

    def close(self) -> None:
        """End the processes; once is enough."""
        for pipe in self._pipes:
            pipe.close()  # each ends when it next listens
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def __enter__(self) -> "ParallelTrainer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the conversation ------------------------------------------------------------------

    def _ask(self, method: str, *arguments: Any, everybody: bool = True) -> list[Any]:
        pipes = self._pipes if everybody else self._pipes[:1]
        for rank, pipe in enumerate(pipes):
            try:
                pipe.send((method, arguments))
            except OSError:
                self._abandon(rank)
        return self._answers(len(pipes))

    def _answers(self, count: int | None = None) -> list[Any]:
        """One answer of each process, or the first error."""
        asked = self._pipes[:count]
        answers: dict[int, Any] = {}
        error: Exception | None = None
        while len(answers) < len(asked):
            # All pipes are watched: a dead process would keep the others waiting for it.
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            readable = wait(waiting, timeout=None if error is None else END_SECONDS)
            if not readable:
                self._kill()
                break
            for pipe in readable:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    good, answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    self._abandon(rank)
                if not good:
                    error = error or answers[rank]
        if error is not None:
            self._explain(error)
        return [answers[rank] for rank in sorted(answers)]

    def _explain(self, error: Exception) -> NoReturn:
        """Raise what a process complains of; that its neighbour is gone is not its own mistake."""
        if not isinstance(error, NerfError):
            for rank, process in enumerate(self._processes):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                    self._abandon(rank)
        raise error

    def _kill(self, but: int | None = None) -> None:
        for rank, process in enumerate(self._processes):
            if rank != but and process.poll() is None:
                process.kill()

    def _abandon(self, rank: int) -> NoReturn:
        """One process is gone; the others would wait for it for ever."""
        self._kill(but=rank)
        try:
            status: int | None = self._processes[rank].wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        raise TrainingError(
            f"process {rank} of {len(self._processes)} of a training on several devices ended in "
            f"the middle of it (exit status {status}); run the sweep again to go on from the last "
            "saved state"
        )


def train_devices(count: int) -> list[torch.device]:
    """The first GPUs of this process.

    Raises:
        TrainingError: there are fewer.
    """
    found = torch.cuda.device_count()
    if found < count:
        raise TrainingError(
            f"a training on {count} GPUs was asked for and {found} are there; set "
            "`resources.train.gpus` to what one machine has"
        )
    return [torch.device("cuda", index) for index in range(count)]
