"""Where photos have detail, and nested draws that go there."""

import math

import pytest
import torch
from torch import Tensor

from nerf.detail import LUMINANCE, WINDOW, detail, weighted_order
from nerf.field import FieldShape, NerfModel, SampleCounts
from orchestrator.bridge import calibration_batches
from pruning import cells
from tests.tiny_scene import tiny_scene


def slow_detail(photo: Tensor) -> Tensor:
    """Pixel by pixel, from the words of the docstring."""
    height, width, _ = photo.shape
    Y = [
        [
            sum(s * float(c) for s, c in zip(LUMINANCE, photo[i, j], strict=True))
            for j in range(width)
        ]
        for i in range(height)
    ]

    def window(i: int, j: int) -> list[float]:
        r = WINDOW // 2
        return [
            Y[a][b]
            for a in range(max(0, i - r), min(height, i + r + 1))
            for b in range(max(0, j - r), min(width, j + r + 1))
        ]

    def slope(line: list[float], k: int) -> float:
        if 0 < k < len(line) - 1:
            return (line[k + 1] - line[k - 1]) / 2
        return line[1] - line[0] if k == 0 else line[-1] - line[-2]

    parts: list[list[float]] = [[], [], []]
    for i in range(height):
        for j in range(width):
            near = window(i, j)
            mean = sum(near) / len(near)
            parts[0].append(math.hypot(slope(Y[i], j), slope([row[j] for row in Y], i)))
            parts[1].append(math.sqrt(max(sum(v * v for v in near) / len(near) - mean**2, 0.0)))
            parts[2].append(max(Y[i][j] - mean, 0.0) * Y[i][j])
    total = torch.ones(height * width, dtype=torch.float64)
    for part in parts:
        values = torch.tensor(part, dtype=torch.float64)
        total += values / values.mean() if values.mean() > 1e-6 else 1.0
    return (total / 4).view(height, width)


def test_detail_equals_a_slow_reference() -> None:
    photo = torch.rand(9, 11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(detail(photo), slow_detail(photo))


def test_a_flat_photo_is_drawn_uniformly_and_no_pixel_is_left_out() -> None:
    torch.testing.assert_close(detail(torch.full((8, 9, 3), 0.4)), torch.ones(8, 9))
    edge = torch.zeros(20, 20, 3)
    edge[:, 10:] = 1.0
    found = detail(edge)
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(found.min()) >= 0.25
    assert float(found[:, 9:11].mean()) > 4 * float(found[:, :5].mean())
    assert detail(torch.ones(1, 1, 3)).shape == (1, 1)


def test_orders_are_permutations_and_heavy_pixels_come_first_as_often_as_they_weigh() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0])
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([weighted_order(weights, generator) for _ in range(4000)])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(4000, 3))
    first = torch.bincount(orders[:, 0], minlength=3) / 4000
    expected = weights / weights.sum()
    # Five standard errors of a share of 4,000 draws.
    assert torch.all((first - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt())
    # Given the first, the second by what is left: without replacement.
    second = torch.bincount(orders[orders[:, 0] == 2, 1], minlength=3).float()
    assert abs(float(second[1] / second.sum()) - 2 / 3) < 5 * math.sqrt(2 / 9 / float(second.sum()))


def test_calibration_sets_by_detail_are_nested_and_another_draw() -> None:
    shape = FieldShape((5, 4), None, 3, 2, 2, 1)
    model, scene = NerfModel.create(shape, SampleCounts(4, 3), 0), tiny_scene()

    def points(sizes: tuple[int, ...], weighting: str) -> Tensor:
        wanted = cells((2,), sizes)
        batches = calibration_batches(model, "coarse", scene, wanted, 0, weighting)  # type: ignore[arg-type]
        return torch.cat([b.inputs["point"] for b in batches])

    small, large, both = (points(n, "detail") for n in ((5,), (12,), (5, 12)))
    kept = {tuple(row) for row in large.tolist()}
    assert {tuple(row) for row in small.tolist()} < kept
    assert {tuple(row) for row in both.tolist()} == kept
    assert not torch.equal(points((5,), "uniform"), small)
