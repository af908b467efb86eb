"""`Device`, `DeviceArray` and `jit`: JAX functions on the chip."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.formats import FORMATS, DType

from .compiler import Binding, Compiled, argument_name, check_options, compile_step
from .compiler.ir import ARRAY_TYPE_NAMES, ARRAY_TYPES, array_type
from .errors import BackendError, DeviceError, KernelError
from .golden.debugger import Debugger
from .golden.device import GoldenDevice
from .kernel.function import Kernel
from .kernel.source import caller
from .program import Program
from .runtime import Counters, DeviceTensor, Driver, LoadedProgram, open_backend

__all__ = ["Device", "DeviceArray", "Jitted", "jit"]

_BOOL = np.dtype(np.bool_)


class Device:
    """A chip, simulated or modelled, with its DRAM.

    Parameters
    ----------
    kind : "rtl", the chip's gates; "rtl-fast", the same with floating-point cells in C++: same
        results and cycles; "golden", the chip's numpy model: same results, no clock; or "netlist",
        the FPGA's cells that Yosys makes of the chip: same results and cycles, minutes to build
    config : preset name or `CoreConfig`
    dram_bytes : size of the device DRAM
    dram_latency : cycles from an accepted burst to its first beat ("golden" has no clock)
    dram_bytes_per_cycle : bandwidth of each direction; default: 2 per lane
    watchdog : cycles without progress after which a program faults; None keeps the chip's default
    seed : of stochastic rounding in the first program that runs; each run takes the next number,
        so that the same calls on two devices of one seed give the same bits
    check : of "golden" only: report races between engines and the use of memory never written, see
        docs/debugging.md
    progress : called with a line of text when a long step of opening the device begins

    A context manager: leaving it closes the device.
    """

    def __init__(
        self,
        kind: str = "golden",
        config: str | CoreConfig = "small",
        *,
        dram_bytes: int = 1 << 26,
        dram_latency: int = 20,
        dram_bytes_per_cycle: int | None = None,
        watchdog: int | None = None,
        seed: int = 0,
        check: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        options: dict[str, Any] = {"dram_bytes": dram_bytes}
        if check:
            if kind != "golden":
                raise BackendError(f'check=True needs the device "golden", not {kind!r}')
            options["check"] = True
        if kind in ("rtl", "rtl-fast", "netlist"):
            options["dram_latency"] = dram_latency
            options["dram_bytes_per_cycle"] = dram_bytes_per_cycle
            if progress is not None:
                options["progress"] = progress
        self.kind = kind
        self._driver: Driver | None = Driver(
            open_backend(kind, get_config(config), **options), watchdog=watchdog, seed=seed
        )
        self.config = self._driver.config
        #: programs whose function died, perhaps while the device was running
        self._doomed: list[LoadedProgram] = []

    @property
    def driver(self) -> Driver:
        """The driver below; raises DeviceError once the device is closed."""
        if self._driver is None:
            raise DeviceError(f"{self} is closed")
        return self._driver

    @property
    def debugger(self) -> Debugger:
        """Breakpoints and a look at everything, on the device "golden"."""
        backend = self.driver.backend
        if not isinstance(backend, GoldenDevice):
            raise DeviceError(f'{self} has no debugger; the device "golden" has one')
        return backend.debugger

    @property
    def seed(self) -> int:
        """Seed of stochastic rounding in the next program that runs. Kept with the state of a
        training and set again, it continues the training as if it had not been interrupted."""
        return self.driver.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.driver.seed = int(value)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._driver is None

    def _bury(self) -> None:
        """Frees what the programs of dead functions take."""
        while self._doomed:
            self._doomed.pop().unload()

    def put(self, array: Any) -> DeviceArray:
        """Copies an array to the device; of any of the chip's types (see `jit`), or bool."""
        host = np.asarray(array)
        _check_dtype(host.dtype, "the array")
        result = self._empty(host.shape, host.dtype, "array")
        self.driver.write(result._tensor, _to_stored(host))
        return result

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> DeviceArray:
        """A new array whose contents are whatever was there."""
        driver = self.driver
        self._bury()
        return DeviceArray(self, driver.allocate(shape, _stored_type(dtype), name), dtype)

    def close(self) -> None:
        """Releases the device; its arrays and compiled functions cannot be used any more."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name = getattr(self, "config", None)
        return f"Device({self.kind!r}, config={name.name if name else '?'!r})"


class DeviceArray:
    """An array in the DRAM of a device, immutable; the memory is freed when it dies.

    It is a leaf of pytrees, can be passed to a `jit` function of the same device without a copy,
    and turns into a numpy array wherever numpy wants one.
    """

    def __init__(self, device: Device, tensor: DeviceTensor, dtype: np.dtype) -> None:
        self._device = device
        self._tensor = tensor
        self._dtype = np.dtype(dtype)
        finalizer = weakref.finalize(self, _free, device, tensor)
        finalizer.atexit = False

    @property
    def device(self) -> Device:
        """Where it lies."""
        return self._device

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, outermost first."""
        return self._tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, int32, int8 or bool."""
        return self._dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def numpy(self) -> np.ndarray:
        """Copies the array from the device."""
        if self._device.closed:
            raise DeviceError(f"{self!r} cannot be read: {self._device} is closed")
        stored = self._device.driver.read(self._tensor)
        return np.asarray(stored != 0) if self._dtype == _BOOL else stored

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on the device cannot be viewed, only copied")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return jax.numpy.asarray(self.numpy())

    def item(self) -> float | int | bool:
        """The only element, as a Python number."""
        value = self.numpy().item()
        return value if isinstance(value, bool | int) else float(value)

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a scalar")
        return self.shape[0]

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"DeviceArray({self._dtype.name}[{shape}] on {self._device.kind})"


def _free(device: Device, tensor: DeviceTensor) -> None:
    if not device.closed and not tensor.freed:
        device.driver.free(tensor)


def _unload(device: Device, loaded: LoadedProgram) -> None:
    if not device.closed:
        device._doomed.append(loaded)


def _stored_type(dtype: np.dtype) -> DType:
    """Type in device DRAM; bools are 1.0 and 0.0."""
    return ARRAY_TYPES[dtype.name]


def _to_stored(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == _BOOL else array


def _check_dtype(dtype: np.dtype, what: str) -> None:
    if array_type(dtype) is None:
        raise TypeError(
            f"{what} is {dtype.name}; the chip takes {ARRAY_TYPE_NAMES} "
            f"(convert it, for example with .astype({'np.float32'}))"
        )


@dataclasses.dataclass
class _Entry:
    """A function compiled for one signature and loaded on the device."""

    compiled: Compiled
    loaded: LoadedProgram | None = None
    #: arrays that hold what the host passes, by input name
    staging: dict[str, DeviceArray] = dataclasses.field(default_factory=dict)


class Jitted:
    """A function that runs on a device; made by `jit`.

    Calling it takes and returns the same pytrees as the function. It is compiled at the first
    call, and again for every new combination of argument structure, shapes and types.
    """

    def __init__(
        self, fn: Callable[..., Any], *, device: Device, matmul: str, rounding: str
    ) -> None:
        self._fn = fn
        self._device = device
        self._matmul = matmul
        self._rounding = rounding
        self._entries: dict[Any, _Entry] = {}
        self._last: _Entry | None = None
        self._counters: Counters | None = None
        functools.update_wrapper(self, fn, updated=())

    # -- calling ---------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = self._device
        driver = device.driver
        device._bury()
        leaves, entry = self._entry(args, kwargs)
        compiled = entry.compiled
        results: list[DeviceArray] = []
        try:
            bindings: dict[str, DeviceTensor] = {}
            for binding, leaf in zip(compiled.inputs, leaves, strict=True):
                if isinstance(leaf, np.ndarray):
                    if binding.name not in entry.staging:
                        entry.staging[binding.name] = device._empty(
                            binding.shape, binding.dtype, binding.name
                        )
                    driver.write(entry.staging[binding.name]._tensor, _to_stored(leaf))
                    leaf = entry.staging[binding.name]
                bindings[binding.name] = leaf._tensor
            for binding in compiled.outputs:
                results.append(device._empty(binding.shape, binding.dtype, binding.name))
                bindings[binding.name] = results[-1]._tensor
            if entry.loaded is None:
                entry.loaded = driver.load(compiled.program, bindings)
                weakref.finalize(self, _unload, device, entry.loaded).atexit = False
            else:
                entry.loaded.bind(bindings)
            self._last = entry
            self._counters = None
            self._counters = entry.loaded.run()
        except BaseException:
            # The traceback may outlive this call; the device memory need not.
            entry.staging.clear()
            results.clear()
            raise
        return jax.tree.unflatten(compiled.out_tree, results)

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """Compiles for these arguments without running; returns the program and its IR."""
        return self._entry(args, kwargs)[1].compiled

    def _entry(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], _Entry]:
        """The arguments' leaves, ready to be bound, and the entry of their signature."""
        with_paths, tree = jax.tree.flatten_with_path((args, kwargs))
        leaves = [self._leaf(argument_name(path), leaf) for path, leaf in with_paths]
        weak = tuple(type(leaf) is float for _, leaf in with_paths)
        key = (tree, weak, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._entries:
            specs = [
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=w)
                for leaf, w in zip(leaves, weak, strict=True)
            ]
            spec_args, spec_kwargs = jax.tree.unflatten(tree, specs)
            self._entries[key] = _Entry(self._compile(spec_args, spec_kwargs))
        return leaves, self._entries[key]

    def _compile(self, args: tuple, kwargs: dict[str, Any]) -> Compiled:
        return compile_step(
            self._fn,
            args,
            self._device.config,
            kwargs=kwargs,
            matmul=self._matmul,
            rounding=self._rounding,
        )

    def _leaf(self, name: str, leaf: Any) -> np.ndarray | DeviceArray:
        if isinstance(leaf, DeviceArray):
            if leaf._device is not self._device:
                raise DeviceError(f"argument {name} lies on another device: {leaf._device}")
            return leaf
        if isinstance(leaf, float):
            return np.asarray(leaf, np.float32)
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            raise TypeError(f"argument {name} is the int {leaf}; pass a float")
        if not isinstance(leaf, bool | np.ndarray | np.generic | jax.Array):
            raise TypeError(
                f"argument {name} is a {type(leaf).__name__}; arguments are arrays and floats"
            )
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"argument {name} is {leaf.dtype}; the chip has no random keys")
        array = np.asarray(leaf)
        _check_dtype(array.dtype, f"argument {name}")
        return array

    # -- looking at it ---------------------------------------------------------------------

    def _latest(self) -> _Entry:
        if self._last is None:
            raise RuntimeError("the function was not called yet")
        return self._last

    @property
    def program(self) -> Program:
        """The program of the last call."""
        return self._latest().compiled.program

    @property
    def compiled(self) -> Compiled:
        """The program of the last call with the IR it was made from."""
        return self._latest().compiled

    def disassemble(self) -> str:
        """The program of the last call as text."""
        return self.program.disassemble()

    def stats(self) -> dict[str, Any]:
        """Figures of the last call.

        ``cycles``, ``macs``, ``tensor_utilization`` (MACs of those the array could have done),
        ``busy`` (engine -> cycles), ``conflicts`` (memory -> cycles in which a bank was asked for
        twice) and ``instructions`` (engine -> number). What takes a clock
        is None on a device without one.
        """
        self._latest()
        counters = self._counters
        if counters is None:
            raise RuntimeError("the last call failed")
        clocked = counters.cycles > 0
        peak = counters.cycles * self._device.config.peak_macs_per_cycle
        return {
            "cycles": counters.cycles if clocked else None,
            "macs": counters.macs,
            "tensor_utilization": counters.macs / peak if clocked else None,
            "busy": dict(counters.busy) if clocked else None,
            "conflicts": dict(counters.conflicts) if clocked else None,
            "instructions": dict(counters.instructions),
        }


class KernelOnDevice(Jitted):
    """A kernel function alone on a device; made by `Kernel.on`."""

    def __init__(self, kernel: Kernel, device: Device, static: dict[str, Any]) -> None:
        super().__init__(kernel, device=device, matmul="bfloat16", rounding="nearest")
        self._kernel = kernel
        self._static = static

    def _compile(self, args: tuple, kwargs: dict[str, Any]) -> Compiled:
        if kwargs:
            raise TypeError(
                f"keyword arguments of kernel {self._kernel.name!r} are given to .on(device): "
                f"{', '.join(kwargs)}"
            )
        try:
            program = self._kernel.build(self._device.config, *args, **self._static)
        except KernelError as error:
            raise error.within(f"kernel {self._kernel.name!r}", caller()) from None
        outputs = [tensor for tensor in program.tensors if tensor.kind == "output"]
        tree = jax.tree.structure(0 if len(outputs) == 1 else (0,) * len(outputs))
        return Compiled(
            program,
            tuple(
                Binding(name, arg.shape, np.dtype(arg.dtype))
                for name, arg in zip(self._kernel.names(len(args)), args, strict=True)
            ),
            tuple(Binding(t.name, t.shape, FORMATS[t.dtype].numpy) for t in outputs),
            tree,
            {},
        )


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    device: Device,
    matmul: str = "bfloat16",
    rounding: str = "nearest",
) -> Any:
    """Compiles a JAX function for a device; also a decorator, ``@jit(device=device)``.

    Parameters
    ----------
    fn : any function of pytrees of float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, int32,
        int8 and bool arrays of rank 0 to 2; Python floats are float32 scalars
    matmul : type that float32 operands of matrix products are rounded to: "bfloat16", "float16",
        "float8_e4m3fn" or "float8_e5m2". Operands of those types and of int8 are multiplied as they
        are.
        With "float32", and in a product of `precision` HIGH or HIGHEST, float32 operands are
        multiplied as they are, in six passes of BF16 products.
    rounding : "nearest", to even, or "stochastic": how each result of a narrow type is rounded to
        it. Operands of matrix products and constants are always rounded to nearest.

    The result takes and returns the same pytrees. What it returns are `DeviceArray` handles: the
    state stays on the device, and goes into the next call without a copy. Like `jax.jit` it
    compiles again for new shapes, types or structures. Raises UnsupportedError for what the chip
    cannot do, naming the primitive, the shapes and the source line, and TypeError for arguments
    of types it does not have.
    """
    check_options(matmul, rounding)
    if fn is None:
        return functools.partial(jit, device=device, matmul=matmul, rounding=rounding)
    return Jitted(fn, device=device, matmul=matmul, rounding=rounding)
