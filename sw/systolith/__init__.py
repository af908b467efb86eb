"""Systolith: JAX training steps on an open training accelerator.

>>> import jax.numpy as jnp, numpy as np, systolith
>>> with systolith.Device("golden", config="nano") as device:
...     double = systolith.jit(lambda x: 2.0 * x, device=device)
...     print(np.asarray(double(jnp.arange(3.0))))
[0. 2. 4.]
"""

from . import nn
from .api import Device, DeviceArray, jit
from .errors import (
    BackendError,
    CompileError,
    ConfigMismatch,
    DeviceError,
    DeviceFault,
    DeviceTimeout,
    KernelError,
    OutOfMemory,
    ProgramError,
    SystolithError,
    TensorError,
    UnsupportedError,
)
from .program import Program

__all__ = [
    "BackendError",
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
    "SystolithError",
    "TensorError",
    "UnsupportedError",
    "jit",
    "nn",
]
