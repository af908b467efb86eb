"""Builds a component with Verilator and runs cocotb tests on it, from pytest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from amaranth.lib import wiring
from systolith.runtime.rtl import OPTIMIZATION
from systolith_hdl.emit import to_verilog
from systolith_hdl.toolchain import cache_dir, content_hash, verilator_env

_BUILD_ARGS = [
    "-O3",
    "--x-assign",
    "fast",
    "--x-initial",
    "fast",
    "-Wno-fatal",
    "-Wno-lint",
    "--no-timing",
    # cocotb's runner makes every signal public, which costs minutes of C++: only the DUT's own
    # signals stay so (see _CONTROL).
    "--no-public-flat-rw",
]
#: Verilator control file: the bench reaches the DUT's signals, none deeper.
_CONTROL = """`verilator_config
public_flat_rw -module "{name}" -var "*"
"""


def seed_of_run() -> int:
    """``$SYSTOLITH_SEED``, else a number drawn; printed, so that a failure can be replayed."""
    seed = int(os.environ.get("SYSTOLITH_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"SYSTOLITH_SEED={seed}")
    return seed


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps two test workers from building the same thing at once."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run_bench(
    component: wiring.Component | str,
    name: str,
    test_module: str,
    *,
    seed: int | None = None,
    testcase: str | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Builds `component` (cached by the hash of its Verilog) and runs the cocotb tests of
    `test_module` on it. In place of a component it may be a Verilog text with module `name`.

    The DUT's ports are named ``member__submember``, its clock ``clk``, its reset ``rst``.
    The seed (`seed`, else ``$SYSTOLITH_SEED``, else drawn) is printed and seeds Python's
    `random` in the simulation. Returns the number of tests that ran; raises AssertionError when one
    failed, or when none ran.
    """
    from cocotb_tools.runner import get_results, get_runner

    verilog = component if isinstance(component, str) else to_verilog(component, name)
    binary, environment, flags = verilator_env()
    build_args = [*_BUILD_ARGS, *flags]
    key = content_hash(verilog, repr(build_args), OPTIMIZATION, _CONTROL, binary)
    build_dir = cache_dir() / f"bench-{name}-{key}"
    build_dir.mkdir(parents=True, exist_ok=True)
    source = build_dir / f"{name}.v"
    control = build_dir / f"{name}.vlt"
    if seed is None:
        seed = seed_of_run()
    print(f"{name}: {test_module} with SYSTOLITH_SEED={seed}")

    saved = dict(os.environ)
    os.environ.update(environment)
    os.environ["MAKEFLAGS"] = f"{environment.get('MAKEFLAGS', ' --')} {OPTIMIZATION}"
    os.environ["PATH"] = f"{Path(binary).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        runner = get_runner("verilator")
        with _locked(build_dir / "lock"):
            if not source.exists() or source.read_text() != verilog:
                source.write_text(verilog)
                control.write_text(_CONTROL.format(name=name))
            runner.build(
                sources=[control, source],
                hdl_toplevel=name,
                build_dir=build_dir,
                build_args=build_args,
                always=False,
                log_file=build_dir / "build.log",
            )
        with tempfile.TemporaryDirectory(prefix=f"systolith-{name}-") as run_dir:
            try:
                results = runner.test(
                    test_module=test_module,
                    hdl_toplevel=name,
                    hdl_toplevel_lang="verilog",
                    build_dir=build_dir,
                    test_dir=run_dir,
                    results_xml=str(Path(run_dir) / "results.xml"),
                    seed=seed,
                    testcase=testcase,
                    extra_env={"COCOTB_RANDOM_SEED": str(seed), **(env or {})},
                )
            except SystemExit:  # cocotb's way to say that a test failed
                raise AssertionError(
                    f"{name}: a test failed; replay it with SYSTOLITH_SEED={seed}"
                ) from None
            ran, failed = get_results(results)
    finally:
        os.environ.clear()
        os.environ.update(saved)
    assert failed == 0, f"{failed} of {ran} tests failed; replay with SYSTOLITH_SEED={seed}"
    assert ran > 0, "no test ran"
    return ran
