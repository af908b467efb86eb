"""Proofs: the adder's generators at the widths of FP8 are right for all inputs.

The chip has the adder in FP32 only; the same functions (`add` and what it calls) make it in
formats small enough for Yosys' SAT solver, which compares it with an exact sum (exact_sum.v) over
all words, subnormals, infinities and NaNs included. The pipeline stays in: what is proven is the
output three cycles after any inputs, or two, from any state before. The same is proven of the adder
as the MAC uses it, in four cycles, with products of any exponent that are not normalised.
"""

import inspect
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from amaranth.hdl import Const, Module, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator
from systolith_hdl.arith import FP32_LATENCY, SHORT_LATENCY, fp32, rounding
from systolith_hdl.arith.fp32 import SHORT_CUTS, Addend, Adder, add, unpack
from systolith_hdl.arith.rounding import Encoding
from systolith_hdl.emit import to_verilog
from systolith_hdl.tensor import ADD_LATENCY
from systolith_hdl.tensor.mac import CUTS
from systolith_hdl.toolchain import use_yosys

E4M3, E5M2, E3M4 = Encoding(4, 3), Encoding(5, 2), Encoding(3, 4)
SPECIFICATION = Path(__file__).with_name("exact_sum.v")


class Accumulator(wiring.Component):
    """The adder of a MAC, `Mac` without the multiplication: a word plus a product.

    Members
    -------
    a : In, a word
    sign, exponent, significand, inf, nan : In, of the product
    o : Out, ADD_LATENCY cycles later
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        super().__init__(
            {
                "a": In(encoding.bits),
                "sign": In(1),
                "exponent": In(signed(encoding.exp_bits + 1)),
                "significand": In(1 + encoding.fraction),
                "inf": In(1),
                "nan": In(1),
                "o": Out(encoding.bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        encoding = self._encoding
        a = unpack(m, self.a, encoding)
        b = Addend(self.sign, self.exponent, self.significand, self.inf, self.nan)
        total = add(m, en=Const(1), a=a, b=b, lead=1, cuts=CUTS, encoding=encoding)
        m.d.comb += self.o.eq(total)
        return m


def proven(
    component: wiring.Component,
    name: str,
    encoding: Encoding,
    folder: Path,
    *,
    short: bool = False,
) -> bool:
    """Whether the component gives the exact sum, rounded, for all inputs; `short`: after
    SHORT_LATENCY cycles."""
    (folder / f"{name}.v").write_text(to_verilog(component, name))
    (folder / SPECIFICATION.name).write_text(SPECIFICATION.read_text())
    miter = f"{name}_miter"
    latency = {"adder": FP32_LATENCY, "accumulator": ADD_LATENCY}[name]
    parameters = {"E": encoding.exponent, "F": encoding.fraction}
    if short:
        latency = parameters["LATENCY"] = SHORT_LATENCY
    chosen = " ".join(f"-chparam {key} {value}" for key, value in parameters.items())
    script = f"""
        read_verilog {name}.v {SPECIFICATION.name}
        hierarchy -check -top {miter} {chosen}
        proc
        flatten
        opt -full
        select -assert-none t:$dlatch
        techmap
        opt -full
        sat -seq {latency + 1} -prove-skip {latency} -prove different 0 {miter}
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
def test_short_adder(encoding: Encoding, tmp_path: Path) -> None:
    assert proven(Adder(encoding, cuts=SHORT_CUTS), "adder", encoding, tmp_path, short=True)


@pytest.mark.parametrize("encoding", [E4M3, E3M4], ids=["e4m3", "e3m4"])
def test_accumulator(encoding: Encoding, tmp_path: Path) -> None:
    assert proven(Accumulator(encoding), "accumulator", encoding, tmp_path)


#: (module, function, then what stands in it and what a mistake would be, once or twice)
MISTAKES = {
    "ties go down": (fp32, "add", "(kept[0] & lost.all())", "0", "guard & (kept[0] | lost.any())",
                     "guard & lost.any()"),
    "ties go up": (fp32, "add", "guard & (kept[0] | lost.any())", "guard"),
    "sticky is lost": (fp32, "add", "lost.any()", "lost[1:].any()"),
    "ties of negative sums": (fp32, "add", "guard | (kept[0] & lost.all())", "guard"),
    "bits are lost in alignment": (
        rounding, "shift_right_sticky", "kept[0] | lost", "kept[0]",
    ),
    "overflow wraps": (rounding, "finish", "packed[-1] | ", ""),
    "exponent off by one": (fp32, "add", "pipe.exponent[1:] + 1", "pipe.exponent[1:]"),
    "a subnormal is normal": (fp32, "add", "shift[0] | ~top", "shift[0]"),
    "-0 - -0 is -0": (fp32, "add", " & ~(pipe.subtract & pipe.zero)", ""),
    "x - x is not zero": (fp32, "add", "zero=pipe.total == 0", "zero=pipe.total != pipe.total"),
    "inf - inf is inf": (fp32, "add", " | (a.inf & b.inf & pipe.differ)", ""),
    "inf - x is x": (fp32, "add", "(b.inf | swap)", "swap"),
    "normalised too far": (fp32, "add", "clear & (room | left)", "clear"),
    "also too far": (fp32, "add", "clear_if & (room | also_left)", "clear_if"),
    "not far enough": (fp32, "add", "(room | left | also_left)", "(room | also_left)"),
    "room is forgotten": (fp32, "add", "pipe.exponent[bit] & ~go", "pipe.exponent[bit] & go"),
    "zeros come in": (fp32, "add", "_spread(pipe.negative & go, 1 << bit)", "0"),
    "negative is positive": (fp32, "add", "(pipe.sign ^ pipe.negative)", "pipe.sign"),
    "a place too far": (fp32, "add", "Cat(Const(0, 1), b.significand)", "b.significand"),
    "an early exponent": (
        fp32, "add", '"big", "addend", "exponent", "sign", "subtract", "inf", "nan")',
        '"big", "addend", "sign", "subtract", "inf", "nan")\n    pipe.let(exponent=a.exponent)',
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the generators' rules can be left out."""
    module, name, *changes = MISTAKES[mistake]
    source = inspect.getsource(getattr(module, name))
    for right, wrong in zip(changes[::2], changes[1::2], strict=True):
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    scope = dict(vars(module))
    exec(source, scope)
    for place in (rounding, fp32):
        if hasattr(place, name):
            monkeypatch.setattr(place, name, scope[name])
    monkeypatch.setitem(globals(), "add", fp32.add)
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
