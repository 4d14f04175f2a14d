"""A search rehearsed on a formula, without a GPU: what a sampler finds, and what a proposal costs.

Usage::

    python -m benchmarks.rehearse SWEEP [--samplers front optuna] [--trials 256] [--seeds 0]
    python -m benchmarks.rehearse SWEEP --after 8 11       # one batch each, from the recorded study

The formula is fitted to the trials that a search of this sweep recorded. Letters: r_l the fraction
removed of layer l (of either network), e_l its error, E their sum with what pairs of layers add::

    e_l = exp(a_l)·r_l^p_l / (1.02 − r_l)^q_l          mse = 1 / (1/(m + E) + 1/c)
    E   = Σ_l e_l + Σ_kl tanh(w_kl)·√(e_k·e_l)

m is the dense model's MSE, c the MSE that nothing exceeds. Rounds and starts are those of the
sweep, sizes those of real files. Everything is measured in full: there is no first look.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray

from benchmarks.search import Found, ratios_of, table
from nerf.field import FieldShape
from orchestrator.keys import content_key
from orchestrator.pareto import Point, Reference, hypervolume
from orchestrator.plan import make_plan
from orchestrator.search import study as studies
from orchestrator.search.samplers import make_sampler
from orchestrator.search.search import open_study
from orchestrator.search.space import Parameters, Space
from orchestrator.search.study import Proposal, Study
from orchestrator.sweep import collect, open_sweep

LAYERS = [*(f"trunk.{i}" for i in range(8)), "feature", "view"]
SAMPLERS: dict[str, Callable[[int], Any]] = {
    "front": lambda seed: make_sampler("gp", seed),
    "optuna": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
    "tpe": lambda seed: make_sampler("tpe", seed),
    "nsga2": lambda seed: make_sampler("nsga2", seed),
    "random": lambda seed: make_sampler("random", seed),
}
Ratios = NDArray[np.float64]


class Formula:
    """PSNR on the validation rays by the ratios, fitted to trials.

    Args:
        ratios: (trials, layers).
        psnr: of each, in dB.
        dense: PSNR of the dense model.

    Attributes:
        error: root mean square of what the formula is wrong by on every sixth trial, when it is
            fitted to the others, in dB.
    """

    def __init__(self, ratios: Ratios, psnr: Ratios, dense: float) -> None:
        x, y = torch.from_numpy(ratios), torch.from_numpy(psnr)
        held_out = torch.arange(len(x)) % 6 == 0
        self._dense = 10 ** (-dense / 10)
        self._fit(x[~held_out], y[~held_out])
        with torch.no_grad():
            wrong = self._psnr(x[held_out]) - y[held_out]
        self.error = float(wrong.square().mean().sqrt())
        self._fit(x, y)

    def _fit(self, x: torch.Tensor, y: torch.Tensor, steps: int = 1500) -> None:
        torch.manual_seed(0)
        layers = x.shape[1]
        start = {"a": -6.0, "p": 0.5, "q": -1.0, "w": 0.0, "c": -2.1}
        shape = {"w": (layers, layers), "c": ()}
        self._of = {
            name: torch.full(
                shape.get(name, (layers,)), value, dtype=torch.float64
            ).requires_grad_()
            for name, value in start.items()
        }
        optimizer = torch.optim.Adam(self._of.values(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            near = sum((self._of[n] - start[n]).square().sum() for n in "pq")
            near = near + (self._of["a"] - start["a"]).square().mean()
            loss = (self._psnr(x) - y).square().mean() + 1e-3 * near
            (loss + 3e-3 * self._of["w"].abs().sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _psnr(self, x: torch.Tensor) -> torch.Tensor:
        of = self._of
        alone = of["a"].exp() * x.clamp_min(1e-9) ** of["p"].exp() / (1.02 - x) ** of["q"].exp()
        root = alone.clamp_min(1e-12).sqrt()
        error = alone.sum(-1) + ((root @ of["w"].tanh()) * root).sum(-1).clamp_min(0)
        return 10 * torch.log10(1 / (self._dense + error) + 1 / of["c"].exp())

    @torch.no_grad()
    def __call__(self, ratios: Sequence[float]) -> float:
        """PSNR in dB."""
        return float(self._psnr(torch.tensor([ratios], dtype=torch.float64))[0])


def parameters(shape: FieldShape, ratios: Sequence[float]) -> int:
    """How many parameters both networks keep."""
    count = 0
    for of in (ratios[: len(ratios) // 2], ratios[len(ratios) // 2 :]):
        *trunk, feature, view = of
        kept = [round(w * (1 - r)) for w, r in zip(shape.trunk, trunk, strict=True)]
        small = replace(
            shape,
            trunk=tuple(kept),
            feature=round(shape.feature * (1 - feature)),
            view=round(shape.view * (1 - view)),
        )
        count += small.parameters()
    return count


class Rehearsal:
    """A sweep's search, measured by a formula."""

    def __init__(self, sweep_file: Path) -> None:
        sweep, store = open_sweep(sweep_file)
        found = Found(collect(make_plan(sweep, store), store), store)
        self.plan, self.reference = found.plan, found.reference
        self.shape = sweep.shape
        self.space = Space(found.plan.settings, sweep.shape, found.plan.sets)
        recorded = open_study(sweep, found.plan, store)
        self.starts = recorded.starts() or []
        self.recorded = recorded
        rows = [list(ratios_of(r).values()) for r in found.tried]
        quality = [
            r.metrics["validation_psnr"]
            if "validation_psnr" in r.metrics
            else r.metrics["first_psnr"]
            for r in found.tried
        ]
        dense = found.dense.metrics["validation_psnr"]
        self.formula = Formula(np.array(rows), np.array(quality), dense)
        some = found.tried[0]
        self.overhead = some.metrics["size_bytes"] - 4 * some.metrics["params"]

    def measure(self, given: Parameters) -> tuple[float, float]:
        """Size in bytes and PSNR in dB."""
        ratios = [given[f"{network}/{name}"] for network in ("coarse", "fine") for name in LAYERS]
        size = 4 * parameters(self.shape, ratios) + self.overhead
        return float(size), self.formula(ratios)

    def finish(self, given: Any) -> tuple[str, Parameters]:
        """Rounded parameters and a key."""
        rounded = self.space.rounded(given)
        return content_key(rounded), rounded

    def run(self, sampler: str, trials: int, seed: int) -> list[tuple[int, float, float]]:
        """Trials so far, hypervolume, and CPU seconds a proposal of the last 64: every 64."""
        studies.make_sampler = lambda _, s: SAMPLERS[sampler](s)
        batch, rows, spent = self.plan.settings.batch, [], []
        with tempfile.TemporaryDirectory() as folder:
            study = Study(
                f"sqlite:///{folder}/study.db", "rehearsal", self.plan.settings.objectives,
                self.space.dimensions,
            )  # fmt: skip
            first = {self.finish(p)[0]: Proposal(self.finish(p)[0], o, p) for o, p in self.starts}
            starts = list(first.values())
            for round_ in range(trials // batch):
                entries = study.entries()
                for entry in (e for e in entries if e.round == round_ - 2):
                    study.tell(entry, self.measure(entry.parameters), {})
                entries = study.entries()
                proposals, starts = starts[:batch], starts[batch:]
                if (left := batch - len(proposals)) > 0:
                    begun = time.process_time()
                    proposals += study.propose(
                        [e for e in entries if e.round <= round_ - 2],
                        [e for e in entries if e.round == round_ - 1],
                        round_, left, "gp", seed, self.finish, {p.key for p in proposals},
                    )  # fmt: skip
                    spent.append((time.process_time() - begun) / left)
                for slot, proposal in enumerate(proposals):
                    study.add(round_, slot, proposal)
                count = (round_ + 1) * batch
                if count % 64 == 0:
                    rows.append((count, self._volume(study), float(np.mean(spent[-64 // batch :]))))
                    print(f"  {sampler}, seed {seed}: {rows[-1]}", flush=True)
            study.close()
        return rows

    def go_on(self, sampler: str, after: int, count: int, seed: int) -> tuple[int, float, float]:
        """Propose once more than was recorded up to a round, whose trials still run.

        Returns:
            How many trials were measured, what the proposals add to the hypervolume of all before
            them (those that run included), and CPU seconds a proposal.
        """
        studies.make_sampler = lambda _, s: SAMPLERS[sampler](s)
        entries = [e for e in self.recorded.entries() if e.round <= after]
        history = [
            replace(e, state="done", values=self.measure(e.parameters))
            for e in entries
            if e.round < after
        ]
        running = [e for e in entries if e.round == after]
        begun = time.process_time()
        proposals = self.recorded.propose(
            history, running, after + 1, count, "gp", seed, self.finish
        )
        seconds = (time.process_time() - begun) / count
        before = [e.parameters for e in entries]
        gain = self._of([*before, *(p.parameters for p in proposals)]) - self._of(before)
        return len(history), gain, seconds

    def _volume(self, study: Study) -> float:
        return self._of(entry.parameters for entry in study.entries())

    def _of(self, given: Iterable[Parameters]) -> float:
        points = [Point("", *self.measure(parameters), 0.0) for parameters in given]
        return hypervolume(points, Reference(self.reference.size_bytes, self.reference.psnr))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument(
        "--samplers", nargs="+", choices=list(SAMPLERS), default=["front", "optuna"]
    )
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--after", type=int, nargs="+", help="rounds of the recorded study")
    parser.add_argument("--proposals", type=int, default=8, help="with --after")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the search's actor
    rehearsal = Rehearsal(options.sweep)
    print(f"formula: {rehearsal.formula.error:.2f} dB rms on every sixth trial, left out")
    if options.after:
        found = [
            [name, seed, known, f"{gain:,.0f}", f"{seconds:.2f}"]
            for name in options.samplers
            for seed in options.seeds
            for known, gain, seconds in (
                rehearsal.go_on(name, after, options.proposals, seed) for after in options.after
            )
        ]
        head = ["sampler", "seed", "trials known", f"gain of {options.proposals}, bytes·dB",
                "CPU seconds a proposal"]  # fmt: skip
        print(table(head, found))
        return
    rows = [
        [name, seed, count, f"{volume:,.0f}", f"{seconds:.2f}"]
        for name in options.samplers
        for seed in options.seeds
        for count, volume, seconds in rehearsal.run(name, options.trials, seed)
    ]
    head = ["sampler", "seed", "trials", "hypervolume, bytes·dB", "CPU seconds a proposal"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
