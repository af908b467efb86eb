"""The kernel builder: instructions as Python calls, with every check at build time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.formats import (
    FLOATS,
    FORMATS,
    FP8_TYPES,
    INTEGERS,
    NARROW_FLOATS,
    WORDS,
    DType,
    dtype_of,
)
from systolith_hdl.isa import (
    BIT_OPERANDS,
    COMPARISONS,
    DIVISIONS,
    DRAM_WRITERS,
    LOOP_DEPTH,
    MAX_KEPT,
    MAX_WAITS,
    OPERATION_TYPES,
    REDUCTIONS,
    SCAN_OPERATIONS,
    SCAN_ROWS,
    SHUFFLE_GROUP,
    TABLE_WORDS,
    AluOp,
    EncodeError,
    Function,
    Opcode,
    Rounding,
    RowSums,
    Space,
    WaitMode,
    decode,
    encode,
)

from systolith.assembly import float_to_bits
from systolith.errors import KernelError
from systolith.golden.exchange import shuffle_sources
from systolith.memory import FreeList
from systolith.program import DRAM_ALIGN, DebugInfo, Program, Relocation, TensorInfo, align_up

from .dependencies import Clocks, IntervalMap, Stream
from .loops import Affine, Loop, Registers
from .source import refuse, user_source
from .tensors import (
    MAX_DIMS,
    TENSOR_KINDS,
    DramTensor,
    TensorKind,
    Tile,
    View,
    broadcast_strides,
    c_strides,
    extent,
)

_Enum = TypeVar("_Enum", bound=enum.Enum)

MAX_SEMAPHORE = (1 << 16) - 1
#: types of views that are operands of the vector engine
_VECTOR = (*FLOATS, *INTEGERS)
_MAX_RUNS = 128  #: intervals kept of one DRAM access


def _member(value: Any, kind: type[_Enum], what: str) -> _Enum:
    """A member of an enumeration, from itself or its name in lower case."""
    names = {member.name.lower(): member for member in kind}
    member = names.get(value) if isinstance(value, str) else value
    if not isinstance(member, kind):
        refuse(f"{what} must be a {kind.__name__} or one of {', '.join(names)}, not {value!r}")
    return member


def _need(config: CoreConfig, field: str, what: str) -> None:
    """Refuses `what` on a core that leaves out what it needs: a field of `LEFT_OUT`."""
    if not getattr(config, field):
        refuse(config.lacks(field, what))


def _key(key: int) -> int:
    """The key of random words, checked."""
    if not isinstance(key, int | np.integer) or not 0 <= key < 1 << 32:
        refuse(f"key must be a number of 32 bits, not {key!r}")
    return int(key)


def _rounding(
    config: CoreConfig, rounding: Rounding | str, dtype: DType, what: str
) -> dict[str, int]:
    """The header field that says how a result becomes `dtype`, the type of `what`."""
    mode = _member(rounding, Rounding, "rounding")
    if mode is Rounding.NEAREST:
        return {}
    _need(config, "random", f"rounding = {mode.name}")
    if dtype not in NARROW_FLOATS:
        refuse(
            f"{what} is {dtype.name}, which is not rounded; stochastic rounding needs a narrow type"
        )
    return {"rounding": mode.value}


@dataclasses.dataclass
class _Pending:
    """An instruction whose semaphores are not numbered yet."""

    opcode: Opcode
    fields: dict[str, Any]
    waits: list[tuple[int, int]]
    source: str
    label: str | None
    tensor: int | None = None
    #: among the signalling instructions of its progress stream, from 1; 0 does not signal
    signal: bool = False
    #: (stream, index); None once waits and signal are in `fields`
    node: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class _Access:
    """Words of a local memory that an instruction touches."""

    space: Space
    low: int
    high: int
    write: bool


class _Region:
    """Instructions among which semaphores count up: a program, or an iteration of a loop."""

    def __init__(self, streams: Sequence[Stream], engines: int) -> None:
        self._streams = streams
        self.clocks = Clocks(streams)
        self.maps = {Space.SBUF: IntervalMap(), Space.PSUM: IntervalMap()}
        #: tensor index -> its bytes
        self.dram_maps: dict[int, IntervalMap] = collections.defaultdict(IntervalMap)
        self.pending: list[list[_Pending]] = [[] for _ in range(engines)]
        self.nodes: list[list[_Pending]] = [[] for _ in streams]

    def add(self, stream: int, pending: _Pending, needed: dict[int, int]) -> None:
        """Appends an instruction to a progress stream, after what it needs."""
        pending.node = self.clocks.next_node(stream)
        pending.waits = self.clocks.add(stream, needed)
        for other, at in pending.waits:
            self.nodes[other][at].signal = True
        self.nodes[stream].append(pending)
        self.pending[self._streams[stream].engine].append(pending)

    def values(self) -> list[list[int]]:
        """For each stream and index the semaphore's count once that instruction is complete."""
        values = []
        for stream, nodes in zip(self._streams, self.nodes, strict=True):
            count = 0
            counts = []
            for node in nodes:
                count += node.signal
                if count > MAX_SEMAPHORE:
                    raise KernelError(
                        f"the semaphore of {stream.name} would pass {MAX_SEMAPHORE}: split the "
                        "program, or make it of loops",
                        source=node.source,
                    )
                counts.append(count)
            values.append(counts)
        return values


def _runs(
    shape: Sequence[int], strides: Sequence[int], offset: int, item: int
) -> list[tuple[int, int]]:
    """The byte intervals of a strided DRAM access, exact; empty if they are more than _MAX_RUNS.

    Blocks of rows of one matrix interleave in DRAM: taken from their lowest to their highest
    byte, stores of different columns would seem to meet.
    """
    run = item
    dims = sorted((abs(s), n, s) for s, n in zip(strides, shape, strict=True) if n > 1 and s)
    while dims and dims[0][0] <= run:
        size, n, stride = dims.pop(0)
        run += size * (n - 1)
        offset += min(0, stride * (n - 1))
    if math.prod(n for _, n, _ in dims) > _MAX_RUNS:
        return []
    starts = [offset]
    for _, n, stride in dims:
        starts = [start + i * stride for start in starts for i in range(n)]
    return [(start, start + run - 1) for start in starts]


class _Memory:
    """Allocator of SBUF or PSUM tiles."""

    def __init__(self, builder: KernelBuilder, space: Space, depth: int) -> None:
        self._builder = builder
        self._space = space
        self._free = FreeList(depth)
        self._live: dict[int, Tile] = {}
        self._made = 0
        #: frees a tile that a compiler can do without for a while; False if there is none
        self.reclaim: Callable[[], bool] | None = None
        self.high_water = 0  #: highest address ever handed out, plus one

    @property
    def free_columns(self) -> int:
        """Columns not in any tile."""
        return self._free.free_units

    @property
    def largest_free(self) -> int:
        """Columns of the largest tile that can be made."""
        return self._free.largest

    def tile(self, columns: int, name: str | None = None, *, at: int | None = None) -> Tile:
        """Reserves `columns` consecutive words in every partition, from word `at` on if given, else
        at the lowest free address."""
        self._builder._check_open()
        columns = int(columns)
        if columns < 1:
            refuse(f"a tile must have at least one column, not {columns}")
        base = self._place(columns, at)
        while base is None and self.reclaim is not None and self.reclaim():
            base = self._place(columns, at)
        if base is None and at is not None:
            held = [
                t for t in self._live.values() if at < t.base + t.columns and t.base < at + columns
            ]
            refuse(
                f"words {at} to {at + columns - 1} of {self._space.name}, which has "
                f"{self._free.size}, are not free" + "".join(f"; {t} is at {t.base}" for t in held)
            )
        if base is None:
            biggest = sorted(self._live.values(), key=lambda tile: -tile.columns)[:4]
            names = ", ".join(f"{tile.name} ({tile.columns})" for tile in biggest)
            refuse(
                f"{self._space.name} is full: {columns} columns wanted, the largest free block has "
                f"{self._free.largest} ({self._free.free_units} of {self._free.size} free)"
                + (f"; the largest of {len(self._live)} live tiles: {names}" if names else "")
            )
        name = name or f"{self._space.name.lower()}{self._made}"
        self._made += 1
        tile = Tile(self._builder.config, self._space, base, columns, name)
        self._live[base] = tile
        self.high_water = max(self.high_water, base + columns)
        return tile

    def _place(self, columns: int, at: int | None) -> int | None:
        """Base of a block taken from the free ones, None if it is not there."""
        if at is None:
            return self._free.allocate(columns)
        return at if self._free.take(at, columns) else None

    @property
    def live(self) -> list[Tile]:
        """All tiles made and not freed."""
        return list(self._live.values())

    def owns(self, tile: Tile) -> bool:
        """Whether a tile was made here and not freed."""
        return self._live.get(tile.base) is tile

    def free(self, tile: Tile) -> None:
        """Gives a tile's words back; later tiles may reuse them, ordered by semaphores."""
        self._builder._check_open()
        if not self.owns(tile):
            problem = "is already free" if tile.freed else f"is not of this {self._space.name}"
            refuse(f"{tile} {problem}")
        tile.freed = True
        del self._live[tile.base]
        self._free.free(tile.base)


class _Dram:
    """Tensors in device DRAM."""

    def __init__(self, builder: KernelBuilder) -> None:
        self._builder = builder
        self.tensors: list[DramTensor] = []

    def tensor(
        self,
        name: str,
        shape: Sequence[int] | int | None = None,
        dtype: DType | Any = None,
        kind: TensorKind = "input",
        data: np.ndarray | None = None,
    ) -> DramTensor:
        """Declares a tensor.

        Parameters
        ----------
        name : unique in the program
        shape, dtype : default to those of `data`; `dtype` may be a numpy dtype
        kind : "input", "output", "scratch", or "constant", which needs `data`
        """
        self._builder._check_open()
        scope = self._builder._scope
        if scope is not None:
            if kind in ("input", "output"):
                refuse(
                    f"tensor {name!r}: the inputs of a kernel function are its arguments, its "
                    "outputs are made with nc.output"
                )
            name = f"{scope.prefix}.{name}"
        if kind not in TENSOR_KINDS:
            refuse(f"tensor {name!r}: kind must be one of {', '.join(TENSOR_KINDS)}, not {kind!r}")
        if (kind == "constant") != (data is not None):
            refuse(f"tensor {name!r}: a constant has data, and nothing else has")
        if data is not None:
            data = np.ascontiguousarray(data) if np.ndim(data) else np.asarray(data)
            shape = data.shape if shape is None else shape
            dtype = data.dtype if dtype is None else dtype
        if shape is None or dtype is None:
            refuse(f"tensor {name!r} needs a shape and a type")
        if not isinstance(dtype, DType):
            try:
                dtype = dtype_of(dtype)
            except TypeError as error:
                refuse(f"tensor {name!r}: {error}")
        shape = (shape,) if isinstance(shape, int) else shape
        shape = tuple(int(n) for n in shape)
        if any(n < 1 for n in shape):
            refuse(f"tensor {name!r}: every dimension must be at least 1: shape {shape}")
        if any(tensor.name == name for tensor in self.tensors):
            refuse(f"there is a tensor {name!r} already")
        if data is not None and (data.shape != shape or data.dtype != FORMATS[dtype].numpy):
            refuse(
                f"tensor {name!r}: its data is {data.dtype.name} {data.shape}, not "
                f"{dtype.name} {shape}"
            )
        tensor = DramTensor(name, shape, dtype, kind, len(self.tensors), data)
        self.tensors.append(tensor)
        return tensor


class _Engine:
    """A namespace of the builder for one engine."""

    def __init__(self, builder: KernelBuilder) -> None:
        self._builder = builder

    def _operand(self, what: str, view: View, spaces: tuple[Space, ...], dtypes: Any) -> None:
        if not isinstance(view, View):
            refuse(f"{what} must be a view, not {type(view).__name__}")
        if view.tile.freed:
            refuse(f"{what} is a view of {view.tile}, which was freed")
        if not self._builder._memory(view.space).owns(view.tile):
            refuse(f"{what} belongs to another builder: {view}")
        if view.space not in spaces:
            allowed = " or ".join(space.name for space in spaces)
            refuse(f"{what} must lie in {allowed}: {view}")
        if view.dtype not in dtypes:
            allowed = " or ".join(dtype.name for dtype in dtypes)
            refuse(f"{what} must be {allowed}, not {view.dtype.name}: {view}")

    def _pad(self, what: str, view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Strides of `view` over the iteration space `shape`, as four numbers."""
        strides = broadcast_strides(view, shape)
        if strides is None:
            refuse(
                f"shape mismatch: {what} has shape {view.shape}, the instruction walks {shape}: "
                f"{view}"
            )
        # The stride of a dimension of one element is never used: zero always fits its field.
        strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
        return (0,) * (MAX_DIMS - len(strides)) + strides

    @staticmethod
    def _distinct(dst: View) -> None:
        """Refuses a destination that visits a column twice."""
        reach = 0
        for stride, count in sorted(
            (abs(s), n) for s, n in zip(dst.strides, dst.shape, strict=True) if n > 1
        ):
            if stride <= reach:  # may or may not repeat an address: look at all of them
                if np.unique(dst.addresses()).size != dst.size:
                    refuse(f"dst writes a column more than once: {dst}")
                return
            reach += stride * (count - 1)

    @staticmethod
    def _counts(shape: tuple[int, ...]) -> dict[str, int]:
        padded = (1,) * (MAX_DIMS - len(shape)) + shape
        return {f"counts.{i}": n for i, n in enumerate(padded)}

    @staticmethod
    def _encode_operand(
        name: str, view: View, strides: tuple[int, ...], dtype: DType
    ) -> dict[str, Any]:
        return {
            f"{name}.base": view.base,
            f"{name}.space": view.space.value,
            f"{name}.dtype": dtype.value,
            **{f"{name}.strides.{i}": s for i, s in enumerate(strides) if s},
            **({f"{name}.index": view.steps} if view.steps else {}),
        }

    @staticmethod
    def _access(view: View, write: bool) -> _Access:
        low, high = view.span
        return _Access(view.space, low, high, write)


class _Elementwise(_Engine):
    """What the vector and scalar engines share."""

    _BOTH = (Space.SBUF, Space.PSUM)

    def _operation(
        self, what: str, operation: AluOp | Function, kind: Any, allowed: Any = None
    ) -> int:
        if not isinstance(operation, kind):
            refuse(f"{what} must be of {kind.__name__}, not {operation!r}")
        if allowed is not None and operation not in allowed:
            names = ", ".join(op.name for op in allowed)
            refuse(f"{what} must be one of {names}, not {operation.name}")
        return operation.value

    def _immediate(
        self,
        what: str,
        value: Any,
        operation: AluOp = AluOp.BYPASS,
        dtype: DType = DType.FP32,
    ) -> int:
        """The word of an immediate: an integer where the type is one, else a float; the second
        operand of a bitwise operation or a shift may always be an int."""
        integer = isinstance(value, int | np.integer)
        if dtype is not DType.FP32 and not integer:
            if not (isinstance(value, float | np.floating) and float(value).is_integer()):
                refuse(f"{what} must be an integer for words of {dtype.name}, not {value!r}")
            value, integer = int(value), True
        if integer and (dtype is not DType.FP32 or operation in BIT_OPERANDS):
            if not -(1 << 31) <= value < 1 << 32:
                refuse(f"{what} = {value} does not fit 32 bits")
            return int(value) & 0xFFFFFFFF
        try:
            return float_to_bits(float(value))
        except (TypeError, ValueError):
            refuse(f"{what} must be a number, not {value!r}")

    def _check_overlap(
        self, dst: View, sources: Mapping[str, View], shape: tuple[int, ...]
    ) -> None:
        """A destination may be a source, element for element, of an instruction that walks `shape`;
        else they must be disjoint."""
        for what, source in sources.items():
            same = source.space is dst.space and source.base == dst.base
            if same and source.steps == dst.steps and dst.shape == shape:
                if self._pad("dst", dst, shape) == self._pad(what, source, shape):
                    continue
            self._check_apart(dst, what, source)

    @staticmethod
    def _check_apart(dst: View, what: str, source: View) -> None:
        """A destination and a source must have no word in common."""
        low, high = dst.span
        if source.space is not dst.space or source.span[0] > high or source.span[1] < low:
            return
        if source.steps != dst.steps:
            refuse(
                f"dst and {what} may overlap, as they step differently with the loops: {dst} and "
                f"{source}"
            )
        if np.intersect1d(source.addresses(), dst.addresses()).size:
            refuse(
                f"dst and {what} overlap without being the same elements, which leaves the "
                f"result undefined: {dst} and {source}"
            )

    def _emit(
        self,
        opcode: Opcode,
        dst: View,
        sources: dict[str, tuple[str, View]],
        fields: dict[str, Any],
        rounding: Rounding | str,
        shape: tuple[int, ...] | None = None,
        computes: DType | None = None,
        words: bool = False,
        sums: View | None = None,
        apart: Mapping[str, tuple[str, View, DType]] | None = None,
        across: bool = False,
    ) -> None:
        """Checks operands and appends the instruction.

        `sources` maps the operand's field to (name in messages, view); `shape` is the iteration
        space, that of `dst` unless given. With `computes`, the type of the words of all sources,
        the result is converted to the type of `dst`; without, the words are FP32. With `words` the
        instruction does no arithmetic, so it moves integers, too. `sums` are the last elements of
        dst's rows where these are no results. `apart` are sources of a type, FP32 or INT32, walked
        in their own shape. One that goes `across` lanes may have others in its sources than in
        `dst`.
        """
        types = _VECTOR if words or computes is not None else FLOATS
        self._operand("dst", dst, self._BOTH, types)
        rounds = words and dst.dtype in NARROW_FLOATS
        for what, view in sources.values():
            # A view that rounds as a destination holds FP32 words all the same.
            self._operand(what, view, self._BOTH, FLOATS if rounds else types)
            if view.lanes != dst.lanes and not across:
                refuse(f"dst has {dst.lanes} lanes and {what} has {view.lanes}")
        self._distinct(dst)
        shape = dst.shape if shape is None else shape
        # Words that only move are like others.
        written = DType.FP32 if words and dst.dtype in INTEGERS else dst.dtype
        encoded = {
            "lanes": dst.lanes,
            **_rounding(self._builder.config, rounding, dst.dtype, "dst"),
            **self._counts(shape),
            **self._encode_operand("dst", dst, self._pad("dst", dst, dst.shape), written),
        }
        for name, (what, view) in sources.items():
            strides = self._pad(what, view, shape)
            encoded.update(self._encode_operand(name, view, strides, computes or DType.FP32))
        for name, (what, view, dtype) in (apart or {}).items():
            self._operand(what, view, self._BOTH, FLOATS if dtype is DType.FP32 else (dtype,))
            if view.lanes != dst.lanes:
                refuse(f"dst has {dst.lanes} lanes and {what} has {view.lanes}")
            strides = self._pad(what, view, view.shape)
            encoded.update(self._encode_operand(name, view, strides, dtype))
            self._check_apart(dst, what, view)
        if sums:
            for what, view in sources.values():
                self._check_apart(sums, what, view)
        self._check_overlap(dst.first(shape[-1]) if sums else dst, dict(sources.values()), shape)
        accesses = [self._access(view, False) for _, view in sources.values()]
        accesses += [self._access(view, False) for _, view, _ in (apart or {}).values()]
        accesses.append(self._access(dst, True))
        self._builder._append(self._stream, opcode, {**encoded, **fields}, accesses)

    @property
    def _stream(self) -> int:
        raise NotImplementedError


def _word_type(view: View) -> DType:
    """The type of a view's words: every float is kept as FP32, INT8 as INT32."""
    if view.dtype in INTEGERS:
        return DType.UINT32 if view.dtype is DType.UINT32 else DType.INT32
    return DType.FP32


class _Vector(_Elementwise):
    """Instructions of the vector engine. They compute in the type of the sources: FP32, of which
    narrow floats are kept, INT32, of which INT8 is, or UINT32. The result is converted to the type
    of dst; `rounding`, a `Rounding` or its name in lower case, says how it becomes a narrow
    float. Immediates are numbers of the type computed in."""

    @property
    def _stream(self) -> int:
        return self._builder._vector

    def _operations(
        self, computes: DType, op0: AluOp, op1: AluOp, second: Any = None
    ) -> dict[str, int]:
        """The fields of both operations; `second` are those that op1 may be, all by default."""
        fields = {
            "op0": self._operation("op0", op0, AluOp),
            "op1": self._operation("op1", op1, AluOp, second),
        }
        if op0 in DIVISIONS:
            refuse(f"op0 must not be {op0.name}, which only the second operation can be")
        if op1 in DIVISIONS:
            _need(self._builder.config, "divider", f"op1 = {op1.name}")
        types = OPERATION_TYPES.get(op1)
        if types is not None and computes not in types:
            allowed = " or ".join(dtype.name for dtype in WORDS if dtype in types)
            refuse(f"op1 = {op1.name} needs sources of {allowed}, not {computes.name}")
        return fields

    def _computes(self, **sources: View) -> DType:
        """The type that the words of all sources have."""
        first, *others = sources.items()
        for what, view in sources.items():
            self._operand(what, view, self._BOTH, _VECTOR)
        for what, view in others:
            if _word_type(view) is not _word_type(first[1]):
                refuse(
                    f"{first[0]} is {first[1].dtype.name} and {what} {view.dtype.name}, but the "
                    f"vector engine computes in one type; copy one of them to a tile of the "
                    f"other's type first: {first[1]} and {view}"
                )
        return _word_type(first[1])

    def tensor_tensor(
        self,
        dst: View,
        src0: View,
        op1: AluOp,
        src1: View,
        op0: AluOp = AluOp.BYPASS,
        imm0: float | int = 0.0,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = (src0 op0 imm0) op1 src1; sources broadcast to the shape of dst."""
        computes = self._computes(src0=src0, src1=src1)
        self._emit(
            Opcode.TENSOR_TENSOR,
            dst,
            {"src0": ("src0", src0), "src1": ("src1", src1)},
            {
                **self._operations(computes, op0, op1),
                "imm0": self._immediate("imm0", imm0, op0, computes),
            },
            rounding,
            computes=computes,
        )

    def scalar_tensor_tensor(
        self,
        dst: View,
        src0: View,
        op0: AluOp,
        scalar: View,
        op1: AluOp,
        src1: View,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = (src0 op0 scalar) op1 src1; `scalar` is a view of one column, a number for each
        partition; sources broadcast to the shape of dst."""
        computes = self._computes(src0=src0, src1=src1, scalar=scalar)
        if scalar.size != 1:
            refuse(f"the scalar must be one column, not {scalar.size}: {scalar}")
        if scalar.steps:
            refuse(
                f"the scalar must be at the same place in every iteration of a loop; copy it there "
                f"first: {scalar}"
            )
        self._emit(
            Opcode.SCALAR_TENSOR_TENSOR,
            dst,
            {"src0": ("src0", src0), "src1": ("src1", src1), "scalar": ("scalar", scalar)},
            self._operations(computes, op0, op1),
            rounding,
            computes=computes,
        )

    def tensor_scalar(
        self,
        dst: View,
        src0: View,
        op0: AluOp,
        imm0: float | int = 0.0,
        op1: AluOp = AluOp.BYPASS,
        imm1: float | int = 0.0,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = (src0 op0 imm0) op1 imm1."""
        computes = self._computes(src0=src0)
        self._emit(
            Opcode.TENSOR_SCALAR,
            dst,
            {"src0": ("src0", src0)},
            {
                **self._operations(computes, op0, op1),
                "imm0": self._immediate("imm0", imm0, op0, computes),
                "imm1": self._immediate("imm1", imm1, op1, computes),
            },
            rounding,
            computes=computes,
        )

    def copy(self, dst: View, src: View, rounding: Rounding | str = Rounding.NEAREST) -> None:
        """dst = src, converted to the type of dst."""
        self.tensor_scalar(dst, src, AluOp.BYPASS, rounding=rounding)

    def reduce(
        self,
        dst: View,
        src0: View,
        op1: AluOp,
        op0: AluOp = AluOp.BYPASS,
        imm0: float | int = 0.0,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = op1-reduction over the innermost dimension of (src0 op0 imm0).

        dst has the shape of src0 with an innermost dimension of 1.
        """
        computes = self._computes(src0=src0)
        fields = {
            **self._operations(computes, op0, op1, REDUCTIONS),
            "imm0": self._immediate("imm0", imm0, op0, computes),
        }
        if not src0.shape or dst.shape != (*src0.shape[:-1], 1):
            refuse(
                f"shape mismatch: the reduction of shape {src0.shape} needs a dst of shape "
                f"{(*src0.shape[:-1], 1)}, not {dst.shape}"
            )
        sources = {"src0": ("src0", src0)}
        self._emit(Opcode.REDUCE, dst, sources, fields, rounding, src0.shape, computes)

    def statistics(
        self, dst: View, src0: View, rounding: Rounding | str = Rounding.NEAREST
    ) -> None:
        """dst = the sum along the innermost dimension of src0, and the sum of its squares.

        dst has the shape of src0 with an innermost dimension of 2. Takes two cycles an element.
        """
        computes = self._computes(src0=src0)
        if not src0.shape or dst.shape != (*src0.shape[:-1], 2):
            refuse(
                f"shape mismatch: the statistics of shape {src0.shape} need a dst of shape "
                f"{(*src0.shape[:-1], 2)}, not {dst.shape}"
            )
        if src0.lanes != dst.lanes:
            refuse(f"dst has {dst.lanes} lanes and src0 has {src0.lanes}")
        sources = {"src0": ("src0", src0)}
        self._emit(Opcode.STATISTICS, dst, sources, {}, rounding, src0.shape, computes)

    def memset(
        self, dst: View, value: float | int, rounding: Rounding | str = Rounding.NEAREST
    ) -> None:
        """dst = value, an int if dst is of an integer type."""
        self._operand("dst", dst, self._BOTH, _VECTOR)
        computes = _word_type(dst)
        fields = {"imm0": self._immediate("value", value, dtype=computes)}
        self._emit(Opcode.MEMSET, dst, {}, fields, rounding, computes=computes)

    def copy_predicated(
        self, dst: View, mask: View, src: View, rounding: Rounding | str = Rounding.NEAREST
    ) -> None:
        """dst = src where mask is not zero (NaN is not zero); elsewhere dst keeps its value. The
        mask may have another type than src if dst has that of src, so that nothing is
        converted."""
        self._operand("dst", dst, self._BOTH, _VECTOR)
        if dst.dtype is src.dtype and dst.dtype not in NARROW_FLOATS:
            self._operand("mask", mask, self._BOTH, _VECTOR)
            # Words move as they are in any type, so the mask's serves for all.
            dst = dst.astype(_word_type(mask))
            src = src.astype(_word_type(mask))
        computes = self._computes(mask=mask, src=src)
        sources = {"src0": ("mask", mask), "src1": ("src", src)}
        self._emit(Opcode.COPY_PREDICATED, dst, sources, {}, rounding, computes=computes)

    def _affine(self, dst: View, base: int, steps: Sequence[int], lane_step: int) -> dict[str, int]:
        """Fields of an affine number over the shape of dst."""
        self._operand("dst", dst, self._BOTH, _VECTOR)
        if len(steps) != len(dst.shape):
            refuse(f"{len(steps)} steps for a dst of shape {dst.shape}")
        # The step of a dimension of one element is never used.
        used = [int(s) if n > 1 else 0 for s, n in zip(steps, dst.shape, strict=True)]
        lane_step = int(lane_step) if dst.lanes > 1 else 0
        for what, value, bits in (
            ("base", int(base), 32),
            ("lane_step", lane_step, 16),
            *(("a step", step, 16) for step in used),
        ):
            if not -(1 << bits - 1) <= value < 1 << bits - 1:
                refuse(f"{what} = {value} does not fit {bits} bits with a sign")
        padded = (0,) * (MAX_DIMS - len(used)) + tuple(used)
        return {
            "base": int(base),
            "lane_step": lane_step,
            **{f"steps.{d}": step for d, step in enumerate(padded) if step},
        }

    def iota(self, dst: View, steps: Sequence[int], base: int = 0, lane_step: int = 0) -> None:
        """dst = base + sum of index * step + lane * lane_step, modulo 2**32, as a signed integer if
        dst is of type INT32, or the nearest float if it is FP32.

        `steps` has a number for each dimension of dst.
        """
        fields: dict[str, Any] = self._affine(dst, base, steps, lane_step)
        if dst.dtype not in (DType.FP32, DType.INT32):
            refuse(f"dst of iota must be FP32 or INT32, not {dst.dtype.name}: {dst}")
        fields["dst.dtype"] = dst.dtype.value
        self._emit(Opcode.IOTA, dst, {}, fields, Rounding.NEAREST, words=True)

    def affine_select(
        self,
        dst: View,
        src0: View,
        comparison: AluOp,
        fill: float | int,
        steps: Sequence[int],
        base: int = 0,
        lane_step: int = 0,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = src0 where ``number comparison 0`` holds, elsewhere `fill`; the numbers are those
        that `iota` would write.

        `fill` must be a bfloat16 number, or, as an int if dst is of an integer type, have 16 low
        bits of 0.
        """
        self._operand("dst", dst, self._BOTH, _VECTOR)
        word = self._immediate("fill", fill, dtype=_word_type(dst))
        if word & 0xFFFF:
            refuse(
                f"fill = {fill} is not a bfloat16 number, which is what the instruction holds; "
                "select with a mask takes any"
            )
        fields = {
            **self._affine(dst, base, steps, lane_step),
            "op0": self._operation("comparison", comparison, AluOp, COMPARISONS),
            "fill": word >> 16,
        }
        sources = {"src0": ("src0", src0)}
        self._emit(Opcode.AFFINE_SELECT, dst, sources, fields, rounding, words=True)

    def select(
        self,
        dst: View,
        condition: View,
        src: View,
        otherwise: float | int,
        comparison: AluOp = AluOp.NE,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = src where ``condition comparison 0`` holds, elsewhere `otherwise`, a number.

        A NaN satisfies NE alone. To keep what dst holds elsewhere: `copy_predicated`; to choose
        between two views: copy one to dst, and the other with `copy_predicated`.
        """
        self._operand("dst", dst, self._BOTH, _VECTOR)
        fields = {
            "op0": self._operation("comparison", comparison, AluOp, COMPARISONS),
            "imm0": self._immediate("otherwise", otherwise, dtype=_word_type(dst)),
        }
        sources = {"src0": ("condition", condition), "src1": ("src", src)}
        self._emit(Opcode.SELECT, dst, sources, fields, rounding, words=True)

    def range_select(
        self,
        dst: View,
        src0: View,
        bounds: View,
        otherwise: float | int,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = src0 where low <= i < high, elsewhere `otherwise`, i the index in the innermost
        dimension.

        `bounds`, of type INT32 and shape (2,), holds low and high of each partition. A range that
        all partitions share needs no instruction of its own: slice the views.
        """
        self._operand("dst", dst, self._BOTH, _VECTOR)
        fields = {"imm0": self._immediate("otherwise", otherwise, dtype=_word_type(dst))}
        if not isinstance(bounds, View) or bounds.shape != (2,):
            refuse(f"bounds must be a view of shape (2,), not {bounds}")
        self._emit(
            Opcode.RANGE_SELECT,
            dst,
            {"src0": ("src0", src0)},
            fields,
            rounding,
            words=True,
            apart={"src1": ("bounds", bounds, DType.INT32)},
        )

    def scan(
        self,
        dst: View,
        src0: View,
        op0: AluOp,
        initial: float | View,
        op1: AluOp = AluOp.BYPASS,
        b: float | View | None = None,
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """dst = r, with ``r[i] = (src0[i] op0 r[i - 1]) op1 b[i]`` along the innermost dimension
        and r[-1] = `initial`: cumulative sums, products and maxima, linear recurrences.

        `initial` is a number, or a view with an innermost dimension of 1 that broadcasts; with a
        number, `b` is a view or None, with a view it is a number or None. (A recurrence with both:
        put ``(src0[0] op0 initial) op1 b[0]`` first, and scan the rest.) A step takes 6 cycles, in
        which up to 6 rows have theirs: rows are those of the next dimension, if dst has one, and
        more than 6 of them take further instructions.
        """
        fields = {
            "op0": self._operation("op0", op0, AluOp, SCAN_OPERATIONS),
            "op1": self._operation("op1", op1, AluOp, SCAN_OPERATIONS),
        }
        sources = {"src0": ("src0", src0)}
        if isinstance(initial, View):
            if isinstance(b, View):
                refuse("with an initial value from a view, b must be a number: see scan")
            if initial.shape and initial.shape[-1] != 1:
                refuse(f"the innermost dimension of initial must be 1: {initial}")
            fields |= {"imm0": self._immediate("b", 0.0 if b is None else b), "accumulate": 1}
            sources["src1"] = ("initial", initial)
        else:
            if b is not None and not isinstance(b, View):
                refuse("with a number for b, the initial value must be a view: see scan")
            fields["imm0"] = self._immediate("initial", initial)
            sources["src1"] = ("b", b) if b is not None else ("src0", src0)
        if b is None and op1 is not AluOp.BYPASS:
            refuse(f"op1 = {op1.name} needs b")
        self._operand("dst", dst, self._BOTH, FLOATS)
        if not dst.shape:
            refuse(f"scan needs a dimension to go along: {dst}")
        views = [dst]
        for what, view in sources.values():
            self._operand(what, view, self._BOTH, FLOATS)
            self._pad(what, view, dst.shape)
            views.append(view.broadcast_to(*dst.shape))
        for part in _rows_of_scan(views):
            named = {
                name: (what, view)
                for (name, (what, _)), view in zip(sources.items(), part[1:], strict=True)
            }
            self._emit(Opcode.SCAN, part[0], named, fields, rounding)

    def random(self, dst: View, key: int) -> None:
        """dst = random words, if it is of type INT32, or uniform numbers from 0 to 1, without 1, if
        it is FP32: multiples of 2**-23.

        They follow from the device's seed, which is another one in each run of a program, `key`,
        the place in dst, in order, and the partition. The same key in a view of the same size gives
        the same words; for others take others.
        """
        _need(self._builder.config, "random", "random")
        self._operand("dst", dst, self._BOTH, _VECTOR)
        if dst.dtype not in (DType.FP32, DType.INT32):
            refuse(f"dst of random must be FP32 or INT32, not {dst.dtype.name}: {dst}")
        fields = {"key": _key(key), "dst.dtype": dst.dtype.value}
        self._emit(Opcode.RANDOM, dst, {}, fields, Rounding.NEAREST, words=True)

    def dropout(
        self, dst: View, src0: View, rate: float, key: int, scale: float | None = None
    ) -> None:
        """dst = src0 * scale, or 0 with probability `rate`, which becomes a multiple of 2**-32.

        `scale` is 1 / (1 - rate) unless given. Which elements are dropped follows from the random
        words of `random` with the same key: the gradient's dropout takes the key of the forward
        one, and a view of the same size.
        """
        _need(self._builder.config, "random", "dropout")
        if not 0 <= rate < 1:
            refuse(f"rate must be from 0 to 1, without 1, not {rate}")
        fields = {
            "key": _key(key),
            "threshold": min(round(rate * (1 << 32)), (1 << 32) - 1),
            "imm0": self._immediate("scale", 1 / (1 - rate) if scale is None else scale),
        }
        self._emit(Opcode.DROPOUT, dst, {"src0": ("src0", src0)}, fields, Rounding.NEAREST)

    def transpose(self, dst: View, src0: View, rounding: Rounding | str = Rounding.NEAREST) -> None:
        """Turns blocks: column l of partition j of dst = column j of partition l of src0.

        Of src0 the innermost dimension are a block's columns, as many as dst has lanes; of dst they
        are as many as src0 has lanes. The other dimensions count blocks.
        """
        self._operand("dst", dst, self._BOTH, _VECTOR)
        self._operand("src0", src0, self._BOTH, _VECTOR)
        wanted = (*src0.shape[:-1], src0.lanes)
        columns = src0.shape[-1] if src0.shape else 0
        if columns != dst.lanes or dst.shape != wanted:
            refuse(
                f"shape mismatch: blocks of shape {src0.shape} in {src0.lanes} lanes need a dst of "
                f"shape {wanted} in {columns} lanes, not {dst.shape} in {dst.lanes}"
            )
        self._emit(
            Opcode.TRANSPOSE,
            dst,
            {"src0": ("src0", src0)},
            {"lanes": src0.lanes},
            rounding,
            src0.shape,
            words=True,
            across=True,
        )

    def shuffle(
        self,
        dst: View,
        src0: View,
        select: Sequence[int],
        rounding: Rounding | str = Rounding.NEAREST,
    ) -> None:
        """Moves words within groups of lanes: lane g + i of dst = lane g + select[i] of src0.

        `select` has a number for each lane of a group, of which there may be 2, 4 or 8.
        """
        lanes = self._builder.config.lanes
        whole = min(SHUFFLE_GROUP, lanes)
        size = len(select)
        if size not in (1, 2, 4, 8) or size > whole or not all(0 <= s < size for s in select):
            refuse(
                f"select must have a number for each lane of a group of 2, 4 or 8 lanes, {whole} "
                f"at most, each less than that: {list(select)}"
            )
        fields = {
            f"select.{place}": place - place % size + int(select[place % size])
            for place in range(whole)
        }
        self._move_lanes(dst, src0, fields, rounding)

    def broadcast_lane(
        self, dst: View, src0: View, lane: int, rounding: Rounding | str = Rounding.NEAREST
    ) -> None:
        """All lanes of dst = lane `lane` of src0."""
        self._operand("src0", src0, self._BOTH, _VECTOR)
        if not 0 <= lane < src0.lanes:
            refuse(f"src0 has no lane {lane}: {src0}")
        self._move_lanes(dst, src0, {"spread": 1, "lane": int(lane)}, rounding)

    def _move_lanes(
        self, dst: View, src0: View, fields: dict[str, int], rounding: Rounding | str
    ) -> None:
        self._operand("dst", dst, self._BOTH, _VECTOR)
        self._operand("src0", src0, self._BOTH, _VECTOR)
        complete = decode(encode(Opcode.SHUFFLE, {**fields, "lanes": dst.lanes}))[1]
        highest = shuffle_sources(complete, self._builder.config.lanes).max()
        if highest >= src0.lanes:
            refuse(f"lane {highest} is wanted of {src0.lanes}: {src0}")
        sources = {"src0": ("src0", src0)}
        self._emit(Opcode.SHUFFLE, dst, sources, fields, rounding, words=True, across=True)

    def top(self, dst: View, src0: View, largest: bool = True) -> None:
        """Finds the largest or smallest words along the innermost dimension of src0, with their
        indices there.

        dst has the shape of src0 with an innermost dimension of k pairs, k from 1 to 8: (k, 2), one
        dimension more, or, where there is no room for that, 2 * k. A pair is a word and its index,
        an integer; the greatest (of the smallest, the least) is first. The pairs must lie at one
        stride. A NaN comes before any number; of equal words, the one of the lower index.
        """
        _need(self._builder.config, "top", "top")
        self._operand("dst", dst, self._BOTH, (DType.FP32,))
        self._operand("src0", src0, self._BOTH, FLOATS)
        rows = src0.shape[:-1]
        flat = dst
        if src0.shape and len(dst.shape) == len(src0.shape) + 1 and dst.shape[-1] == 2:
            last = dst[(0,) * len(rows)].flatten()
            if last is None:
                refuse(f"the pairs of dst must lie at one stride: {dst}")
            flat = dataclasses.replace(
                dst,
                shape=(*dst.shape[:-2], *last.shape),
                strides=(*dst.strides[:-2], *last.strides),
            )
        kept = flat.shape[-1] // 2 if flat.shape else 0
        if not src0.shape or flat.shape != (*rows, 2 * kept) or not 1 <= kept <= MAX_KEPT:
            refuse(
                f"shape mismatch: up to {MAX_KEPT} pairs of each row of {src0.shape} need a dst of "
                f"shape {(*rows, 'k', 2)}, not {dst.shape}"
            )
        if kept > src0.shape[-1]:
            refuse(f"{kept} of {src0.shape[-1]} words cannot be found: {src0}")
        if src0.lanes != dst.lanes:
            refuse(f"dst has {dst.lanes} lanes and src0 has {src0.lanes}")
        # The instruction writes the last pair first, and of each the index.
        backwards = flat[(*(slice(None) for _ in rows), slice(None, None, -1))]
        operation = AluOp.MAX if largest else AluOp.MIN
        self._emit(
            Opcode.TOP,
            backwards,
            {"src0": ("src0", src0)},
            {"op0": operation.value, "kept": kept},
            Rounding.NEAREST,
            src0.shape,
        )


def _rows_of_scan(views: Sequence[View]) -> Iterator[list[View]]:
    """Cuts views of one shape into those that SCAN takes: the dimension it goes along before the
    innermost one, which counts the rows it works on in turn."""
    if len(views[0].shape) == 1:
        views = [view.broadcast_to(1, *view.shape) for view in views]
    views = [
        view.permute(*range(len(view.shape) - 2), len(view.shape) - 1, len(view.shape) - 2)
        for view in views
    ]
    rows = views[0].shape[-1]
    whole = rows - rows % SCAN_ROWS
    if whole > SCAN_ROWS and len(views[0].shape) < MAX_DIMS:
        # All full groups in one instruction: their number is the outermost dimension.
        yield [
            dataclasses.replace(
                view,
                shape=(whole // SCAN_ROWS, *view.shape[:-1], SCAN_ROWS),
                strides=(SCAN_ROWS * view.strides[-1], *view.strides),
            )
            for view in views
        ]
        starts = range(whole, rows, SCAN_ROWS)
    else:
        starts = range(0, rows, SCAN_ROWS)
    outer = (slice(None),) * (len(views[0].shape) - 1)
    for start in starts:
        yield [view[(*outer, slice(start, start + SCAN_ROWS))] for view in views]


class _Scalar(_Elementwise):
    """Instructions of the scalar engine. `rounding` as of the vector engine's."""

    @property
    def _stream(self) -> int:
        return self._builder._scalar

    def activate(
        self,
        dst: View,
        src: View,
        function: Function,
        scale: float | View = 1.0,
        bias: float | View = 0.0,
        rounding: Rounding | str = Rounding.NEAREST,
        sums: RowSums | str = RowSums.NONE,
    ) -> None:
        """dst = function(src * scale + bias); scale and bias are numbers or views that broadcast.

        At most one of two views may differ within a row, the innermost dimension: if both are
        views, each has one element for a row, and they lie at one distance from each other in one
        memory. `sums`, a `RowSums` or its name in lower case, wants the sum of each row: BEHIND,
        in an element more of dst's innermost dimension, or ONLY, in a dst of innermost dimension 1.
        """
        kind = _member(sums, RowSums, "sums")
        fields: dict[str, Any] = {
            "op0": self._operation("function", function, Function),
            "op1": kind.value,
        }
        self._operand("src", src, self._BOTH, FLOATS)
        self._operand("dst", dst, self._BOTH, FLOATS)
        shape = dst.shape
        totals = apart = None
        if kind is not RowSums.NONE:
            shape = src.shape
            more = 1 if kind is RowSums.ONLY else (shape[-1] if shape else 0) + 1
            if not shape or dst.shape != (*shape[:-1], more):
                refuse(
                    f"shape mismatch: sums {kind.name} of rows of shape {shape} need a dst of "
                    f"shape {(*shape[:-1], more)}, not {dst.shape}"
                )
            if kind is RowSums.BEHIND:
                totals = dst.last(1)
        sources = {"src0": ("src", src)}
        opcode = Opcode.ACTIVATE
        if isinstance(scale, View) and isinstance(bias, View):
            opcode = Opcode.ACTIVATE_ROWS
            apart = {"src1": ("scale and bias", self._pairs(scale, bias, shape), DType.FP32)}
        elif isinstance(scale, View):
            opcode = Opcode.ACTIVATE_TENSOR_SCALE
            sources["src1"] = ("scale", scale)
            fields["imm0"] = self._immediate("bias", bias)
        else:
            fields["imm0"] = self._immediate("scale", scale)
            if isinstance(bias, View):
                opcode = Opcode.ACTIVATE_TENSOR_BIAS
                sources["src1"] = ("bias", bias)
            else:
                fields["imm1"] = self._immediate("bias", bias)
        self._emit(opcode, dst, sources, fields, rounding, shape, sums=totals, apart=apart)

    def load_table(self, words: View, first: int = 0) -> None:
        """Words `first` and following of the table that each partition has for Function.CUSTOM =
        the columns of `words`, which lie at one stride; they are taken as they are.

        Whole tables are made by `systolith.kernel.table`, and loaded by their own `load`. They stay
        until others are loaded; partitions may have different ones.
        """
        self._operand("the words", words, self._BOTH, tuple(DType))
        flat = words.flatten()
        if flat is None:
            refuse(f"the words of a table must lie at one stride: {words}")
        if first < 0 or first + flat.size > TABLE_WORDS:
            refuse(
                f"words {first} to {first + flat.size - 1} do not exist: a table has {TABLE_WORDS}"
            )
        strides = self._pad("the words", flat, flat.shape)
        fields = {
            "lanes": flat.lanes,
            "first": first,
            **self._counts(flat.shape),
            **self._encode_operand("src0", flat, strides, DType.INT32),
        }
        accesses = [self._access(flat, False)]
        self._builder._append(self._stream, Opcode.LOAD_TABLE, fields, accesses)

    def _pairs(self, scale: View, bias: View, shape: tuple[int, ...]) -> View:
        """The scales and biases of rows, [..., 2]."""
        for what, view in (("scale", scale), ("bias", bias)):
            self._operand(what, view, self._BOTH, FLOATS)
            if view.shape and view.shape[-1] != 1:
                refuse(
                    f"where scale and bias are both views, each must have one element for a row, "
                    f"an innermost dimension of 1; use two instructions for {what} {view}"
                )
        outer = (*shape[:-1], 1)
        strides = self._pad("scale", scale, outer)
        if scale.tile is not bias.tile or strides != self._pad("bias", bias, outer):
            refuse(
                "where scale and bias are both views, they must be parts of one tile at the same "
                f"strides: {scale} and {bias}"
            )
        if scale.lanes != bias.lanes:
            refuse(f"scale has {scale.lanes} lanes and bias has {bias.lanes}")
        return View(
            scale.tile,
            scale.base,
            (*outer[:-1], 2),
            (*strides[len(strides) - len(outer) : -1], bias.base - scale.base),
            scale.lanes,
        )


#: types of views that are operands of the tensor engine
_OPERANDS = (*FLOATS, DType.INT8)


def _matmul_type(view: View) -> DType:
    """Type that the tensor engine takes a view's words as."""
    return DType.BF16 if view.dtype is DType.FP32 else view.dtype


class _Tensor(_Engine):
    """Instructions of the tensor engine."""

    def __init__(self, builder: KernelBuilder) -> None:
        super().__init__(builder)
        #: (K, M, made of pairs) of what was loaded last
        self._stationary: tuple[int, int, bool] | None = None

    def _pair(self, what: str, view: View, pair: View) -> None:
        """Refuses a second operand that does not fit the first, or the core."""
        if self._builder.config.fp8_rate != 2:
            refuse(f"pairs need a core with an fp8_rate of 2, not {self._builder.config.name}")
        self._operand(f"{what} of pairs", view, (Space.SBUF,), FP8_TYPES)
        self._operand(f"the second of {what}", pair, (Space.SBUF,), FP8_TYPES)
        if pair.lanes != view.lanes or pair.size != view.size:
            refuse(
                f"the second of {what} has {pair.lanes} lanes of {pair.size} columns, the first "
                f"{view.lanes} of {view.size}"
            )

    def load_stationary(self, view: View, pair: View | None = None) -> None:
        """stationary[k, m] = lane k of column m of `view`, rounded to the view's type.

        A view of type FP32 is rounded to BF16, of one of INT8 the low 8 bits count. `view.lanes`
        is K; the view has M columns in all, at most as many as the core has lanes, at one constant
        stride. With `pair`, a view of the same sizes, each row holds pairs of numbers, the second
        from there; both must have an FP8 type. Bases that differ by 4 modulo 8 keep the two from
        meeting in a bank of SBUF.
        """
        self._operand("the stationary operand", view, (Space.SBUF,), _OPERANDS)
        if pair is not None:
            self._pair("the stationary operand", view, pair)
        if view.size > self._builder.config.lanes:
            refuse(
                f"the stationary operand has {view.size} columns, the array "
                f"{self._builder.config.lanes}: {view}"
            )
        flat = view.flatten()
        if flat is None:
            refuse(f"the columns of the stationary operand must lie at one stride: {view}")
        sources = [flat]
        if pair is not None:
            second = pair.flatten()
            if second is None:
                refuse(f"the columns of the stationary operand must lie at one stride: {pair}")
            sources.append(second)
        self._stationary = (flat.lanes, flat.size, pair is not None)
        self._builder._append(
            self._builder._loads,
            Opcode.LOAD_STATIONARY if pair is None else Opcode.LOAD_STATIONARY_PAIR,
            {
                "lanes": flat.lanes,
                **self._counts(flat.shape),
                **self._encode_sources("view", sources, flat.shape),
            },
            [self._access(source, False) for source in sources],
        )

    def _encode_sources(
        self, what: str, sources: Sequence[View], shape: tuple[int, ...]
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for number, view in enumerate(sources):
            strides = self._pad(what, view, shape)
            fields |= self._encode_operand(f"src{number}", view, strides, _matmul_type(view))
        return fields

    def matmul(
        self, dst: View, moving: View, accumulate: bool = False, pair: View | None = None
    ) -> None:
        """dst[m, f] (+)= sum over k of stationary[k, m] * moving[k, f].

        `moving` is rounded to its view's type, FP32 to BF16; that of the stationary operand may
        be another. If dst has the type INT32, `moving` must be INT8, and the sums are integers,
        added modulo 2**32.
        `moving.lanes` must be the K and `dst.lanes` the M of the stationary operand; both views
        have the same shape, F columns in all. With `accumulate` the sum is added to dst; a column
        that dst names more than once is added to each time. With `pair`, a view of the shape of
        `moving`, and a stationary operand of pairs, what is added for each k is the sum of two
        products, of first times first and second times second numbers; see `load_stationary`.
        """
        self._operand("dst", dst, (Space.PSUM,), (DType.FP32, DType.INT32))
        self._operand("the moving operand", moving, (Space.SBUF,), _OPERANDS)
        if dst.dtype is DType.INT32 and moving.dtype is not DType.INT8:
            refuse(f"a dst of INT32 needs a moving operand of INT8, not {moving.dtype.name}")
        if self._stationary is None:
            refuse("matmul before any load_stationary")
        rows, columns, pairs = self._stationary
        if pairs != (pair is not None):
            refuse(
                "the stationary operand is made of pairs, the moving one is not"
                if pairs
                else "the moving operand is made of pairs, the stationary one is not"
            )
        if pair is not None:
            self._pair("the moving operand", moving, pair)
        if moving.lanes != rows:
            refuse(
                f"the moving operand has {moving.lanes} lanes, the stationary operand {rows} (K)"
            )
        if dst.lanes != columns:
            refuse(f"dst has {dst.lanes} lanes, the stationary operand {columns} columns (M)")
        if moving.shape != dst.shape:
            refuse(f"shape mismatch: dst has shape {dst.shape}, the moving operand {moving.shape}")
        if not accumulate:
            self._distinct(dst)
        if pair is not None and pair.shape != dst.shape:
            refuse(f"shape mismatch: dst has shape {dst.shape}, the second operand {pair.shape}")
        sources = [moving] if pair is None else [moving, pair]
        self._builder._append(
            self._builder._matmuls,
            Opcode.MATMUL if pair is None else Opcode.MATMUL_PAIR,
            {
                "lanes": rows,
                "columns": columns,
                "accumulate": int(bool(accumulate)),
                **self._counts(dst.shape),
                **self._encode_operand("dst", dst, self._pad("dst", dst, dst.shape), dst.dtype),
                **self._encode_sources("moving", sources, dst.shape),
            },
            [
                *(self._access(source, False) for source in sources),
                *([self._access(dst, False)] if accumulate else []),
                self._access(dst, True),
            ],
        )


class _Dma(_Engine):
    """Instructions of the DMA queues."""

    def __init__(self, builder: KernelBuilder) -> None:
        super().__init__(builder)
        self._queued = [0] * builder.config.dma_queues  #: bytes given to each queue

    def _queue(self, queue: int | None, store: bool, nbytes: int) -> int:
        count = len(self._queued)
        if queue is None:
            # Stores wait for results; kept off the other queues, they do not hold loads back.
            choice = [count - 1] if store or count == 1 else range(count - 1)
            queue = min(choice, key=lambda q: self._queued[q])
        elif not 0 <= queue < count:
            refuse(f"queue must be 0 to {count - 1}, not {queue}")
        self._queued[queue] += nbytes
        return queue

    def load(
        self,
        view: View,
        dram: DramTensor,
        base_offset_bytes: int | Affine = 0,
        dram_strides: Sequence[int] | None = None,
        lane_stride: int = 0,
        queue: int | None = None,
        accumulate: bool = False,
    ) -> None:
        """view <- dram, converted to FP32 words, integers to 32 bits.

        Parameters
        ----------
        base_offset_bytes : of element (0, ..., 0) of lane 0, from the start of the tensor
        dram_strides : bytes, one for each dimension of the view; default: dense
        lane_stride : bytes from one lane to the next
        queue : number of the DMA queue; default: the least loaded of those kept for loads
        accumulate : add to the words of the view, in FP32, or modulo 2**32 if the tensor is of
            integers; a column that the view names more than once is added to each time
        """
        self._transfer(
            Opcode.DMA_LOAD,
            view,
            dram,
            base_offset_bytes,
            dram_strides,
            lane_stride,
            queue,
            accumulate=accumulate,
        )

    def store(
        self,
        view: View,
        dram: DramTensor,
        base_offset_bytes: int | Affine = 0,
        dram_strides: Sequence[int] | None = None,
        lane_stride: int = 0,
        queue: int | None = None,
        rounding: Rounding | str = Rounding.NEAREST,
        accumulate: bool = False,
    ) -> None:
        """dram <- view, rounded to the type of the tensor, or the low bits of integers.

        Parameters as for `load`; `rounding`, a `Rounding` or its name in lower case, says how the
        words become a narrow type. With `accumulate` the view is added to the tensor, and holds the
        sums, too: what meets in DRAM at different indices of the first of four dimensions is added
        in order."""
        self._transfer(
            Opcode.DMA_STORE,
            view,
            dram,
            base_offset_bytes,
            dram_strides,
            lane_stride,
            queue,
            rounding,
            accumulate=accumulate,
        )

    def gather(
        self,
        view: View,
        dram: DramTensor,
        index: View,
        base_offset_bytes: int = 0,
        rows: int | None = None,
        row_stride: int | None = None,
        column_stride: int | None = None,
        lane_stride: int | None = None,
        queue: int | None = None,
        accumulate: bool = False,
    ) -> None:
        """view[i] <- row index[i] of dram, converted as `load` does.

        Parameters
        ----------
        view : of shape (indices, columns): row i goes to columns i, element c * lanes + l of it to
            lane l of column c by default
        index : INT32 words in SBUF, N in a column: index i lies in partition i % N of column i // N
        base_offset_bytes : of element 0 of row 0, from the start of the tensor
        rows : of the table; an index outside is a fault. Default: the tensor's first dimension
        row_stride : bytes; default: those of one of the tensor's first dimension
        column_stride, lane_stride : bytes from column to column and from lane to lane of a row;
            default: dense
        queue, accumulate : as for `load`
        """
        strides = (rows, row_stride, column_stride, lane_stride)
        self._indexed(
            Opcode.GATHER,
            view,
            dram,
            index,
            base_offset_bytes,
            strides,
            queue,
            accumulate=accumulate,
        )

    def scatter(
        self,
        view: View,
        dram: DramTensor,
        index: View,
        base_offset_bytes: int = 0,
        rows: int | None = None,
        row_stride: int | None = None,
        column_stride: int | None = None,
        lane_stride: int | None = None,
        queue: int | None = None,
        rounding: Rounding | str = Rounding.NEAREST,
        accumulate: bool = False,
    ) -> None:
        """Row index[i] of dram <- view[i], converted as `store` does; of rows of one index the last
        one stays, and with `accumulate` all are added, in order. Parameters as for `gather` and
        `store`."""
        strides = (rows, row_stride, column_stride, lane_stride)
        self._indexed(
            Opcode.SCATTER,
            view,
            dram,
            index,
            base_offset_bytes,
            strides,
            queue,
            rounding,
            accumulate,
        )

    def _indexed(
        self,
        opcode: Opcode,
        view: View,
        dram: DramTensor,
        index: View,
        offset: int,
        strides: tuple[int | None, int | None, int | None, int | None],
        queue: int | None,
        rounding: Rounding | str = Rounding.NEAREST,
        accumulate: bool = False,
    ) -> None:
        self._operand("the vector of indices", index, (Space.SBUF,), (DType.INT32,))
        if not isinstance(dram, DramTensor) or not isinstance(view, View):
            refuse("indices pick rows of a DRAM tensor, from or to a view")
        if len(view.shape) != 2:
            refuse(f"the view must have the shape (indices, columns): {view}")
        if not dram.shape:
            refuse(f"{dram} has no rows")
        lanes = self._builder.config.lanes
        flat = index.flatten()
        if flat is None or (flat.size > 1 and flat.strides != (1,)):
            refuse(f"the columns of indices must follow each other: {index}")
        if index.size * lanes < view.shape[0] or index.lanes < min(lanes, view.shape[0]):
            refuse(
                f"{view.shape[0]} indices are wanted, there are {index.size} columns of "
                f"{index.lanes}: {index}"
            )
        low, high = view.span
        writes = accumulate or opcode is Opcode.GATHER
        if writes and low <= index.span[1] and index.span[0] <= high:
            refuse(f"rows are written over the indices: {view} and {index}")
        rows, row_stride, column_stride, lane_stride = strides
        rows = dram.shape[0] if rows is None else int(rows)
        if not 1 <= rows < 1 << 32:
            refuse(f"rows = {rows} is not 1 to {(1 << 32) - 1}")
        self._transfer(
            opcode,
            view,
            dram,
            offset,
            (
                dram.nbytes // dram.shape[0] if row_stride is None else row_stride,
                view.lanes * dram.itemsize if column_stride is None else column_stride,
            ),
            dram.itemsize if lane_stride is None else lane_stride,
            queue,
            rounding,
            accumulate,
            index=flat,
            rows=rows,
        )

    def _transfer(
        self,
        opcode: Opcode,
        view: View,
        dram: DramTensor,
        offset: int | Affine,
        strides: Sequence[int] | None,
        lane_stride: int,
        queue: int | None,
        rounding: Rounding | str = Rounding.NEAREST,
        accumulate: bool = False,
        index: View | None = None,
        rows: int = 0,
    ) -> None:
        """With `index`, the view is (indices, columns) and the tensor's part (rows, columns)."""
        store = opcode in DRAM_WRITERS
        self._operand("the local operand", view, (Space.SBUF,), FORMATS)
        if not isinstance(dram, DramTensor):
            refuse(f"dram must be a DRAM tensor, not {type(dram).__name__}")
        if store and (dram.kind == "constant" or dram.readonly):
            what = "an argument of the kernel" if dram.readonly else "a constant"
            refuse(f"{dram} is {what} and cannot be stored to")
        tensors = self._builder.dram.tensors
        if dram.index >= len(tensors) or tensors[dram.index] is not (dram.base or dram):
            refuse(f"{dram} belongs to another builder")
        how = _rounding(self._builder.config, rounding, dram.dtype, str(dram))
        item = dram.itemsize
        if strides is None:
            strides = tuple(item * step for step in c_strides(view.shape))
        if len(strides) != len(view.shape):
            refuse(f"{len(strides)} DRAM strides for a view of shape {view.shape}")
        # What of the tensor may be touched: with indices any row of it.
        shape = view.shape if index is None else (rows, view.shape[1])
        strides = tuple(int(s) if n > 1 else 0 for s, n in zip(strides, shape, strict=True))
        lane_stride = int(lane_stride) if view.lanes > 1 else 0
        place = Affine.of(offset, "base_offset_bytes")
        for what, value in (
            ("base_offset_bytes", place.const),
            *(("a step of base_offset_bytes", step) for step in place.steps.values()),
            ("lane_stride", lane_stride),
            *(("a DRAM stride", s) for s in strides),
        ):
            if value % item:
                refuse(f"{what} = {value} is not a multiple of the {item} bytes of an element")
            if not -(1 << 31) <= value < 1 << 31 and not what.endswith("base_offset_bytes"):
                refuse(f"{what} = {value} does not fit 32 bits")
        low, high = extent((*shape, view.lanes), (*strides, lane_stride))
        low += place.span[0]
        high += place.span[1] + item - 1
        if low < 0 or high >= dram.nbytes:
            refuse(
                f"the transfer reaches bytes {low} to {high} of the {dram.nbytes} of {dram}: "
                f"shape {shape}, strides {strides}, offset {place}, lane_stride {lane_stride}"
            )
        intervals = [(low, high)]
        if (store or dram.kind == "scratch") and not place.steps:
            exact = _runs((*shape, view.lanes), (*strides, lane_stride), place.const, item)
            intervals = exact or intervals
        queue = self._queue(queue, store, view.size * view.lanes * item)
        accesses = [self._access(view, accumulate or not store)]
        places: dict[str, Any]
        if index is None:
            counts = self._counts(view.shape)
            local = self._pad("view", view, view.shape)
            padded = (0,) * (MAX_DIMS - len(strides)) + strides
            places = {f"dram_strides.{i}": s for i, s in enumerate(padded) if s}
        else:
            counts = self._counts((view.shape[0], 1, 1, view.shape[1]))
            first, second = self._pad("view", view, view.shape)[-2:]
            local = (first, 0, 0, second)
            places = {"row_stride": strides[0], "column_stride": strides[1]}
            places |= {"rows": rows, "index.base": index.base}
            places |= {"index.index": index.steps} if index.steps else {}
            accesses.insert(0, self._access(index, False))
        self._builder._append(
            self._builder._queues[queue],
            opcode,
            {
                "lanes": view.lanes,
                **counts,
                **self._encode_operand("local", view, local, DType.FP32),
                "dram_base": place.const,
                **({"dram_index": place.steps} if place.steps else {}),
                **places,
                "lane_stride": lane_stride,
                "dram_dtype": dram.dtype.value,
                "accumulate": int(bool(accumulate)),
                **how,
            },
            accesses,
            dram=(dram.index, intervals, store),
        )


@dataclasses.dataclass
class Scope:
    """One call of a kernel function within a program.

    Parameters
    ----------
    prefix : of the names of its tensors
    label : of its instructions
    output : makes the tensor of its next result, given shape and type
    """

    prefix: str
    label: str
    output: Callable[[Sequence[int] | int, DType | Any], DramTensor]


class KernelBuilder:
    """Builds a program call by call, in the order a single engine would run it.

    The result computes what executing the calls one after the other would: semaphores are
    inserted where instructions of different engines touch the same words or DRAM bytes, judged
    by the range between the lowest and the highest address of each operand.

    Parameters
    ----------
    config : preset name or `CoreConfig`
    name : of the program

    Members
    -------
    sbuf, psum : allocators; ``tile(columns)`` and ``free(tile)``
    dram : ``tensor(name, shape, dtype, kind, data)``
    tensor, vector, scalar, dma : the engines' instructions
    """

    def __init__(self, config: str | CoreConfig, name: str = "kernel") -> None:
        self.config = get_config(config)
        self.name = name
        queues = self.config.dma_queues
        first_dma = self.config.engines.index("dma0")
        self._loads, self._matmuls, self._vector, self._scalar = range(4)
        self._queues = [4 + q for q in range(queues)]
        engines = self.config.engines
        self._streams = (
            Stream("tensor loads", engines.index("tensor")),
            Stream("tensor matmuls", engines.index("tensor"), implies=self._loads),
            Stream("vector", engines.index("vector")),
            Stream("scalar", engines.index("scalar")),
            *(Stream(f"dma{q}", first_dma + q) for q in range(queues)),
        )
        self._region = _Region(self._streams, len(engines))
        self._loops: list[Loop] = []  # open ones
        self._registers = [Registers(engine) for engine in engines]
        self._label: str | None = None
        self._source: str | None = None
        self._finished = False
        self._scope: Scope | None = None

        self.sbuf = _Memory(self, Space.SBUF, self.config.sbuf_depth)
        self.psum = _Memory(self, Space.PSUM, self.config.psum_depth)
        self.dram = _Dram(self)
        self.tensor = _Tensor(self)
        self.vector = _Vector(self)
        self.scalar = _Scalar(self)
        self.dma = _Dma(self)

    @contextlib.contextmanager
    def label(self, text: str | None = None, *, source: str | None = None) -> Iterator[None]:
        """Labels the instructions made inside, in the debug map.

        `source` (``file:line``) replaces the caller's statement: a compiler names its user's.
        """
        saved = self._label, self._source
        self._label = saved[0] if text is None else text
        self._source = saved[1] if source is None else source
        try:
            yield
        finally:
            self._label, self._source = saved

    def output(
        self, shape: Sequence[int] | int, dtype: DType | Any, name: str | None = None
    ) -> DramTensor:
        """Declares a result: in a kernel function the next one it returns, else an output of the
        program."""
        self._check_open()
        scope, self._scope = self._scope, None
        if scope is not None:
            # It is made by whoever called the kernel function.
            try:
                return scope.output(shape, dtype)
            finally:
                self._scope = scope
        made = sum(tensor.kind == "output" for tensor in self.dram.tensors)
        return self.dram.tensor(name or f"out{made}", shape, dtype, kind="output")

    @contextlib.contextmanager
    def scope(self, scope: Scope) -> Iterator[None]:
        """What a kernel function does inside belongs to it: statements are its own, names of
        tensors are kept apart, and tiles it leaves are freed."""
        before = {*self.sbuf.live, *self.psum.live}
        saved = self._scope, self._source, self._label
        self._scope, self._source, self._label = scope, None, scope.label
        try:
            yield
            for memory in (self.sbuf, self.psum):
                for tile in memory.live:
                    if tile not in before:
                        memory.free(tile)
        finally:
            self._scope, self._source, self._label = saved

    def _memory(self, space: Space) -> _Memory:
        return self.sbuf if space is Space.SBUF else self.psum

    def _check_open(self) -> None:
        if self._finished:
            refuse(f"program {self.name!r} is finished")

    def _append(
        self,
        stream: int,
        opcode: Opcode,
        fields: dict[str, Any],
        accesses: list[_Access],
        dram: tuple[int, Sequence[tuple[int, int]], bool] | None = None,
    ) -> None:
        """Adds an instruction to a progress stream and finds what it waits for.

        `dram` is (tensor index, intervals from lowest to highest byte, is a write).
        """
        self._check_open()
        region = self._region
        engine = self._streams[stream].engine
        for name, value in fields.items():
            if isinstance(value, Mapping):
                for loop in value:
                    if loop not in self._loops:
                        refuse(f"{loop.name} is used outside of its loop")
                fields[name] = self._registers[engine].number(value, self._loops)
        node = region.clocks.next_node(stream)
        needed: dict[int, int] = {}
        for access in accesses:
            region.maps[access.space].access(access.low, access.high, node, access.write, needed)
        if dram is not None:
            index, intervals, write = dram
            for low, high in intervals:
                region.dram_maps[index].access(low, high, node, write, needed)
        pending = _Pending(
            opcode,
            fields,
            [],
            self._source or user_source(),
            self._label,
            tensor=None if dram is None else dram[0],
        )
        region.add(stream, pending, needed)

    # -- loops ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loop(
        self,
        count: int,
        *,
        name: str | None = None,
        goes_on: tuple[DramTensor, int | Affine] | None = None,
    ) -> Iterator[Affine]:
        """What is called inside is executed `count` times, from one copy of its instructions.

        Gives the iteration number, from 0: to be used, with integers added and multiplied, as
        offset or index of views and as offset of transfers. An iteration begins when the one
        before is complete on all engines, so what should overlap belongs into one iteration.

        Parameters
        ----------
        count : iterations; with `goes_on` at most
        name : of the index, in messages
        goes_on : (tensor of 4-byte elements, byte offset): after each iteration that word is read;
            the loop is over when it is zero

        Loops nest up to LOOP_DEPTH deep, as far as there are semaphores.
        """
        self._check_open()
        _need(self.config, "loops", "nc.loop")
        if not isinstance(count, int | np.integer) or not 1 <= count < 1 << 32:
            refuse(f"a loop has 1 to {(1 << 32) - 1} iterations, not {count!r}")
        if len(self._loops) == LOOP_DEPTH:
            refuse(f"loops nest at most {LOOP_DEPTH} deep")
        semaphores = self._semaphore_base(len(self._loops) + 2)
        if semaphores > self.config.semaphores:
            refuse(
                f"loops {len(self._loops) + 1} deep need {semaphores} semaphores, the core has "
                f"{self.config.semaphores}"
            )
        test = None if goes_on is None else self._flag(*goes_on)
        source = self._source or user_source()
        loop = Loop(name or f"loop{len(self._loops)}", int(count))
        outer, kept = self._region, {*self.sbuf.live, *self.psum.live}
        self._region = inner = _Region(self._streams, len(self.config.engines))
        self._loops.append(loop)
        try:
            yield Affine(0, {loop: 1})
        finally:
            self._loops.pop()
            self._region = outer
        for tile in kept - {*self.sbuf.live, *self.psum.live}:
            refuse(f"{tile} was made before the loop and freed in it, yet every iteration uses it")
        self._close(loop, inner, test, source)
        if not self._loops:
            for registers in self._registers:
                registers.clear()

    def _flag(self, tensor: DramTensor, offset: int | Affine) -> tuple[DramTensor, Affine]:
        place = Affine.of(offset, "the offset of a flag")
        low, high = place.span
        if tensor.itemsize != 4 or low < 0 or high + 4 > tensor.nbytes or place.const % 4:
            refuse(f"a flag is an element of 4 bytes: {tensor}, offset {place}")
        return tensor, place

    def _semaphore_base(self, depth: int) -> int:
        """First semaphore of the loops that deep: one for each stream, and one by which engines say
        that they are at the end of an iteration. Before those of all loops lie one for each stream,
        and one for each engine by which it may go on."""
        streams = len(self._streams)
        return streams + len(self.config.engines) + (depth - 1) * (streams + 1)

    def _close(
        self,
        loop: Loop,
        inner: _Region,
        test: tuple[DramTensor, Affine] | None,
        source: str,
    ) -> None:
        """Puts a loop into the region around it.

        Semaphores count up in an iteration as they do outside of loops. At its end every engine
        that takes part signals that it is done; the master waits for all, takes the counts back
        to zero, and lets the others go on.
        """
        depth = len(self._loops) + 1
        base = self._semaphore_base(depth)
        arrive, go = base + len(self._streams), len(self._streams)
        values = inner.values()
        taking = [engine for engine, found in enumerate(inner.pending) if found]
        if not taking:
            return
        main = {stream.engine: number for number, stream in enumerate(self._streams)}
        master, others = taking[0], taking[1:]

        def control(opcode: Opcode, **fields: Any) -> _Pending:
            named = {key.replace("__", "."): value for key, value in fields.items()}
            return _Pending(opcode, named, [], source, self._label)

        def nop(waits: Sequence[tuple[int, int]] = (), mode: WaitMode = WaitMode.AT_LEAST) -> Any:
            return [
                control(Opcode.NOP, **_wait_fields(waits[i : i + MAX_WAITS], mode))
                for i in range(0, len(waits), MAX_WAITS)
            ]

        def signal(semaphore: int) -> list[_Pending]:
            return [control(Opcode.NOP, signal__sem=semaphore, signal__amount=1)]

        def meet(counted: Sequence[tuple[int, int]] = ()) -> None:
            """Nobody goes on before all are here; then the counts are taken back."""
            for engine in others:
                bodies[engine] += signal(arrive) + nop([(go + engine, 1)], WaitMode.ACQUIRE)
            bodies[master] += nop([(arrive, len(others)), *counted], WaitMode.ACQUIRE)
            for engine in others:
                bodies[master] += signal(go + engine)

        bodies = {e: self._resolve(inner.pending[e], values, base) for e in taking}
        if others:
            meet([(base + s, found[-1]) for s, found in enumerate(values) if found[-1:] > [0]])
        if test is not None:
            tensor, place = test
            for engine in taking:
                fields: dict[str, Any] = {"dram_base": place.const}
                if place.steps:
                    fields["dram_index"] = self._registers[engine].number(
                        place.steps, [*self._loops, loop]
                    )
                read = control(Opcode.TEST, **fields)
                read.tensor = tensor.index
                bodies[engine].append(read)
            if others:  # nobody writes the flag again before all have read it
                meet()

        # Outside, the loop is one access of the master to everything, after everything before.
        outer = self._region
        before = {s: len(nodes) - 1 for s, nodes in enumerate(outer.nodes) if nodes}
        for engine in taking:
            outer.add(main[engine], control(Opcode.LOOP, count=loop.count), before)
            steps = self._registers[engine].steps(loop)
            following = control(Opcode.NEXT, conditional=int(test is not None))
            following.fields |= steps
            outer.pending[engine] += [*bodies[engine], following]
        over = outer.clocks.next_node(main[master])
        for memory, limit in (
            (Space.SBUF, self.config.sbuf_depth),
            (Space.PSUM, self.config.psum_depth),
        ):
            outer.maps[memory].access(0, limit - 1, over, True, {})
        for tensor in self.dram.tensors:
            outer.dram_maps[tensor.index].access(0, tensor.nbytes - 1, over, True, {})
        outer.add(main[master], control(Opcode.NOP), {})

    def _resolve(
        self, pendings: Sequence[_Pending], values: Sequence[Sequence[int]], base: int
    ) -> list[_Pending]:
        """The instructions with waits and signals in their fields, and NOPs for waits that find no
        slot; the semaphore of stream s is `base` + s."""
        found: list[_Pending] = []
        for pending in pendings:
            if pending.node is None:
                found.append(pending)
                continue
            waits = [(base + stream, values[stream][index]) for stream, index in pending.waits]
            while len(waits) > MAX_WAITS:
                fields = _wait_fields(waits[:MAX_WAITS])
                found.append(_Pending(Opcode.NOP, fields, [], pending.source, pending.label))
                waits = waits[MAX_WAITS:]
            fields = {**pending.fields, **_wait_fields(waits)}
            if pending.signal:
                fields |= {"signal.sem": base + pending.node[0], "signal.amount": 1}
            found.append(dataclasses.replace(pending, fields=fields, waits=[], node=None))
        return found

    def finish(self, metadata: Mapping[str, Any] | None = None) -> Program:
        """Ends every stream and returns the program; the builder takes no more calls."""
        self._check_open()
        if self._scope is not None:
            refuse("a kernel function returns its outputs; whoever calls it finishes the program")
        if self._loops:
            refuse(f"loop {self._loops[-1].name} is still open")
        values = self._region.values()
        self._finished = True

        tensors: list[TensorInfo] = []
        address = 0
        for tensor in self.dram.tensors:
            tensors.append(
                TensorInfo(tensor.name, tensor.shape, tensor.dtype, tensor.kind, address)
            )
            address += align_up(tensor.nbytes, DRAM_ALIGN)

        streams: dict[str, bytes] = {}
        debug: dict[str, tuple[DebugInfo, ...]] = {}
        relocations: list[Relocation] = []
        cached: dict[tuple[str | None, str | None], DebugInfo] = {}
        for engine, instructions in zip(self.config.engines, self._region.pending, strict=True):
            raw: list[bytes] = []
            entries: list[DebugInfo] = []
            for pending in self._resolve(instructions, values, 0):
                fields = pending.fields
                if pending.tensor is not None:
                    relocations.append(Relocation(engine, len(raw), pending.tensor))
                    start = tensors[pending.tensor].address
                    fields = {**fields, "dram_base": fields["dram_base"] + start}
                try:
                    raw.append(encode(pending.opcode, fields))
                except EncodeError as error:
                    raise KernelError(str(error), source=pending.source) from error
                entries.append(
                    cached.setdefault(
                        (pending.source, pending.label), DebugInfo(pending.source, pending.label)
                    )
                )
            raw.append(encode(Opcode.END, {}))
            entries.append(DebugInfo(None))
            streams[engine] = b"".join(raw)
            debug[engine] = tuple(entries)
        return Program(
            name=self.name,
            config=self.config,
            streams=streams,
            tensors=tuple(tensors),
            relocations=tuple(relocations),
            constants={t.name: t.data.tobytes() for t in self.dram.tensors if t.data is not None},
            debug=debug,
            metadata=dict(metadata or {}),
        )


def _wait_fields(
    waits: Sequence[tuple[int, int]], mode: WaitMode = WaitMode.AT_LEAST
) -> dict[str, int]:
    """The wait slots of an instruction: (semaphore, count) each."""
    fields: dict[str, int] = {}
    for slot, (sem, value) in enumerate(waits):
        fields[f"wait.{slot}.sem"] = sem
        fields[f"wait.{slot}.mode"] = mode.value
        fields[f"wait.{slot}.value"] = value
    return fields
