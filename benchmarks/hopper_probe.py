"""Where do the Hopper kernels hang? A ladder of small Gluon kernels, from a barrier to a network.

    python benchmarks/hopper_probe.py [--seconds 55] [--only "a;b one"] [--json probe.json]

Each rung is a process of its own. All compile at the same time; they run one after the other (a
lock), so a rung that hangs cannot be mistaken for its neighbour. For each rung one line says how
long its import, its compile and its run took, and one of

    ok                  finished, right result;
    wrong               finished, wrong result (how far off follows);
    HANG                launched, and not finished within the limit: a deadlock on the GPU. What
                        the partitions had stored in page-locked memory until then follows;
    COMPILING           still compiling at the end: no deadlock, the compiler is slow;
    WAITING             compiled, but its turn never came;
    error               an exception, its last line follows.

In "regs" rungs the warps hand registers to each other (setmaxnreg), as the compiler has it; in
"plain" rungs those instructions are taken out of the PTX (the code may spill, but cannot wait for
registers); in "capped" rungs the 256 registers that the compiler always asks for outside of
partitions are 240. A rung that hangs with "regs" and passes with one of the others convicts
setmaxnreg.
"""

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RUN_LIMIT = 1.2  # seconds from launch; every rung takes milliseconds if it works
TRAINING_RAYS = 256
BEGIN = float(os.environ.get("PROBE_BEGIN", time.time()))


def stamp(word: str) -> None:
    """Print what has been reached, and when, for the parent to read."""
    print(f"@ {time.time() - BEGIN:.2f} {word}", flush=True)


def ladder() -> dict[str, Callable[[], str]]:  # noqa: PLR0915  (one list of rungs)
    """The rungs by name, simplest first; importing what they need."""
    import hopper_probe_kernels as kernels  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from nerf.encoding import encode  # noqa: PLC0415
    from nerf.field import Field, FieldShape  # noqa: PLC0415
    from nerf.kernels import hopper_chain, hopper_gradients  # noqa: PLC0415
    from nerf.kernels.mlp import HOPPER, FusedField, Launch, PackedField  # noqa: PLC0415

    pinned: list[torch.Tensor] = []

    def watched(*size: int, dtype: torch.dtype = torch.float32, value: float = 0) -> torch.Tensor:
        """Page-locked memory that the GPU writes and we can read while it hangs."""
        tensor = torch.full(size, value, dtype=dtype).pin_memory()
        pinned.append(tensor)
        return tensor

    def describe() -> str:
        words = []
        for tensor in pinned:
            if tensor.dtype == torch.int32:
                words.append(f"trace {tensor.tolist()}")
            else:
                rows = (~tensor.isnan()).reshape(-1)
                where = rows.nonzero().flatten()
                first = (
                    f", first at {int(where[0])}, last at {int(where[-1])}" if len(where) else ""
                )
                words.append(f"written {int(rows.sum())} of {len(rows)}{first}")
        return "; ".join(words)

    class Stamped:
        """A kernel that says when it is compiled, waits for its turn, and is then launched."""

        def __init__(self, kernel: Any, registers: str) -> None:
            self.kernel, self.registers = kernel, registers

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*args: Any, **options: Any) -> None:
                change_registers(self.registers)
                compiled = self.kernel.warmup(*args, grid=grid, **options)
                used = f"{compiled.metadata.shared} bytes shared"
                stamp(f"compiled {self.kernel.__name__} ({used})")
                take_turn()
                stamp(f"launching {self.kernel.__name__}")
                self.kernel[grid](*args, **options)
                finish(describe)

            return run

    def launch(kernel: Any, *args: Any, registers: str = "regs", **options: Any) -> None:
        Stamped(kernel, registers)[(1,)](*args, num_warps=4, **options)

    def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-2) -> str:
        difference = (found.double().cpu() - expected.double().cpu()).norm()
        off = float(difference / expected.double().cpu().norm().clamp_min(1e-12))
        return "ok" if off < tolerance else f"wrong (relative error {off:.3g})"

    def equals(found: list[int], expected: list[int]) -> str:
        return "ok" if found == expected else f"wrong (trace {found}, expected {expected})"

    rungs: dict[str, Callable[[], str]] = {}

    # (a) A barrier alone: one partition arrives and waits, then two partitions hand a turn around.

    def barrier() -> str:
        trace = watched(4, dtype=torch.int32)
        launch(kernels.barrier, trace)
        return equals(trace.tolist(), [1, 2, 0, 0])

    rungs["a barrier"] = barrier

    def specialized(registers: str, groups: int) -> Callable[[], str]:
        def run() -> str:
            trace = watched(8, dtype=torch.int32)
            if groups == 2:
                launch(kernels.specialized_2, trace, registers=registers, maxnreg=168)
            elif groups == 3:
                launch(kernels.specialized_3, trace, registers=registers, maxnreg=128)
            else:
                launch(kernels.specialized_1, trace, registers=registers, maxnreg=168)
            return equals(trace.tolist(), [*range(1, groups + 2), *[0] * (7 - groups)])

        return run

    for groups in (1, 2, 3):
        for word in ("plain", "capped", "regs"):
            rungs[f"a {groups} groups, {word}"] = specialized(word, groups)

    def spare() -> str:
        """With 136 registers a thread the compiler asks for 248, not 256."""
        trace = watched(8, dtype=torch.int32)
        launch(kernels.specialized_1, trace, maxnreg=136)
        return equals(trace.tolist(), [1, 2, *[0] * 6])

    rungs["a 1 groups, regs 248"] = spare

    def rally(registers: str) -> Callable[[], str]:
        def run() -> str:
            trace = watched(4, dtype=torch.int32)
            launch(kernels.rally, trace, 100, registers=registers, maxnreg=168)
            return equals(trace.tolist(), [100, 100, 100, 0])

        return run

    for word in ("plain", "capped", "regs"):
        rungs[f"a rally, {word}"] = rally(word)

    # (b) One TMA load. (c) A ring of them. (d) With products.

    def tiles(count: int) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(0)
        data = torch.randn(count * 64, 64).to("cuda", torch.bfloat16)
        return data, hopper_chain._tiles(data)

    def load() -> str:
        trace = watched(4, dtype=torch.int32)
        data, described = tiles(2)
        out = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
        launch(kernels.load, described, out, trace)
        return close(out, data[64:], 1e-6)

    rungs["b one TMA load"] = load

    def store() -> str:
        trace = watched(4, dtype=torch.int32)
        data, described = tiles(2)
        launch(kernels.store, described, trace)
        return close(data[64:], torch.ones(64, 64), 1e-6)

    rungs["b one TMA store"] = store

    def ring(registers: str, groups: int, product: bool) -> Callable[[], str]:
        def run() -> str:
            steps = 40
            trace = watched(4, dtype=torch.int32)
            data, described = tiles(steps * 4)
            out = torch.zeros(groups, 64, 256, device="cuda")
            kernel = kernels.ring_1 if groups == 1 else kernels.ring_2
            launch(kernel, described, out, trace, steps, product, registers=registers, maxnreg=168)
            if not product:
                return equals(trace.tolist(), [steps] * (groups + 1) + [0] * (3 - groups))
            total = data.float().view(steps, 256, 64).sum((0, 2))
            return close(out, total.expand(groups, 64, 256))

        return run

    for product, name in ((False, "c ring"), (True, "d ring and products")):
        for groups in (1, 2):
            for word in ("plain", "capped", "regs"):
                rungs[f"{name}, {groups} groups, {word}"] = ring(word, groups, product)

    # (e) One layer of the real kernel. (f) The network with one group. (g) With two, and more.

    def rays(count: int, samples: int) -> list[torch.Tensor]:
        torch.manual_seed(1)
        unit = torch.nn.functional.normalize(torch.randn(count, 3), dim=-1)
        given = [
            torch.randn(count, 3) * 0.3,
            torch.randn(count, 3),
            torch.rand(count, samples),
            unit,
        ]
        return [x.cuda() for x in given]

    def exact(field: Field, given: list[torch.Tensor]) -> torch.Tensor:
        wide = Field(field.shape).double().cuda()
        wide.load_state_dict(field.state_dict())
        origins, directions, distances, unit = (x.double() for x in given)
        with torch.no_grad():
            density, rgb = wide(origins[:, None] + distances[..., None] * directions[:, None], unit)
        return torch.cat((density[..., None], rgb), -1)

    def network(shape: FieldShape, how: Launch, registers: str, count: int) -> Callable[[], str]:
        def run() -> str:
            torch.manual_seed(0)
            field, given = Field(shape).cuda(), rays(count, 64)
            packed = PackedField(field, how)
            density = watched(count, 64, value=float("nan"))
            rgb = watched(count, 64, 3, value=float("nan"))
            expected, share = exact(field, given), packed.share(given[3])
            torch.cuda.synchronize()
            if how.groups == 1:
                chain = Stamped(kernels.forward_one_group, registers)
            else:
                chain = Stamped(kernels.forward_chain, registers)
            hopper_chain.forward_chain = chain
            if how.groups == 1:
                hopper_chain._registers = lambda _: (232, 168)
            hopper_chain.evaluate(packed, *given[:3], share, density, rgb)
            return close(torch.cat((density[..., None], rgb), -1), expected)

        return run

    layer, whole = FieldShape(trunk=(64,), skip=None, feature=64, view=64), FieldShape()
    one = replace(HOPPER, groups=1)
    three = replace(HOPPER, groups=3, stages=3, backward_groups=3, backward_stages=4)
    for word in ("plain", "capped", "regs"):
        rungs[f"e one layer, 2 groups, {word}"] = network(layer, HOPPER, word, 2)
        rungs[f"f network, 1 group, {word}"] = network(whole, one, word, 1)
        rungs[f"g network, 2 groups, {word}"] = network(whole, HOPPER, word, 2)
        rungs[f"g 2 groups, 1024 rays, {word}"] = network(whole, HOPPER, word, 1024)
        rungs[f"g 2 groups, turns, {word}"] = network(
            whole, replace(HOPPER, turns=True), word, 1024
        )
        rungs[f"g 3 groups, {word}"] = network(whole, three, word, 1024)

    def bits(gates: torch.Tensor) -> torch.Tensor:
        """Gates of 256 channels: bit j of word c is channel 8·j + c."""
        shifts = torch.arange(32, device="cuda")[None, :, None]
        return ((gates.long()[:, None, :] >> shifts) & 1).reshape(len(gates), 256)

    def training(part: str, word: str) -> Callable[[], str]:
        """One part of a training step."""

        def run() -> str:
            torch.manual_seed(0)
            count = TRAINING_RAYS
            field, given = Field(whole).cuda(), rays(count, 64)
            fused = FusedField(whole, count, 64, "cuda", HOPPER)
            fused.load(field)
            plan, weights = fused.plan, fused._weights
            g_density, g_rgb = torch.rand(count, 64).cuda(), torch.rand(count, 64, 3).cuda()
            expected, encoded = exact(field, given), encode(given[3], 4)
            fused.hopper.gates.random_(-(2**31), 2**31 - 1)
            if part == "gradients":
                fused.activations.normal_()
                fused.deltas.normal_()
            torch.cuda.synchronize()
            hopper_chain.forward_chain = Stamped(kernels.forward_chain, word)
            hopper_chain.backward_chain = Stamped(kernels.backward_chain, word)
            hopper_gradients._partial_gradients = Stamped(kernels.partial_gradients, word)
            if part == "forward":
                density, rgb = fused.forward(*given[:3], encoded)
                return close(torch.cat((density[..., None], rgb), -1), expected)
            if part == "backward":
                gates = [bits(g[: fused.rows]).bool() for g in fused.hopper.gates]
                fused.backward_deltas(g_density, g_rgb)
                above = (g_rgb.view(-1, 3) @ weights["rgb.weight"]) * gates[8][:, :128]
                matrix = weights["mix.weight"]
                for index in range(7, -1, -1):
                    above = above.bfloat16().float() @ matrix.bfloat16().float()
                    if index == 7:
                        above += g_density.view(-1, 1) * weights["density.weight"]
                    above *= gates[index]
                    matrix = weights[f"trunk.{index}.weight"][:, -256:]
                chunk = fused.deltas[:4, : fused.rows].permute(1, 0, 2).reshape(-1, 256)
                return close(chunk.float(), above)
            fused.partial_sums()
            parts = fused.partials.double().cpu()
            slots = fused.slots.tolist()
            block, which = next((i, b) for i, b in enumerate(plan.blocks) if b.sources == 4)
            d = fused.deltas[which.delta : which.delta + 2].permute(1, 0, 2).reshape(-1, 128)
            h = fused.activations[which.source : which.source + 4].permute(1, 0, 2).reshape(-1, 256)
            found = parts[slots[block] : slots[block + 1], : 128 * 256].sum(0).view(128, 256)
            return close(found, d.float().t() @ h.float())

        return run

    for part in ("forward", "backward", "gradients"):
        for word in ("plain", "capped", "regs"):
            rungs[f"h training, {part}, {word}"] = training(part, word)
    return rungs


# The child.


TURN: list[Any] = []


def change_registers(word: str) -> None:
    """Change what warps ask of setmaxnreg, in what is compiled from now on."""
    from triton.backends.nvidia.compiler import CUDABackend  # noqa: PLC0415

    make = CUDABackend.make_ptx

    def make_ptx(*args: Any, **options: Any) -> str:
        text = make(*args, **options)
        if word == "plain":
            return re.sub(r"setmaxnreg[^;]*;", "", text)
        if word == "capped":
            return re.sub(r"(setmaxnreg[^;]*\s)256;", r"\g<1>240;", text)
        return text

    CUDABackend.make_ptx = make_ptx


def take_turn() -> None:
    """Wait until no other rung runs."""
    handle = Path(os.environ["PROBE_LOCK"]).open("w")  # noqa: SIM115  (held until the process ends)
    fcntl.flock(handle, fcntl.LOCK_EX)
    TURN.append(handle)


def finish(describe: Callable[[], str]) -> None:
    """Wait for the GPU, for a while; a hang ends the process."""
    import torch  # noqa: PLC0415

    event = torch.cuda.Event()
    event.record()
    until = time.time() + RUN_LIMIT
    while not event.query():
        if time.time() > until:
            stamp(f"HANG {describe()}")
            os._exit(3)
        time.sleep(0.005)
    stamp("returned")


def child(name: str) -> None:
    """Run one rung."""
    import torch  # noqa: PLC0415

    torch.zeros(1, device="cuda")
    rung = ladder()[name]
    stamp("imported")
    try:
        verdict = rung()
    except Exception as failure:  # whatever it is, the parent prints it
        lines = [x.strip() for x in str(failure).splitlines() if x.strip()]
        cause = failure.__cause__
        last = f" from {str(cause).strip()[-160:]}" if cause else ""
        verdict = f"error {type(failure).__name__}: {' / '.join(lines[-2:])[:240]}{last}"
    stamp(f"verdict {verdict}")
    os._exit(0)


# The parent.


@dataclass
class Rung:
    """A child and what it said."""

    name: str
    process: subprocess.Popen[str]
    lines: list[str]

    def row(self) -> dict[str, Any]:
        """Times and verdict, from the stamps."""
        times: dict[str, float] = {}
        verdict, last = "", "started"
        for text in self.lines:
            if not text.startswith("@ "):
                continue
            _, moment, word, *rest = text.split(" ", 3)
            times.setdefault(word, float(moment))
            last = word
            if word == "HANG":
                verdict = "HANG " + " ".join(rest)
            if word == "verdict":
                verdict = " ".join(rest)
        if not verdict:
            states = {"started": "IMPORTING", "imported": "COMPILING", "compiled": "WAITING"}
            verdict = states.get(last, f"STUCK after {last}")
            rest_of = [x for x in self.lines if not x.startswith("@ ")]
            if self.process.returncode not in (None, 0, -9) and rest_of:
                verdict = f"died ({self.process.returncode}): {rest_of[-1][:200]}"

        def between(a: str, b: str) -> float | None:
            return round(times[b] - times[a], 2) if a in times and b in times else None

        return {
            "imported at": times.get("imported"),
            "compile s": between("imported", "compiled"),
            "waited s": between("compiled", "launching"),
            "run s": between("launching", "returned"),
            "verdict": verdict,
        }


NAMES = (
    "a barrier", "a 1 groups, regs 248", "a 1 groups, regs", "a 2 groups, plain",
    "a 2 groups, capped", "a 2 groups, regs", "a 3 groups, regs", "a rally, plain",
    "a rally, capped", "b one TMA load", "b one TMA store", "c ring, 1 groups, plain",
    "c ring, 2 groups, plain", "c ring, 2 groups, capped", "d ring and products, 2 groups, plain",
    "d ring and products, 2 groups, capped", "d ring and products, 2 groups, regs",
    "e one layer, 2 groups, plain", "e one layer, 2 groups, capped", "f network, 1 group, capped",
    "g network, 2 groups, plain", "g network, 2 groups, capped", "g network, 2 groups, regs",
    "g 2 groups, 1024 rays, capped", "g 2 groups, turns, capped", "g 3 groups, capped",
    "h training, forward, capped", "h training, backward, capped", "h training, gradients, capped",
)  # fmt: skip


def main() -> None:
    """Start every rung, read what they say, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--only", default="", help="beginnings of names, separated by semicolons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rung", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rung:
        child(given.rung)
    wanted = [x for x in given.only.split(";") if x]
    names = [n for n in NAMES if not wanted or any(n.startswith(w) for w in wanted)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        setting = {
            "PROBE_BEGIN": str(time.time()),
            "PROBE_LOCK": f"{folder}/lock",
            "OMP_NUM_THREADS": "1",
        }
        rungs = []
        for index, name in enumerate(names):
            command = [sys.executable, __file__, "--rung", name]
            # A cache of its own: rungs differ in what is taken out of the PTX, and a compile that
            # was cached says nothing about the compiler.
            setting["TRITON_CACHE_DIR"] = f"{folder}/cache{index}"
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | setting,
            )
            rung = Rung(name, process, [])
            rungs.append(rung)

            def keep(rung: Rung = rung) -> None:
                assert rung.process.stdout is not None
                for line in rung.process.stdout:
                    rung.lines.append(line.rstrip("\n"))

            threading.Thread(target=keep, daemon=True).start()
        until = BEGIN + given.seconds
        while time.time() < until and any(r.process.poll() is None for r in rungs):
            time.sleep(0.1)
        for rung in rungs:
            if rung.process.poll() is None:
                rung.process.kill()
        time.sleep(0.5)
        found = {rung.name: rung.row() for rung in rungs}
    for name, row in found.items():
        times = "  ".join(f"{k} {v}" for k, v in row.items() if k != "verdict" and v is not None)
        print(f"{name:38s} {row['verdict']}\n{'':8s}{times}", flush=True)
    print(f"{time.time() - BEGIN:.0f} s in all")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
