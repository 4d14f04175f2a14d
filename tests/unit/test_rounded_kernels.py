"""Rounding rows, their gradients and updates on the kernels, against float64 formulas."""

import importlib.util
import math

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: no fused kernels", allow_module_level=True)

import triton_interpreter

triton_interpreter.use_interpreter_without_gpu()  # before anything imports Triton

with triton_interpreter.unchecked_imports():
    from nerf.kernels import rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
BETA, RATE, BIAS_1, BIAS_2 = 0.95, 2e-3, 1.7, 1.3
LAYERS = [(3, 7), (5, 4), (1, 6)]  # out, in; the last one is Adam's
PADDED = 8


class Rows:
    """Weights of a few small layers as the kernels want them, and in float64 by layer."""

    def __init__(self, bits: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(DEVICE)

        table, at = [], 0
        self.places = []
        for number, (out, inputs) in enumerate(LAYERS):
            bias = at + out * inputs
            self.places.append((at, bias))
            slot = number if number < 2 else -1
            table += [(at + r * inputs, inputs, bias + r, number, slot, r) for r in range(out)]
            at = bias + out
        self.count, self.rows = at, len(table)
        self.table = torch.tensor(table, dtype=torch.int32, device=DEVICE)
        self.factors = 0.5 + random(self.rows).abs()
        self.values, self.gradients, self.more = random(at), random(at), random(at)
        self.first, self.second = random(at + self.rows), random(at + self.rows).abs()
        top = float(2 ** (bits - 1) - 1)
        self.tops = torch.full((self.rows,), top, device=DEVICE)
        # Some weights are beyond the ends of their rows.
        self.start = (1.0 + 0.5 * random(self.rows).abs()) / top
        self.changes, self.g_changes = 0.1 * random(self.rows), torch.zeros_like(self.start)
        self.stack = torch.zeros(2, 5, 7, device=DEVICE)
        self.costs = torch.tensor([0.02, 0.5, 0.1], device=DEVICE)
        self.code_sums = torch.zeros(3, device=DEVICE)

    def layer(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        at, bias = self.places[number]
        return flat[at:bias].view(LAYERS[number])

    def per_row(self, of: torch.Tensor, number: int) -> torch.Tensor:
        first = sum(out for out, _ in LAYERS[:number])
        return of[first : first + LAYERS[number][0]]

    def scale(self, number: int) -> torch.Tensor:
        """As the file holds it: float16, here of float32 numbers."""
        exact = self.per_row(self.start, number) * self.per_row(self.changes, number).exp()
        return exact.half().to(F64)


def grid(w: torch.Tensor, scale: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = w / scale[:, None]
    return x, x.clamp(-top, top).round()


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_of_rows_are_those_of_the_formulas(bits, squeeze):
    rows = Rows(bits)
    g = (rows.gradients + rows.more).to(F64)
    momentum = rows.first.to(F64)
    rounded.row_gradients[(rows.rows,)](
        rows.table, rows.values, rows.gradients, rows.more, rows.start, rows.tops, rows.changes,
        rows.g_changes, rows.first, rows.stack, rows.costs, 5, 7, BETA=BETA, ROUND=True,
        SQUEEZE=squeeze, MUON=True, PADDED=PADDED,
    )  # fmt: skip
    outside = 0
    for number, (out, inputs) in enumerate(LAYERS):
        w, scale = rows.layer(rows.values, number).to(F64), rows.scale(number)
        top = float(rows.tops[0])
        x, k = grid(w, scale, top)
        inside = x.abs() <= top
        outside += int((~inside).sum())
        given = rows.layer(g, number)
        cost = float(rows.costs[number]) * squeeze
        expected = given * inside + cost * w.sign() / scale[:, None]
        of_scale = (given * (k - x * inside)).sum(1) - cost * x.abs().sum(1) / scale
        found = rows.layer(rows.gradients, number).to(F64)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        exact = (rows.per_row(rows.start, number) * rows.per_row(rows.changes, number).exp()).to(
            F64
        )
        torch.testing.assert_close(
            rows.per_row(rows.g_changes, number).to(F64), of_scale * exact, rtol=1e-4, atol=1e-4
        )
        bias = rows.places[number][1]
        torch.testing.assert_close(
            rows.gradients[bias : bias + out].to(F64), g[bias : bias + out], rtol=1e-6, atol=1e-6
        )
        if number < 2:
            m = BETA * rows.layer(momentum, number) + (1 - BETA) * expected
            torch.testing.assert_close(
                rows.layer(rows.first, number).to(F64), m, rtol=1e-5, atol=1e-5
            )
            u = (1 - BETA) * expected + BETA * m
            torch.testing.assert_close(
                rows.stack[number, :out, :inputs].to(F64), u, rtol=1e-5, atol=1e-5
            )
    assert outside > 0
    assert float(rows.stack[0, 3:].abs().sum() + rows.stack[1, :, 4:].abs().sum()) == 0


@pytest.mark.parametrize("update", [False, True])
def test_rows_are_updated_and_rounded(update):
    rows = Rows(4)
    rows.stack.copy_(torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(5)))
    before = {n: getattr(rows, n).to(F64) for n in ("values", "first", "second", "changes")}
    g, g_changes = rows.gradients.to(F64), torch.randn_like(rows.g_changes)
    rows.g_changes.copy_(g_changes)
    schedule = torch.tensor([[RATE * BIAS_1, BIAS_2, RATE, 1.0, RATE]], device=DEVICE)
    result = torch.full((rows.count,), math.nan, device=DEVICE)
    rounded.update_rows[(rows.rows,)](
        rows.table, rows.factors, rows.values, result, rows.gradients, rows.first, rows.second,
        rows.start, rows.tops, rows.changes, rows.g_changes, rows.stack, schedule, rows.code_sums,
        5, 7, rows.count, BETA_1=0.9, BETA_2=0.999, EPSILON=1e-8, UPDATE=update, ROUND=True,
        SQUEEZE=True, MUON=True, PADDED=PADDED,
    )  # fmt: skip

    def adam(w, g, m, v, s, r):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return w - s * m / (v.sqrt() * r + 1e-8)

    n = rows.count
    by_adam = adam(
        before["values"], g, before["first"][:n], before["second"][:n], RATE * BIAS_1, BIAS_2
    )
    changes = adam(
        before["changes"], g_changes.to(F64), before["first"][n:], before["second"][n:], RATE, 1.0
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        rows.changes.to(F64), changes if update else before["changes"], **close
    )
    for number, (out, inputs) in enumerate(LAYERS):
        expected = rows.layer(by_adam, number)
        if number < 2:
            steps = rows.stack[number, :out, :inputs].to(F64)
            factor = rows.per_row(rows.factors, number).to(F64)[:, None]
            expected = rows.layer(before["values"], number) - RATE * factor * steps
            assert torch.equal(
                rows.layer(rows.first[:n].to(F64), number), rows.layer(before["first"][:n], number)
            )
        if not update:
            expected = rows.layer(before["values"], number)
        w = rows.layer(rows.values, number)
        torch.testing.assert_close(w.to(F64), expected, **close)
        _, k = grid(w.to(F64), rows.scale(number), float(rows.tops[0]))
        codes = k * rows.scale(number)[:, None]
        torch.testing.assert_close(rows.layer(result, number).to(F64), codes, **close)
        assert float(rows.code_sums[number]) == float(k.abs().sum())
        bias = rows.places[number][1]
        wanted = by_adam[bias : bias + out] if update else before["values"][bias : bias + out]
        torch.testing.assert_close(rows.values[bias : bias + out].to(F64), wanted, **close)
        assert torch.equal(result[bias : bias + out], rows.values[bias : bias + out].half().float())


@pytest.mark.parametrize(
    ("sums", "limits", "iteration"),
    [
        ([30.0, 9.0, 0.0], (90.0, 60.0), 10),  # on the way, too many
        ([30.0, 9.0, 2.0], (400.0, 300.0), 90),  # there, too few
        ([3.0, 1.0, 2.0], (20.0, 50.0), 90),  # nothing to squeeze
    ],
)
def test_the_price_of_codes_is_that_of_the_formula(sums, limits, iteration):
    sizes = torch.tensor([21.0, 20.0, 6.0])
    m = (torch.tensor(sums, dtype=F64) / sizes).clamp(min=1e-4).requires_grad_()
    theta = ((1 + m * m).sqrt() - 1) / m
    bits = (sizes * (torch.log2((1 + theta) / (1 - theta)) - m * torch.log2(theta))).sum()
    bits.backward()
    bits = float(bits.detach())
    share = min(1.0, (iteration - 5) / 40)
    first, last = max(limits), limits[1]
    allowed = first * (last / first) ** share
    excess = min(max(bits / allowed - 1, -0.1), 0.1)
    now = 3e-4 * math.exp(50 * excess)
    price, total = torch.tensor([3e-4], device=DEVICE), torch.tensor([1.0], device=DEVICE)
    costs, code_sums = torch.zeros(3, device=DEVICE), torch.tensor(sums, device=DEVICE)
    rounded.price_codes[(1,)](
        torch.tensor([iteration], device=DEVICE), code_sums, sizes.to(DEVICE),
        torch.tensor(limits, device=DEVICE), price, costs, total, 3, 5, 40.0, 0.7, 50.0, 0.1,
        PADDED=4,
    )  # fmt: skip
    # The derivative of Σ nᵢ H(mᵢ) by one more multiple, mᵢ = sum / nᵢ; none where all are 0.
    slopes = m.grad / sizes * torch.tensor([s > 0 for s in sums])
    torch.testing.assert_close(costs.cpu().to(F64), now / allowed * slopes, rtol=1e-4, atol=1e-9)
    assert float(total) == pytest.approx(1 + now * bits / allowed, rel=1e-5)
    assert float(price) == pytest.approx(3e-4 * math.exp(0.7 * excess), rel=1e-5)
    assert float(code_sums.abs().sum()) == 0
