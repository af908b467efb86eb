"""What a kernel computes on: tiles of SBUF and PSUM, views of them, tensors in DRAM."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FORMATS, DType
from systolith_hdl.isa import Space

from .loops import Affine, Loop
from .source import refuse

#: What a view is indexed with.
Index = int | slice | Affine
MAX_DIMS = 4  #: nested counts of one instruction
MAX_COUNT = (1 << 16) - 1  #: of one dimension
STRIDE_LIMITS = (-(1 << 15), (1 << 15) - 1)  #: words

#: what a DRAM tensor is to the runtime
TensorKind = Literal["input", "output", "scratch", "constant"]
TENSOR_KINDS: tuple[str, ...] = ("input", "output", "scratch", "constant")


def extent(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Returns the lowest and highest offset that a pattern reaches."""
    low = high = 0
    for count, stride in zip(shape, strides, strict=True):
        reach = (count - 1) * stride
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a dense array, last dimension innermost."""
    strides: list[int] = []
    step = 1
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


@dataclasses.dataclass(eq=False)
class Tile:
    """A block of consecutive words, the same in every partition.

    Parameters
    ----------
    config : of the core it lies in
    space : memory it lies in
    base : address of its first word
    columns : words of one partition
    name : shown in messages
    """

    config: CoreConfig
    space: Space
    base: int
    columns: int
    name: str
    freed: bool = False

    def view(
        self,
        shape: Sequence[int] | int | None = None,
        strides: Sequence[int] | None = None,
        offset: int | Affine = 0,
        lanes: int | None = None,
    ) -> View:
        """Returns a pattern of words in this tile.

        Parameters
        ----------
        shape : up to 4 dimensions, outermost first; default: all columns
        strides : words, one for each dimension; default: dense, last dimension innermost
        offset : words from the start of the tile; may be made of loop indices
        lanes : partitions 0 to lanes-1 take part; default: all
        """
        if shape is None:
            shape = (self.columns,)
        elif isinstance(shape, int):
            shape = (shape,)
        shape = tuple(int(count) for count in shape)
        strides = c_strides(shape) if strides is None else tuple(int(s) for s in strides)
        lanes = self.config.lanes if lanes is None else int(lanes)
        place = Affine.of(offset, "offset")
        return View(self, self.base + place.const, shape, strides, lanes, steps=place.steps)

    def __str__(self) -> str:
        return f"{self.space.name} tile {self.name!r} ({self.columns} columns)"


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """Words of a tile that an instruction reads or writes.

    Views are made by `Tile.view` and by the methods here, each of which checks that the pattern
    stays inside its tile.

    Parameters
    ----------
    tile : the tile
    base : word address of element (0, ..., 0)
    shape : up to 4 dimensions, outermost first
    strides : words
    lanes : partitions 0 to lanes-1 take part
    dtype : as a destination: what is written is converted to it; as an operand of the tensor
        engine: what is read is rounded to it. Words hold FP32, of a narrow float too, or integers
        of 32 bits, of INT8 too; the vector engine computes in what the words of its sources are.
    steps : words by which the base steps with loops
    """

    tile: Tile
    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lanes: int
    dtype: DType = DType.FP32
    steps: Mapping[Loop, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        tile = self.tile
        if len(self.shape) > MAX_DIMS:
            refuse(f"a view has at most {MAX_DIMS} dimensions, not {len(self.shape)}: {self.shape}")
        if len(self.strides) != len(self.shape):
            refuse(f"shape {self.shape} and strides {self.strides} differ in length")
        for count in self.shape:
            if not 1 <= count <= MAX_COUNT:
                refuse(f"every dimension of a view must be 1 to {MAX_COUNT}: shape {self.shape}")
        for count, stride in zip(self.shape, self.strides, strict=True):
            if count > 1 and not STRIDE_LIMITS[0] <= stride <= STRIDE_LIMITS[1]:
                refuse(f"a stride must be {STRIDE_LIMITS[0]} to {STRIDE_LIMITS[1]}, not {stride}")
        if not 1 <= self.lanes <= tile.config.lanes:
            refuse(f"lanes must be 1 to {tile.config.lanes}, not {self.lanes}")
        low, high = self.span
        if low < tile.base or high >= tile.base + tile.columns:
            refuse(
                f"the view reaches columns {low - tile.base} to {high - tile.base} of {tile}: "
                f"shape {self.shape}, strides {self.strides}, offset {self.base - tile.base}"
            )

    @property
    def space(self) -> Space:
        """Memory the view lies in."""
        return self.tile.space

    @property
    def size(self) -> int:
        """Columns the view visits."""
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """Lowest and highest word address, over all iterations of loops."""
        low, high = extent(self.shape, self.strides)
        first, last = Affine(self.base, self.steps).span
        return first + low, last + high

    def addresses(self) -> np.ndarray:
        """Returns the word address of every element, in the view's shape; in the first iteration of
        loops."""
        found = np.full((), self.base, np.int64)
        for count, stride in zip(self.shape, self.strides, strict=True):
            found = found[..., None] + np.arange(count) * stride
        return found

    def astype(self, dtype: DType) -> View:
        """Returns the same words as an operand of type `dtype`."""
        if dtype not in FORMATS:
            allowed = ", ".join(known.name for known in FORMATS)
            refuse(f"operands in SBUF and PSUM are {allowed}, not {dtype!r}")
        return dataclasses.replace(self, dtype=dtype)

    def with_lanes(self, lanes: int) -> View:
        """Returns the same pattern in partitions 0 to lanes-1."""
        return dataclasses.replace(self, lanes=int(lanes))

    def permute(self, *axes: int) -> View:
        """Returns the view with its dimensions in another order."""
        if sorted(axes) != list(range(len(self.shape))):
            refuse(f"axes {axes} are no permutation of the {len(self.shape)} dimensions")
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[axis] for axis in axes),
            strides=tuple(self.strides[axis] for axis in axes),
        )

    def reshape(self, *shape: int) -> View:
        """Returns the elements in another shape; the view's words must be dense and in order."""
        dense = all(
            count == 1 or stride == wanted
            for count, stride, wanted in zip(
                self.shape, self.strides, c_strides(self.shape), strict=True
            )
        )
        if not dense or math.prod(shape) != self.size:
            refuse(
                f"cannot reshape a view of shape {self.shape}, strides {self.strides} to {shape}"
            )
        return dataclasses.replace(self, shape=tuple(shape), strides=c_strides(shape))

    def flatten(self) -> View | None:
        """Returns the elements, in order, as one dimension; None if they have no one stride."""
        dims = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n > 1]
        for (_, outer), (count, inner) in itertools.pairwise(dims):
            if outer != count * inner:
                return None
        stride = dims[-1][1] if dims else 1
        return dataclasses.replace(self, shape=(self.size,), strides=(stride,))

    def broadcast_to(self, *shape: int) -> View:
        """Returns the view repeated along new leading dimensions and along those of size 1."""
        strides = broadcast_strides(self, tuple(shape))
        if strides is None:
            refuse(f"cannot broadcast shape {self.shape} to {shape}")
        return dataclasses.replace(self, shape=tuple(shape), strides=strides)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> View:
        """Returns part of the view; integers and loop indices drop a dimension, slices keep it, as
        in numpy."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape):
            refuse(f"{len(index)} indices for a view of shape {self.shape}")
        base = Affine(self.base, self.steps)
        shape: list[int] = []
        strides: list[int] = []
        padded = index + (slice(None),) * (len(self.shape) - len(index))
        for item, count, stride in zip(padded, self.shape, self.strides, strict=True):
            if isinstance(item, slice):
                start, stop, step = item.indices(count)
                chosen = range(start, stop, step)
                if not chosen:
                    refuse(f"slice {start}:{stop}:{step} of a dimension of {count} is empty")
                base += start * stride
                shape.append(len(chosen))
                strides.append(step * stride)
            else:
                place = Affine.of(item, "an index")
                low, high = place.span
                if not -count <= low <= high < count or (place.steps and low < 0):
                    refuse(f"index {place} is outside a dimension of {count}")
                base += (place if place.steps else place.const % count) * stride
        return dataclasses.replace(
            self, base=base.const, shape=tuple(shape), strides=tuple(strides), steps=base.steps
        )

    def first(self, count: int) -> View:
        """Returns the first `count` elements of the innermost dimension."""
        return self[(slice(None),) * (len(self.shape) - 1) + (slice(count),)]

    def last(self, count: int) -> View:
        """Returns the last `count` elements of the innermost dimension."""
        return self[(slice(None),) * (len(self.shape) - 1) + (slice(-count, None),)]

    def __str__(self) -> str:
        return (
            f"{self.space.name} view of {self.tile.name!r} [shape {self.shape}, "
            f"strides {self.strides}, offset {self.base - self.tile.base}, lanes {self.lanes}]"
        )


def broadcast_strides(view: View, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the strides that walk `view` over `shape`, or None if it does not broadcast."""
    if len(view.shape) > len(shape):
        return None
    missing = len(shape) - len(view.shape)
    strides = [0] * missing
    for have, want, stride in zip(view.shape, shape[missing:], view.strides, strict=True):
        if have != want and have != 1:
            return None
        strides.append(stride if have == want else 0)
    return tuple(strides)


@dataclasses.dataclass(frozen=True, eq=False)
class DramTensor:
    """A dense tensor in device DRAM; the runtime decides where it lies.

    Parameters
    ----------
    name : unique in its program
    shape : dimensions, outermost first
    dtype : type of the packed elements
    kind : "input" and "output" are bound by the caller of the program, "scratch" is its own,
        "constant" carries its data. An input that is also stored to is updated in place.
    index : in the tensor table
    data : of a constant
    base : the tensor whose bytes these are, if it is not this one
    readonly : must not be stored to: an argument of a `systolith.kernel` function
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    kind: TensorKind
    index: int
    data: np.ndarray | None = None
    base: DramTensor | None = None
    readonly: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return FORMATS[self.dtype].bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next along each dimension."""
        return tuple(step * self.itemsize for step in c_strides(self.shape))

    def reshape(self, *shape: int) -> DramTensor:
        """Returns the same bytes under another shape."""
        if math.prod(shape) != math.prod(self.shape):
            refuse(f"cannot reshape {self} to {shape}")
        return dataclasses.replace(self, shape=tuple(shape), base=self.base or self)

    def __str__(self) -> str:
        return f"DRAM tensor {self.name!r} ({self.dtype.name} {self.shape})"
