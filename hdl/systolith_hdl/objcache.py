"""Compiles for Verilator's makefiles ($OBJCACHE), those files once that are Verilator's own.

Each build compiles the same run-time library, 12 seconds of it, and its make looks into no cache.
Run as a script: ``python objcache.py FOLDER IDENTITY g++ ... -c -o OBJECT SOURCE``. An object is
kept in FOLDER by IDENTITY, which stands for the sources and the compiler, and by the command.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: Path, identity: str, command: list[str]) -> int:
    """Runs a compiler's command, or copies what it would make; returns its exit status."""
    source = Path(command[-1])
    if not source.name.startswith("verilated") or "-o" not in command:
        return subprocess.call(command)
    made = Path(command[command.index("-o") + 1])
    key = hashlib.sha256("\0".join([identity, *command]).encode()).hexdigest()[:20]
    kept = folder / f"{source.stem}-{key}.o"
    if not kept.exists():
        status = subprocess.call(command)
        if status:
            return status
        folder.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        shutil.copyfile(made, temporary)
        temporary.replace(kept)
    else:
        shutil.copyfile(kept, made)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
