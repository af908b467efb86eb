"""Systolith: JAX training steps on an open training accelerator.

>>> import jax.numpy as jnp, numpy as np, systolith
>>> with systolith.Device("golden", config="nano") as device:
...     double = systolith.jit(lambda x: 2.0 * x, device=device)
...     print(np.asarray(double(jnp.arange(3.0))))
[0. 2. 4.]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BackendError,
    CheckError,
    CompileError,
    ConfigMismatch,
    DeviceError,
    DeviceFault,
    DeviceTimeout,
    KernelError,
    OutOfMemory,
    ProgramError,
    RaceError,
    SystolithError,
    TensorError,
    UndefinedError,
    UnsupportedError,
)
from .program import Program

if TYPE_CHECKING:
    from . import kernel as kernel
    from . import kernels as kernels
    from . import nn as nn
    from .api import Device, DeviceArray, jit

__all__ = [
    "BackendError",
    "CheckError",
    "CompileError",
    "ConfigMismatch",
    "Device",
    "DeviceArray",
    "DeviceError",
    "DeviceFault",
    "DeviceTimeout",
    "KernelError",
    "OutOfMemory",
    "Program",
    "ProgramError",
    "RaceError",
    "SystolithError",
    "TensorError",
    "UndefinedError",
    "UnsupportedError",
    "jit",
    "kernel",
    "kernels",
    "nn",
]


def __getattr__(name: str) -> Any:
    # What needs JAX is imported when it is first used: benches and kernels do without.
    if name == "nn":
        return importlib.import_module(".nn", __name__)
    if name in ("kernel", "kernels"):
        return importlib.import_module(f".{name}", __name__)
    if name in ("Device", "DeviceArray", "jit"):
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
