"""The compiler: a JAX function, traced for given shapes, becomes a `Program`.

Passes: trace (jaxpr to tensor IR), eliminate dead code, fuse, lay out, schedule, generate.
`verify_ir` runs after each; ``dumps`` of the result holds the IR after each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import FORMATS, NARROW_FLOATS, DType
from systolith_hdl.isa import Rounding

from ..errors import CompileError, UnsupportedError
from ..kernel.function import compiling_for
from ..program import Program
from .codegen import Binding, Generator
from .fuse import eliminate_dead, fuse
from .ir import Graph, verify_ir
from .layout import assign_forms
from .schedule import schedule
from .trace import trace

__all__ = ["Binding", "Compiled", "argument_name", "compile_step"]

#: types that `matmul=` names: what the tensor engine rounds float32 operands to, or FP32 for
#: products that keep every bit of them
MATMUL_TYPES: dict[str, DType] = {
    FORMATS[dtype].numpy.name: dtype for dtype in (*NARROW_FLOATS, DType.FP32)
}
#: what `rounding=` names: how results become narrow floats
ROUNDINGS: dict[str, Rounding] = {rounding.name.lower(): rounding for rounding in Rounding}


def check_options(matmul: str, rounding: str) -> None:
    """Raises UnsupportedError for an option of `compile_step` that does not exist."""
    for name, given, known in (
        ("matmul", matmul, MATMUL_TYPES),
        ("rounding", rounding, ROUNDINGS),
    ):
        if given not in known:
            raise UnsupportedError(
                f"{name}={given!r} is not supported; supported: {', '.join(known)}"
            )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Parameters
    ----------
    program : for a core of one config
    inputs, outputs : the program's tensors for the flattened arguments and results, in order
    out_tree : pytree of the results
    dumps : name of the pass -> the IR after it, as text
    """

    program: Program
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    out_tree: Any
    dumps: dict[str, str]


def compile_step(
    fn: Callable[..., Any],
    args: Sequence[Any],
    config: CoreConfig,
    *,
    kwargs: Mapping[str, Any] | None = None,
    matmul: str = "bfloat16",
    rounding: str = "nearest",
    name: str | None = None,
) -> Compiled:
    """Compiles ``fn(*args, **kwargs)``.

    Parameters
    ----------
    args, kwargs : pytrees of `jax.ShapeDtypeStruct`
    matmul : type that float32 operands of matrix products are rounded to, or "float32" to multiply
        them as they are, in several passes; those of a narrow type keep it
    rounding : "nearest" or "stochastic": how results become narrow floats; operands of matrix
        products are always rounded to nearest
    name : of the program; default: that of the function

    Raises
    ------
    UnsupportedError : names the primitive, the shapes and the user's source line
    CompileError : the step does not fit
    """
    check_options(matmul, rounding)
    if ROUNDINGS[rounding] is Rounding.STOCHASTIC and not config.random:
        raise UnsupportedError(config.lacks("random", f"rounding={rounding!r}"))
    program_name = name or str(getattr(fn, "__name__", "step"))
    kwargs = dict(kwargs or {})
    with compiling_for(config):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
    leaves, out_tree = jax.tree.flatten_with_path(out_shape)[0], jax.tree.structure(out_shape)
    inputs = tuple(
        Binding(argument_name(path), leaf.shape, np.dtype(leaf.dtype))
        for path, leaf in jax.tree.flatten_with_path((tuple(args), kwargs))[0]
    )
    outputs = tuple(
        Binding(f"out{jax.tree_util.keystr(path)}", leaf.shape, np.dtype(leaf.dtype))
        for path, leaf in leaves
    )
    dumps: dict[str, str] = {}

    def passed(graph: Graph, after: str) -> None:
        dumps[after] = graph.dump()
        verify_ir(graph, after)

    graph = trace(closed, [binding.name for binding in inputs], MATMUL_TYPES[matmul], config)
    passed(graph, "trace")
    eliminate_dead(graph)
    passed(graph, "dead code")
    fuse(graph)
    passed(graph, "fuse")
    assign_forms(graph, config)
    passed(graph, "layout")
    traced_order = list(graph.ops)
    schedule(graph, config)
    passed(graph, "schedule")
    metadata = {
        "matmul": matmul,
        "rounding": rounding,
        "inputs": len(inputs),
        "outputs": len(outputs),
    }

    def generate() -> Program:
        generator = Generator(
            graph, config, program_name, inputs, outputs, rounding=ROUNDINGS[rounding]
        )
        return generator.run(metadata)

    try:
        program = generate()
    except CompileError:
        # Another order has other values alive at once; the traced one may fit.
        graph.ops = traced_order
        program = generate()
    return Compiled(program, inputs, outputs, out_tree, dumps)


def argument_name(path: tuple[Any, ...]) -> str:
    """Name of one leaf of ``(args, kwargs)``: ``arg0['w1']``, or ``scale`` for a keyword."""
    kind, position, *rest = path
    name = f"arg{position.idx}" if kind.idx == 0 else str(position.key)
    return name + jax.tree_util.keystr(tuple(rest))
