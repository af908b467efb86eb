"""From a jaxpr to the tensor IR.

Every equation whose operands are all known is evaluated by JAX itself, so integers, iota and
shapes never reach the chip. Calls are inlined. Transposes and broadcasts become part of the
operand: a `Ref` stands for a tensor that may be larger than the value behind it along dimensions
of size 1, and is expanded only where an operation or an output needs the elements.
"""

from __future__ import annotations

import linecache
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core
import jax.extend.source_info_util
import numpy as np
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FORMATS, INTEGERS, DType
from systolith_hdl.isa import DIVISIONS, AluOp, Function

from ..errors import CompileError, UnsupportedError
from ..kernel.call import Call
from ..kernel.function import Kernel, kernel_p
from ..kernels.embedding import embedding, embedding_grad, scatter_add
from .ir import ARRAY_TYPE_NAMES, ARRAY_TYPES, Graph, Op, Shape, Use, Value, array_type, broadcast

#: A traced tensor: the IR's value where the chip computes it, an array where it is known now.
#: The value's shape broadcasts to `canonical` of the JAX shape.
Ref = Use | np.ndarray

#: what `b op a` is as `a op' b`
MIRRORED = {
    AluOp.ADD: AluOp.ADD,
    AluOp.SUB: AluOp.RSUB,
    AluOp.RSUB: AluOp.SUB,
    AluOp.MUL: AluOp.MUL,
    AluOp.MAX: AluOp.MAX,
    AluOp.MIN: AluOp.MIN,
    AluOp.ABS_MAX: AluOp.ABS_MAX,
    AluOp.EQ: AluOp.EQ,
    AluOp.NE: AluOp.NE,
    AluOp.LT: AluOp.GT,
    AluOp.LE: AluOp.GE,
    AluOp.GT: AluOp.LT,
    AluOp.GE: AluOp.LE,
    AluOp.LOGICAL_AND: AluOp.LOGICAL_AND,
    AluOp.LOGICAL_OR: AluOp.LOGICAL_OR,
    AluOp.LOGICAL_XOR: AluOp.LOGICAL_XOR,
    AluOp.BIT_AND: AluOp.BIT_AND,
    AluOp.BIT_OR: AluOp.BIT_OR,
    AluOp.BIT_XOR: AluOp.BIT_XOR,
}

#: K over which a product of float32 operands is summed in PSUM; the vector engine adds up the rest
SPLIT_DEPTH = 128

#: primitives whose handlers take integers among others; `_INTEGER_HANDLERS` have those for integers
ANY_TYPE_PRIMITIVES = frozenset(
    {
        "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dot_general", "expand_dims",
        "gather", "optimization_barrier", "pvary", "reshape", "scatter-add", "select_n", "slice",
        "split", "squeeze", "stop_gradient", "systolith_kernel", "transpose",
    }
)  # fmt: skip

#: added as a bias it leaves every number as it is, -0.0 too
NO_BIAS = -0.0


def canonical(shape: Sequence[int]) -> Shape:
    """The IR's shape of a JAX shape of rank 0 to 2."""
    rows, cols = (1,) * (2 - len(shape)) + tuple(shape)
    return rows, cols


def describe(aval: Any) -> str:
    """``float32[3,4]``."""
    return f"{np.dtype(aval.dtype).name}[{','.join(map(str, aval.shape))}]"


def source_of(eqn: Any) -> str | None:
    """``file:line (function)`` of the user's statement behind an equation, if JAX kept it."""
    place = jax.extend.source_info_util.summarize(eqn.source_info)
    head, _, function = place.partition(" (")
    parts = head.rsplit(":", 2)
    if len(parts) != 3 or not parts[1].isdigit():
        return None
    path = parts[0]
    if os.path.isabs(path):
        relative = os.path.relpath(path)
        path = path if relative.startswith(os.pardir) else relative
    return f"{path}:{parts[1]}" + (f" ({function}" if function else "")


def _source_line(source: str | None) -> str:
    if source is None:
        return ""
    path, _, rest = source.partition(":")
    number = rest.split(" ")[0]
    line = linecache.getline(path, int(number)).strip() if number.isdigit() else ""
    return f"\n  at {source}" + (f"\n    {line}" if line else "")


def _known(value: Any) -> Any:
    """A known value as an array; a random key stays what it is until it is folded away."""
    extended = jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended)
    return value if extended else np.asarray(value)


Handler = Callable[..., "Ref | Sequence[Ref]"]
_HANDLERS: dict[str, Handler] = {}
#: primitive -> what takes its place if operands or results are integers
_INTEGER_HANDLERS: dict[str, Handler] = {}


_H = TypeVar("_H", bound=Handler)


def _lowers(*names: str) -> Callable[[_H], _H]:
    def register(handler: _H) -> _H:
        for name in names:
            _HANDLERS[name] = handler
        return handler

    return register


class _Refuse(Exception):
    """Raised by a handler; becomes an UnsupportedError that names the equation."""


def uniform(array: np.ndarray) -> float | None:
    """The number all elements of a known array are, or None if they differ."""
    flat = np.asarray(array).ravel()
    if flat.size and array_type(flat.dtype) in INTEGERS:
        return float(flat[0]) if (flat == flat[0]).all() else None  # exact
    flat = flat.astype(np.float32)
    if flat.size and (flat.view(np.uint32) == flat.view(np.uint32)[0]).all():
        return float(flat[0])
    return None


class Tracer:
    """Builds a graph, one equation after the other.

    Parameters
    ----------
    matmul : narrow float that FP32 operands of matrix products are rounded to; FP32: not rounded
    config : the core that it is for
    """

    def __init__(self, matmul: DType, config: CoreConfig) -> None:
        self.matmul = matmul
        self._config = config
        self.graph = Graph()
        self._source: str | None = None
        self._label = ""
        self._known_ops: dict[tuple, Use] = {}
        self._constants: dict[tuple[Shape, DType, bytes], Use] = {}
        #: value that is exactly an INT8 value in a wider type -> that
        self._widened: dict[Value, Use] = {}
        self._next = 0

    # --- values --------------------------------------------------------------------------

    def value(self, shape: Shape, dtype: DType = DType.FP32, name: str = "") -> Value:
        """A new value."""
        self._next += 1
        return Value(self._next - 1, shape, dtype, name)

    def input(self, shape: Sequence[int], dtype: np.dtype, name: str) -> Use:
        """A new input; raises UnsupportedError for a shape or type the compiler lacks."""
        kept = array_type(dtype)
        if len(shape) > 2 or 0 in shape or kept is None:
            raise UnsupportedError(
                f"argument {name} is {np.dtype(dtype).name}{list(shape)}; arguments are "
                f"{ARRAY_TYPE_NAMES}, of rank 0 to 2, and not empty"
            )
        value = self.value(canonical(shape), kept, name)
        self.graph.inputs.append(value)
        return Use(value)

    def emit(
        self,
        kind: str,
        operands: Sequence[Use],
        shape: Shape,
        dtype: DType = DType.FP32,
        *,
        nearest: bool = False,
        **attrs: Any,
    ) -> Use:
        """Appends an operation, or finds the one that already computes the same."""
        if attrs.get("op1") in DIVISIONS and not self._config.divider:
            raise _Refuse(self._config.lacks("divider", attrs["op1"].name))
        key = (kind, tuple(operands), tuple(map(repr, attrs.items())), shape, dtype, nearest)
        if key not in self._known_ops:
            result = self.value(shape, dtype, self._label)
            result.nearest = nearest
            self.graph.ops.append(
                Op(kind, list(operands), attrs, result, self._source, self._label)
            )
            self._known_ops[key] = Use(result)
        return self._known_ops[key]

    def use(self, ref: Ref) -> Use:
        """The ref as an operand; a known array becomes a constant, a uniform one of size 1."""
        if isinstance(ref, Use):
            return ref
        number = uniform(ref)
        if number is not None:
            return self.emit("fill", [], (1, 1), value=number)
        return self._constant(np.asarray(ref).astype(np.float32), DType.FP32)

    def _constant(self, elements: np.ndarray, dtype: DType) -> Use:
        array = elements.reshape(canonical(elements.shape))
        key = (canonical(array.shape), dtype, array.tobytes())
        if key not in self._constants:
            value = self.value(canonical(array.shape), dtype, "constant")
            self.graph.constants[value] = array
            self._constants[key] = Use(value)
        return self._constants[key]

    def full(self, ref: Ref, shape: Shape) -> Use:
        """The ref with all its elements."""
        if isinstance(ref, np.ndarray):
            kept = array_type(ref.dtype)
            if kept in INTEGERS:
                return self._constant(ref, kept)
            number = uniform(ref)
            if number is not None:
                return self.emit("fill", [], shape, value=number)
        use = self.use(ref)
        if use.shape == shape:
            return use
        if use.value.dtype in INTEGERS:
            return self._moved(use, shape, use.value.dtype)
        return self._ts(AluOp.BYPASS, use, 0.0, shape)

    def array(self, ref: Ref, shape: Shape, dtype: DType) -> Use:
        """The ref with all its elements, known ones packed in `dtype`."""
        if isinstance(ref, np.ndarray):
            numpy = FORMATS[dtype].numpy
            return self._constant(np.broadcast_to(ref, ref.shape).astype(numpy), dtype)
        return self.full(ref, shape)

    def _moved(self, use: Use, shape: Shape, dtype: DType, *, nearest: bool = False) -> Use:
        """A copy of another shape or type."""
        attrs = {"op0": AluOp.BYPASS, "imm0": 0.0, "op1": AluOp.BYPASS, "imm1": 0.0}
        return self.emit("ts", [use], shape, dtype, nearest=nearest, **attrs)

    def cast(self, use: Use, dtype: DType) -> Use:
        """A copy converted to another type. As operands of matrix products, floats and integers
        made of INT8 are the INT8 numbers themselves (see `int8_behind`)."""
        result = self._moved(Use(use.value), use.value.shape, dtype).value
        # All numbers of INT8 are those of a float with its sign and 7 more bits.
        if use.value.dtype is DType.INT8 and (dtype in INTEGERS or FORMATS[dtype].fraction >= 7):
            self._widened[result] = Use(use.value)
        return Use(result, use.transposed)

    def int8_behind(self, use: Use) -> Use:
        """The INT8 value that `use` is in a wider type; `use` itself if there is none."""
        found = self._widened.get(use.value)
        return Use(found.value, use.transposed) if found else use

    def index(self, ref: Ref, count: int) -> Use:
        """A vector of indices from an array [count, 1]."""
        if isinstance(ref, Use):
            return self.array(ref.t, canonical((count,)), DType.INT32)
        return self.array(ref.reshape(count), canonical((count,)), DType.INT32)

    # --- operations ----------------------------------------------------------------------

    @staticmethod
    def _places(op: AluOp, value: float) -> dict[str, Any]:
        """Attributes of ``a op value``. What only the second ALU has goes there."""
        if op in DIVISIONS:
            return {"op0": AluOp.BYPASS, "imm0": 0.0, "op1": op, "imm1": value}
        return {"op0": op, "imm0": value, "op1": AluOp.BYPASS, "imm1": 0.0}

    def _ts(self, op: AluOp, a: Use, imm: float, shape: Shape | None = None) -> Use:
        return self.emit("ts", [a], shape or a.shape, **self._places(op, float(np.float32(imm))))

    def binary(self, op: AluOp, a: Ref, b: Ref) -> Use:
        """``a op b``, at least one of them not known."""
        a_number = None if isinstance(a, Use) else uniform(a)
        b_number = None if isinstance(b, Use) else uniform(b)
        if a_number is not None and b_number is not None:
            return self._fail()
        if a_number is not None and op in MIRRORED:
            return self.binary(MIRRORED[op], b, a)
        if b_number is not None:
            use = self.use(a)
            neutral = {
                AluOp.MUL: 1.0,
                AluOp.MAX: -math.inf,
                AluOp.MIN: math.inf,
                AluOp.SUB: 0.0,
            }
            if neutral.get(op) == b_number and math.copysign(1, b_number) == math.copysign(
                1, neutral[op]
            ):
                return use
            return self._ts(op, use, b_number)
        left, right = self.use(a), self.use(b)
        shape = broadcast(left.shape, right.shape)
        return self.emit("tt", [left, right], shape, op0=AluOp.BYPASS, imm0=0.0, op1=op)

    def number(self, ref: Ref, dtype: DType) -> Use:
        """An integer operand; known ones become constants of type `dtype`."""
        if isinstance(ref, Use):
            return ref
        value = uniform(ref)
        if value is not None:
            return self.emit("fill", [], (1, 1), dtype, value=value)
        return self._constant(np.asarray(ref).astype(FORMATS[dtype].numpy), dtype)

    def integers(self, op: AluOp, a: Ref, b: Ref, made: DType, given: DType) -> Use:
        """``a op b`` of integers of type `given`, at least one of them not known; `made` is the
        type of the result."""
        if not isinstance(a, Use) and op in MIRRORED:
            return self.integers(MIRRORED[op], b, a, made, given)
        left = self.number(a, given)
        value = None if isinstance(b, Use) else uniform(b)
        if value is not None:
            return self.alone(op, left, made, value)
        right = self.number(b, given)
        shape = broadcast(left.shape, right.shape)
        return self.emit("tt", [left, right], shape, made, op0=AluOp.BYPASS, imm0=0.0, op1=op)

    def alone(self, op: AluOp, a: Use, made: DType, value: float = 0.0) -> Use:
        """``a op value`` of integers."""
        return self.emit("ts", [a], a.shape, made, **self._places(op, value))

    def _fail(self) -> Use:
        raise CompileError("internal error: an operation on numbers was not folded")

    def act(self, function: Function, a: Ref, scale: float = 1.0, bias: float = NO_BIAS) -> Use:
        """``function(a * scale + bias)``."""
        use = self.use(a)
        return self.emit("act", [use], use.shape, function=function, scale=scale, bias=bias)

    def mul(self, a: Ref, b: Ref) -> Use:
        return self.binary(AluOp.MUL, a, b)

    def add(self, a: Ref, b: Ref) -> Use:
        return self.binary(AluOp.ADD, a, b)

    def sub(self, a: Ref, b: Ref) -> Use:
        return self.binary(AluOp.SUB, a, b)

    def scalar(self, number: float) -> np.ndarray:
        return np.asarray(number, np.float32)

    def select(self, mask: Ref, on_false: Ref, on_true: Ref, dtype: DType = DType.FP32) -> Use:
        """``on_true where mask else on_false``."""
        operands = [self.use(mask)]
        attrs: dict[str, Any] = {"on_false": None, "on_true": None}
        for key, ref in (("on_false", on_false), ("on_true", on_true)):
            number = None if isinstance(ref, Use) or dtype in INTEGERS else uniform(ref)
            attrs[key] = number
            if number is None:
                known = isinstance(ref, np.ndarray) and dtype in INTEGERS
                operands.append(self.full(ref, canonical(ref.shape)) if known else self.use(ref))
        shape = broadcast(*(use.shape for use in operands))
        return self.emit("select", operands, shape, dtype, **attrs)

    def split(self, use: Use) -> tuple[Use, ...]:
        """The BF16 numbers that an FP32 operand of a matrix product is the sum of.

        Each is what rounding the rest to BF16 gives, so three hold 24 bits. What rounds beyond BF16
        is clipped to its largest number; the second part has the rest. That takes rounding to
        nearest: the parts are operands, not results.
        """
        x = Use(use.value)
        largest = float(np.uint32(FORMATS[DType.BF16].largest).view(np.float32))
        clip = {"op0": AluOp.MAX, "imm0": -largest, "op1": AluOp.MIN, "imm1": largest}
        high = self.emit("ts", [x], x.shape, DType.BF16, nearest=True, **clip)
        rest = self.sub(x, high)
        middle = self.rounded(rest, DType.BF16, nearest=True)
        minus = {"op0": AluOp.BYPASS, "imm0": 0.0, "op1": AluOp.SUB}
        low = self.emit("tt", [rest, middle], x.shape, DType.BF16, nearest=True, **minus)
        return tuple(part.t if use.transposed else part for part in (high, middle, low))

    def reduce(self, op: AluOp, use: Use, axis: int, dtype: DType = DType.FP32) -> Use:
        """Reduction of `use` along one axis, kept as size 1."""
        rows, cols = use.shape
        if use.shape[axis] == 1:
            return use
        shape = (rows, 1) if axis == 1 else (1, cols)
        return self.emit(
            "reduce", [use], shape, dtype, op0=AluOp.BYPASS, imm0=0.0, op1=op, axis=axis
        )

    # --- equations -----------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Ref]) -> list[Ref]:
        """Lowers the equations of a jaxpr; returns what its outputs are."""
        env: dict[Any, Ref] = {}

        def read(atom: Any) -> Ref:
            if isinstance(atom, jax.extend.core.Literal):
                return np.asarray(atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
            return env[atom]

        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = _known(const)
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            for var, result in zip(eqn.outvars, self.equation(eqn, operands), strict=True):
                env[var] = result
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Ref]) -> Sequence[Ref]:
        """Lowers one equation."""
        outer = self._source, self._label
        source = source_of(eqn)
        self._source, self._label = source or outer[0], eqn.primitive.name
        try:
            inner = self._inner_jaxpr(eqn)
            if inner is not None:
                jaxpr, consts = inner
                return self.run(jaxpr, consts, operands)
            if eqn.primitive is not kernel_p and not any(isinstance(ref, Use) for ref in operands):
                return self._fold(eqn, operands)
            return self._lower(eqn, operands)
        finally:
            self._source, self._label = outer

    def _inner_jaxpr(self, eqn: Any) -> tuple[Any, Sequence[Any]] | None:
        if eqn.primitive.name not in (
            "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
            "custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint", "custom_lin",
        ):  # fmt: skip
            return None
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = eqn.params.get(key)
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                return inner.jaxpr, inner.consts
            if inner is not None:
                return inner, ()
        return None

    def _fold(self, eqn: Any, operands: list[Any]) -> Sequence[Ref]:
        with jax.ensure_compile_time_eval():
            params = eqn.primitive.get_bind_params(eqn.params)
            # JAX before 0.10 hands out traced functions beside the parameters.
            functions, params = params if isinstance(params, tuple) else ((), params)
            results = eqn.primitive.bind(*functions, *operands, **params)
        if not eqn.primitive.multiple_results:
            results = [results]
        return [_known(result) for result in results]

    def _lower(self, eqn: Any, operands: list[Ref]) -> Sequence[Ref]:
        name = eqn.primitive.name
        avals = [atom.aval for atom in eqn.invars]
        outs = [var.aval for var in eqn.outvars]

        def refuse(reason: str) -> UnsupportedError:
            types = ", ".join(describe(aval) for aval in avals)
            made = ", ".join(describe(aval) for aval in outs)
            where = _source_line(self._source)
            return UnsupportedError(f"{reason}: {name} {types} -> {made}{where}")

        handler = _HANDLERS.get(name)
        if handler is None and name not in _INTEGER_HANDLERS:
            raise refuse(f"the primitive {name!r} is not supported")
        for aval in (*avals, *outs):
            if len(aval.shape) > 2:
                raise refuse("tensors have at most two dimensions")
            if 0 in aval.shape:
                raise refuse("empty tensors are not supported")
        for aval in outs:
            if array_type(aval.dtype) is None:
                raise refuse(
                    f"{np.dtype(aval.dtype).name} is not a type the chip computes with "
                    f"({ARRAY_TYPE_NAMES})"
                )
        if name not in ANY_TYPE_PRIMITIVES:
            given = [v.aval for v, ref in zip(eqn.invars, operands, strict=True)
                     if isinstance(ref, Use)]  # fmt: skip
            if any(array_type(aval.dtype) in INTEGERS for aval in (*given, *outs)):
                handler = _INTEGER_HANDLERS.get(name)
                if handler is None:
                    raise refuse(f"the primitive {name!r} is not supported for integers")
        if handler is None:
            raise refuse(f"the primitive {name!r} is supported for integers only")
        first = len(self.graph.ops)
        try:
            results = handler(self, eqn, *operands)
        except _Refuse as error:
            raise refuse(str(error)) from None
        if isinstance(results, Use | np.ndarray):
            results = [results]
        fresh = {op.result: op for op in self.graph.ops[first:]}
        return [
            self._rounded(result, aval, fresh) for result, aval in zip(results, outs, strict=True)
        ]

    def _rounded(self, ref: Ref, aval: Any, fresh: dict[Value, Op]) -> Ref:
        """Rounds the result of an equation to its type if that is a narrow one."""
        dtype = array_type(aval.dtype)
        if not isinstance(ref, Use) or dtype in (None, DType.FP32, *INTEGERS):
            return ref
        if _includes(dtype, ref.value.dtype):
            return ref
        op = fresh.get(ref.value)
        if op is not None and op.kind in ("tt", "ts", "act", "actb", "reduce"):
            # The last operation itself rounds what it writes; it must not be taken for the
            # one that does not.
            self._known_ops = {k: u for k, u in self._known_ops.items() if u.value is not ref.value}
            ref.value.dtype = dtype
            return ref
        if op is None and _is_mask(self.graph, ref.value):
            return ref
        return self.rounded(ref, dtype)

    def rounded(self, use: Use, dtype: DType, *, nearest: bool = False) -> Use:
        """`use` rounded to a narrow float."""
        return self._moved(use, use.shape, dtype, nearest=nearest)


def _includes(dtype: DType, other: DType) -> bool:
    """Whether a type has every number of another one."""
    wide, narrow = FORMATS[dtype], FORMATS[other]
    return wide.exponent >= narrow.exponent and wide.fraction >= narrow.fraction


def _is_mask(graph: Graph, value: Value) -> bool:
    """Whether an existing value is a mask, whose 1.0 and 0.0 every type has."""
    compares = (AluOp.EQ, AluOp.NE, AluOp.LT, AluOp.LE, AluOp.GT, AluOp.GE)
    logical = (AluOp.LOGICAL_AND, AluOp.LOGICAL_OR, AluOp.LOGICAL_XOR)
    for op in graph.ops:
        if op.result is value and op.kind in ("tt", "ts"):
            last = op.attrs["op1"] if op.attrs["op1"] is not AluOp.BYPASS else op.attrs["op0"]
            return last in compares + logical
    return False


# --- elementwise primitives -----------------------------------------------------------------


def _register_binary(name: str, op: AluOp) -> None:
    _HANDLERS[name] = lambda t, eqn, a, b: t.binary(op, a, b)


for _name, _op in {
    "add": AluOp.ADD,
    "add_any": AluOp.ADD,
    "sub": AluOp.SUB,
    "mul": AluOp.MUL,
    "rem": AluOp.MOD,
    "max": AluOp.MAX,
    "min": AluOp.MIN,
    "eq": AluOp.EQ,
    "ne": AluOp.NE,
    "lt": AluOp.LT,
    "le": AluOp.LE,
    "gt": AluOp.GT,
    "ge": AluOp.GE,
    "and": AluOp.LOGICAL_AND,
    "or": AluOp.LOGICAL_OR,
    "xor": AluOp.LOGICAL_XOR,
}.items():
    _register_binary(_name, _op)


def _register_function(name: str, function: Function) -> None:
    _HANDLERS[name] = lambda t, eqn, a, **_: t.act(function, a)


for _name, _function in {
    "exp": Function.EXP,
    "log": Function.LOG,
    "tanh": Function.TANH,
    "logistic": Function.SIGMOID,
    "erf": Function.ERF,
    "atan": Function.ARCTAN,
    "sin": Function.SIN,
    "cos": Function.COS,
    "sign": Function.SIGN,
    "sqrt": Function.SQRT,
    "rsqrt": Function.RSQRT,
    "systolith_gelu": Function.GELU,
    "systolith_gelu_dx": Function.GELU_DX,
    "systolith_gelu_tanh": Function.GELU_TANH,
    "systolith_gelu_tanh_dx": Function.GELU_TANH_DX,
    "systolith_silu": Function.SILU,
    "systolith_silu_dx": Function.SILU_DX,
    "systolith_mish": Function.MISH,
    "systolith_mish_dx": Function.MISH_DX,
    "systolith_softplus": Function.SOFTPLUS,
}.items():
    _register_function(_name, _function)


@_lowers("exp2")
def _exp2(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.act(Function.EXP, a, scale=float(np.float32(math.log(2))))


@_lowers("erfc")
def _erfc(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.binary(AluOp.RSUB, t.act(Function.ERF, a), t.scalar(1.0))


@_lowers("copy", "copy_p", "stop_gradient", "optimization_barrier", "pvary")
def _copy(t: Tracer, eqn: Any, *operands: Ref) -> Sequence[Ref]:
    return operands


@_lowers("neg")
def _neg(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.mul(a, t.scalar(-1.0))


@_lowers("abs")
def _abs(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.binary(AluOp.ABS_MAX, a, t.scalar(0.0))


@_lowers("not")
def _not(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.binary(AluOp.EQ, a, t.scalar(0.0))


@_lowers("is_finite")
def _is_finite(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.binary(AluOp.LT, _abs(t, eqn, a), t.scalar(math.inf))


@_lowers("clamp")
def _clamp(t: Tracer, eqn: Any, low: Ref, a: Ref, high: Ref) -> Use:
    return t.binary(AluOp.MIN, t.binary(AluOp.MAX, a, low), high)


@_lowers("square")
def _square(t: Tracer, eqn: Any, a: Ref) -> Use:
    return t.mul(a, a)


def _reciprocal(t: Tracer, a: Ref) -> Use:
    return t.act(Function.RECIPROCAL, a)


@_lowers("div")
def _div(t: Tracer, eqn: Any, a: Ref, b: Ref) -> Use:
    if isinstance(b, np.ndarray):
        with np.errstate(divide="ignore", over="ignore"):
            return t.mul(a, np.float32(1.0) / b.astype(np.float32))
    return t.mul(_reciprocal(t, b), a)


def _power(t: Tracer, a: Ref, exponent: int) -> Use:
    """a to the power of a positive integer."""
    result: Ref | None = None
    square = a
    while exponent:
        if exponent & 1:
            result = square if result is None else t.mul(result, square)
        exponent >>= 1
        if exponent:
            square = t.mul(square, square)
    assert result is not None
    return t.use(result)


@_lowers("integer_pow")
def _integer_pow(t: Tracer, eqn: Any, a: Ref) -> Ref:
    exponent = eqn.params["y"]
    if exponent == 0:
        return t.scalar(1.0)
    power = _power(t, a, abs(exponent))
    return power if exponent > 0 else _reciprocal(t, power)


@_lowers("pow")
def _pow(t: Tracer, eqn: Any, a: Ref, b: Ref) -> Ref:
    exponent = None if isinstance(b, Use) else uniform(b)
    if exponent == 0.5:
        return t.act(Function.SQRT, a)
    if exponent == -0.5:
        return t.act(Function.RSQRT, a)
    if exponent == 0.0:
        return t.scalar(1.0)
    if exponent is not None and exponent == int(exponent) and abs(exponent) <= 64:
        power = _power(t, a, abs(int(exponent)))
        return power if exponent > 0 else _reciprocal(t, power)
    if isinstance(a, np.ndarray):
        if (a < 0).any():
            raise _Refuse("a power of a negative number")
        with np.errstate(divide="ignore"):
            return t.act(Function.EXP, t.mul(b, np.log(a.astype(np.float32))))
    return t.act(Function.EXP, t.mul(t.act(Function.LOG, a), b))


@_lowers("log1p")
def _log1p(t: Tracer, eqn: Any, a: Ref) -> Use:
    # u = 1 + a is rounded; the first-order correction for what was lost is (a - (u - 1)) / u.
    # Where log(u) is not finite there is nothing to correct.
    u = t.add(a, t.scalar(1.0))
    log = t.act(Function.LOG, u)
    lost = t.sub(a, t.sub(u, t.scalar(1.0)))
    corrected = t.add(t.mul(_reciprocal(t, u), lost), log)
    return t.select(_is_finite(t, eqn, log), log, corrected)


@_lowers("expm1")
def _expm1(t: Tracer, eqn: Any, a: Ref) -> Use:
    # exp(a) - 1 cancels near zero; there 2 h / (1 - h) with h = tanh(a / 2) does not.
    h = t.act(Function.TANH, a, scale=0.5)
    small = t.mul(_reciprocal(t, t.binary(AluOp.RSUB, h, t.scalar(1.0))), t.mul(h, t.scalar(2.0)))
    large = t.sub(t.act(Function.EXP, a), t.scalar(1.0))
    return t.select(t.binary(AluOp.LT, _abs(t, eqn, a), t.scalar(1.0)), large, small)


@_lowers("select_n")
def _select_n(t: Tracer, eqn: Any, mask: Ref, *cases: Ref) -> Ref:
    if len(cases) != 2 or np.dtype(eqn.invars[0].aval.dtype) != np.bool_:
        raise _Refuse("only a choice of two by a bool is supported")
    if isinstance(mask, np.ndarray):
        number = uniform(mask)
        if number is not None:
            return cases[int(number)]
    kept = array_type(eqn.outvars[0].aval.dtype)
    return t.select(mask, *cases, kept if kept in INTEGERS else DType.FP32)


@_lowers("convert_element_type")
def _convert_element_type(t: Tracer, eqn: Any, a: Ref) -> Ref:
    new, old = (np.dtype(v.aval.dtype).name for v in (eqn.outvars[0], eqn.invars[0]))
    kept, given = ARRAY_TYPES[new], ARRAY_TYPES.get(old)
    if {kept, given} & {*INTEGERS}:
        if new == "bool":
            return t.alone(AluOp.NE, t.use(a), DType.FP32)
        return a if kept is given else t.cast(t.use(a), kept)
    if new == "bool" and old != "bool":
        return t.binary(AluOp.NE, a, t.scalar(0.0))
    return a


@_lowers("reduce_precision")
def _reduce_precision(t: Tracer, eqn: Any, a: Ref) -> Ref:
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    if bits == (8, 23):
        return a
    # FP8_E4M3 overflows to NaN, a reduced precision of its widths to infinity.
    for dtype in (DType.BF16, DType.FP16, DType.FP8_E5M2):
        if bits == (FORMATS[dtype].exponent, FORMATS[dtype].fraction):
            return t.rounded(t.use(a), dtype)
    raise _Refuse(f"precision of {bits[0]} exponent and {bits[1]} mantissa bits")


# --- shapes ---------------------------------------------------------------------------------


@_lowers("transpose")
def _transpose(t: Tracer, eqn: Any, a: Ref) -> Ref:
    use = t.use(a)
    return use.t if tuple(eqn.params["permutation"]) == (1, 0) else use


@_lowers("broadcast_in_dim")
def _broadcast_in_dim(t: Tracer, eqn: Any, a: Ref, *_: Ref) -> Ref:
    use = t.use(a)
    # A vector that runs along dimension 0 of a matrix is a column.
    vector = len(eqn.invars[0].aval.shape) == 1 and len(eqn.outvars[0].aval.shape) == 2
    return use.t if vector and tuple(eqn.params["broadcast_dimensions"]) == (0,) else use


@_lowers("reshape", "squeeze", "expand_dims")
def _reshape(t: Tracer, eqn: Any, a: Ref, *_: Ref) -> Ref:
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        raise _Refuse("a reshape with an order of dimensions")
    old = canonical(eqn.invars[0].aval.shape)
    new = canonical(eqn.outvars[0].aval.shape)
    use = t.use(a)
    if old == new:
        return use
    if old == new[::-1] and 1 in old:
        return use.t
    full = t.full(use, old)
    return t.emit("reshape", [full], new, full.value.dtype)


def _sliced(t: Tracer, a: Ref, start: Shape, shape: Shape, step: Shape = (1, 1)) -> Ref:
    use = t.use(a)
    # Along a dimension that is only broadcast, every slice is the same.
    (row, col), (rows, cols) = start, shape
    if use.shape[0] == 1:
        row, rows = 0, 1
    if use.shape[1] == 1:
        col, cols = 0, 1
    if (rows, cols) == use.shape:
        return use
    return t.emit("slice", [use], (rows, cols), use.value.dtype, start=(row, col), step=step)


@_lowers("slice")
def _slice(t: Tracer, eqn: Any, a: Ref) -> Ref:
    starts = [int(start) for start in eqn.params["start_indices"]]
    steps = [int(step) for step in eqn.params["strides"] or (1,) * len(starts)]
    row, col = [0] * (2 - len(starts)) + starts
    row_step, col_step = [1] * (2 - len(steps)) + steps
    shape = canonical(eqn.outvars[0].aval.shape)
    return _sliced(t, a, (row, col), shape, (row_step, col_step))


@_lowers("split")
def _split(t: Tracer, eqn: Any, a: Ref) -> Sequence[Ref]:
    axis = eqn.params["axis"] + 2 - len(eqn.invars[0].aval.shape)
    start = 0
    parts = []
    for var, size in zip(eqn.outvars, map(int, eqn.params["sizes"]), strict=True):
        begin = (start, 0) if axis == 0 else (0, start)
        parts.append(_sliced(t, a, begin, canonical(var.aval.shape)))
        start += size
    return parts


# --- reductions and contractions ------------------------------------------------------------


def _reduced(eqn: Any, use: Use, step: Callable[[Use, int], Use]) -> Use:
    """What is left of an operand when `step` has reduced its axes one after the other."""
    shape = eqn.invars[0].aval.shape
    axes = [axis + 2 - len(shape) for axis in eqn.params["axes"]]
    for axis in sorted(axes, reverse=True):
        use = step(use, axis)
    # What is left of a matrix without its columns is a vector.
    return use.t if len(shape) == 2 and axes == [1] else use


def _register_reduction(name: str, op: AluOp) -> None:
    def handler(t: Tracer, eqn: Any, a: Ref) -> Ref:
        full = canonical(eqn.invars[0].aval.shape)

        def step(use: Use, axis: int) -> Use:
            if use.shape[axis] > 1 or full[axis] == 1:
                return t.reduce(op, use, axis)
            # The same element again and again.
            if op is AluOp.ADD:
                return t.mul(use, t.scalar(full[axis]))
            return _power(t, use, full[axis]) if op is AluOp.MUL else use

        return _reduced(eqn, t.use(a), step)

    _HANDLERS[name] = handler


for _name, _op in {
    "reduce_sum": AluOp.ADD,
    "reduce_max": AluOp.MAX,
    "reduce_min": AluOp.MIN,
    "reduce_prod": AluOp.MUL,
    "reduce_and": AluOp.MIN,
    "reduce_or": AluOp.MAX,
}.items():
    _register_reduction(_name, _op)


# --- integers -------------------------------------------------------------------------------


def _types(eqn: Any) -> tuple[DType, DType]:
    """Types of the last operand and of the result."""
    given, made = eqn.invars[-1].aval.dtype, eqn.outvars[0].aval.dtype
    return ARRAY_TYPES[np.dtype(given).name], ARRAY_TYPES[np.dtype(made).name]


def _register_integer(name: str, op: AluOp) -> None:
    def handler(t: Tracer, eqn: Any, a: Ref, b: Ref) -> Use:
        given, made = _types(eqn)
        return t.integers(op, a, b, made, given)

    _INTEGER_HANDLERS[name] = handler


for _name, _op in {
    "add": AluOp.ADD,
    "add_any": AluOp.ADD,
    "sub": AluOp.SUB,
    "mul": AluOp.MUL,
    "div": AluOp.DIVIDE,
    "rem": AluOp.MOD,
    "max": AluOp.MAX,
    "min": AluOp.MIN,
    "eq": AluOp.EQ,
    "ne": AluOp.NE,
    "lt": AluOp.LT,
    "le": AluOp.LE,
    "gt": AluOp.GT,
    "ge": AluOp.GE,
    "and": AluOp.BIT_AND,
    "or": AluOp.BIT_OR,
    "xor": AluOp.BIT_XOR,
    "shift_left": AluOp.SHIFT_LEFT,
    "shift_right_arithmetic": AluOp.SHIFT_RIGHT_SIGNED,
}.items():
    _register_integer(_name, _op)


def _shift_right_logical(t: Tracer, eqn: Any, a: Ref, b: Ref) -> Use:
    given, made = _types(eqn)
    if given is DType.INT8:
        raise _Refuse("zeros cannot come in from the left of int8, which lies in 32 bits")
    return t.integers(AluOp.SHIFT_RIGHT, a, b, made, given)


_INTEGER_HANDLERS["shift_right_logical"] = _shift_right_logical


def _register_alone(name: str, op: AluOp) -> None:
    _INTEGER_HANDLERS[name] = lambda t, eqn, a: t.alone(op, a, _types(eqn)[1])


for _name, _op in {
    "neg": AluOp.NEG,
    "abs": AluOp.ABS,
    "not": AluOp.BIT_NOT,
    "square": AluOp.SQUARE,
}.items():
    _register_alone(_name, _op)


def _integer_sign(t: Tracer, eqn: Any, a: Use) -> Use:
    _, made = _types(eqn)
    clipped = t.alone(AluOp.MIN, a, made, 1.0)
    return clipped if made is DType.UINT32 else t.alone(AluOp.MAX, clipped, made, -1.0)


def _integer_clamp(t: Tracer, eqn: Any, low: Ref, a: Ref, high: Ref) -> Use:
    given, made = _types(eqn)
    if isinstance(low, Use) or isinstance(a, Use):
        least: Ref = t.integers(AluOp.MAX, a, low, made, given)
    else:
        least = np.maximum(a, low)
    return t.integers(AluOp.MIN, least, high, made, given)


def _integer_power(t: Tracer, eqn: Any, a: Use) -> Ref:
    _, made = _types(eqn)
    exponent = eqn.params["y"]
    if exponent < 0:
        raise _Refuse("a negative power of integers")
    result: Use | None = None
    square = a
    while exponent:
        if exponent & 1:
            result = square if result is None else t.integers(AluOp.MUL, result, square, made, made)
        exponent >>= 1
        if exponent:
            square = t.alone(AluOp.SQUARE, square, made)
    return result if result is not None else np.ones((), FORMATS[made].numpy)


_INTEGER_HANDLERS["sign"] = _integer_sign
_INTEGER_HANDLERS["clamp"] = _integer_clamp
_INTEGER_HANDLERS["integer_pow"] = _integer_power


def _register_integer_reduction(name: str, op: AluOp) -> None:
    def handler(t: Tracer, eqn: Any, a: Ref) -> Use:
        given, made = _types(eqn)
        use = t.full(t.number(a, given), canonical(eqn.invars[0].aval.shape))
        return _reduced(eqn, use, lambda use, axis: t.reduce(op, use, axis, made))

    _INTEGER_HANDLERS[name] = handler


for _name, _op in {
    "reduce_sum": AluOp.ADD,
    "reduce_max": AluOp.MAX,
    "reduce_min": AluOp.MIN,
    "reduce_prod": AluOp.MUL,
    "reduce_and": AluOp.BIT_AND,
    "reduce_or": AluOp.BIT_OR,
    "reduce_xor": AluOp.BIT_XOR,
}.items():
    _register_integer_reduction(_name, _op)


def _small(ref: Ref, integers: bool) -> Ref:
    """A known int32 operand of a product: as int8 if its numbers are, for a result of integers; as
    float32 for another."""
    if isinstance(ref, Use) or ref.dtype != np.int32:
        return ref
    if not integers:
        return ref.astype(np.float32)
    small = ref.astype(np.int8)
    return small if (small == ref).all() else ref


def _as_matrices(t: Tracer, left: Use, right: Use, eqn: Any) -> tuple[Use, Use, Shape, Shape]:
    """Operands of a product that sums over all dimensions, or over none, as [M, K] and [K, F]."""
    a_shape, b_shape = (v.aval.shape for v in eqn.invars)
    (a_axes, b_axes), _ = eqn.params["dimension_numbers"]
    if a_axes:
        if dict(zip(a_axes, b_axes, strict=True))[0] != 0:
            right = right.t
        size = math.prod(a_shape)
        left = t.emit("reshape", [left], (1, size), left.value.dtype)
        right = t.emit("reshape", [right], (1, size), right.value.dtype).t
        return left, right, (1, size), (size, 1)
    if max(len(a_shape), len(b_shape)) > 1:
        raise _Refuse("products of int8 without an axis to sum over are for vectors")
    return left.t, right, left.t.shape, right.shape


def _along_k(t: Tracer, use: Use, axis: int, start: int, length: int) -> Use:
    """Part of an operand of a product: `length` of its elements along `axis`."""
    plain = Use(use.value)
    axis ^= use.transposed
    rows, cols = plain.shape
    begin, shape = ((start, 0), (length, cols)) if axis == 0 else ((0, start), (rows, length))
    part = t.use(_sliced(t, plain, begin, shape))
    return part.t if use.transposed else part


def _product(t: Tracer, left: Use, right: Use, types: Sequence[DType], made: DType) -> Use:
    """``left @ right``, [M, K] @ [K, F], with the operands rounded to `types`; one of FP32 is not
    rounded but multiplied in parts. `made` is FP32 or, of operands of INT8, an integer type."""
    (m, k), (_, f) = left.shape, right.shape
    # A value of a narrow type, whatever the array's, is an operand as it is.
    types = [
        use.value.dtype if dtype is DType.FP32 else dtype
        for use, dtype in zip((left, right), types, strict=True)
    ]
    depth = SPLIT_DEPTH if DType.FP32 in types else k
    total: Use | None = None
    for start in range(0, k, depth):
        length = min(depth, k - start)
        parts = [
            t.split(part) if dtype is DType.FP32 else (part,)
            for part, dtype in (
                (_along_k(t, left, 1, start, length), types[0]),
                (_along_k(t, right, 0, start, length), types[1]),
            )
        ]
        product = t.emit(
            "dot",
            [*parts[0], *parts[1]],
            (m, f),
            made,
            types=tuple(DType.BF16 if dtype is DType.FP32 else dtype for dtype in types),
            parts=(len(parts[0]), len(parts[1])),
        )
        total = product if total is None else t.add(total, product)
    assert total is not None
    return total


@_lowers("dot_general")
def _dot_general(t: Tracer, eqn: Any, a: Ref, b: Ref) -> Ref:
    (a_axes, b_axes), (a_batch, b_batch) = eqn.params["dimension_numbers"]
    if a_batch or b_batch:
        raise _Refuse("batched matrix products are not supported")
    precision = eqn.params.get("precision")
    precisions = precision if isinstance(precision, tuple) else (precision,)
    if not all(p is None or isinstance(p, jax.lax.Precision) for p in precisions):
        raise _Refuse(f"precision {precision} is not supported (DEFAULT, HIGH and HIGHEST are)")
    exact = any(p not in (None, jax.lax.Precision.DEFAULT) for p in precisions)
    matmul = DType.FP32 if exact else t.matmul
    a_shape, b_shape = (v.aval.shape for v in eqn.invars)
    result_type = array_type(eqn.outvars[0].aval.dtype)
    integers = result_type in INTEGERS
    left, right = (
        t.int8_behind(t.full(_small(ref, integers), canonical(shape)))
        for ref, shape in ((a, a_shape), (b, b_shape))
    )
    # Narrow arrays are multiplied as they are.
    kept = [
        DType.INT8 if use.value.dtype is DType.INT8 else array_type(v.aval.dtype)
        for use, v in zip((left, right), eqn.invars, strict=True)
    ]
    if result_type is DType.UINT32 or any(
        use.value.dtype in (DType.INT32, DType.UINT32) for use in (left, right)
    ):
        raise _Refuse(
            "the operands of a product of integers must be int8, or int8 made wider; for int32 "
            "results of int8 operands use preferred_element_type=jnp.int32"
        )
    types = [matmul if dtype in (None, DType.FP32, DType.INT32) else dtype for dtype in kept]
    if DType.INT8 in types and (len(a_axes) == 2 or not a_axes):
        left, right, a_shape, b_shape = _as_matrices(t, left, right, eqn)
        a_axes, b_axes = (1,), (0,)
    if len(a_axes) == 2:
        # Everything is summed: elementwise, in FP32.
        same = dict(zip(a_axes, b_axes, strict=True))[0] == 0
        product = t.mul(left, right if same else right.t)
        return t.reduce(AluOp.ADD, t.reduce(AluOp.ADD, product, 1), 0)
    if not a_axes:
        # An outer product of vectors, or a product with a scalar.
        return t.mul(left.t if len(a_shape) == len(b_shape) == 1 else left, right)
    # To [M, K] @ [K, F]; a vector on the left is [1, K], on the right [K, 1].
    if len(a_shape) == 2 and tuple(a_axes) == (0,):
        left = left.t
    if len(b_shape) == 1 or tuple(b_axes) == (1,):
        right = right.t
    (m, _), (_, f) = left.shape, right.shape
    if (m, f) == (1, 1) and DType.INT8 not in types:
        product = t.mul(left, right.t)
        return t.reduce(AluOp.ADD, product, 1)
    made = result_type if result_type in INTEGERS else DType.FP32
    result = _product(t, left, right, types, made)
    # A matrix times a vector is a vector: [M, 1] is its column.
    return result.t if len(a_shape) == 2 and len(b_shape) == 1 else result


def _packed(t: Tracer, ref: Ref, aval: Any) -> Use:
    """An argument of a kernel, which reads all elements, packed in the type of the array."""
    kept, shape = ARRAY_TYPES[np.dtype(aval.dtype).name], canonical(aval.shape)
    use = t.array(ref, shape, kept)
    return use if use.value.dtype is kept else t._moved(use, shape, kept)


@_lowers("systolith_kernel")
def _kernel(t: Tracer, eqn: Any, *operands: Ref) -> Sequence[Ref]:
    given = [var.aval for var in eqn.invars]
    made = [var.aval for var in eqn.outvars]
    uses = [_packed(t, ref, aval) for ref, aval in zip(operands, given, strict=True)]
    call = Call(
        eqn.params["kernel"],
        eqn.params["static"],
        tuple((tuple(aval.shape), np.dtype(aval.dtype)) for aval in given),
        tuple((tuple(aval.shape), np.dtype(aval.dtype)) for aval in made),
    )
    t._label = call.kernel.name
    kinds = [(canonical(aval.shape), ARRAY_TYPES[np.dtype(aval.dtype).name]) for aval in made]
    (shape, dtype), *others = kinds
    first = t.emit("kernel", uses, shape, dtype, call=call)
    return [
        first,
        *(t.emit("result", [first], *kind, index=i) for i, kind in enumerate(others, 1)),
    ]


def _picks_rows(eqn: Any, inserted: Any, mapped: Any, window: Any, mode: Any) -> None:
    """Refuses a gather or scatter that is not of whole rows along axis 0 by a vector."""
    table, index = (var.aval for var in eqn.invars[:2])
    numbers = eqn.params["dimension_numbers"]
    batching = [getattr(numbers, name) for name in dir(numbers) if name.endswith("batching_dims")]
    if (
        index.shape[1:] != (1,)
        or tuple(inserted) != (0,)
        or tuple(mapped) != (0,)
        or tuple(window) != (1,) * (len(table.shape) - 1)
        or any(batching)
    ):
        raise _Refuse(
            "only rows that a vector of int32 picks along axis 0 are gathered, or added to, as in "
            "x[i], jnp.take(x, i, axis=0) and x.at[i].add(y)"
        )
    if array_type(index.dtype) is not DType.INT32:
        raise _Refuse("indices must be int32")
    if mode == jax.lax.GatherScatterMode.CLIP:
        raise _Refuse("indices are not clipped: one outside is an error of the device")


def _rows_call(
    t: Tracer, eqn: Any, kernel: Kernel, static: dict[str, Any], uses: list[Use], shapes: Any
) -> Use:
    """Calls a kernel on tables; a vector is one with a column. `shapes` are those of the
    arguments, and of the result."""
    made = eqn.outvars[0].aval
    kept = ARRAY_TYPES[np.dtype(made.dtype).name]
    specs = [
        (tuple(shape), FORMATS[dtype].numpy)
        for shape, dtype in zip(shapes, (*(use.value.dtype for use in uses), kept), strict=True)
    ]
    call = Call(kernel, tuple(static.items()), tuple(specs[:-1]), (specs[-1],))
    t._label = kernel.name
    return t.emit("kernel", uses, canonical(made.shape), kept, call=call)


def _as_table(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], 1) if len(shape) == 1 else (shape[0], shape[1])


@_lowers("gather")
def _gather(t: Tracer, eqn: Any, table: Ref, start: Ref) -> Ref:
    numbers = eqn.params["dimension_numbers"]
    aval, index = (var.aval for var in eqn.invars)
    if tuple(eqn.params["slice_sizes"]) != (1, *aval.shape[1:]):
        raise _Refuse("only whole rows are gathered")
    _picks_rows(
        eqn,
        numbers.collapsed_slice_dims,
        numbers.start_index_map,
        numbers.offset_dims,
        eqn.params["mode"],
    )
    uses = [_packed(t, table, aval), t.index(start, index.shape[0])]
    made = _as_table(eqn.outvars[0].aval.shape)
    return _rows_call(t, eqn, embedding, {}, uses, (_as_table(aval.shape), index.shape[:1], made))


@_lowers("scatter-add")
def _scatter_add(t: Tracer, eqn: Any, table: Ref, start: Ref, updates: Ref) -> Ref:
    numbers = eqn.params["dimension_numbers"]
    aval, index, added = (var.aval for var in eqn.invars)
    _picks_rows(
        eqn,
        numbers.inserted_window_dims,
        numbers.scatter_dims_to_operand_dims,
        numbers.update_window_dims,
        eqn.params["mode"],
    )
    if added.shape[1:] != aval.shape[1:] or added.dtype != aval.dtype:
        raise _Refuse("only whole rows of the same type are added")
    picked = t.index(start, index.shape[0])
    more = _packed(t, updates, added)
    shape, rows = _as_table(aval.shape), _as_table(added.shape)
    if isinstance(table, np.ndarray) and not np.asarray(table).astype(np.float32).any():
        static = {"rows": shape[0]}
        return _rows_call(
            t, eqn, embedding_grad, static, [more, picked], (rows, index.shape[:1], shape)
        )
    uses = [_packed(t, table, aval), picked, more]
    return _rows_call(t, eqn, scatter_add, {}, uses, (shape, index.shape[:1], rows, shape))


def trace(closed: Any, names: Sequence[str], matmul: DType, config: CoreConfig) -> Graph:
    """Lowers a whole step.

    Parameters
    ----------
    closed : what `jax.make_jaxpr` returned
    names : of its arguments, for messages
    matmul : narrow float that FP32 operands of matrix products are rounded to; FP32: not rounded
    config : the core that it is for

    Raises
    ------
    UnsupportedError : names the primitive, the shapes and the user's source line
    """
    tracer = Tracer(matmul, config)
    inputs = [
        tracer.input(var.aval.shape, var.aval.dtype, name)
        for var, name in zip(closed.jaxpr.invars, names, strict=True)
    ]
    results = tracer.run(closed.jaxpr, closed.consts, inputs)
    for ref, atom in zip(results, closed.jaxpr.outvars, strict=True):
        aval = atom.aval
        if len(aval.shape) > 2 or 0 in aval.shape or array_type(aval.dtype) is None:
            raise UnsupportedError(
                f"an output is {describe(aval)}; outputs are {ARRAY_TYPE_NAMES}, of rank 0 to 2, "
                "and not empty"
            )
        tracer.graph.outputs.append(tracer.full(ref, canonical(aval.shape)))
    return tracer.graph
