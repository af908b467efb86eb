"""Passes on the IR before layout: dead code, and fusion into what one instruction can do."""

from __future__ import annotations

import math

from systolith_hdl.formats import INTEGERS, DType
from systolith_hdl.isa import AluOp

from .ir import Graph, Op, Use, Value, word_type
from .trace import MIRRORED, NO_BIAS


def eliminate_dead(graph: Graph) -> None:
    """Removes operations whose results nobody reads, and constants likewise."""
    live: set[Value] = {use.value for use in graph.outputs}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if op.result in live:
            kept.append(op)
            live.update(use.value for use in op.operands)
    graph.ops = kept[::-1]
    graph.constants = {v: data for v, data in graph.constants.items() if v in live}


def _affine(op: Op) -> tuple[float, float] | None:
    """(scale, bias) if the operation is exactly ``a * scale + bias``, with those roundings."""
    if op.kind != "ts":
        return None
    a = op.attrs
    scale, bias = 1.0, NO_BIAS
    op1, imm1 = a["op1"], a["imm1"]
    if a["op0"] is AluOp.MUL:
        scale = a["imm0"]
    elif op1 is AluOp.BYPASS:
        op1, imm1 = a["op0"], a["imm0"]
    elif a["op0"] is not AluOp.BYPASS:
        return None
    if op1 is AluOp.ADD:
        bias = imm1
    elif op1 is AluOp.SUB:
        bias = -imm1
    elif op1 is AluOp.RSUB:
        scale, bias = -scale, imm1
    elif op1 is not AluOp.BYPASS:
        return None
    if math.isnan(scale) or math.isnan(bias):
        return None
    return scale, bias


def affine(op: Op) -> tuple[float, float, Use, Use | None] | None:
    """(scale, bias, a, b) if ``a * scale + bias`` or ``a * scale + b`` is what the operation does.

    The scalar engine can then do it as well as the vector engine, with the same roundings. It
    has no integers.
    """
    if {op.result.dtype, *(use.value.dtype for use in op.operands)} & {*INTEGERS}:
        return None
    if op.kind == "ts":
        found = _affine(op)
        return None if found is None else (*found, op.operands[0], None)
    if op.kind != "tt" or op.attrs["op0"] not in (AluOp.BYPASS, AluOp.MUL):
        return None
    scale = op.attrs["imm0"] if op.attrs["op0"] is AluOp.MUL else 1.0
    left, right = op.operands
    if op.attrs["op1"] is AluOp.ADD:
        return scale, NO_BIAS, left, right
    if op.attrs["op1"] is AluOp.RSUB:
        return -scale, NO_BIAS, left, right
    if op.attrs["op1"] is AluOp.SUB and scale == 1.0:
        return -1.0, NO_BIAS, right, left
    return None


def _merge(op: Op, index: int, producer: Op) -> bool:
    """Tries to make `producer`, operand `index` of `op`, part of `op`."""
    transposed = op.operands[index].transposed

    def through(use: Use) -> Use:
        return use.t if transposed else use

    single = producer.kind == "ts" and producer.attrs["op1"] is AluOp.BYPASS
    same_shape = producer.operands and producer.operands[0].shape == producer.result.shape
    attrs = op.attrs
    if op.kind == "ts" and single and attrs["op1"] is AluOp.BYPASS:
        op.attrs = {
            "op0": producer.attrs["op0"],
            "imm0": producer.attrs["imm0"],
            "op1": attrs["op0"],
            "imm1": attrs["imm0"],
        }
        op.operands = [through(producer.operands[0])]
        return True
    if op.kind == "tt" and single and attrs["op0"] is AluOp.BYPASS and same_shape:
        other = op.operands[1 - index]
        op1 = attrs["op1"] if index == 0 else MIRRORED.get(attrs["op1"])
        if op1 is None:
            return False
        op.attrs = {"op0": producer.attrs["op0"], "imm0": producer.attrs["imm0"], "op1": op1}
        op.operands = [through(producer.operands[0]), other]
        return True
    if op.kind == "reduce" and single and attrs["op0"] is AluOp.BYPASS and same_shape:
        op.attrs = {**attrs, "op0": producer.attrs["op0"], "imm0": producer.attrs["imm0"]}
        op.operands = [through(producer.operands[0])]
        return True
    if op.kind == "act" and attrs["scale"] == 1.0 and str(attrs["bias"]) == str(NO_BIAS):
        found = affine(producer)
        if found is None or (producer.kind == "ts" and not same_shape):
            return False
        scale, bias, a, b = found
        if b is None:
            op.attrs = {**attrs, "scale": scale, "bias": bias}
            op.operands = [through(a)]
        else:
            op.kind = "actb"
            op.attrs = {"function": attrs["function"], "scale": scale}
            op.operands = [through(a), through(b)]
        return True
    return False


def _rounds_dot(op: Op, producer: Op) -> bool:
    """Whether `op` does no more than round the matrix product that `producer` makes."""
    return (
        producer.kind == "dot"
        and producer.result.dtype is DType.FP32
        and op.result.dtype not in INTEGERS
        and op.kind == "ts"
        and op.attrs["op0"] is op.attrs["op1"] is AluOp.BYPASS
        and op.result.dtype is not DType.FP32
        and op.result.shape == producer.result.shape
        and not op.operands[0].transposed
    )


def fuse(graph: Graph) -> None:
    """Merges an operation into its only reader where one instruction can do both."""
    changed = True
    while changed:
        changed = False
        uses = graph.uses()
        makers = {op.result: op for op in graph.ops}
        gone: set[Op] = set()
        for op in graph.ops:
            for index in range(len(op.operands)):
                value = op.operands[index].value
                producer = makers.get(value)
                if producer is None or producer in gone or uses[value] != 1:
                    continue
                if _rounds_dot(op, producer):
                    # The product is rounded as it leaves PSUM.
                    producer.result = op.result
                    gone.add(op)
                    changed = True
                    break
                # A rounded or converted intermediate has to be.
                words = {word_type(use.value.dtype) for use in (*op.operands, *producer.operands)}
                if words == {value.dtype} and _merge(op, index, producer):
                    gone.add(producer)
                    changed = True
                    break
        graph.ops = [op for op in graph.ops if op not in gone]
