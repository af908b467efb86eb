"""Chooses the `Form` of every operation, so that as little as possible is laid out anew.

What an operation reads in another form than its producer left it goes through DRAM: one store,
and one load for each further form. Inputs and constants lie in DRAM anyway and are loaded in any
form, so they only cost a load for each form. The search starts from all operations across rows
and changes one group of connected elementwise operations, or one operation, at a time, while
that lowers the estimated cycles.
"""

from __future__ import annotations

from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FP8_TYPES
from systolith_hdl.isa import DIVISIONS

from .ir import Form, Graph, Op, Value, op_forms, operand_form, product_order

#: cycles a transfer takes beside its data: issue, semaphores, DRAM latency
TRANSFER = 80
#: cycles an instruction takes beside its columns
INSTRUCTION = 12
#: cycles of a column that goes through the divider, about
DIVISION = 38

_ELEMENTWISE = ("tt", "ts", "act", "actb", "select")


def columns(shape: tuple[int, int], form: Form, lanes: int) -> int:
    """Words of one partition that a value takes in a form."""
    rows, cols = shape
    if form is Form.ROWS:
        return -(-rows // lanes) * cols
    if form is Form.COLS:
        return -(-cols // lanes) * rows
    return rows * cols


def contraction_steps(op: Op, config: CoreConfig) -> list[tuple[int, int, tuple[int, ...]]]:
    """What every step of a matrix product adds up, in order: (part of the left operand, of the
    right one, tiles of K of N rows each), see `product_order`.

    One tile a step. Where the core adds up two FP8 products at once and both operands are FP8,
    whole tiles make pairs, 0 and 1, 2 and 3 and so on: k goes with k + N. A whole tile that is
    left over and a last partial one are steps of their own.
    """
    depth = op.operands[0].shape[1]
    paired = 0
    if config.fp8_rate == 2 and all(dtype in FP8_TYPES for dtype in op.attrs["types"]):
        paired = depth // config.lanes // 2 * 2
    return [
        (left, right, (k, k + 1) if k < paired else (k,))
        for left, right, k in product_order(op.attrs["parts"], depth, config.lanes)
        if k >= paired or k % 2 == 0
    ]


def op_cycles(op: Op, config: CoreConfig) -> float:
    """Estimated cycles of an operation on its engine."""
    lanes = config.lanes
    if op.form is None:
        return 0.0
    if op.kind == "dot":
        rows, cols = op.result.shape
        m, f = (rows, cols) if op.form is Form.ROWS else (cols, rows)
        return len(contraction_steps(op, config)) * -(-m // lanes) * (max(f, lanes) + 4)
    shape = op.operands[0].shape if op.kind == "reduce" else op.result.shape
    each = DIVISION if op.attrs.get("op1") in DIVISIONS else 1
    return INSTRUCTION + each * columns(shape, op.form, lanes)


def assign_forms(graph: Graph, config: CoreConfig) -> int:
    """Sets `form` of every operation; returns the estimated cost in cycles."""
    lanes = config.lanes
    stored = {use.value for use in graph.outputs}
    # What leaves with its lanes side by side in DRAM needs no corner turn.
    straight = {use.value: Form.ROWS if use.transposed else Form.COLS for use in graph.outputs}
    in_dram = set(graph.inputs) | set(graph.constants)
    makers = {op.result: op for op in graph.ops}
    readers: dict[Value, list[tuple[Op, int]]] = {}
    for op in graph.ops:
        for index, use in enumerate(op.operands):
            readers.setdefault(use.value, []).append((op, index))

    def value_cost(value: Value) -> float:
        made = None
        cost = 0.0
        maker = makers.get(value)
        if maker is not None:
            made = maker.form
            in_memory = value in stored or made is None
            if straight.get(value, made) is not made:
                cost += 2 * lanes
        else:
            in_memory = value in in_dram
        wanted: set[Form | None] = {operand_form(op, i) for op, i in readers.get(value, ())}
        # Half a partition's words a cycle is what two bytes per lane of DRAM bandwidth allow.
        for form in wanted - {made}:
            if not in_memory:
                assert made is not None
                cost += TRANSFER + 2 * value.size / lanes
                in_memory = True
            if form is not None:
                cost += TRANSFER + 2 * columns(value.shape, form, lanes)
        return cost

    def op_cost(op: Op) -> float:
        return op_cycles(op, config)

    for op in graph.ops:
        forms = op_forms(op)
        op.form = forms[0] if forms else None

    groups = _groups(graph.ops)
    cost = sum(op_cost(op) for op in graph.ops) + sum(value_cost(v) for v in (*makers, *in_dram))
    for _ in range(8):
        before = cost
        for group in groups:
            cost = _improve(group, cost, op_cost, value_cost)
        if cost >= before:
            break
    return round(cost)


def _groups(ops: list[Op]) -> list[list[Op]]:
    """Each connected set of elementwise operations on values of the same size, then each
    operation that has a choice."""
    group_of: dict[Op, list[Op]] = {}
    makers = {op.result: op for op in ops}
    for op in ops:
        if op.kind not in _ELEMENTWISE:
            continue
        mine = [op]
        group_of[op] = mine
        for use in op.operands:
            other = group_of.get(makers.get(use.value))  # type: ignore[arg-type]
            if other is not None and other is not mine and use.value.size == op.result.size:
                other.extend(mine)
                for member in mine:
                    group_of[member] = other
                mine = other
    seen: set[int] = set()
    groups: list[list[Op]] = []
    for group in group_of.values():
        if id(group) not in seen and len(group) > 1:
            seen.add(id(group))
            groups.append(group)
    return groups + [[op] for op in ops if len(op_forms(op)) > 1]


def _improve(group, cost, op_cost, value_cost) -> float:  # type: ignore[no-untyped-def]
    """Tries every change of a group's forms; keeps the best."""
    values = {use.value for op in group for use in op.operands} | {op.result for op in group}

    def local() -> float:
        return sum(map(op_cost, group)) + sum(map(value_cost, values))

    def flip(form: Form, op: Op) -> Form:
        forms = op_forms(op)
        return forms[(forms.index(form) + 1) % len(forms)]

    old = [op.form for op in group]
    start = local()
    best, best_forms = start, old
    # All flipped, or all the same as the operation sees them: transposed uses and vectors
    # make these differ.
    candidates = [
        [flip(op.form, op) for op in group],
        *(
            [form if form in op_forms(op) else op.form for op in group]
            for form in (Form.ROWS, Form.COLS, Form.ALL)
        ),
    ]
    for forms in candidates:
        for op, form in zip(group, forms, strict=True):
            op.form = form
        now = local()
        if now < best - 1e-9:
            best, best_forms = now, forms
    for op, form in zip(group, best_forms, strict=True):
        op.form = form
    return cost - start + best
