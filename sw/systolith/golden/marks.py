"""How undefined words pass through the instructions that do not simply take element for element.

Marks are numbers that say where a word's lack of definition comes from, 0 for a defined one (see
`systolith.golden.checks`). A function here gives the marks of dst, [lanes, *counts], from

- the instruction's fields, with the number of the core's lanes as "core_lanes";
- the marks of its sources and, as "dst", those dst has had before;
- the words its sources hold.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from systolith_hdl.formats import DType
from systolith_hdl.isa import AluOp, Opcode, RowSums

from . import choose, exchange
from .arithmetic import nonzero

Marks = dict[str, np.ndarray]


def _reduce(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    return marks["src0"].max(axis=-1, keepdims=True)


def _copy_predicated(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    chosen = nonzero(words["src0"], DType(fields["src0.dtype"]))
    return np.maximum(marks["src0"], np.where(chosen, marks["src1"], marks["dst"]))


def _affine_select(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    numbers = choose.affine(fields, marks["dst"].shape[1:])
    chosen = choose.affine_compares(AluOp(fields["op0"]), numbers)
    return np.where(chosen, marks["src0"], 0)


def _select(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    chosen = choose.compares(AluOp(fields["op0"]), words["src0"])
    return np.maximum(marks["src0"], np.where(chosen, marks["src1"], 0))


def _range_select(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    lanes = fields["lanes"]
    chosen = choose.within(words["src1"].reshape(lanes, 2), fields["counts.3"])
    data = np.where(chosen[:, None, None, None], marks["src0"], 0)
    return np.maximum(data, marks["src1"].max(axis=-1, keepdims=True))


def _scan(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    second = marks["src1"]
    if fields["accumulate"]:
        second = second[:, :, :, :1]
    return np.maximum.accumulate(np.maximum(marks["src0"], second), axis=3)


def _transpose(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    return marks["src0"].swapaxes(0, -1)


def _shuffle(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    return marks["src0"][exchange.shuffle_sources(fields, fields["core_lanes"])]


def _activate(fields: dict[str, int], marks: Marks, words: Marks) -> np.ndarray:
    found = marks["src0"]
    if "src1" in marks:
        second = marks["src1"]
        if second.shape != found.shape:  # the scale and the bias of each row
            second = second.max(axis=-1, keepdims=True)
        found = np.maximum(found, second)
    sums = RowSums(fields["op1"])
    if sums is RowSums.NONE:
        return found
    total = found.max(axis=-1, keepdims=True)
    return total if sums is RowSums.ONLY else np.concatenate([found, total], axis=-1)


PASSES: dict[Opcode, Callable[[dict[str, int], Marks, Marks], np.ndarray]] = {
    Opcode.REDUCE: _reduce,
    Opcode.STATISTICS: _reduce,
    Opcode.COPY_PREDICATED: _copy_predicated,
    Opcode.AFFINE_SELECT: _affine_select,
    Opcode.SELECT: _select,
    Opcode.RANGE_SELECT: _range_select,
    Opcode.SCAN: _scan,
    Opcode.TOP: _reduce,
    Opcode.TRANSPOSE: _transpose,
    Opcode.SHUFFLE: _shuffle,
    Opcode.ACTIVATE: _activate,
    Opcode.ACTIVATE_TENSOR_BIAS: _activate,
    Opcode.ACTIVATE_TENSOR_SCALE: _activate,
    Opcode.ACTIVATE_ROWS: _activate,
}
