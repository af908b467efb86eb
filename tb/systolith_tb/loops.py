"""Components side by side, in a grid and skewed, as Verilog that Verilator writes out one by one
and as the loops that the simulator makes of them: driven alike, every output of every cycle goes
into a signature."""

import ctypes
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from systolith.runtime.rtl import verilate
from systolith_hdl import psum
from systolith_hdl.arith import PackNarrow, RoundNarrow, WidenInt8, WidenNarrow
from systolith_hdl.arith.dither import DitherLane
from systolith_hdl.config import get_config
from systolith_hdl.emit import Once, grid, side_by_side, to_verilog
from systolith_hdl.scalar.lane import FunctionTables, ScalarLane
from systolith_hdl.scalar.sums import RowSum
from systolith_hdl.tensor.array import Edge, ProcessingElement
from systolith_hdl.tensor.delay import skew
from systolith_hdl.toolchain import sources_hash
from systolith_hdl.vector.front import FrontLane
from systolith_hdl.vector.lane import VectorLane
from systolith_hdl.vector.top import TopLane

LANES = 2
ROWS, COLUMNS = 2, 3

#: Places what is named so.
Place = Callable[[str], Once]


def _lanes(make: Callable[[], wiring.Component], *shared: str) -> Place:
    return lambda name: side_by_side(make(), name, LANES, shared=shared)


def _grid(preset: str) -> Place:
    config = get_config(preset)
    return lambda name: grid(ProcessingElement(config), name, ROWS, COLUMNS, down=("acc",))


def _skew(width: int, count: int, first: int, step: int) -> Place:
    return lambda name: skew(width, count, first=first, step=step)


#: name -> everything that the chip places side by side, in rows and columns, or skewed
COMPONENTS: dict[str, Place] = {
    "vector_lane": _lanes(
        lambda: VectorLane(divider=True),
        *("en", "op0", "op1", "dtype", "chain", "divide", "start", "divides", "second"),
        *("index", "clear"),
    ),
    "vector_front": _lanes(
        FrontLane,
        *("data", "condition", "holds", "otherwise", "index", "bounds", "start", "base"),
        *("step", "increment", "threshold", "initial", "imm0", "predicated", "tensor"),
        *("imm1", "load", "scalar"),
    ),
    "vector_top": _lanes(TopLane, "smallest", "used", "take", "index", "shift", "value"),
    "scalar_lane": _lanes(ScalarLane, "en", "control", "turning"),
    "function_tables": _lanes(FunctionTables, "en"),
    "row_sum": _lanes(RowSum, "en", "adding", "index", "store", "clear"),
    "psum_lane": _lanes(psum.Lane, "integer", "accumulate"),
    "array_edge": _lanes(lambda: Edge(get_config("nano"))),
    "array_edge_fp8x2": _lanes(
        lambda: Edge(get_config("medium-fp8")), "moving_pair", "weight_pair"
    ),
    "processing_element": _grid("nano"),
    "processing_element_fp8x2": _grid("medium-fp8"),
    "skew": _skew(50, 6, 0, 4),
    "deskew": _skew(32, 5, 4, -1),
    "dither_lane": _lanes(DitherLane, "move", "x", "shared"),
    "round_narrow": _lanes(RoundNarrow, "dtype", "stochastic"),
    "pack_narrow": _lanes(PackNarrow, "dtype"),
    "widen_narrow": _lanes(WidenNarrow, "dtype"),
    "widen_int8": _lanes(WidenInt8),
}


class Signatures(wiring.Component):
    """All `COMPONENTS`, their inputs random.

    Members
    -------
    random : In(32), a new random word in every cycle, of which all inputs are made; they stand
        still in those in which its two highest bits are low
    marks : Out(32) x components, the signatures, mixed from the outputs of all cycles so far
    """

    random: In(32)
    marks: Out(data.ArrayLayout(32, len(COMPONENTS)))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for mark, (name, place) in enumerate(COMPONENTS.items()):
            m.submodules[name] = cells = place(name)
            outputs = []
            number = 0
            for member, port in cells.signature.members.items():
                signals = getattr(cells, member)
                for signal in list(signals) if port.dimensions else [signals]:
                    value = Value.cast(signal)
                    if port.flow is not In:
                        outputs.append(value)
                        continue
                    words = []
                    while 32 * len(words) < len(value):
                        # A register for each word, stirred by the random input: xorshift.
                        number += 1
                        word = Signal(32, name=f"{name}_{number}", init=number * 0x9E3779B9 % 2**32)
                        a = word ^ (word << 13)[:32]
                        b = a ^ a[17:]
                        following = b ^ (b << 5)[:32] ^ self.random.rotate_left(number % 32)
                        with m.If(self.random[30:].any()):  # a loop may be left out in other cycles
                            m.d.sync += word.eq(following)
                        words.append(word)
                    m.d.comb += value.eq(Cat(words))
            mixed = self.marks[mark].rotate_left(1)
            bits = Cat(outputs)
            for first in range(0, len(bits), 32):
                mixed = mixed ^ bits[first : first + 32].rotate_left(first // 32 % 31)
            m.d.sync += self.marks[mark].eq(mixed)
        return m


def signatures(random: np.ndarray, *, loops: bool, fast: bool = False) -> np.ndarray:
    """Signatures after each cycle.

    Parameters
    ----------
    random : uint32 [cycles]
    loops : lanes as loops, or each written out
    fast : with the floating-point cells in C++

    Returns
    -------
    uint32 [cycles, components]
    """
    library = verilate(
        f"loops{'-fast' if fast else ''}{'' if loops else '-written-out'}",
        "signatures",
        lambda: to_verilog(Signatures(), "signatures"),
        Path(__file__).with_suffix(".cpp"),
        sources=sources_hash() + inspect.getsource(Signatures) + repr(list(COMPONENTS)),
        cflags=f"-DCOMPONENTS={len(COMPONENTS)}",
        fast=fast,
        loops=loops,
    )
    found = np.zeros((len(random), len(COMPONENTS)), np.uint32)
    ctypes.CDLL(str(library)).run_signatures(
        ctypes.c_uint64(len(random)),
        np.ascontiguousarray(random, np.uint32).ctypes.data_as(ctypes.c_void_p),
        found.ctypes.data_as(ctypes.c_void_p),
    )
    return found
