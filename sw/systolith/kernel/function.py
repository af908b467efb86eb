"""`systolith.kernel`: Python functions that make instructions, called like any other function.

Inside `systolith.jit` a call becomes a JAX primitive; the compiler runs the function when it comes
to it, with the builder of the whole program. `Kernel.on` runs a kernel alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.extend.source_info_util import register_exclusion
from jax.interpreters import ad, batching
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.formats import FORMATS, DType, dtype_of

from ..errors import KernelError
from ..program import Program
from .builder import KernelBuilder, Scope
from .call import Call, Spec
from .source import user_source
from .tensors import DramTensor

if TYPE_CHECKING:
    from ..api import Device, Jitted

__all__ = ["Kernel", "compiling_for", "kernel", "kernel_p"]

# Messages and debug maps name the statement that called into this module.
register_exclusion(__file__)

kernel_p = Primitive("systolith_kernel")
kernel_p.multiple_results = True

_config: contextvars.ContextVar[CoreConfig | None] = contextvars.ContextVar("config", default=None)


@contextlib.contextmanager
def compiling_for(config: CoreConfig) -> Iterator[None]:
    """Functions traced inside are compiled for that core."""
    token = _config.set(config)
    try:
        yield
    finally:
        _config.reset(token)


def _spec(array: Any) -> Spec:
    dtype = array.dtype
    numpy = FORMATS[dtype].numpy if isinstance(dtype, DType) else np.dtype(dtype)
    return tuple(int(n) for n in array.shape), numpy


def _shown(spec: Spec) -> str:
    return f"{spec[1].name}{list(spec[0])}"


def _chip_type(dtype: np.dtype) -> DType:
    """What an array is kept in; masks are 1.0 and 0.0."""
    return DType.FP32 if dtype == np.bool_ else dtype_of(dtype)


class Kernel:
    """A kernel function; made by `kernel`.

    Called with arrays inside a function of `systolith.jit`, it returns arrays.

    Parameters
    ----------
    body : ``body(nc, *tensors, **static)``; returns what `nc.output` made, in that order
    outputs : ``outputs(*specs, **static)``: the result's shape and type, or a tuple of them;
        default: found by running the body
    """

    def __init__(
        self, body: Callable[..., Any], outputs: Callable[..., Any] | None, name: str | None
    ) -> None:
        self.body = body
        self.name = name or body.__name__
        self._outputs = outputs
        self._rule: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._parameters = list(inspect.signature(body).parameters.values())[1:]
        self._results: dict[Any, tuple[Spec, ...]] = {}
        self._differentiable: dict[Any, Callable[..., Any]] = {}
        functools.update_wrapper(self, body)

    # -- calling -------------------------------------------------------------------------------

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        called = user_source()
        items = tuple(sorted(static.items()))
        try:
            hash(items)
        except TypeError:
            raise KernelError(
                f"kernel {self.name!r}: keyword arguments are fixed when it is compiled, so they "
                f"must be hashable: {static}",
                source=called,
            ) from None
        arrays = tuple(jax.numpy.asarray(array) for array in arrays)
        try:
            if self._rule is None:
                return self._bind(items, *arrays)
            if items not in self._differentiable:
                forward, backward = self._rule
                function = jax.custom_vjp(functools.partial(self._bind, items))
                function.defvjp(
                    functools.partial(forward, **static), functools.partial(backward, **static)
                )
                self._differentiable[items] = function
            return self._differentiable[items](*arrays)
        except KernelError as error:
            raise error.within(f"kernel {self.name!r}", called) from None

    def _bind(self, static: tuple[tuple[str, Any], ...], *arrays: Any) -> Any:
        results = kernel_p.bind(*arrays, kernel=self, static=static)
        return results[0] if len(results) == 1 else tuple(results)

    def defvjp(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Gives the kernel a gradient, as `jax.custom_vjp` has it.

        Parameters
        ----------
        forward : ``forward(*arrays, **static) -> (result, kept)``
        backward : ``backward(kept, gradient, **static) -> gradients``, one for each array

        Both are JAX functions, and may call kernels.
        """
        self._rule = forward, backward
        self._differentiable.clear()

    def on(self, device: Device, **static: Any) -> Jitted:
        """The kernel alone on a device: takes and returns arrays of any rank."""
        from ..api import KernelOnDevice

        return KernelOnDevice(self, device, static)

    # -- building ------------------------------------------------------------------------------

    def build(self, config: str | CoreConfig, *arrays: Any, **static: Any) -> Program:
        """The kernel alone as a program.

        Parameters
        ----------
        config : preset name or `CoreConfig`
        arrays : anything with a shape and a dtype

        The program's inputs have the names of the parameters, its outputs are out0, out1, ...
        """
        specs = tuple(_spec(array) for array in arrays)
        return self._run(get_config(config), specs, tuple(sorted(static.items()))).finish()

    def _run(
        self, config: CoreConfig, arguments: tuple[Spec, ...], static: tuple[tuple[str, Any], ...]
    ) -> KernelBuilder:
        """A builder of the kernel alone, not finished."""
        nc = KernelBuilder(config, name=self.name)
        tensors = [
            nc.dram.tensor(name, shape, _chip_type(dtype))
            for name, (shape, dtype) in zip(self.names(len(arguments)), arguments, strict=True)
        ]
        call = Call(self, static, arguments, ())
        self.emit(nc, tensors, call, prefix=self.name, output=nc.output)
        return nc

    def names(self, count: int) -> list[str]:
        """Names of the first `count` arguments."""
        positional = [
            parameter.name
            for parameter in self._parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        return [*positional, *(f"arg{i}" for i in range(len(positional), count))][:count]

    def results(
        self, arguments: tuple[Spec, ...], static: tuple[tuple[str, Any], ...]
    ) -> tuple[Spec, ...]:
        """Shapes and types of the results: as declared, or by running the body."""
        if self._outputs is not None:
            specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
            declared = self._outputs(*specs, **dict(static))
            declared = declared if isinstance(declared, tuple | list) else (declared,)
            return tuple(_spec(spec) for spec in declared)
        config = _config.get()
        if config is None:
            raise KernelError(
                f"kernel {self.name!r} runs on a device: call it in a function of systolith.jit, "
                "or with .on(device)"
            )
        key = config, arguments, static
        if key not in self._results:
            tensors = self._run(config, arguments, static).dram.tensors
            self._results[key] = tuple(
                (tensor.shape, FORMATS[tensor.dtype].numpy)
                for tensor in tensors
                if tensor.kind == "output"
            )
        return self._results[key]

    def emit(
        self,
        nc: KernelBuilder,
        arguments: Sequence[DramTensor],
        call: Call,
        *,
        prefix: str,
        output: Callable[[Any, Any], DramTensor],
    ) -> None:
        """Runs the body, which adds its instructions to `nc`.

        Parameters
        ----------
        arguments : tensors of the shapes of ``call.arguments``
        prefix : of the names of the body's own tensors
        output : makes the tensor of the next result; ``call.results`` are compared with what the
            body asks for, if there are any

        Raises KernelError for what the builder refuses, and results other than declared.
        """
        arguments = [
            dataclasses.replace(tensor, base=tensor.base or tensor, readonly=True)
            for tensor in arguments
        ]
        made: list[DramTensor] = []

        def next_output(shape: Any, dtype: Any) -> DramTensor:
            shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
            wanted: Spec = (
                shape,
                FORMATS[dtype].numpy if isinstance(dtype, DType) else np.dtype(dtype),
            )
            if call.results and (
                len(made) >= len(call.results) or wanted != call.results[len(made)]
            ):
                raise KernelError(
                    f"result {len(made)} is {_shown(wanted)}, declared are "
                    f"{', '.join(map(_shown, call.results))}",
                    source=user_source(),
                )
            made.append(output(shape, dtype))
            return made[-1]

        with nc.scope(Scope(prefix, self.name, next_output)):
            try:
                returned = self.body(nc, *arguments, **dict(call.static))
            except TypeError as error:
                raise self._arguments_error(error, len(arguments), call) from error
        returned = returned if isinstance(returned, tuple | list) else (returned,)
        if not made or [id(tensor) for tensor in returned] != [id(tensor) for tensor in made]:
            raise KernelError(
                f"kernel {self.name!r} must return the tensors that it made with nc.output, at "
                "least one, in the order made",
                source=self._place(),
            )
        if call.results and len(made) != len(call.results):
            raise KernelError(
                f"kernel {self.name!r} returns {len(made)} results, declared are "
                f"{len(call.results)}",
                source=self._place(),
            )

    def _arguments_error(self, error: TypeError, count: int, call: Call) -> BaseException:
        """A KernelError if the call does not fit the body's parameters, else the error itself."""
        try:
            inspect.signature(self.body).bind(None, *range(count), **dict(call.static))
        except TypeError as mismatch:
            return KernelError(f"kernel {self.name!r}: {mismatch}", source=self._place())
        return error

    def _place(self) -> str:
        code = self.body.__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    def __repr__(self) -> str:
        return f"<kernel {self.name} at {id(self):#x}>"


def _abstract(*avals: Any, kernel: Kernel, static: tuple[tuple[str, Any], ...]) -> list[Any]:
    arguments = tuple((tuple(aval.shape), np.dtype(aval.dtype)) for aval in avals)
    for name, (shape, dtype) in zip(kernel.names(len(arguments)), arguments, strict=True):
        try:
            _chip_type(dtype)
        except TypeError as error:
            raise KernelError(f"kernel {kernel.name!r}, argument {name}: {error}") from None
        if 0 in shape:
            raise KernelError(f"kernel {kernel.name!r}, argument {name} is empty: {list(shape)}")
    return [
        jax.core.ShapedArray(shape, dtype) for shape, dtype in kernel.results(arguments, static)
    ]


def _evaluate(*arrays: Any, kernel: Kernel, static: Any) -> Any:
    raise KernelError(
        f"kernel {kernel.name!r} runs on a device: call it in a function of systolith.jit, or with "
        ".on(device)"
    )


def _no_gradient(primals: Any, tangents: Any, *, kernel: Kernel, static: Any) -> Any:
    raise KernelError(f"kernel {kernel.name!r} has no gradient; give it one with its defvjp")


def _no_batch(arrays: Any, axes: Any, *, kernel: Kernel, static: Any) -> Any:
    raise KernelError(
        f"kernel {kernel.name!r} cannot be batched by vmap: call it for each, or write it for all"
    )


kernel_p.def_abstract_eval(_abstract)
kernel_p.def_impl(_evaluate)
ad.primitive_jvps[kernel_p] = _no_gradient
batching.primitive_batchers[kernel_p] = _no_batch


def kernel(
    body: Callable[..., Any] | None = None,
    *,
    outputs: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Any:
    """Makes a kernel of a function; a decorator, ``@systolith.kernel``, with or without options.

    Parameters
    ----------
    body : ``body(nc, *tensors, **static)``: `nc` is a `KernelBuilder`, the tensors are those of the
        arrays it is called with, which it must not store to. It makes its results with
        ``nc.output(shape, dtype)`` and returns them in that order. Keyword arguments are fixed when
        it is compiled. Tiles it does not free are freed when it returns
    outputs : ``outputs(*specs, **static)``: anything with the shape and dtype of the result, or a
        tuple; without it they are found by running the body
    name : in messages, and label of its instructions; default: that of the function
    """
    if body is None:
        return functools.partial(kernel, outputs=outputs, name=name)
    return Kernel(body, outputs, name)
