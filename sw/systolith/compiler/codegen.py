"""From the laid-out IR to a program, through the kernel builder.

Operations are generated in their order; the builder's semaphores let engines overlap. What a
value occupies in SBUF and PSUM is freed after the last operation that reads it there. Results of
matrix products stay in PSUM while only vector and scalar instructions read them. When SBUF is
full, the value needed last is stored to DRAM and loaded again when it is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FORMATS, INTEGERS, DType
from systolith_hdl.isa import Function, Rounding, Space

from ..errors import CompileError, KernelError
from ..kernel import DramTensor, KernelBuilder, Tile, View
from ..kernel.call import Call
from ..program import Program
from .fuse import affine
from .ir import ALIASES, ARRAY_TYPES, IN_DRAM, Form, Graph, Op, Shape, Use, Value, operand_form
from .layout import columns, contraction_steps

_INFINITY = 1 << 60  #: position of a need that never comes
_MAX_STRIDE = (1 << 15) - 1
_MAX_COUNT = (1 << 16) - 1
_PIECES = 4  #: instructions an operation on many tiles is made of, at most
_PIECE_COLUMNS = 64  #: columns of each of them, at least
_ARRIVAL = 2.0  #: cycles in which a column of an operand arrives, about, from a slow DRAM
_JOINED = 2  #: tiles that come together if they continue each other in DRAM: longer bursts
_ENDING = 3  #: parts in which the last blocks of a matrix product leave PSUM, about
_LOAD_PIECES = 32  #: as _PIECES, for an operand of a matrix product, which begins with the first
_LOAD_COLUMNS = 32  #: columns of each of them, at least


@dataclasses.dataclass(eq=False)
class _DramCopy:
    """Elements of a value in DRAM, somewhere in a tensor; offset and strides in elements."""

    tensor: DramTensor
    offset: int
    strides: tuple[int, int]


@dataclasses.dataclass(eq=False)
class _Home:
    """Where a value is now, and where it will be needed."""

    value: Value
    tiles: dict[Form, Tile] = dataclasses.field(default_factory=dict)
    dram: list[_DramCopy] = dataclasses.field(default_factory=list)
    #: form (None: DRAM) -> positions of the operations that read it there, ascending
    needs: dict[Form | None, list[int]] = dataclasses.field(default_factory=dict)
    source: str | None = None

    def next_need(self, form: Form | None, now: int) -> int:
        """Position of the first operation from `now` on that reads the value in a form."""
        return next((at for at in self.needs.get(form, ()) if at >= now), _INFINITY)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One tensor that the caller of a program binds: its name in the program's table, the JAX
    shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Generator:
    """Generates one program.

    Parameters
    ----------
    graph : verified, with forms
    config : of the core
    name : of the program
    inputs, outputs : one for each of the graph's, in order
    rounding : how results become narrow floats
    """

    def __init__(
        self,
        graph: Graph,
        config: CoreConfig,
        name: str,
        inputs: Sequence[Binding],
        outputs: Sequence[Binding],
        *,
        rounding: Rounding = Rounding.NEAREST,
    ) -> None:
        self._rounding = rounding
        self._graph = graph
        self._config = config
        self._nc = KernelBuilder(config, name=name)
        self._inputs = inputs
        self._outputs = outputs
        self._homes: dict[Value, _Home] = {}
        self._now = 0
        self._pinned: set[Tile] = set()
        self._numbers: dict[str, Tile] = {}
        self._scratch = itertools.count()
        #: columns of work given to the engines that can do the same things
        self._work = {"vector": 0, "scalar": 0}
        self._last_queue = config.dma_queues - 1
        #: value, form -> (start, length) of the pieces in which its first tile is loaded
        self._heads: dict[tuple[Value, Form], list[tuple[int, int]]] = {}
        self._calls = 0
        #: first result of a kernel, number of a result -> where that is
        self._kernel_results: dict[tuple[Value, int], _DramCopy] = {}

    def run(self, metadata: dict[str, Any]) -> Program:
        """Generates everything."""
        self._place_tensors()
        self._collect_needs()
        self._prefetch()
        for position, op in enumerate(self._graph.ops):
            self._now = position
            with self._nc.label(op.label or op.kind, source=op.source or "jax"):
                self._operation(op)
                self._after(op)
            self._release(use.value for use in (*op.operands, Use(op.result)))
        self._now = len(self._graph.ops)
        with self._nc.label("output", source="jax"):
            for index, use in enumerate(self._graph.outputs):
                self._store_output(index, use)
        return self._nc.finish(metadata)

    # --- preparation ---------------------------------------------------------------------

    def _place_tensors(self) -> None:
        for value, binding in zip(self._graph.inputs, self._inputs, strict=True):
            tensor = self._nc.dram.tensor(
                binding.name, binding.shape, _dram_type(binding.dtype), kind="input"
            )
            copy = _DramCopy(tensor, 0, (value.shape[1], 1))
            self._homes[value] = _Home(value, dram=[copy])
        for number, (value, data) in enumerate(self._graph.constants.items()):
            tensor = self._nc.dram.tensor(
                f"constant{number}", kind="constant", data=np.ascontiguousarray(data)
            )
            self._homes[value] = _Home(value, dram=[_DramCopy(tensor, 0, (value.shape[1], 1))])
        self._output_tensors = [
            self._nc.dram.tensor(b.name, b.shape, _dram_type(b.dtype), kind="output")
            for b in self._outputs
        ]
        self._stored = [False] * len(self._outputs)

    def _collect_needs(self) -> None:
        for position, op in enumerate(self._graph.ops):
            for index, use in enumerate(op.operands):
                form = operand_form(op, index)
                self._home(use.value).needs.setdefault(form, []).append(position)
            self._homes[op.result] = _Home(op.result, source=op.source)

    def _home(self, value: Value) -> _Home:
        return self._homes[value]

    def _prefetch(self) -> None:
        """Loads inputs ahead of everything, in the order of first use, into half of SBUF; those
        of the first operation into as much as its result leaves."""
        lanes = self._config.lanes
        budget = self._config.sbuf_depth // 2
        wanted = [
            (at[0], number, home, form)
            for number, home in enumerate(self._homes.values())
            if home.dram
            for form, at in home.needs.items()
            if form is not None
        ]
        wanted.sort(key=lambda item: item[:2])
        for first, group in itertools.groupby(wanted, key=lambda item: item[0]):
            op = self._graph.ops[first]
            if first == 0 and op.form is not None:
                room = self._config.sbuf_depth - columns(op.result.shape, op.form, lanes)
                budget = max(budget, room)
            # Operands of one operation come in turns: it can begin with the first pieces of all.
            # Nothing is stored before the first operation, so all queues load for it.
            loads: list[Iterator[None]] = []
            operands: list[tuple[_Home, Form]] = []
            for number, (_, _, home, form) in enumerate(group):
                size = columns(home.value.shape, form, self._config.lanes)
                if size > budget:
                    budget = 0
                    break
                budget -= size
                tile = self._allocate(size, home.value.name)
                home.tiles[form] = tile
                operands.append((home, form))
                if op.kind != "dot":
                    queue = number % self._config.dma_queues if first == 0 else None
                    loads.append(self._transfers(home, form, tile, home.dram[0], True, queue))
            with self._nc.label(f"load operands of {op.label}", source=op.source or "jax"):
                if op.kind == "dot":
                    self._load_factors(op, operands)
                for _ in itertools.zip_longest(*loads):
                    pass

    def _load_factors(self, op: Op, operands: list[tuple[_Home, Form]]) -> None:
        """Loads operands of a matrix product, in the order in which it needs their parts."""
        lanes = self._config.lanes
        rows, cols = op.result.shape
        across, free = (rows, cols) if op.form is Form.ROWS else (cols, rows)
        blocks = -(-across // lanes)
        split = op.attrs["parts"][0]
        stationary = op.operands[:split] if op.form is Form.ROWS else op.operands[split:]
        # (column of the product before which it is needed, piece of an operand)
        wanted: list[tuple[int, int, _Home, Form, tuple[int, int, int, int, int]]] = []
        for home, form in operands:
            stays = any(operand.value is home.value for operand in stationary)
            for first, tiles, length, used in self._tiling(home.value.shape, form):
                row, col = home.dram[0].strides
                joined = _JOINED if (row if form is Form.ROWS else col) == 1 else 1
                pieces = list(self._factor_pieces(first, tiles, length, joined))
                if first == 0:
                    self._heads[home.value, form] = [p[2:] for p in pieces if p[0] == 0]
                for tile, count, start, size in pieces:
                    need = tile * blocks * free
                    need += start // lanes * free if stays else start
                    wanted.append((need, not stays, home, form, (tile, count, start, size, used)))
        wanted.sort(key=lambda item: item[:2])
        # One queue keeps them in this order; it needs help where its rows do not fill a beat.
        for number, (_, _, home, form, piece) in enumerate(wanted):
            copy = home.dram[0]
            item = FORMATS[copy.tensor.dtype].bytes
            queues = self._config.dma_queues if lanes * item < self._config.axi_bytes else 1
            self._move_piece(
                home.tiles[form], form, copy, home.value.shape, piece, True, number % queues
            )

    def _factor_pieces(
        self, first: int, tiles: int, free: int, joined: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """As `_pieces`, for an operand of a matrix product, `joined` tiles at a time: the first
        come in small pieces, as the product can begin with them."""
        lanes = self._config.lanes
        if first == 0 and free <= _MAX_STRIDE:
            count = min(joined, tiles)
            start, size = 0, lanes * count
            while start < free:
                length = min(size, free - start)
                yield 0, count, start, length
                start += length
                size = min(start, max(_PIECE_COLUMNS, lanes))
            first, tiles = count, tiles - count
        most = min(_LOAD_PIECES, max(1, -(-tiles // joined)))
        yield from self._pieces(first, tiles, free, most, _LOAD_COLUMNS)

    # --- memory --------------------------------------------------------------------------

    def _allocate(self, value_columns: int, name: str) -> Tile:
        """A tile of SBUF; makes room if there is none."""
        while self._nc.sbuf.largest_free < value_columns:
            if not self._evict():
                self._does_not_fit("SBUF", value_columns, name, self._config.sbuf_depth)
        tile = self._nc.sbuf.tile(value_columns, name)
        self._pinned.add(tile)
        return tile

    def _evict(self) -> bool:
        """Frees the SBUF tile that is needed last, storing its value if it is nowhere else."""
        best: tuple[int, int, _Home, Form] | None = None
        for number, home in enumerate(self._homes.values()):
            for form, tile in home.tiles.items():
                if tile.space is Space.SBUF and tile not in self._pinned:
                    key = (home.next_need(form, self._now), number)
                    if best is None or key > best[:2]:
                        best = (*key, home, form)
        if best is None:
            return False
        _, _, home, form = best
        if not home.dram and len(home.tiles) == 1:
            self._to_dram(home)
        self._nc.sbuf.free(home.tiles.pop(form))
        return True

    def _does_not_fit(self, space: str, wanted: int, name: str, depth: int) -> None:
        live = sorted(
            (
                (tile.columns, home)
                for home in self._homes.values()
                for tile in home.tiles.values()
                if tile.space.name == space
            ),
            key=lambda item: -item[0],
        )
        lines = [
            f"{columns} columns: {home.value.name} {home.value.type}"
            + (f" at {home.source}" if home.source else "")
            for columns, home in live[:4]
        ]
        op = self._graph.ops[min(self._now, len(self._graph.ops) - 1)]
        raise CompileError(
            f"the step does not fit: {name} needs {wanted} columns of {space}, which has {depth} "
            f"per partition ({self._config.lanes} partitions of 32-bit words)"
            + (f", for {op.label} at {op.source}" if op.source else "")
            + "".join(f"\n  held then: {line}" for line in lines)
        )

    def _psum(self, wanted: int, name: str) -> Tile:
        """A tile of PSUM; results that wait there are copied out if there is no room."""
        while self._nc.psum.largest_free < wanted:
            if not self._clear_psum():
                self._does_not_fit("PSUM", wanted, name, self._config.psum_depth)
        tile = self._nc.psum.tile(wanted, name)
        self._pinned.add(tile)
        return tile

    def _release(self, values: Iterator[Value]) -> None:
        """Frees what nobody reads after the current operation, and unpins the rest."""
        self._pinned.clear()
        for value in dict.fromkeys(values):
            home = self._home(value)
            later = self._now + 1
            needed = {form for form in home.needs if home.next_need(form, later) < _INFINITY}
            for form in list(home.tiles):
                # The only copy stays as long as any other form has to be made from it.
                if form in needed or (needed and not home.dram and len(home.tiles) == 1):
                    continue
                self._free(home.tiles.pop(form))

    def _free(self, tile: Tile) -> None:
        (self._nc.sbuf if tile.space is Space.SBUF else self._nc.psum).free(tile)

    # --- moving values -------------------------------------------------------------------

    def _tiling(self, shape: Shape, form: Form) -> list[tuple[int, int, int, int]]:
        """(first tile, tiles, elements along the free axis, lanes): full tiles, then the last."""
        lanes = self._config.lanes
        if form is Form.ALL:
            return [(0, 1, shape[0] * shape[1], lanes)]
        across, free = shape if form is Form.ROWS else shape[::-1]
        parts = []
        full = across // lanes
        if full:
            parts.append((0, full, free, lanes))
        if across % lanes:
            parts.append((full, 1, free, across % lanes))
        return parts

    def _transfer(
        self, home: _Home, form: Form, tile: Tile, copy: _DramCopy, load: bool, queue: int | None
    ) -> None:
        """Moves a whole value between a tile and DRAM."""
        for _ in self._transfers(home, form, tile, copy, load, queue):
            pass

    def _transfers(
        self,
        home: _Home,
        form: Form,
        tile: Tile,
        copy: _DramCopy,
        load: bool,
        queue: int | None,
    ) -> Iterator[None]:
        """The same piece by piece: each step of the iterator makes one instruction."""
        shape = home.value.shape
        for first, tiles, free, used in self._tiling(shape, form):
            for piece in self._pieces(first, tiles, free):
                self._move_piece(tile, form, copy, shape, (*piece, used), load, queue)
                yield

    def _move_piece(
        self,
        tile: Tile,
        form: Form,
        copy: _DramCopy,
        shape: Shape,
        piece: tuple[int, int, int, int, int],
        load: bool,
        queue: int | None,
    ) -> None:
        """Moves (tile, tiles, start, length, lanes) of a value between its tile and DRAM."""
        item = FORMATS[copy.tensor.dtype].bytes
        row, col = copy.strides
        lanes = self._config.lanes
        tile0, count, free0, length, used = piece
        if form is Form.ALL:
            free, lane, step = shape[0] * shape[1], 0, (row if shape[1] == 1 else col)
            used = lanes if load else 1
        else:
            lane, step = (row, col) if form is Form.ROWS else (col, row)
            free = shape[1] if form is Form.ROWS else shape[0]
        dims = [(count, free, lanes * lane), (length, 1, step)]
        if lane == 1:
            # What the lanes hold continues in the next tile: long runs in DRAM.
            dims.reverse()
        counts, strides, steps = zip(*dims, strict=True)
        view = tile.view(counts, strides, offset=tile0 * free + free0, lanes=used)
        offset = copy.offset + tile0 * lanes * lane + free0 * step
        transfer = self._nc.dma.load if load else self._nc.dma.store
        transfer(
            view,
            copy.tensor,
            offset * item,
            tuple(step * item for step in steps),
            lane * item,
            queue=queue,
        )

    @staticmethod
    def _pieces(
        first: int, tiles: int, free: int, most: int = _PIECES, least: int = _PIECE_COLUMNS
    ) -> Iterator[tuple[int, int, int, int]]:
        """(tile, tiles, start, length) of the pieces that a walk over tiles is made in.

        A long walk is cut into a few of `least` columns or more, so that what reads its result can
        begin before its end; and no piece has counts or strides that an instruction cannot hold.
        """
        step = max(-(-tiles // most), -(-least // free))
        if free > _MAX_STRIDE:
            step = 1
        for tile in range(first, first + tiles, step):
            count = min(step, first + tiles - tile)
            for start in range(0, free, _MAX_COUNT):
                yield tile, count, start, min(_MAX_COUNT, free - start)

    def _load(self, home: _Home, form: Form) -> Tile:
        tile = self._allocate(
            columns(home.value.shape, form, self._config.lanes), home.value.name or str(home.value)
        )
        # Inputs have the other queues to themselves; what was computed comes back through the
        # queue that stored it.
        copy = home.dram[0]
        kept = copy.tensor.kind in ("input", "constant")
        self._transfer(home, form, tile, copy, True, None if kept else self._last_queue)
        home.tiles[form] = tile
        return tile

    def _to_dram(self, home: _Home, transposed: bool = False) -> _DramCopy:
        """Stores a value to DRAM scratch, in row-major order of it or of its transpose."""
        rows, cols = home.value.shape
        shape = (cols, rows) if transposed else (rows, cols)
        tensor = self._nc.dram.tensor(
            f"scratch{next(self._scratch)}", shape, home.value.dtype, kind="scratch"
        )
        copy = _DramCopy(tensor, 0, (1, rows) if transposed else (cols, 1))
        form = self._any_sbuf(home)
        self._transfer(home, form, home.tiles[form], copy, False, None)
        home.dram.append(copy)
        return copy

    def _any_sbuf(self, home: _Home) -> Form:
        """A form the value has in SBUF, which DMA reaches and PSUM is not."""
        for form, tile in home.tiles.items():
            if tile.space is Space.SBUF:
                return form
        if home.tiles:
            form = next(iter(home.tiles))
            self._evacuate(home, form)
            return form
        wanted = [form for form in home.needs if form is not None]
        shape = home.value.shape
        form = wanted[0] if wanted else Form.ROWS if shape[0] > 1 else Form.ALL
        self._load(home, form)
        return form

    def _evacuate(self, home: _Home, form: Form) -> None:
        """Moves a value from PSUM to SBUF."""
        old = home.tiles[form]
        self._pinned.add(old)
        tile = self._allocate(old.columns, old.name)
        for start in range(0, old.columns, _MAX_COUNT):
            count = min(_MAX_COUNT, old.columns - start)
            lanes = self._lanes(home.value.shape, form)
            dst = tile.view((count,), offset=start, lanes=lanes).astype(home.value.dtype)
            self._move(dst, _words(old.view((count,), offset=start, lanes=lanes), home.value))
        home.tiles[form] = tile
        self._pinned.discard(old)
        self._nc.psum.free(old)

    def _move(self, dst: View, src: View, rounding: Rounding = Rounding.NEAREST) -> None:
        """Copies with the engine that has less to do; integers are nothing for the scalar one."""
        if dst.dtype in INTEGERS:
            self._nc.vector.copy(dst, src)
            self._work["vector"] += dst.size + 8
        elif self._choose(dst.size) == "scalar":
            self._nc.scalar.activate(dst, src, Function.IDENTITY, 1.0, -0.0, rounding=rounding)
        else:
            self._nc.vector.copy(dst, src, rounding=rounding)

    def _rounds(self, value: Value) -> Rounding:
        """How an instruction that writes `value` rounds."""
        plain = value.dtype in (DType.FP32, *INTEGERS) or value.nearest
        return Rounding.NEAREST if plain else self._rounding

    def _agree(self, op: Op) -> None:
        """Makes the copies of a value that is whole in every partition equal, if every partition
        rounded its own stochastically: that of the first becomes everyone's."""
        home = self._home(op.result)
        if (
            self._rounds(op.result) is Rounding.NEAREST
            or op.form is not Form.ALL
            or op.kind in IN_DRAM
            or Form.ALL not in home.needs
        ):
            return
        if not home.dram:
            self._to_dram(home)
        tile = home.tiles[Form.ALL]
        self._transfer(home, Form.ALL, tile, home.dram[0], True, self._last_queue)

    def _choose(self, work: int) -> str:
        engine = min(self._work, key=lambda name: self._work[name])
        self._work[engine] += work + 8
        return engine

    def _ensure(self, value: Value, form: Form, sbuf: bool = False) -> Tile:
        """The tile that holds a value in a form, made if need be."""
        home = self._home(value)
        if form not in home.tiles:
            if not home.dram:
                self._to_dram(home)
            self._load(home, form)
        if sbuf and home.tiles[form].space is Space.PSUM:
            self._evacuate(home, form)
        tile = home.tiles[form]
        self._pinned.add(tile)
        return tile

    def _after(self, op: Op) -> None:
        """Stores a fresh result where it is an output or is needed in another form."""
        home = self._home(op.result)
        for index, use in enumerate(self._graph.outputs):
            if use.value is op.result:
                self._store_output(index, use)
        self._agree(op)
        made = set(home.tiles)
        others = [form for form in home.needs if form is not None and form not in made]
        if not others:
            return
        if not home.dram:
            self._to_dram(home)
        for form in others:
            # Loaded ahead of its use while there is room to spare.
            size = columns(op.result.shape, form, self._config.lanes)
            if self._nc.sbuf.largest_free > size + self._config.sbuf_depth // 4:
                self._load(home, form)

    def _store_output(self, index: int, use: Use) -> None:
        if self._stored[index]:
            return
        self._stored[index] = True
        home = self._home(use.value)
        form = self._any_sbuf(home)
        cols = use.shape[1]
        copy = _DramCopy(self._output_tensors[index], 0, (1, cols) if use.transposed else (cols, 1))
        self._transfer(home, form, home.tiles[form], copy, False, self._last_queue)
        # An output of the value's own type is as good as scratch.
        if copy.tensor.dtype is home.value.dtype:
            home.dram.append(copy)

    # --- operations ----------------------------------------------------------------------

    def _operation(self, op: Op) -> None:
        if op.kind == "dot":
            self._dot(op)
        elif op.kind == "kernel":
            self._kernel(op)
        elif op.kind in ALIASES:
            self._alias(op)
        elif op.kind == "reduce":
            self._reduce(op)
        else:
            self._elementwise(op)

    def _lanes(self, shape: Shape, form: Form) -> int:
        across = {Form.ROWS: shape[0], Form.COLS: shape[1], Form.ALL: _INFINITY}[form]
        return min(self._config.lanes, across)

    def _result(self, op: Op) -> Tile:
        assert op.form is not None
        size = columns(op.result.shape, op.form, self._config.lanes)
        tile = None
        if self._nc.sbuf.largest_free < size:
            tile = self._take_over(op)
        if tile is None:
            tile = self._allocate(size, op.result.name or str(op.result))
        self._home(op.result).tiles[op.form] = tile
        return tile

    def _take_over(self, op: Op) -> Tile | None:
        """The tile of an operand that no one reads after an elementwise operation, which then
        works in place. Only done for want of room: it has to wait for all other readers."""
        # A choice is made in two steps, so only what it begins with may be overwritten.
        candidates = op.operands
        if op.kind == "select":
            candidates = op.operands[1:2] if op.attrs["on_false"] is None else []
        elif op.kind not in ("tt", "ts", "act", "actb"):
            candidates = []
        for use in candidates:
            home = self._home(use.value)
            form = use.form(op.form)  # type: ignore[arg-type]
            tile = home.tiles.get(form)
            if (
                use.shape == op.result.shape
                and tile is not None
                and tile.space is Space.SBUF
                and all(home.next_need(f, self._now + 1) == _INFINITY for f in home.needs)
                and sum(other.value is use.value for other in op.operands) == 1
            ):
                del home.tiles[form]
                return tile
        return None

    def _operand_tile(self, op: Op, index: int, sbuf: bool = False) -> Tile:
        form = operand_form(op, index)
        assert form is not None
        return self._ensure(op.operands[index].value, form, sbuf)

    def _walk(self, shape: Shape, form: Form) -> Iterator[tuple[int, int, int, int]]:
        """Pieces of an elementwise iteration space; the lanes beyond a last, partial tile are
        computed too, as no one reads them."""
        if form is Form.ALL:
            yield from self._pieces(0, 1, shape[0] * shape[1])
            return
        across, free = shape if form is Form.ROWS else shape[::-1]
        yield from self._pieces(0, -(-across // self._config.lanes), free)

    def _view(
        self, tile: Tile, shape: Shape, space: Shape, form: Form, piece: tuple[int, int, int, int]
    ) -> View:
        """View of an operand of `shape` over a piece of the iteration space `space`."""
        first, count, start, length = piece
        if form is Form.ALL:
            row, step = 0, int(shape[0] * shape[1] > 1)
        else:
            across, free = (0, 1) if form is Form.ROWS else (1, 0)
            step = int(shape[free] > 1)
            row = shape[free] if shape[across] > 1 else 0
        return tile.view(
            (count, length),
            (row if count > 1 else 0, step),
            offset=first * row + start * step,
            lanes=self._lanes(space, form),
        )

    def _elementwise(self, op: Op) -> None:
        tiles = [self._operand_tile(op, index) for index in range(len(op.operands))]
        numbers = {
            key: self._number(op.attrs[key])
            for key in ("on_false", "on_true")
            if op.attrs.get(key) is not None
        }
        self._pinned.update(numbers.values())
        result = self._result(op)
        form, space = op.form, op.result.shape
        assert form is not None
        for piece in self._walk(space, form):
            dst = self._view(result, space, space, form, piece).astype(op.result.dtype)
            views = [
                _words(self._view(tile, use.shape, space, form, piece), use.value)
                for tile, use in zip(tiles, op.operands, strict=True)
            ]
            if op.kind == "select":
                literals = {
                    key: self._view(tile, (1, 1), space, form, piece)
                    for key, tile in numbers.items()
                }
                self._select(op, dst, views, literals)
            else:
                self._instruction(op, dst, views)

    def _instruction(self, op: Op, dst: View, views: list[View]) -> None:
        nc, attrs = self._nc, op.attrs
        how = self._rounds(op.result)
        if op.kind == "fill":
            nc.vector.memset(dst, attrs["value"], rounding=how)
            self._work["vector"] += dst.size
            return
        if op.kind == "act":
            nc.scalar.activate(
                dst, views[0], attrs["function"], attrs["scale"], attrs["bias"], rounding=how
            )
            self._work["scalar"] += dst.size
            return
        if op.kind == "actb":
            nc.scalar.activate(
                dst, views[0], attrs["function"], attrs["scale"], views[1], rounding=how
            )
            self._work["scalar"] += dst.size
            return
        linear = affine(op)
        if linear is not None and self._choose(dst.size) == "scalar":
            scale, bias, a, _ = linear
            first, *rest = views if a is op.operands[0] else views[::-1]
            nc.scalar.activate(
                dst, first, Function.IDENTITY, scale, rest[0] if rest else bias, rounding=how
            )
            return
        if linear is None:
            self._work["vector"] += dst.size
        if op.kind == "tt":
            nc.vector.tensor_tensor(
                dst, views[0], attrs["op1"], views[1], attrs["op0"], attrs["imm0"], rounding=how
            )
        else:
            nc.vector.tensor_scalar(
                dst,
                views[0],
                attrs["op0"],
                attrs["imm0"],
                attrs["op1"],
                attrs["imm1"],
                rounding=how,
            )

    def _number(self, value: float) -> Tile:
        """A column that holds a number in every lane."""
        known = repr(value)  # tells -0.0 from 0.0, and finds NaN
        if known not in self._numbers:
            tile = self._allocate(1, f"number {known}")
            self._nc.vector.memset(tile.view((1,)), value)
            self._numbers[known] = tile
        return self._numbers[known]

    def _select(self, op: Op, dst: View, views: list[View], numbers: dict[str, View]) -> None:
        mask, *rest = views
        cases = {
            key: numbers[key] if key in numbers else rest.pop(0) for key in ("on_false", "on_true")
        }
        how = self._rounds(op.result)
        if op.attrs["on_false"] is not None:
            self._nc.vector.memset(dst, op.attrs["on_false"], rounding=how)
        elif cases["on_false"].base != dst.base or cases["on_false"].tile is not dst.tile:
            self._nc.vector.copy(dst, cases["on_false"], rounding=how)
        self._nc.vector.copy_predicated(dst, mask, cases["on_true"], rounding=how)
        self._work["vector"] += 2 * dst.size

    def _reduce(self, op: Op) -> None:
        tile = self._operand_tile(op, 0)
        result = self._result(op)
        shape, form = op.operands[0].shape, op.form
        assert form is not None
        across, free = shape if form is not Form.COLS else shape[::-1]
        tiles = -(-across // self._config.lanes)
        if form is Form.ALL:
            tiles, free = 1, shape[0] * shape[1]
        if free > _MAX_COUNT:
            raise CompileError(
                f"a reduction over {free} elements is longer than {_MAX_COUNT}"
                + (f", at {op.source}" if op.source else "")
            )
        for piece in self._pieces(0, tiles, free):
            first, count = piece[:2]
            dst = result.view(
                (count, 1), (1, 1), offset=first, lanes=self._lanes(shape, form)
            ).astype(op.result.dtype)
            self._nc.vector.reduce(
                dst,
                _words(self._view(tile, shape, shape, form, piece), op.operands[0].value),
                op.attrs["op1"],
                op.attrs["op0"],
                op.attrs["imm0"],
                rounding=self._rounds(op.result),
            )
            self._work["vector"] += count * free

    def _alias(self, op: Op) -> None:
        """reshape and slice: other strides over the same bytes in DRAM."""
        use = op.operands[0]
        home = self._home(use.value)
        result = self._home(op.result)
        rows, cols = use.shape
        if op.kind == "reshape":
            dense = (1, rows) if use.transposed else (cols, 1)
            copy = next(
                (c for c in home.dram if c.strides == dense and c.tensor.dtype is use.value.dtype),
                None,
            ) or self._to_dram(home, transposed=use.transposed)
            strides = (op.result.shape[1], 1)
            result.dram.append(_DramCopy(copy.tensor, copy.offset, strides))
            return
        if op.kind == "result":
            result.dram.append(self._kernel_results[use.value, op.attrs["index"]])
            return
        copy = home.dram[0] if home.dram else self._to_dram(home)
        row, col = copy.strides[::-1] if use.transposed else copy.strides
        (row0, col0), (row_step, col_step) = op.attrs["start"], op.attrs["step"]
        result.dram.append(
            _DramCopy(
                copy.tensor,
                copy.offset + row0 * row + col0 * col,
                (row * row_step, col * col_step),
            )
        )

    def _packed(self, use: Use, shape: tuple[int, ...]) -> DramTensor:
        """A value whole in DRAM, in row-major order and its own type."""
        home = self._home(use.value)
        rows, cols = use.shape
        wanted = (1, rows) if use.transposed else (cols, 1)
        for copy in home.dram:
            dims = zip(use.value.shape, copy.strides, wanted, strict=True)
            if (
                copy.offset == 0
                and copy.tensor.dtype is use.value.dtype
                and math.prod(copy.tensor.shape) == use.value.size
                and all(n == 1 or have == want for n, have, want in dims)
            ):
                break
        else:
            copy = self._to_dram(home, transposed=use.transposed)
        return copy.tensor.reshape(*shape)

    def _kernel(self, op: Op) -> None:
        """A call of a kernel function: its instructions, from DRAM to DRAM, with all of SBUF and
        PSUM to itself; what lies there makes room when it has to."""
        call: Call = op.attrs["call"]
        arguments = [
            self._packed(use, shape)
            for use, (shape, _) in zip(op.operands, call.arguments, strict=True)
        ]
        self._pinned.clear()
        values = {0: op.result} | {
            other.attrs["index"]: other.result
            for other in self._graph.ops
            if other.kind == "result" and other.operands[0].value is op.result
        }
        results: list[DramTensor] = []

        def output(shape: Any, dtype: Any) -> DramTensor:
            results.append(self._kernel_output(call, values.get(len(results)), len(results)))
            return results[-1]

        number = self._calls = self._calls + 1
        self._nc.sbuf.reclaim, self._nc.psum.reclaim = self._evict, self._clear_psum
        try:
            call.kernel.emit(
                self._nc, arguments, call, prefix=f"{call.kernel.name}{number}", output=output
            )
        except KernelError as error:
            raise error.within(f"kernel {call.kernel.name!r}", op.source) from None
        finally:
            self._nc.sbuf.reclaim = self._nc.psum.reclaim = None
        for index, (tensor, (shape, _)) in enumerate(zip(results, call.results, strict=True)):
            copy = _DramCopy(tensor, 0, ((1, *shape)[-1], 1))
            self._kernel_results[op.result, index] = copy
        self._home(op.result).dram.append(self._kernel_results[op.result, 0])

    def _kernel_output(self, call: Call, value: Value | None, number: int) -> DramTensor:
        """Where a kernel leaves a result: in the program's output itself if it is one."""
        shape, dtype = call.results[number]
        for index, use in enumerate(self._graph.outputs):
            tensor = self._output_tensors[index]
            plain = not use.transposed or 1 in use.shape
            if (
                use.value is value
                and plain
                and not self._stored[index]
                and tensor.dtype is _dram_type(dtype)
            ):
                self._stored[index] = True
                return tensor.reshape(*shape)
        name = f"scratch{next(self._scratch)}"
        return self._nc.dram.tensor(name, shape, _dram_type(dtype), kind="scratch")

    def _clear_psum(self) -> bool:
        """Moves one value from PSUM to SBUF; False if none is there."""
        for home in self._homes.values():
            form = next((f for f, t in home.tiles.items() if t.space is Space.PSUM), None)
            if form is not None and home.tiles[form] not in self._pinned:
                self._evacuate(home, form)
                return True
        return False

    def _arrives_in_pieces(self, op: Op) -> bool:
        """Whether a product should begin with what of its operands is there, rather than finish
        what of its result is wanted."""
        return all(
            any(copy.tensor.kind in ("input", "constant") for copy in self._home(use.value).dram)
            for use in op.operands
        )

    def _dot(self, op: Op) -> None:
        """Matrix product: steps over tiles of K accumulate in PSUM.

        With the result across rows, the left operand is stationary and the right one moves;
        across columns it is the other way round, which gives the transpose in the same words.
        Both read K across partitions. Operands in parts take a pass for each pair of them.
        """
        lanes = self._config.lanes
        operands = [self._operand_tile(op, i, sbuf=True) for i in range(len(op.operands))]
        left, right = operands[: op.attrs["parts"][0]], operands[op.attrs["parts"][0] :]
        depth = op.operands[0].shape[1]
        rows, cols = op.result.shape
        across, free = (rows, cols) if op.form is Form.ROWS else (cols, rows)
        left_type, right_type = op.attrs["types"]
        stationary, moving = (left, right) if op.form is Form.ROWS else (right, left)
        stationary_type, moving_type = (
            (left_type, right_type) if op.form is Form.ROWS else (right_type, left_type)
        )
        blocks = -(-across // lanes)
        home = self._home(op.result)
        integer = op.result.dtype in INTEGERS
        assert op.form is not None
        steps = contraction_steps(op, self._config)
        # What the array holds: (of, block, tiles of K).
        loaded: tuple[Tile, int, tuple[int, ...]] | None = None
        first_moving = op.attrs["parts"][0] if op.form is Form.ROWS else 0

        def arrivals(moves: int) -> list[tuple[int, int]]:
            """Pieces (column, columns) in which the first tile of a moving operand comes."""
            index = first_moving + moves
            form = operand_form(op, index)
            assert form is not None
            return self._heads.get((op.operands[index].value, form), [(0, free)])

        def product(
            psum: Tile, offset: int, block: int, step: int, start: int, length: int
        ) -> None:
            """psum[:, offset:] (+)= columns `start` on of one block of rows, over one step."""
            nonlocal loaded
            *parts, tiles = steps[step]
            m = min(lanes, across - block * lanes)
            used = min(lanes, depth - tiles[0] * lanes)
            still, moves = parts if op.form is Form.ROWS else parts[::-1]
            if loaded != (stationary[still], block, tiles):
                self._nc.tensor.load_stationary(
                    *(
                        stationary[still]
                        .view((m,), offset=k * across + block * lanes, lanes=used)
                        .astype(stationary_type)
                        for k in tiles
                    )
                )
                loaded = stationary[still], block, tiles
            pieces = [(start, length)]
            if block == step == 0:
                # As they arrive.
                pieces = [
                    (max(at, start), min(at + size, start + length) - max(at, start))
                    for at, size in arrivals(moves)
                    if at < start + length and at + size > start
                ]
            for at, size in pieces:
                columns, *second = (
                    moving[moves]
                    .view((size,), offset=k * free + at, lanes=used)
                    .astype(moving_type)
                    for k in tiles
                )
                sums = psum.view((size,), offset=offset + at - start, lanes=m)
                self._nc.tensor.matmul(
                    sums.astype(DType.INT32) if integer else sums,
                    columns,
                    accumulate=step > 0,
                    pair=second[0] if second else None,
                )

        # PSUM holds what is not rounded.
        stays = home.needs and (integer or op.result.dtype is DType.FP32)
        if stays and blocks * free <= self._config.psum_depth // 2:
            psum = self._psum(blocks * free, op.result.name)
            products = [(block, step) for block in range(blocks) for step in range(len(steps))]
            if self._arrives_in_pieces(op):
                products.sort(key=lambda product: product[1])
            for block, step in products:
                product(psum, block * free, block, step, 0, free)
            home.tiles[op.form] = psum
            return
        # Through PSUM, as many blocks of rows at once as it holds. While operands arrive, K is
        # outermost, so that the product begins with their first tiles; then block after block is
        # finished, copied out, and stored if it is a result of the program, while the next are
        # at work.
        result = self._result(op)
        piece = min(free, self._config.psum_depth // 4)
        store = self._output_store(op)
        parts = [
            (block, start, min(piece, free - start))
            for start in range(0, free, piece)
            for block in range(blocks)
        ]
        arriving = self._arrives_in_pieces(op)
        tiles = sum(len(step[-1]) for step in steps)
        while parts:
            group: list[tuple[int, int, int]] = []
            accumulators: list[Tile] = []
            while parts and (not group or self._nc.psum.largest_free >= parts[0][2]):
                group.append(parts.pop(0))
                accumulators.append(self._psum(group[-1][2], op.result.name))
            work = sum(length for _, _, length in group)
            early = int(_ARRIVAL * tiles * (across + free) / work) if arriving else 0
            # Two steps at least are left: while they go on, the block before is stored.
            early = min(early, len(steps) - (2 if len(steps) > 2 else 1))
            arriving = False
            for step in range(early):
                for psum, (block, start, length) in zip(accumulators, group, strict=True):
                    product(psum, 0, block, step, start, length)
            for psum, (block, start, length) in zip(accumulators, group, strict=True):
                # The last blocks end in smaller steps: little is left to hide them behind.
                last = not parts and psum in accumulators[-2:]
                sizes = _ending(length, lanes) if last else [length]
                for step in range(early, len(steps) - 1):
                    product(psum, 0, block, step, start, length)
                m = min(lanes, across - block * lanes)
                at = 0
                for number, count in enumerate(sizes):
                    product(psum, at, block, len(steps) - 1, start + at, count)
                    done = result.view((count,), offset=block * free + start + at, lanes=m)
                    done = done.astype(op.result.dtype)
                    sums = psum.view((count,), offset=at, lanes=m)
                    sums = sums.astype(DType.INT32) if integer else sums
                    if last and ((len(sizes) - number) % 2 or integer):
                        self._nc.vector.copy(done, sums, rounding=self._rounds(op.result))
                    elif last:
                        self._nc.scalar.activate(
                            done,
                            sums,
                            Function.IDENTITY,
                            1.0,
                            -0.0,
                            rounding=self._rounds(op.result),
                        )
                    else:
                        self._move(done, sums, self._rounds(op.result))
                    if store is not None:
                        store(done, block * lanes, start + at)
                    at += count
            for psum in accumulators:
                self._pinned.discard(psum)
                self._nc.psum.free(psum)

    def _output_store(self, op: Op) -> Callable[[View, int, int], None] | None:
        """How to store a part of a matrix product that is a result of the program, given its
        view, first row and first column (columns and rows if the form is COLS); None if it is
        none. The whole then counts as stored."""
        for index, use in enumerate(self._graph.outputs):
            if use.value is op.result and not self._stored[index]:
                break
        else:
            return None
        self._stored[index] = True
        cols = use.shape[1]
        row, col = (1, cols) if use.transposed else (cols, 1)
        lane, step = (row, col) if op.form is Form.ROWS else (col, row)
        tensor = self._output_tensors[index]
        item = FORMATS[tensor.dtype].bytes
        if tensor.dtype is self._home(op.result).value.dtype:
            self._home(op.result).dram.append(_DramCopy(tensor, 0, (row, col)))

        # With nothing left to load, all queues store.
        queues = [self._last_queue]
        if op is self._graph.ops[-1]:
            queues = list(range(self._config.dma_queues))
        turns = itertools.cycle(queues)

        def store(view: View, across: int, free: int) -> None:
            self._nc.dma.store(
                view,
                tensor,
                (across * lane + free * step) * item,
                (step * item,),
                lane * item,
                queue=next(turns),
            )

        return store


def _ending(length: int, lanes: int) -> list[int]:
    """Lengths of the parts in which a last block of a product leaves PSUM: equal ones, and small
    ones at the very end, which is waited for."""
    step = max(lanes, -(-length // _ENDING))
    parts = [step] * (length // step) + ([length % step] if length % step else [])
    while parts[-1] >= 2 * lanes:
        last = parts.pop()
        parts += [last - last // 2, last // 2]
    return parts


def _words(view: View, value: Value) -> View:
    """A view of a value as a source: integers as such, every float as FP32."""
    return view.astype(value.dtype) if value.dtype in INTEGERS else view


def _dram_type(dtype: np.dtype) -> DType:
    """Type in DRAM; masks are 1.0 and 0.0."""
    return ARRAY_TYPES[np.dtype(dtype).name]
