"""The floating-point leaf cells alone, driven from numpy through a Verilated library.

Millions of cases a second, which no bench that hands every word through Python reaches.
"""

import ctypes
import inspect
from pathlib import Path

import numpy as np
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from systolith.runtime.rtl import verilate
from systolith_hdl.arith import FP32_LATENCY, Fp32Add, Fp32Mul, MulMode
from systolith_hdl.emit import Once, to_verilog
from systolith_hdl.tensor import ADD_LATENCY, MUL_LATENCY
from systolith_hdl.tensor.mac import OPERAND_BITS, Mac, recode
from systolith_hdl.tensor.mac_fp8x2 import SECOND_BITS, MacFp8x2, recode_factor
from systolith_hdl.toolchain import sources_hash


class Cells(wiring.Component):
    """FP32 adders, multipliers and both MACs side by side, placed as the chip does; the MACs behind
    their recoding.

    Members
    -------
    en, a, b : In, of the adders and the multipliers
    mode : In(MulMode), with them, of the multiplier with integers
    total, product, word : Out, FP32_LATENCY enabled cycles after `a` and `b`
    total_short : Out, SHORT_LATENCY enabled cycles after them
    mac_a, mac_w : In, FP32 words of which the MAC sees OPERAND_BITS
    active : In, with `mac_a` and `mac_w`
    acc : In, MUL_LATENCY cycles later
    mac_o : Out, ADD_LATENCY cycles after `acc`
    pair_a, pair_w : In, with `mac_a` and `mac_w`: second numbers for the MAC of pairs, which sees
        SECOND_BITS of them and shares the other inputs, but meets `acc` in PAIR_MUL_LATENCY cycles
    pair : In, bit 0: a is a pair, bit 1: w is one
    pair_o : Out, ADD_LATENCY cycles after `acc`
    """

    en: In(1)
    a: In(32)
    b: In(32)
    total: Out(32)
    total_short: Out(32)
    product: Out(32)
    mode: In(MulMode)
    word: Out(32)
    mac_a: In(32)
    mac_w: In(32)
    active: In(1)
    acc: In(32)
    mac_o: Out(32)
    pair_a: In(32)
    pair_w: In(32)
    pair: In(2)
    pair_o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.add = add = Once(Fp32Add(), "fp32_add")
        m.submodules.add_short = add_short = Once(Fp32Add(short=True), "fp32_add_short")
        m.submodules.mul = mul = Once(Fp32Mul(), "fp32_mul")
        m.submodules.words = words = Once(Fp32Mul(words=True), "word_mul")
        m.d.comb += [words.mode.eq(self.mode), self.word.eq(words.o)]
        m.submodules.mac = mac = Once(Mac(), "mac_narrow")
        m.d.comb += [
            self.total.eq(add.o),
            self.total_short.eq(add_short.o),
            self.product.eq(mul.o),
            self.mac_o.eq(mac.o),
            mac.a.as_value().eq(recode(m, self.mac_a[-OPERAND_BITS:])),
            mac.w.as_value().eq(recode(m, self.mac_w[-OPERAND_BITS:])),
            mac.active.eq(self.active),
            mac.acc.eq(self.acc),
        ]
        m.submodules.pairs = pairs = Once(MacFp8x2(), "mac_fp8x2")
        m.d.comb += [self.pair_o.eq(pairs.o), pairs.active.eq(self.active), pairs.acc.eq(self.acc)]
        for factor, word, second, pair in (
            (pairs.a, self.mac_a, self.pair_a, self.pair[0]),
            (pairs.w, self.mac_w, self.pair_w, self.pair[1]),
        ):
            recoded = recode_factor(m, word[-OPERAND_BITS:], second[-SECOND_BITS:], pair)
            m.d.comb += factor.as_value().eq(recoded)
        for cell in (add, add_short, mul, words):
            m.d.comb += [cell.en.eq(self.en), cell.a.eq(self.a), cell.b.eq(self.b)]
        return m


def run_cells(inputs: np.ndarray, *, fast: bool = False) -> np.ndarray:
    """Clocks the cells, as gates or as C++ (`fast`).

    Parameters
    ----------
    inputs : uint32 [cycles, (en | active << 1 | pair << 2 | mode << 4, a, b, mac_a, mac_w, acc,
        pair_a, pair_w)]; the last two may be missing

    Returns
    -------
    uint32 [cycles, (total, product, mac_o, pair_o, word, total_short)], as they are at the end of
    each cycle
    """
    library = verilate(
        f"cells{'-fast' if fast else ''}",
        "cells",
        lambda: to_verilog(Cells(), "cells"),
        Path(__file__).with_suffix(".cpp"),
        sources=sources_hash() + inspect.getsource(Cells),
        fast=fast,
    )
    inputs = np.pad(inputs, ((0, 0), (0, 8 - inputs.shape[1])))
    inputs = np.ascontiguousarray(inputs, np.uint32)
    outputs = np.zeros((len(inputs), 6), np.uint32)
    ctypes.CDLL(str(library)).run_cells(
        ctypes.c_uint64(len(inputs)),
        inputs.ctypes.data_as(ctypes.c_void_p),
        outputs.ctypes.data_as(ctypes.c_void_p),
    )
    return outputs


def fp32_results(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP32 words of ``a + b`` and ``a * b`` from the gates."""
    inputs = np.zeros((len(a) + FP32_LATENCY, 6), np.uint32)
    inputs[:, 0] = 1
    inputs[: len(a), 1], inputs[: len(a), 2] = a, b
    outputs = run_cells(inputs)[FP32_LATENCY:]
    return outputs[:, 0], outputs[:, 1]


def mac_results(acc: np.ndarray, a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """FP32 words of ``acc + a * w`` from the gates."""
    latency = MUL_LATENCY + ADD_LATENCY
    inputs = np.zeros((len(a) + latency, 6), np.uint32)
    inputs[:, 0] = 2
    inputs[: len(a), 3], inputs[: len(a), 4] = a, w
    inputs[MUL_LATENCY : MUL_LATENCY + len(a), 5] = acc
    return run_cells(inputs)[latency:, 2]
