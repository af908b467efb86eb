"""Orders the operations so that the engines have something to do.

Each engine executes its instructions in program order, so an operation that waits for a long
matrix product holds up everything behind it. List scheduling on estimated cycles: of the
operations whose operands have been scheduled, the one that can start first comes next, and of
those the one with the longest way to the end.
"""

from __future__ import annotations

from systolith_hdl.config import CoreConfig

from .fuse import affine
from .ir import IN_DRAM, Graph, Op, Value, operand_form
from .layout import TRANSFER, columns, op_cycles


def _engines(op: Op) -> tuple[str, ...]:
    if op.kind == "dot":
        return ("tensor",)
    if op.kind in ("act", "actb"):
        return ("scalar",)
    if op.kind in IN_DRAM:
        return ("dma",)
    return ("vector", "scalar") if affine(op) is not None else ("vector",)


def schedule(graph: Graph, config: CoreConfig) -> int:
    """Reorders ``graph.ops``; returns the estimated cycles."""
    lanes = config.lanes
    makers = {op.result: op for op in graph.ops}
    readers: dict[Value, list[Op]] = {}
    for op in graph.ops:
        for value in {use.value for use in op.operands}:
            readers.setdefault(value, []).append(op)
    outputs = {use.value for use in graph.outputs}

    def relayout(op: Op, index: int) -> float:
        """Cycles from a computed operand being ready to its being ready in the form read."""
        value = op.operands[index].value
        form, made = operand_form(op, index), makers[value].form
        if form is made:
            return 0.0
        words = value.size / lanes if form is None else columns(value.shape, form, lanes)
        return 2 * (TRANSFER + words)

    cycles = {op: op_cycles(op, config) for op in graph.ops}
    # The longest way to the end, from the start of an operation.
    remaining: dict[Op, float] = {}
    for op in reversed(graph.ops):
        after = TRANSFER + 2 * op.result.size / lanes if op.result in outputs else 0.0
        for reader in readers.get(op.result, ()):
            for index, use in enumerate(reader.operands):
                if use.value is op.result:
                    after = max(after, relayout(reader, index) + remaining[reader])
        remaining[op] = cycles[op] + after

    position = {op: index for index, op in enumerate(graph.ops)}
    waiting = {op: len({u.value for u in op.operands if u.value in makers}) for op in graph.ops}
    ready = [op for op in graph.ops if not waiting[op]]
    done: dict[Value, float] = {}
    free = {"tensor": 0.0, "vector": 0.0, "scalar": 0.0, "dma": 0.0}
    order: list[Op] = []
    while ready:

        def start(op: Op) -> float:
            operands = max(
                (
                    done[use.value] + relayout(op, index)
                    for index, use in enumerate(op.operands)
                    if use.value in makers
                ),
                default=0.0,
            )
            return max(operands, min(free[engine] for engine in _engines(op)))

        op = min(ready, key=lambda op: (start(op), -remaining[op], position[op]))
        ready.remove(op)
        order.append(op)
        end = start(op) + cycles[op]
        free[min(_engines(op), key=lambda engine: free[engine])] = end
        done[op.result] = end
        for reader in readers.get(op.result, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    graph.ops = order
    return round(max(done.values(), default=0.0))
