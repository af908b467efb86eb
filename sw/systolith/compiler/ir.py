"""The tensor IR: a list of operations on two-dimensional values, in execution order.

Every value is ``[R, C]``; scalars are ``[1, 1]`` and vectors ``[1, C]``. There is no transpose
and no broadcast operation: an operand is a `Use`, which says whether the value is read
transposed, and elementwise operations broadcast dimensions of size 1. Booleans are 1.0 or 0.0.
An elementwise operation or a reduction computes in the type of its operands' words, FP32, INT32 (of
INT8, too) or UINT32, and its result may have any type; `act` and `actb` compute in FP32.

After the layout pass every operation also has a `Form`: the layout in which it walks its
iteration space and leaves its result.

========== =========================== =========================================================
kind       attributes                  result
========== =========================== =========================================================
tt         op0, imm0, op1              ``(a op0 imm0) op1 b``
ts         op0, imm0, op1, imm1        ``(a op0 imm0) op1 imm1``; its shape may be larger than
                                       the operand's (a broadcast)
act        function, scale, bias       ``function(a * scale + bias)``
actb       function, scale             ``function(a * scale + b)``
select     on_false, on_true           operands: mask, then those of on_false and on_true that
                                       are no number (None); ``on_true where mask else on_false``
reduce     op0, imm0, op1, axis        op1-reduction of ``a op0 imm0`` along an axis, kept as 1
dot        types, parts                ``a @ b``, each operand rounded to its type; operands: the
                                       parts of a, then those of b. See `product_order`. A sum of
                                       INT8 products may be INT32, or wrapped to INT8
reshape                                elements of ``a`` in row-major order in another shape
slice      start, step                 ``a[start[0]::step[0], start[1]::step[1]]``, cut to the
                                       result's shape
fill       value                       every element is ``value``
kernel     call                        the first result of a kernel function, see `kernel.function`
result     index                       another result of the kernel that made the operand
========== =========================== =========================================================
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from systolith_hdl.formats import FLOATS, FORMATS, INTEGERS, NARROW_FLOATS, DType
from systolith_hdl.isa import REDUCTIONS, AluOp, Function

from ..errors import CompileError
from ..kernel.call import Call

Shape = tuple[int, int]

#: Name of an array's type -> what the chip keeps it in; bools are 1.0 or 0.0.
ARRAY_TYPES: dict[str, DType] = {
    **{FORMATS[dtype].numpy.name: dtype for dtype in (*FLOATS, *INTEGERS)},
    "bool": DType.FP32,
}
#: ``float32, bfloat16, ... or bool``, for messages
ARRAY_TYPE_NAMES = " or ".join((", ".join(list(ARRAY_TYPES)[:-1]), list(ARRAY_TYPES)[-1]))


def array_type(dtype: Any) -> DType | None:
    """What an array of a numpy type is kept in, or None if the chip does not have it."""
    return ARRAY_TYPES.get(np.dtype(dtype).name)


#: BF16 numbers that a float32 operand of a matrix product is the sum of, the largest first
SPLIT_PARTS = 3


def product_order(parts: tuple[int, int], depth: int, lanes: int) -> list[tuple[int, int, int]]:
    """What a "dot" adds up, in order: (part of the left operand, of the right one, tile of K).

    The smallest products come first. Products of parts that lie 2**-24 or more below the largest
    are left out.

    Parameters
    ----------
    parts : of each operand; 1 is an operand as it is
    depth : K
    lanes : N
    """
    pairs = [(i, j) for i in range(parts[0]) for j in range(parts[1]) if i + j < SPLIT_PARTS]
    pairs.sort(key=lambda pair: (-sum(pair), -pair[0]))
    return [(i, j, k) for i, j in pairs for k in range(-(-depth // lanes))]


#: kinds that are other strides or types over the same bytes in DRAM: no engine, no form
ALIASES = ("reshape", "slice", "result")
#: kinds that read their operands from DRAM and leave their result there
IN_DRAM = (*ALIASES, "kernel")


class Form(enum.Enum):
    """Where the elements of a value lie in SBUF or PSUM, with N partitions."""

    #: element (r, c) at partition r % N, word (r // N) * C + c
    ROWS = "rows"
    #: element (r, c) at partition c % N, word (c // N) * R + r
    COLS = "cols"
    #: a vector or scalar, whole in every partition: element i at word i
    ALL = "all"

    def flipped(self) -> Form:
        """The form of the transposed value in the same words."""
        return {Form.ROWS: Form.COLS, Form.COLS: Form.ROWS, Form.ALL: Form.ALL}[self]


@dataclasses.dataclass(eq=False)
class Value:
    """One tensor of the program.

    Parameters
    ----------
    id : unique in its graph
    shape : rows, columns
    dtype : FP32, or a narrow float for a value rounded to it, or an integer
    name : for messages: the argument's path, or the primitive that made it
    nearest : a narrow float rounded to nearest, even where results are rounded stochastically
    """

    id: int
    shape: Shape
    dtype: DType
    name: str
    nearest: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]

    def __str__(self) -> str:
        return f"%{self.id}"

    @property
    def type(self) -> str:
        """For messages: ``fp32[3,4]``."""
        return f"{self.dtype.name.lower()}[{self.shape[0]},{self.shape[1]}]"


@dataclasses.dataclass(frozen=True)
class Use:
    """A value as an operand, possibly transposed."""

    value: Value
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        """Shape as the operation sees it."""
        rows, cols = self.value.shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def t(self) -> Use:
        """The transposed use."""
        return Use(self.value, not self.transposed)

    def form(self, form: Form) -> Form:
        """The form of the value that is `form` as the operation sees it, or the reverse."""
        return form.flipped() if self.transposed else form

    def __str__(self) -> str:
        return f"{self.value}" + (".T" if self.transposed else "")


@dataclasses.dataclass(eq=False)
class Op:
    """One operation; the table in the module's docstring lists the kinds.

    Parameters
    ----------
    source : the user's statement it came from, or None
    label : the JAX primitive it came from
    form : set by the layout pass
    """

    kind: str
    operands: list[Use]
    attrs: dict[str, Any]
    result: Value
    source: str | None = None
    label: str = ""
    form: Form | None = None

    def __str__(self) -> str:
        attrs = ", ".join(
            f"{key}={value.name if isinstance(value, enum.Enum) else value}"
            for key, value in self.attrs.items()
        )
        operands = ", ".join(str(use) for use in self.operands)
        text = f"{self.result}:{self.result.type} = {self.kind}({operands})"
        text += f" {{{attrs}}}" if attrs else ""
        text += f" @{self.form.value}" if self.form else ""
        return text + f"  # {self.label}" + (f" {self.source}" if self.source else "")


@dataclasses.dataclass
class Graph:
    """A whole step.

    Parameters
    ----------
    inputs : values bound by the caller; every one of them, used or not
    constants : values known when compiling, with their elements
    ops : in execution order
    outputs : what the caller gets, in order; the same value may appear more than once
    """

    inputs: list[Value] = dataclasses.field(default_factory=list)
    constants: dict[Value, np.ndarray] = dataclasses.field(default_factory=dict)
    ops: list[Op] = dataclasses.field(default_factory=list)
    outputs: list[Use] = dataclasses.field(default_factory=list)

    def uses(self) -> dict[Value, int]:
        """How often each value is read, being an output included."""
        counts: dict[Value, int] = {}
        for use in self.all_uses():
            counts[use.value] = counts.get(use.value, 0) + 1
        return counts

    def all_uses(self) -> Iterator[Use]:
        """Every operand, then every output."""
        for op in self.ops:
            yield from op.operands
        yield from self.outputs

    def dump(self) -> str:
        """Returns the graph as text, one operation a line."""
        lines = [f"input {value}:{value.type} {value.name}" for value in self.inputs]
        lines += [f"constant {value}:{value.type} {value.name}" for value in self.constants]
        lines += [str(op) for op in self.ops]
        lines += [f"output {use}:{use.value.type}" for use in self.outputs]
        return "\n".join(lines)


def word_type(dtype: DType) -> DType:
    """What the words of a value are, in which the vector engine computes."""
    if dtype is DType.UINT32:
        return dtype
    return DType.INT32 if dtype in INTEGERS else DType.FP32


def broadcast(*shapes: Shape) -> Shape:
    """The numpy broadcast of shapes; raises ValueError."""
    rows, cols = np.broadcast_shapes(*shapes)
    return rows, cols


def lane_form(shape: Shape, form: Form) -> Form:
    """`form`, or ALL where the dimension that would go on the partitions has size 1."""
    if form is Form.ROWS and shape[0] == 1:
        return Form.ALL
    if form is Form.COLS and shape[1] == 1:
        return Form.ALL
    return form


def forms_of(shape: Shape) -> tuple[Form, ...]:
    """Forms in which an elementwise operation may leave a result of that shape."""
    if shape == (1, 1):
        return (Form.ALL,)
    if shape[0] == 1:
        return (Form.COLS, Form.ALL)
    if shape[1] == 1:
        return (Form.ROWS, Form.ALL)
    return (Form.ROWS, Form.COLS)


def op_forms(op: Op) -> tuple[Form, ...]:
    """Forms an operation can be carried out in."""
    shape = op.result.shape
    if op.kind == "reduce":
        along = Form.ROWS if op.attrs["axis"] == 1 else Form.COLS
        return (lane_form(op.operands[0].shape, along),)
    if op.kind in IN_DRAM:
        return ()
    if op.kind == "dot":
        # One row or column alone would lie in one partition: it is put across them.
        forms = (Form.ROWS, Form.COLS)
        return tuple(form for form in forms if lane_form(shape, form) is form) or forms[:1]
    return forms_of(shape)


def operand_form(op: Op, index: int) -> Form | None:
    """The form in which `op`, whose own form is set, reads the *value* of an operand; None if it
    reads it from DRAM."""
    use = op.operands[index]
    if op.kind in IN_DRAM:
        return None
    if op.kind == "dot":
        left = index < op.attrs["parts"][0]
        return use.form(lane_form(use.shape, Form.COLS if left else Form.ROWS))
    assert op.form is not None
    return use.form(lane_form(use.shape, op.form))


# --- legality -------------------------------------------------------------------------------


def _shape_elementwise(op: Op) -> Shape | None:
    return broadcast(*(use.shape for use in op.operands))


def _shape_ts(op: Op) -> Shape | None:
    return broadcast(op.operands[0].shape, op.result.shape)


def _shape_reduce(op: Op) -> Shape | None:
    rows, cols = op.operands[0].shape
    return (rows, 1) if op.attrs["axis"] == 1 else (1, cols)


def _shape_dot(op: Op) -> Shape | None:
    count = op.attrs["parts"][0]
    lefts, rights = op.operands[:count], op.operands[count:]
    (m, k), (k2, f) = lefts[0].shape, rights[0].shape
    same = all(len({use.shape for use in uses}) == 1 for uses in (lefts, rights))
    return (m, f) if k == k2 and same and len(rights) == op.attrs["parts"][1] else None


def _shape_reshape(op: Op) -> Shape | None:
    return op.result.shape if op.operands[0].value.size == op.result.size else None


def _shape_slice(op: Op) -> Shape | None:
    for have, want, start, step in zip(
        op.operands[0].shape, op.result.shape, op.attrs["start"], op.attrs["step"], strict=True
    ):
        if step < 1 or start < 0 or want < 1 or start + (want - 1) * step >= have:
            return None
    return op.result.shape


def _number(value: Any) -> bool:
    return isinstance(value, float)


def _alu(value: Any) -> bool:
    return isinstance(value, AluOp)


def _function(value: Any) -> bool:
    return isinstance(value, Function)


def _maybe_number(value: Any) -> bool:
    return value is None or isinstance(value, float)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(v) is int for v in value)


def _operand_types(value: Any) -> bool:
    allowed = (*NARROW_FLOATS, DType.INT8)
    return isinstance(value, tuple) and len(value) == 2 and all(v in allowed for v in value)


def _integers_legal(op: Op) -> bool:
    """Whether an operation does no more with integers than it can."""
    given = [use.value.dtype for use in op.operands]
    made = op.result.dtype
    if op.kind == "dot":
        types = [
            t for t, n in zip(op.attrs["types"], op.attrs["parts"], strict=True) for _ in range(n)
        ]
        same = all((t is DType.INT8) == (g in INTEGERS) for t, g in zip(types, given, strict=True))
        return same and (made not in INTEGERS or set(types) == {DType.INT8})
    if op.kind in ("kernel", "result", "fill"):
        return True
    if op.kind in ALIASES:
        return given == [made]
    if op.kind in ("act", "actb"):
        return not {made, *given} & {*INTEGERS}
    if op.kind == "select":
        # Words are moved; a number is one of FP32.
        given = given[1:]
        return made not in INTEGERS or (
            op.attrs["on_false"] is op.attrs["on_true"] is None and set(given) == {made}
        )
    return len({word_type(dtype) for dtype in given}) == 1


def _parts(value: Any) -> bool:
    return _pair(value) and all(count in (1, SPLIT_PARTS) for count in value)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What `verify_ir` demands of one kind: operand counts, attributes, the result's shape."""

    operands: Sequence[int]
    attrs: dict[str, Callable[[Any], bool]]
    shape: Callable[[Op], Shape | None]


RULES: dict[str, Rule] = {
    "tt": Rule((2,), {"op0": _alu, "imm0": _number, "op1": _alu}, _shape_elementwise),
    "ts": Rule((1,), {"op0": _alu, "imm0": _number, "op1": _alu, "imm1": _number}, _shape_ts),
    "act": Rule(
        (1,), {"function": _function, "scale": _number, "bias": _number}, _shape_elementwise
    ),
    "actb": Rule((2,), {"function": _function, "scale": _number}, _shape_elementwise),
    "select": Rule(
        (1, 2, 3), {"on_false": _maybe_number, "on_true": _maybe_number}, _shape_elementwise
    ),
    "reduce": Rule(
        (1,),
        {
            "op0": _alu,
            "imm0": _number,
            "op1": lambda value: value in REDUCTIONS,
            "axis": lambda value: value in (0, 1),
        },
        _shape_reduce,
    ),
    "dot": Rule(
        (2, 1 + SPLIT_PARTS, 2 * SPLIT_PARTS),
        {"types": _operand_types, "parts": _parts},
        _shape_dot,
    ),
    "reshape": Rule((1,), {}, _shape_reshape),
    "slice": Rule((1,), {"start": _pair, "step": _pair}, _shape_slice),
    "fill": Rule((0,), {"value": _number}, lambda op: op.result.shape),
    "kernel": Rule(
        range(1 << 16), {"call": lambda value: isinstance(value, Call)}, lambda op: op.result.shape
    ),
    "result": Rule(
        (1,), {"index": lambda value: type(value) is int and value > 0}, lambda op: op.result.shape
    ),
}


def verify_ir(graph: Graph, after: str) -> None:
    """Checks that a graph is legal; run between passes.

    Parameters
    ----------
    after : name of the pass that produced it, for the message; from "layout" on forms are demanded

    Raises
    ------
    CompileError : a pass is wrong (not the user's program)
    """

    def require(ok: bool, op: Op | None, what: str) -> None:
        if not ok:
            at = f": {op}" if op else ""
            raise CompileError(f"internal error after pass {after!r}: {what}{at}")

    defined: set[Value] = set()
    ids: set[int] = set()

    def define(value: Value, op: Op | None) -> None:
        require(value not in defined, op, f"{value} is defined twice")
        require(value.id not in ids, op, f"two values have the number {value.id}")
        require(min(value.shape) >= 1, op, f"{value} is empty")
        require(value.dtype in (*FLOATS, *INTEGERS), op, f"{value} has a type SBUF lacks")
        defined.add(value)
        ids.add(value.id)

    for value in graph.inputs:
        define(value, None)
    for value, elements in graph.constants.items():
        define(value, None)
        require(elements.shape == value.shape, None, f"constant {value} has shape {elements.shape}")
        kept = array_type(elements.dtype)
        require(kept is value.dtype, None, f"constant {value} has type {elements.dtype}")
    for op in graph.ops:
        rule = RULES.get(op.kind)
        require(rule is not None, op, "unknown kind")
        assert rule is not None
        require(len(op.operands) in rule.operands, op, "wrong number of operands")
        for use in op.operands:
            require(use.value in defined, op, f"{use.value} is used before it is defined")
        require(op.attrs.keys() == rule.attrs.keys(), op, f"attributes must be {set(rule.attrs)}")
        for key, check in rule.attrs.items():
            require(check(op.attrs[key]), op, f"attribute {key} is illegal")
        if op.kind == "select":
            numbers = sum(op.attrs[key] is not None for key in ("on_false", "on_true"))
            require(len(op.operands) + numbers == 3, op, "wrong number of operands")
        if after != "trace":
            require(_integers_legal(op), op, "no operation on integers")
        try:
            shape = rule.shape(op)
        except ValueError:
            shape = None
        require(shape == op.result.shape, op, f"the result's shape must be {shape}")
        if after in ("layout", "schedule"):
            forms = op_forms(op)
            require(op.form in forms or not forms, op, f"form must be one of {forms}")
        define(op.result, op)
    for use in graph.outputs:
        require(use.value in defined, None, f"output {use} is not defined")
