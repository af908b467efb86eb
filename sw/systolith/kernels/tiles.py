"""What the kernels of the library have in common: blocks of rows, transfers, rotating buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from systolith_hdl.formats import FLOATS, DType
from systolith_hdl.isa import AluOp, Function, RowSums, Space

from ..kernel import DramTensor, KernelBuilder, Tile, View
from ..kernel.source import refuse

_Work = TypeVar("_Work")
_Slot = TypeVar("_Slot")
_DONE = object()


def parts(total: int, step: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of at most `step` that `total` is made of."""
    return [(start, min(step, total - start)) for start in range(0, total, step)]


def rank(tensor: DramTensor, *ranks: int) -> None:
    """Refuses a tensor that is not of floats, or not of one of these ranks."""
    if len(tensor.shape) not in ranks:
        wanted = " or ".join(map(str, ranks))
        refuse(f"{tensor} must have rank {wanted}")
    if tensor.dtype not in FLOATS:
        refuse(f"{tensor} must be of floats")


def same(*tensors: DramTensor) -> None:
    """Refuses tensors that differ in shape."""
    for tensor in tensors[1:]:
        if tensor.shape != tensors[0].shape:
            refuse(f"{tensor} must have the shape of {tensors[0]}")


def is_shape(tensor: DramTensor, *shape: int) -> None:
    """Refuses a tensor of another shape."""
    if tensor.shape != shape:
        refuse(f"{tensor} must have the shape {shape}")


class Ring:
    """Tiles used in turn, so that one can be filled while another is read."""

    def __init__(self, nc: KernelBuilder, space: Space, columns: int, count: int = 2) -> None:
        memory = nc.psum if space is Space.PSUM else nc.sbuf
        self.tiles = [memory.tile(columns) for _ in range(count)]
        self._next = 0

    def take(self) -> Tile:
        """The tile that was used longest ago."""
        self._next = (self._next + 1) % len(self.tiles)
        return self.tiles[self._next]


class Panel(NamedTuple):
    """Rows of a matrix that are worked on together: row ``row + b * N + l`` lies in partition l,
    block b of its view [blocks, columns]."""

    row: int
    blocks: int
    lanes: int

    def view(self, tile: Tile, columns: int) -> View:
        """The panel's view of a tile of at least ``blocks * columns`` words."""
        return tile.view((self.blocks, columns), lanes=self.lanes)

    def place(self, nc: KernelBuilder, tensor: DramTensor) -> dict[str, Any]:
        """Where the panel lies in a matrix, or a vector with an element for each row, as
        arguments of a transfer."""
        columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
        pitch = columns * tensor.itemsize
        return {
            "base_offset_bytes": self.row * pitch,
            "dram_strides": (nc.config.lanes * pitch, tensor.itemsize),
            "lane_stride": pitch,
        }


def panels(nc: KernelBuilder, rows: int, columns: int, tiles: int) -> Iterator[Panel]:
    """The panels of a matrix of which a kernel holds `tiles` at once, in half of SBUF; some at
    least, so that engines overlap."""
    lanes = nc.config.lanes
    full = rows // lanes
    fit = nc.config.sbuf_depth // 2 // (tiles * columns)
    step = max(1, min(fit, -(-full // 4)))
    for first, blocks in parts(full, step):
        yield Panel(first * lanes, blocks, lanes)
    if rows % lanes:
        yield Panel(full * lanes, 1, rows % lanes)


class Buffers(NamedTuple):
    """What one panel is worked on with."""

    tiles: list[Tile]
    small: list[Tile]


def over_panels(
    nc: KernelBuilder,
    rows: int,
    columns: int,
    tiles: int,
    small: int,
    job: Callable[[Panel, list[View], list[View]], Iterator[None]],
    width: int = 1,
) -> None:
    """Works on a matrix panel by panel, two of them in turns.

    Parameters
    ----------
    tiles, small : views [blocks, columns] and [blocks, width] that a panel needs
    job : ``job(panel, tiles, small)``: makes the instructions of one panel, and yields where those
        of another one may come between
    """
    # A third set of buffers is loaded while two are worked on.
    works = list(panels(nc, rows, columns, 3 * tiles))
    blocks = max(panel.blocks for panel in works)
    words = tiles * blocks * columns + small * blocks * width
    sets = max(1, min(3, len(works), nc.sbuf.largest_free // words))
    slots = [
        Buffers(
            [nc.sbuf.tile(blocks * columns) for _ in range(tiles)],
            [nc.sbuf.tile(blocks * width) for _ in range(small)],
        )
        for _ in range(sets)
    ]

    def start(panel: Panel, slot: Buffers) -> Iterator[None]:
        return job(
            panel,
            [panel.view(tile, columns) for tile in slot.tiles],
            [panel.view(tile, width) for tile in slot.small],
        )

    in_turns(works, slots, start)


def in_turns(
    works: Iterable[_Work], slots: Sequence[_Slot], job: Callable[[_Work, _Slot], Iterator[None]]
) -> None:
    """Makes the instructions of two pieces of work at a time, in turns, as an engine executes in
    order: while one waits for another engine, there is the other. Each has a slot to itself; the
    one free for the longest time is used next."""
    waiting = iter(works)
    free = list(slots)
    active: list[tuple[Iterator[None], _Slot]] = []
    more = True
    while more or active:
        while more and free and len(active) < 2:
            work = next(waiting, None)
            more = work is not None
            if work is not None:
                slot = free.pop(0)
                active.append((job(work, slot), slot))
        for entry in list(active):
            if next(entry[0], _DONE) is _DONE:
                active.remove(entry)
                free.append(entry[1])


def add(nc: KernelBuilder, dst: View, a: View, b: View, *, scale: float = 1.0) -> None:
    """dst = a * scale + b on the scalar engine: where the vector engine has more to do."""
    nc.scalar.activate(dst, a, Function.IDENTITY, scale, b)


def sum_of_products(nc: KernelBuilder, dst: View, a: View, b: View) -> None:
    """dst = sum of a * b along rows, [..., 1], in one instruction of the scalar engine."""
    nc.scalar.activate(dst, a, Function.IDENTITY, b, -0.0, sums=RowSums.ONLY)


def everywhere(nc: KernelBuilder, tensor: DramTensor) -> View:
    """A vector, whole in every partition."""
    view = nc.sbuf.tile(tensor.shape[0], tensor.name).view()
    nc.dma.load(view, tensor, lane_stride=0)
    return view


def _across(
    nc: KernelBuilder,
    tile: Tile,
    tensor: DramTensor,
    offset: int,
    rows: int,
    columns: int,
    row_step: int,
    column_step: int = 1,
) -> Iterator[tuple[View, dict[str, Any]]]:
    """Views of a tile with the rows of a matrix across partitions, N at a time, block after block,
    and where each lies in DRAM; parameters as those of `load_across`."""
    lanes, item = nc.config.lanes, tensor.itemsize
    full, rest = divmod(rows, lanes)
    for first, blocks, used in ((0, full, lanes), (full, 1, rest)):
        if blocks and used:
            view = tile.view((blocks, columns), offset=first * columns, lanes=used)
            yield (
                view,
                {
                    "base_offset_bytes": (offset + first * lanes * row_step) * item,
                    "dram_strides": (lanes * row_step * item, column_step * item),
                    "lane_stride": row_step * item,
                },
            )


def load_across(nc: KernelBuilder, tile: Tile, tensor: DramTensor, **where: Any) -> None:
    """Loads a matrix with its rows across partitions, N at a time, block after block.

    Element (r, c) comes to partition ``r % N``, word ``r // N * columns + c``.

    Parameters
    ----------
    rows, columns : of the matrix
    offset, row_step, column_step : elements of the tensor; `column_step` is 1 by default
    """
    for view, place in _across(nc, tile, tensor, **where):
        nc.dma.load(view, tensor, **place)


def store_across(nc: KernelBuilder, tile: Tile, tensor: DramTensor, **where: Any) -> None:
    """Stores what lies as `load_across` leaves it; parameters as of that."""
    for view, place in _across(nc, tile, tensor, **where):
        nc.dma.store(view, tensor, **place)


def sum_of_lanes(nc: KernelBuilder, tile: Tile, out: DramTensor) -> None:
    """out[c] = sum over all partitions of word c of a tile, in FP32, by way of DRAM."""
    lanes, columns = nc.config.lanes, out.shape[0]
    turned = nc.dram.tensor(f"{out.name}.lanes", (lanes, columns), DType.FP32, kind="scratch")
    last = nc.config.dma_queues - 1
    nc.dma.store(tile.view(columns), turned, lane_stride=4 * columns, queue=last)
    for start, used in parts(columns, lanes):
        rows = nc.sbuf.tile(lanes)
        total = nc.sbuf.tile(1).view(lanes=used)
        nc.dma.load(rows.view(lanes=used), turned, 4 * start, (4 * columns,), 4, queue=last)
        nc.vector.reduce(total, rows.view(lanes=used), AluOp.ADD)
        nc.dma.store(total, out, start * out.itemsize, lane_stride=out.itemsize)
        nc.sbuf.free(rows)
