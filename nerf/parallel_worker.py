"""One process of a training on several devices, see `nerf.parallel`.

It is told what to train through a pipe, then does what it is asked: advance, save, load, weights.
It ends when the pipe is closed, so it never outlives whoever started it by more than one answer.
"""

import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nerf.shares import Share
from nerf.training import Trainer

# Longer than any single message takes, shorter than a person waits.
STUCK = timedelta(minutes=5)


class Worker:
    """What a process can be asked.

    Args:
        trainer: its part of the training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def advance(self, iterations: int) -> Any:
        """Run some iterations, all processes at once."""
        return self._trainer.advance(iterations)

    def save(self, path: Path) -> None:
        """Write the state; the same in every process."""
        self._trainer.save(path)

    def load(self, path: Path) -> int:
        """Read the state; gives its iteration."""
        self._trainer.load(path)
        return self._trainer.iteration

    def weights(self) -> dict[str, dict[str, Any]]:
        """The weights of each network as numpy arrays."""
        return {
            name: {key: value.cpu().numpy() for key, value in field.state_dict().items()}
            for name, field in self._trainer.model.networks().items()
        }


def open_trainer(message: tuple[Any, ...]) -> Trainer:
    """Join the others and make this process's trainer."""
    rank, count, device_name, meeting, scene, shape, samples, recipe, seed, backend = message
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=count,
        timeout=STUCK,
    )
    share = Share(rank, count) if count > 1 else None
    return Trainer(scene, shape, samples, recipe, seed, device, backend, share)


def main(pipe: Connection) -> None:
    """Answer until the pipe is closed."""
    try:
        worker = Worker(open_trainer(pipe.recv()))
        pipe.send((True, None))
    except EOFError:
        return
    except Exception as error:
        _complain(pipe, error)
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(worker, method)(*arguments)
        except Exception as error:
            _complain(pipe, error)
        else:
            pipe.send((True, answer))


def _complain(pipe: Connection, error: Exception) -> None:
    try:
        pipe.send((False, error))
    except Exception:  # an error that cannot be sent as it is
        pipe.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    try:
        main(Connection(int(sys.argv[1])))
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
