"""Proofs: the adder's generators at the widths of FP8 are right for all inputs.

The chip has the adder in FP32 only; the same functions (`raw_add`, `pack` and what they call) make
it in formats small enough for Yosys' SAT solver, which compares it with an exact sum
(exact_sum.v) over all words, subnormals, infinities and NaNs included. The pipeline stays in: what
is proven is the output three cycles after any inputs, from any state before. The same is proven of
the adder as the MAC uses it, with products of any exponent and sticky bits.
"""

import inspect
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from amaranth.hdl import Const, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator
from systolith_hdl.arith import FP32_LATENCY, fp32, rounding
from systolith_hdl.arith.fp32 import Adder, is_nan, raw_add, raw_layout, unpack
from systolith_hdl.arith.rounding import Encoding
from systolith_hdl.emit import to_verilog
from systolith_hdl.toolchain import use_yosys

E4M3, E5M2, E3M4 = Encoding(4, 3), Encoding(5, 2), Encoding(3, 4)
SPECIFICATION = Path(__file__).with_name("exact_sum.v")


class Accumulator(wiring.Component):
    """The adder of a MAC, `Mac` without the multiplication: a word plus a raw number.

    Members
    -------
    a : In, a word
    sign, exponent, significand : In, of the raw number
    nan : In, the product is NaN
    o : Out, FP32_LATENCY cycles later
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        super().__init__(
            {
                "a": In(encoding.bits),
                "sign": In(1),
                "exponent": In(encoding.exp_bits),
                "significand": In(encoding.raw_bits - 1),
                "nan": In(1),
                "o": Out(encoding.bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        encoding = self._encoding
        a, b = Signal(raw_layout(encoding)), Signal(raw_layout(encoding))
        m.d.comb += [
            a.as_value().eq(unpack(self.a, encoding)),
            b.sign.eq(self.sign),
            b.exponent.eq(self.exponent),
            b.significand.eq(self.significand),
        ]
        nan = self.nan | is_nan(self.a, encoding)
        total = raw_add(m, en=Const(1), a=a, b=b, nan=nan, encoding=encoding)
        m.d.comb += self.o.eq(total)
        return m


def proven(component: wiring.Component, name: str, encoding: Encoding, folder: Path) -> bool:
    """Whether the component gives the exact sum, rounded, for all inputs."""
    (folder / f"{name}.v").write_text(to_verilog(component, name))
    (folder / SPECIFICATION.name).write_text(SPECIFICATION.read_text())
    miter = f"{name}_miter"
    script = f"""
        read_verilog {name}.v {SPECIFICATION.name}
        hierarchy -check -top {miter} -chparam E {encoding.exponent} -chparam F {encoding.fraction}
        proc
        flatten
        opt -full
        select -assert-none t:$dlatch
        techmap
        opt -full
        sat -seq {FP32_LATENCY + 1} -prove-skip {FP32_LATENCY} -prove different 0 {miter}
    """
    (folder / "prove.ys").write_text(script)
    use_yosys()
    done = subprocess.run(
        [os.environ.get("YOSYS", "yosys"), "prove.ys"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [word in done.stdout for word in ("no model found: SUCCESS!", "model found: FAIL!")]
    assert sum(found) == 1, done.stdout[-3000:]
    return found[0]


@pytest.mark.parametrize("encoding", [E4M3, E5M2, E3M4], ids=["e4m3", "e5m2", "e3m4"])
def test_adder(encoding: Encoding, tmp_path: Path) -> None:
    assert proven(Adder(encoding), "adder", encoding, tmp_path)


@pytest.mark.parametrize("encoding", [E4M3, E3M4], ids=["e4m3", "e3m4"])
def test_accumulator(encoding: Encoding, tmp_path: Path) -> None:
    assert proven(Accumulator(encoding), "accumulator", encoding, tmp_path)


#: (module, function, what stands in it, what a mistake would be)
MISTAKES = {
    "ties go down": (rounding, "pack", "(raw[4] | (raw[:3] != 0))", "(raw[:3] != 0)"),
    "ties go up": (rounding, "pack", "raw[3] & (raw[4] | (raw[:3] != 0))", "raw[3]"),
    "sticky is lost": (rounding, "pack", "raw[:3] != 0", "raw[1:3] != 0"),
    "bits are lost in alignment": (
        rounding, "shift_right_sticky", "shifted[most] | (shifted[:most] != 0)", "shifted[most]",
    ),
    "overflow wraps": (rounding, "pack", "packed[-1] | ", ""),
    "exponent off by one": (rounding, "pack", "fraction - 1), top)", "fraction - 1), Const(0, 1))"),
    "-0 - -0 is -0": (fp32, "raw_add", "sign_2 & ~(subtract_2 & (sum_2 == 0))", "sign_2"),
    "inf - inf is inf": (fp32, "raw_add", "& (a.sign ^ b.sign)\n", "& 0\n"),
    "normalised too far": (fp32, "raw_add", "Mux(zeros < exponent_2, zeros, exponent_2)", "zeros"),
    "an early exponent": (
        fp32, "raw_add", "exponent_2.eq(big_1.exponent)", "exponent_2.eq(big.exponent)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the generators' rules can be left out."""
    module, name, right, wrong = MISTAKES[mistake]
    source = inspect.getsource(getattr(module, name))
    assert source.count(right) == 1
    scope = dict(vars(module))
    exec(source.replace(right, wrong), scope)
    for place in (rounding, fp32):
        if hasattr(place, name):
            monkeypatch.setattr(place, name, scope[name])
    monkeypatch.setitem(globals(), "raw_add", fp32.raw_add)
    found = not proven(Adder(E3M4), "adder", E3M4, tmp_path)
    if not found:
        found = not proven(Accumulator(E3M4), "accumulator", E3M4, tmp_path)
    assert found


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [(E4M3, ml_dtypes.float8_e4m3), (E5M2, ml_dtypes.float8_e5m2)],
    ids=["e4m3", "e5m2"],
)
def test_every_sum_is_that_of_ml_dtypes(encoding: Encoding, dtype: type) -> None:
    """A reference that no one here wrote: all 65536 pairs in Amaranth's simulator."""
    words = np.arange(256, dtype=np.uint8)
    values = words.view(dtype).astype(np.float64)
    with np.errstate(invalid="ignore"):
        sums = values[:, None] + values[None, :]
    wanted = np.where(np.isnan(sums), encoding.nan, sums.astype(dtype).view(np.uint8)).ravel()
    left, right = (grid.ravel().tolist() for grid in np.meshgrid(words, words, indexing="ij"))
    adder = Adder(encoding)
    got: list[int] = []

    async def feed(ctx) -> None:  # type: ignore[no-untyped-def]
        ctx.set(adder.en, 1)
        for a, b in zip(left + [0] * FP32_LATENCY, right + [0] * FP32_LATENCY, strict=True):
            ctx.set(adder.a, a)
            ctx.set(adder.b, b)
            await ctx.tick()
            got.append(ctx.get(adder.o))

    simulator = Simulator(adder)
    simulator.add_clock(1e-6)
    simulator.add_testbench(feed)
    simulator.run()
    np.testing.assert_array_equal(got[FP32_LATENCY - 1 : FP32_LATENCY - 1 + len(wanted)], wanted)
