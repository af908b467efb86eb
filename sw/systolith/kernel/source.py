"""Finds the statement of the user that made the builder do something."""

from __future__ import annotations

import functools
import os
import sys
from typing import NoReturn

from systolith.errors import KernelError

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_SOFTWARE = os.path.dirname(os.path.dirname(_PACKAGE)) + os.sep


@functools.cache
def _is_builder(filename: str) -> bool:
    # "<string>" is the file of the methods that `dataclasses` generates.
    return filename == "<string>" or os.path.abspath(filename).startswith(_PACKAGE)


@functools.cache
def _shown(filename: str) -> str:
    """The file as a message names it: relative when it lies below the working directory."""
    if filename.startswith("<"):
        return filename
    relative = os.path.relpath(filename) if os.path.isabs(filename) else filename
    return filename if relative.startswith(os.pardir) else relative


def user_source() -> str:
    """Returns ``file:line`` of the innermost statement outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_builder(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}"


def caller() -> str:
    """Returns ``file:line`` of the innermost statement outside all of Systolith."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SOFTWARE):
        frame = frame.f_back
    return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}"


def refuse(message: str) -> NoReturn:
    """Raises KernelError at the user's statement."""
    raise KernelError(message, source=user_source())
