"""Runs programs on devices."""

from .backend import BACKENDS, Backend, open_backend
from .driver import Counters, DeviceTensor, Driver, LoadedProgram

__all__ = [
    "BACKENDS",
    "Backend",
    "Counters",
    "DeviceTensor",
    "Driver",
    "LoadedProgram",
    "open_backend",
]
