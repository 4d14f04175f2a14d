"""How one network is laid out for the fused kernels: chunks, tiles, steps, gradient blocks.

Everything is cut into **chunks** of 64 columns, whatever the layers' widths, and padded with zeros
to whole chunks in memory only. One compiled kernel therefore serves every pruned network: widths
are run-time loop counts read from a small table, never compile-time constants.

Letters: N rows (ray, sample) padded to `ROWS`; an *activation* chunk is an (N, 64) matrix of its
own, so a chunk is contiguous and a layer of 256 channels is 4 of them; a weight **tile** is 64
output channels × 64 inputs, inputs contiguous, and tiles lie in memory in the order in which the
kernels read them (for each chunk of inputs, for each chunk of outputs).

The network is computed in its merged form. Between `feature` and `view` there is no activation,
so density and colour see

    view = relu(mix · h + share),  mix = W_view[:, features] · W_feature      (V × last width)
    share = W_view[:, direction] · γ(d) + b_view + W_view[:, features] · b_feature   (one a ray)

which is exact, saves 12 % of the arithmetic of the original network, and the gradients of the two
factors follow from the gradient of `mix` (see `nerf.kernels.mlp`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from nerf.field import FieldShape

CHUNK = 64
MAX_CHUNKS = 4  # the widest layer the kernels take is 256 channels
ROWS = 128  # rows are padded to a multiple of this
TABLE = 8  # integers a step takes in a table
BLOCK_OUT = 2  # a gradient block is at most 2 chunks of outputs × 4 chunks of inputs
SLOT = BLOCK_OUT * CHUNK * (MAX_CHUNKS * CHUNK + 1)  # numbers a partial gradient block takes
WORK = 8  # integers an item of gradient work takes in its table

HIDDEN, LAST, VIEW = 0, 1, 2


def chunks(width: int) -> int:
    """Chunks of 64 that hold `width` columns."""
    return -(-width // CHUNK)


def padded_rows(rows: int) -> int:
    """Rows of the buffers that hold `rows` rows."""
    return -(-rows // ROWS) * ROWS


def supported(shape: FieldShape) -> str | None:
    """Why the fused kernels cannot run this network; None if they can."""
    widest = MAX_CHUNKS * CHUNK
    if max(*shape.trunk, shape.view) > widest:
        return f"a layer is wider than {widest} channels ({shape})"
    if shape.point_features > CHUNK - 1:
        return f"the point encoding has more than {CHUNK - 1} features ({shape.point_features})"
    return None


@dataclass(frozen=True)
class Step:
    """One matrix product of a chain: target chunks = f(source chunks × weight tiles).

    Attributes:
        weight: which matrix it applies ("trunk.3", or "mix").
        outputs: chunks it produces.
        source: first activation chunk it reads (0 is the encoded point).
        sources: chunks it reads from `source` on.
        point: whether the encoded point is read too, before them.
        tile: first weight tile.
        vector: first chunk of its bias (backward: of the density weights) in `Plan.vector`.
        target: chunk it writes first.
        mask: forward: its index among the ReLU layers; backward: the chunk whose sign gates it.
        kind: HIDDEN, LAST (the density head reads it) or VIEW (the colour head reads it).
    """

    weight: str
    outputs: int
    source: int
    sources: int
    point: bool
    tile: int
    vector: int
    target: int
    mask: int
    kind: int

    def row(self) -> tuple[int, ...]:
        """The step as the kernels read it."""
        return (
            self.outputs,
            self.source,
            self.sources,
            int(self.point),
            self.tile,
            self.vector,
            self.target,
            self.mask,
        )


@dataclass(frozen=True)
class Block:
    """A block of weight gradients: (delta chunks)ᵀ × (activation chunks), summed over rows.

    Attributes:
        delta: first delta chunk (rows of the gradient, i.e. output channels).
        deltas: how many, 1 or 2.
        source: first activation chunk (columns of the gradient, i.e. inputs).
        sources: how many, 1 to 4.
    """

    delta: int
    deltas: int
    source: int
    sources: int

    @property
    def cost(self) -> int:
        """What 64 rows of it cost, in chunks read."""
        return self.deltas + self.sources


class Plan:
    """The layout of one network shape.

    Attributes:
        shape: the network.
        parameters: offset and size of every parameter of `Field` in the flat vector, in the
            order of `FieldShape.layers` (weight, then bias).
        count: length of the flat vector.
        forward: steps of the forward chain.
        backward: steps of the backward chain; the first reads the deltas of the view layer.
        activations: activation chunks (0 the encoded point, then the trunk, then view).
        deltas: delta chunks (the trunk, then view, then the heads: density, red, green, blue).
    """

    def __init__(self, shape: FieldShape) -> None:
        reason = supported(shape)
        if reason is not None:
            raise ValueError(f"the fused kernels cannot run this network: {reason}")
        self.shape = shape
        self.parameters: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.count = 0
        for spec in shape.layers():
            for name, size in (
                (f"{spec.name}.weight", (spec.out_width, spec.in_width)),
                (f"{spec.name}.bias", (spec.out_width,)),
            ):
                self.parameters[name] = (self.count, size)
                self.count += size[0] * (size[1] if len(size) == 2 else 1)
        self._lay_out()

    # The flat vectors.

    @property
    def mix_size(self) -> tuple[int, int]:
        """Shape of `mix`, which follows the parameters in the extended vector."""
        return self.shape.view, self.shape.trunk[-1]

    @property
    def extended(self) -> int:
        """Length of the extended vector: parameters, mix, and one zero that padding points at."""
        return self.count + self.mix_size[0] * self.mix_size[1] + 1

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A parameter (or "mix.weight") as a view of the extended vector."""
        if name == "mix.weight":
            rows, columns = self.mix_size
            return flat[self.count : self.count + rows * columns].view(rows, columns)
        offset, size = self.parameters[name]
        return flat[offset : offset + size[0] * (size[1] if len(size) == 2 else 1)].view(size)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter and "mix.weight" as views of the extended vector."""
        return {name: self.view(flat, name) for name in (*self.parameters, "mix.weight")}

    # Chunks and steps.

    def _lay_out(self) -> None:
        shape = self.shape
        widths = [chunks(width) for width in shape.trunk]
        self.activation_of = {"point": 0}
        self.delta_of = {}
        at = 0
        for index, width in enumerate(widths):
            self.delta_of[f"trunk.{index}"] = at
            self.activation_of[f"trunk.{index}"] = at + 1
            at += width
        self.delta_of["view"] = at
        self.activation_of["view"] = at + 1
        self.delta_of["heads"] = at + chunks(shape.view)
        self.activations = at + 1 + chunks(shape.view)
        self.deltas = self.delta_of["heads"] + 1

        steps, tile, vector = [], 0, 0
        for index, width in enumerate(widths):
            point = index == 0 or self._skips_into(index)
            sources = widths[index - 1] if index else 0
            steps.append(
                Step(
                    f"trunk.{index}",
                    width,
                    self.activation_of[f"trunk.{index - 1}"] if index else 0,
                    sources,
                    point,
                    tile,
                    vector,
                    self.activation_of[f"trunk.{index}"],
                    index,
                    LAST if index == len(widths) - 1 else HIDDEN,
                )
            )
            tile += width * (sources + int(point))
            vector += width
        last = f"trunk.{len(widths) - 1}"
        outputs = chunks(shape.view)
        steps.append(
            Step(
                "mix",
                outputs,
                self.activation_of[last],
                widths[-1],
                False,
                tile,
                vector,
                self.activation_of["view"],
                len(widths),
                VIEW,
            )
        )
        self.forward = tuple(steps)
        # Behind the biases, in chunks: density weights, red, green, blue, then the heads' 4 biases.
        self.density_at = vector
        self.rgb_at = vector + widths[-1]
        self.heads_bias_at = self.rgb_at + 3 * outputs
        self.vector_size = self.heads_bias_at * CHUNK + 4
        self.view_columns = outputs * CHUNK

        steps, tile = [], 0
        for index in range(len(widths) - 1, -1, -1):
            above = "view" if index == len(widths) - 1 else f"trunk.{index + 1}"
            sources = outputs if above == "view" else widths[index + 1]
            steps.append(
                Step(
                    "mix" if above == "view" else above,
                    widths[index],
                    self.delta_of[above],
                    sources,
                    False,
                    tile,
                    self.density_at,
                    self.delta_of[f"trunk.{index}"],
                    self.activation_of[f"trunk.{index}"],
                    LAST if above == "view" else HIDDEN,
                )
            )
            tile += widths[index] * sources
        self.backward = tuple(steps)

    def _skips_into(self, index: int) -> bool:
        return self.shape.skip is not None and index == self.shape.skip + 1

    def table(self, backward: bool = False) -> Tensor:
        """The steps as the kernels read them, (steps, TABLE) int32."""
        steps = self.backward if backward else self.forward
        return torch.tensor([step.row() for step in steps], dtype=torch.int32)

    # Weights into tiles.

    def forward_tiles(self, weights: Mapping[str, Tensor], fill: float | int = 0) -> Tensor:
        """Weight tiles of the forward chain, (tiles, 64, 64), zero (`fill`) where padded.

        Args:
            weights: parameters by name, and "mix.weight".
            fill: what padding holds.
        """
        tiles = []
        for step in self.forward:
            matrix = weights[f"{step.weight}.weight"]
            parts = [matrix]
            if step.point and step.sources:
                point = self.shape.point_features
                parts = [matrix[:, :point], matrix[:, point:]]
            for part in parts:
                tiles.append(_tiles(part, fill))
        return torch.cat(tiles)

    def backward_tiles(self, weights: Mapping[str, Tensor], fill: float | int = 0) -> Tensor:
        """Weight tiles of the backward chain (the transposed weights), (tiles, 64, 64)."""
        tiles = []
        for step in self.backward:
            matrix = weights[f"{step.weight}.weight"]
            if step.weight != "mix" and self._skips_into(int(step.weight.split(".")[1])):
                matrix = matrix[:, self.shape.point_features :]
            tiles.append(_tiles(matrix.t(), fill))
        return torch.cat(tiles) if tiles else torch.empty(0, CHUNK, CHUNK)

    def vector(self, weights: Mapping[str, Tensor], fill: float | int = 0) -> Tensor:
        """Biases of the trunk and weights and biases of the heads, padded to chunks."""
        parts = [_padded(weights[f"{s.weight}.bias"], fill) for s in self.forward if s.kind != VIEW]
        parts.append(_padded(weights["density.weight"][0], fill))
        parts += [_padded(row, fill) for row in weights["rgb.weight"]]
        return torch.cat((*parts, weights["density.bias"], weights["rgb.bias"]))

    def _indices(self) -> dict[str, Tensor]:
        return self.views(torch.arange(self.extended, dtype=torch.int32))

    @cached_property
    def forward_index(self) -> Tensor:
        """Where in the extended vector each element of `forward_tiles` lies, int32."""
        return self.forward_tiles(self._indices(), self.extended - 1).reshape(-1)

    @cached_property
    def backward_index(self) -> Tensor:
        """Where in the extended vector each element of `backward_tiles` lies, int32."""
        return self.backward_tiles(self._indices(), self.extended - 1).reshape(-1)

    @cached_property
    def vector_index(self) -> Tensor:
        """Where in the extended vector each element of `vector` lies, int32."""
        return self.vector(self._indices(), self.extended - 1)

    # Weight gradients.

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks that together hold every weight gradient (of the merged network)."""
        found = []
        for step in self.forward:
            first = self.delta_of["view" if step.weight == "mix" else step.weight]
            outputs = step.outputs + (step.weight == "mix")  # the heads follow view
            for at in range(0, outputs, BLOCK_OUT):
                size = min(BLOCK_OUT, outputs - at)
                if step.point:
                    found.append(Block(first + at, size, 0, 1))
                if step.sources:
                    found.append(Block(first + at, size, step.source, step.sources))
        found.append(
            Block(self.delta_of["heads"], 1, self.activation_of["view"], chunks(self.shape.view))
        )
        return tuple(found)

    @cached_property
    def gradient_index(self) -> Tensor:
        """Block and place of each gradient, (extended, 2) int32; (-1, 0) where there is none.

        A block's slot holds 128 rows of 256 columns and, behind them, the 128 row sums of its
        deltas (the bias gradients). What has no place (feature, and the weights of view) is
        computed from `mix` and the sums of deltas.
        """
        block = torch.full((self.extended,), -1, dtype=torch.int32)
        place = torch.zeros(self.extended, dtype=torch.int32)
        blocks, places = self.views(block), self.views(place)
        width = MAX_CHUNKS * CHUNK
        cells: dict[tuple[int, int], tuple[int, int, int]] = {}
        sums: dict[int, tuple[int, int]] = {}
        for at, found in enumerate(self.blocks):
            for i in range(found.deltas):
                sums.setdefault(found.delta + i, (at, i * CHUNK))
                for j in range(found.sources):
                    cells[found.delta + i, found.source + j] = at, i * CHUNK, j * CHUNK

        def assign(name: str, delta: str, source: str, channel: int = 0, start: int = 0) -> None:
            """Find a matrix (its columns from `start`), whose row 0 is `channel` of `delta`."""
            rows, columns = blocks[name].shape[0], blocks[name].shape[1] - start
            if source == "point":
                columns = self.shape.point_features
            for r in range(0, rows, CHUNK):
                for c in range(0, columns, CHUNK):
                    chunk = (
                        self.delta_of[delta] + r // CHUNK,
                        self.activation_of[source] + c // CHUNK,
                    )
                    at, down, right = cells[chunk]
                    height, breadth = min(CHUNK, rows - r), min(CHUNK, columns - c)
                    cell = slice(r, r + height), slice(start + c, start + c + breadth)
                    rows_at = down + channel + torch.arange(height)[:, None]
                    blocks[name][cell] = at
                    places[name][cell] = (rows_at * width + right + torch.arange(breadth)).int()

        def assign_bias(name: str, delta: str, channel: int = 0) -> None:
            rows = len(blocks[name])
            for r in range(0, rows, CHUNK):
                at, down = sums[self.delta_of[delta] + r // CHUNK]
                height = min(CHUNK, rows - r)
                begin = BLOCK_OUT * CHUNK * width + down + channel
                blocks[name][r : r + height] = at
                places[name][r : r + height] = begin + torch.arange(height, dtype=torch.int32)

        for index in range(len(self.shape.trunk)):
            name, start = f"trunk.{index}", 0
            if index == 0 or self._skips_into(index):
                assign(f"{name}.weight", name, "point")
                start = self.shape.point_features
            if index:
                assign(f"{name}.weight", name, f"trunk.{index - 1}", start=start)
            assign_bias(f"{name}.bias", name)
        assign("mix.weight", "view", name)
        assign("density.weight", "heads", name)
        assign("rgb.weight", "heads", "view", channel=1)
        assign_bias("view.bias", "view")
        assign_bias("density.bias", "heads")
        assign_bias("rgb.bias", "heads", channel=1)
        return torch.stack((block, place), 1)

    def work(self, rows: int, programs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split the gradient blocks evenly over programs.

        Args:
            rows: padded rows N.
            programs: how many programs run.

        Returns:
            Items (items, WORK) int32: delta, deltas, source, sources, first row, end row, slot, 0;
            the first item of each program and the end, (programs + 1,) int32; the first slot of
            each block and the end, (blocks + 1,) int32.
        """
        groups = rows // CHUNK
        total = sum(block.cost for block in self.blocks) * groups
        items: list[tuple[int, ...]] = []
        first, slots = [0], [0]
        spent, program = 0, 1
        for block in self.blocks:
            at = 0
            while at < groups:
                limit = -(-total * program // programs)
                room = max(1, -(-(limit - spent) // block.cost))
                end = min(groups, at + room) if program < programs else groups
                items.append(
                    (
                        block.delta,
                        block.deltas,
                        block.source,
                        block.sources,
                        at * CHUNK,
                        end * CHUNK,
                        len(items),
                        0,
                    )
                )
                spent += (end - at) * block.cost
                at = end
                while program < programs and spent >= -(-total * program // programs):
                    first.append(len(items))
                    program += 1
            slots.append(len(items))
        first += [len(items)] * (programs + 1 - len(first))
        return (
            torch.tensor(items, dtype=torch.int32),
            torch.tensor(first, dtype=torch.int32),
            torch.tensor(slots, dtype=torch.int32),
        )

    def work_in_pairs(self, rows: int, programs: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `work`, but the two blocks that read the same activations run side by side.

        Programs 2i and 2i + 1 go through the same rows at the same time, so that one fetch of the
        activations serves both. Both have as many items, with as many rows each; an item's last
        integer tells whether its activations are those of the other program's.
        """
        groups, pairs = rows // CHUNK, programs // 2
        together = self._partners()
        costs = [max(self.blocks[i].cost for i in pair) / (2 / len(pair)) for pair in together]
        limit = sum(costs) * groups / pairs
        pieces: list[tuple[int, int, int, int]] = []  # program, block, first and end group
        pair, spent = 0, 0.0
        for members, cost in zip(together, costs, strict=True):
            at = 0
            while at < groups:
                room = max(1, round((limit * (pair + 1) - spent) / cost))
                if len(members) == 1:
                    room += room % 2  # both programs of a pair take as many rows
                end = groups if pair == pairs - 1 else min(groups, at + room)
                if len(members) == 2:
                    pieces += [(2 * pair + i, block, at, end) for i, block in enumerate(members)]
                else:
                    half = (at + end) // 2
                    pieces.append((2 * pair, members[0], at, half))
                    pieces.append((2 * pair + 1, members[0], half, end))
                spent += (end - at) * cost
                at = end
                while pair < pairs - 1 and spent > limit * (pair + 1) - cost / 2:
                    pair += 1
        order = sorted(pieces, key=lambda piece: (piece[1], piece[2]))
        slot_of = {piece: slot for slot, piece in enumerate(order)}
        pieces.sort(key=lambda piece: piece[0])
        in_step = {block for members in together if len(members) == 2 for block in members}
        items = []
        for piece in pieces:
            block = self.blocks[piece[1]]
            items.append((block.delta, block.deltas, block.source, block.sources,
                          piece[2] * CHUNK, piece[3] * CHUNK, slot_of[piece],
                          int(piece[1] in in_step)))  # fmt: skip
        owners = torch.tensor([piece[0] for piece in pieces])
        first = torch.searchsorted(owners, torch.arange(programs + 1))
        blocks = torch.tensor([piece[1] for piece in order])
        slots = torch.searchsorted(blocks, torch.arange(len(self.blocks) + 1))
        return torch.tensor(items, dtype=torch.int32), first.int(), slots.int()

    def _partners(self) -> list[list[int]]:
        """Blocks that read the same activations, two by two where there are two."""
        found: list[list[int]] = []
        for at, block in enumerate(self.blocks):
            for pair in found:
                other = self.blocks[pair[0]]
                if len(pair) == 1 and (
                    (other.source, other.sources, other.delta + BLOCK_OUT)
                    == (block.source, block.sources, block.delta)
                ):
                    pair.append(at)
                    break
            else:
                found.append([at])
        return found

    # What it costs.

    def flops(self, padded: bool = False) -> int:
        """Floating-point operations of one evaluation of the merged network.

        Args:
            padded: count whole chunks, as the kernels compute them.
        """
        if padded:
            tiles = sum(s.outputs * (s.sources + int(s.point)) for s in self.forward)
            return 2 * tiles * CHUNK * CHUNK
        shape = self.shape
        mix = shape.view * shape.trunk[-1]
        apart = shape.view * shape.feature + shape.trunk[-1] * shape.feature
        return shape.flops() - 2 * (apart + shape.view * shape.direction_features - mix)


def swizzled(tiles: Tensor) -> Tensor:
    """Tiles (…, 64, 64) as shared memory holds them: 8 columns wide units exchanged in each row."""
    row, unit = torch.arange(CHUNK)[:, None], torch.arange(8)[None, :]
    where = (unit ^ (row % 8)).to(tiles.device)
    units = tiles.reshape(-1, CHUNK, 8, 8)
    moved = units.gather(2, where[None, :, :, None].expand_as(units))
    return moved.reshape(tiles.shape)


@lru_cache(maxsize=64)
def plan_for(shape: FieldShape) -> Plan:
    """The plan of a shape; plans are kept."""
    return Plan(shape)


def _tiles(matrix: Tensor, fill: float | int) -> Tensor:
    """Cut (outputs, inputs) into tiles of 64 × 64, ordered by input chunk, then output chunk."""
    out_width, in_width = matrix.shape
    outs, ins = chunks(out_width), chunks(in_width)
    padding = (0, ins * CHUNK - in_width, 0, outs * CHUNK - out_width)
    whole = pad(matrix, padding, value=fill)
    return whole.view(outs, CHUNK, ins, CHUNK).permute(2, 0, 1, 3).reshape(-1, CHUNK, CHUNK)


def _padded(vector: Tensor, fill: float | int) -> Tensor:
    return pad(vector, (0, chunks(len(vector)) * CHUNK - len(vector)), value=fill)
