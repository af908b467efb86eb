"""Finds the statement of the user that made the builder do something."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from systolith.errors import KernelError

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_SOFTWARE = os.path.dirname(os.path.dirname(_PACKAGE)) + os.sep


@functools.cache
def _is_builder(filename: str) -> bool:
    # "<string>" is the file of the methods that `dataclasses` generates; `contextlib` stands
    # between a with statement and the builder.
    if filename in ("<string>", contextlib.__file__):
        return True
    return os.path.abspath(filename).startswith(_PACKAGE)


@functools.cache
def _shown(filename: str) -> str:
    """The file as a message names it: relative when it lies below the working directory."""
    if filename.startswith("<"):
        return filename
    relative = os.path.relpath(filename) if os.path.isabs(filename) else filename
    return filename if relative.startswith(os.pardir) else relative


def _source(inside: Callable[[str], bool]) -> str:
    """``file:line`` of the innermost statement that is not inside."""
    frame = sys._getframe(2)
    while frame.f_back is not None and inside(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}"


def user_source() -> str:
    """Returns ``file:line`` of the innermost statement outside this package."""
    return _source(_is_builder)


def caller() -> str:
    """Returns ``file:line`` of the innermost statement outside all of Systolith."""
    return _source(lambda filename: filename.startswith(_SOFTWARE))


def refuse(message: str) -> NoReturn:
    """Raises KernelError at the user's statement."""
    raise KernelError(message, source=user_source())
