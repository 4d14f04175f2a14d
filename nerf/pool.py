"""The rays that a training draws from."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nerf.cameras import Rays, view_rays
from nerf.scenes.scene import Scene
from nerf.validation import training_pixels


class RayPool:
    """All training rays of a scene with their colours, on one device.

    An epoch is a seeded permutation of them, cut into whole batches; the few rays that are left
    over sit that epoch out. Iteration i takes the i-th batch.

    Args:
        scene: the scene.
        device: where the rays are kept.
        validation: fraction of the pixels of each view that is left out.
    """

    def __init__(self, scene: Scene, device: torch.device, validation: float = 0.0) -> None:
        views = []
        for view in scene.train:
            pose = torch.as_tensor(scene.poses[view], dtype=torch.float32)
            views.append(view_rays(scene.camera, pose.to(device)))
        self.rays = Rays.concatenate(views)
        photos = torch.as_tensor(scene.images[list(scene.train)], dtype=torch.float32)
        self.colors = photos.reshape(-1, 3).to(device)
        if validation > 0.0:
            free = torch.cat([training_pixels(scene, validation, view) for view in scene.train])
            left = free.nonzero().flatten().to(device)
            self.rays, self.colors = self.rays[left], self.colors[left]
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rays)

    def batch(self, seed: int, iteration: int, size: int) -> tuple[Rays, Float[Tensor, "rays 3"]]:
        """The rays and colours of one iteration."""
        picked = self.pick(seed, iteration, size)
        return self.rays[picked], self.colors[picked]

    def pick(self, seed: int, iteration: int, size: int) -> Int[Tensor, " rays"]:
        """The numbers of the rays of one iteration."""
        size = min(size, len(self))
        epoch, place = divmod(iteration, len(self) // size)
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = ((seed, epoch), self.order(seed, epoch).to(self.colors.device))
        return self._order[1][place * size : (place + 1) * size]

    def order(self, seed: int, epoch: int) -> Int[Tensor, " rays"]:
        """All rays in the order of an epoch, on the CPU."""
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        return torch.randperm(len(self), generator=generator)


class Batches:
    """Which rays an iteration has, as kernels read it from a device.

    Args:
        pool: all rays.
        seed: of their orders.
        rays: rays a batch.
        device: where the kernels run.
        part: which rays of each batch are wanted; all if None.

    Attributes:
        count: whole batches of an epoch.
        order: (count · wanted,) int32, the wanted rays of the batches of the epoch at hand.
        counter: (1,) int64, the iteration; the kernels count it.
    """

    def __init__(
        self, pool: RayPool, seed: int, rays: int, device: torch.device, part: slice | None = None
    ) -> None:
        self.count = len(pool) // rays
        self._rays, self._part = rays, part or slice(0, rays)
        wanted = len(range(rays)[self._part])
        self.order = torch.zeros(self.count * wanted, dtype=torch.int32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._pool, self._seed = pool, seed
        self._at = 0  # what the counter says
        self._epoch = -1
        self._next: tuple[int, Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def prepare(self, iteration: int) -> None:
        """Say what the host has to say: another epoch's order of rays, or a jump."""
        epoch = iteration // self.count
        if epoch != self._epoch:
            whole = self._order_of(epoch)[: self.count * self._rays].view(self.count, -1)
            self.order.copy_(whole[:, self._part].reshape(-1))
            self._epoch = epoch
        if iteration != self._at:
            self.go_to(iteration)

    def counted(self) -> None:
        """The kernels have counted one iteration."""
        self._at += 1

    def go_to(self, iteration: int) -> None:
        """Go on from another iteration."""
        self.counter.fill_(iteration)
        self._at = iteration

    def _order_of(self, epoch: int) -> Tensor:
        """The rays in an epoch's order; the next epoch's is made meanwhile, by another thread."""
        if self._next is not None and self._next[0] == epoch:
            order = self._next[1].result()
        else:
            order = self._pool.order(self._seed, epoch)
        self._next = epoch + 1, self._thread.submit(self._pool.order, self._seed, epoch + 1)
        return order


def mix(seed: int, number: int) -> int:
    """A seed made of a seed and a number."""
    return (seed * 1_000_003 + number * 7_919 + 1) % 2**63
