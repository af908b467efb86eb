"""Components side by side, as Verilog that Verilator writes out lane by lane and as the loops that
the simulator makes of them: driven alike, every output of every cycle goes into a signature."""

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
from systolith_hdl.emit import side_by_side, to_verilog
from systolith_hdl.scalar.lane import FunctionTables, ScalarLane
from systolith_hdl.scalar.sums import RowSum
from systolith_hdl.tensor.array import ProcessingElement
from systolith_hdl.toolchain import sources_hash
from systolith_hdl.vector.front import FrontLane
from systolith_hdl.vector.lane import VectorLane
from systolith_hdl.vector.top import TopLane

LANES = 2

#: name -> component, and what its copies share: everything that the chip places side by side
COMPONENTS: dict[str, tuple[Callable[[], wiring.Component], tuple[str, ...]]] = {
    "vector_lane": (
        lambda: VectorLane(divider=True),
        (
            *("en", "op0", "op1", "dtype", "chain", "divide", "start", "divides", "second"),
            *("index", "clear"),
        ),
    ),
    "vector_front": (
        FrontLane,
        (
            *("data", "condition", "holds", "otherwise", "index", "bounds", "start", "base"),
            *("step", "increment", "threshold", "initial", "imm0", "predicated", "tensor"),
            *("imm1", "load", "scalar"),
        ),
    ),
    "vector_top": (TopLane, ("smallest", "used", "take", "index", "shift", "value")),
    "scalar_lane": (ScalarLane, ("en", "control", "turning")),
    "function_tables": (FunctionTables, ("en",)),
    "row_sum": (RowSum, ("en", "adding", "index", "store", "clear")),
    "psum_lane": (psum.Lane, ("integer", "accumulate")),
    "processing_element": (lambda: ProcessingElement(get_config("nano")), ()),
    "processing_element_fp8x2": (lambda: ProcessingElement(get_config("medium-fp8")), ()),
    "dither_lane": (DitherLane, ("move", "x", "shared")),
    "round_narrow": (RoundNarrow, ("dtype", "stochastic")),
    "pack_narrow": (PackNarrow, ("dtype",)),
    "widen_narrow": (WidenNarrow, ("dtype",)),
    "widen_int8": (WidenInt8, ()),
}


class Signatures(wiring.Component):
    """All `COMPONENTS`, their inputs random.

    Members
    -------
    random : In(32), a new random word in every cycle, of which all inputs are made
    marks : Out(32) x components, the signatures, mixed from the outputs of all cycles so far
    """

    random: In(32)
    marks: Out(data.ArrayLayout(32, len(COMPONENTS)))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for place, (name, (make, shared)) in enumerate(COMPONENTS.items()):
            m.submodules[name] = cells = side_by_side(make(), name, LANES, shared=shared)
            outputs = []
            number = 0
            for member, port in cells.signature.members.items():
                signals = getattr(cells, member)
                for signal in [signals] if member in shared else list(signals):
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
                        m.d.sync += word.eq(
                            b ^ (b << 5)[:32] ^ self.random.rotate_left(number % 32)
                        )
                        words.append(word)
                    m.d.comb += value.eq(Cat(words))
            mixed = self.marks[place].rotate_left(1)
            bits = Cat(outputs)
            for first in range(0, len(bits), 32):
                mixed = mixed ^ bits[first : first + 32].rotate_left(first // 32 % 31)
            m.d.sync += self.marks[place].eq(mixed)
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
