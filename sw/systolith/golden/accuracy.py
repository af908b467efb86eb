"""Measures the scalar engine's functions against float64: ``python -m systolith.golden.accuracy``.

Every binade of both signs is sampled: its first and last numbers, the neighbourhood of every
segment boundary of the tables, and evenly spread numbers with random low bits. One ULP is the
spacing of FP32 numbers at the true value (2**-149 among the subnormals); a correctly rounded
result is at most 0.5 ULP off. Writes ``docs/activation-accuracy.md`` when run in a checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # type: ignore[import-untyped]
from systolith_hdl.isa import Function
from systolith_hdl.scalar import tables as T

from .activation import Bits, evaluate

Doubles = npt.NDArray[np.floating[Any]]


def _density(y: Doubles) -> Doubles:
    return np.exp(-y * y / 2) / np.sqrt(2 * np.pi)


def _gelu(y: Doubles) -> Doubles:
    # the limit: -inf * 0 would be NaN
    return np.where(np.isneginf(y), -0.0, y * special.ndtr(y))


def _gelu_dx(y: Doubles) -> Doubles:
    slope = special.ndtr(y) + np.where(np.isinf(y), 0.0, y) * _density(y)
    # Phi and y * phi cancel next to the zero: Taylor around it (all derivatives are polynomials
    # times the density) keeps the relative accuracy.
    zero = np.array(-0.7517915246935645)  # nearest double
    d = (y - zero) - 1.4956759177009838e-17  # what the double is off by
    first = _density(zero) * (2 - zero**2)
    second = _density(zero) * (zero**3 - 4 * zero)
    third = _density(zero) * (-(zero**4) + 7 * zero**2 - 4)
    series = d * (first + d * (second / 2 + d * third / 6))
    return np.where(np.abs(d) < 1e-5, series, slope)


def _sigmoid(y: Doubles) -> Doubles:
    return 1 / (1 + np.exp(-y))


def _tanh_argument(y: Doubles) -> tuple[Doubles, Doubles]:
    """2 * u of GELU_TANH and its derivative."""
    twice = 2 * np.sqrt(2 / _PI)
    return twice * (y + y**3 * 44715 / 1000000), twice * (1 + 3 * y**2 * 44715 / 1000000)


def _gelu_tanh_dx(y: Doubles) -> Doubles:
    u, slope = _tanh_argument(y)
    return _sigmoid(u) * (1 + y * _sigmoid(-u) * slope)


def _mish_dx(y: Doubles) -> Doubles:
    plus = np.logaddexp(0 * y, y)
    return np.tanh(plus) + y * _sigmoid(y) / np.cosh(plus) ** 2


def _wide(f: Callable[[Doubles], Doubles], below: float) -> Callable[[Doubles], Doubles]:
    """A function next to whose zero terms cancel, worked out in the widest floats there are;
    `below` is its limit at minus infinity, and 1 that at infinity."""

    def truth(y: Doubles) -> Doubles:
        finite = np.where(np.isinf(y), 0.0, y).astype(np.longdouble)
        limit = np.where(y > 0, 1.0, below)
        return np.where(np.isinf(y), limit, f(finite).astype(np.float64))

    return truth


def _gate(f: Callable[[Doubles], Doubles]) -> Callable[[Doubles], Doubles]:
    """y * f(y), f falling to 0 at minus infinity."""
    return lambda y: np.where(np.isneginf(y), -0.0, y * f(y))


_PI = np.longdouble("3.14159265358979323846264338327950288")

#: What each function of the committed tables should be, in float64.
TRUTH: dict[Function, Callable[[Doubles], Doubles]] = {
    Function.IDENTITY: lambda y: y,
    Function.EXP: np.exp,
    Function.LOG: np.log,
    Function.TANH: np.tanh,
    Function.RECIPROCAL: np.reciprocal,
    Function.RSQRT: lambda y: 1 / np.sqrt(y),
    Function.SQRT: np.sqrt,
    Function.GELU: _gelu,
    Function.GELU_DX: _gelu_dx,
    Function.SIGMOID: special.expit,
    Function.ERF: special.erf,
    Function.SOFTPLUS: lambda y: np.logaddexp(0, y),
    Function.ARCTAN: np.arctan,
    Function.SIGN: np.sign,
    Function.ABS: np.abs,
    Function.RELU: lambda y: np.maximum(y, 0),
    Function.SILU: _gate(special.expit),
    Function.SILU_DX: _wide(lambda y: _sigmoid(y) * (1 + y * _sigmoid(-y)), -0.0),
    Function.GELU_TANH: _gate(
        lambda y: special.expit(_tanh_argument(y.astype(np.longdouble))[0]).astype(np.float64)
    ),
    Function.GELU_TANH_DX: _wide(_gelu_tanh_dx, -0.0),
    Function.MISH: _gate(lambda y: np.tanh(np.logaddexp(0, y))),
    Function.MISH_DX: _wide(_mish_dx, -0.0),
    Function.SQUARE: np.square,
    Function.SIN: np.sin,
    Function.COS: np.cos,
}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What was measured of one function.

    Parameters
    ----------
    count : numbers evaluated
    max_ulp : largest error in ULP
    at : FP32 number at which it was met
    correct : share of correctly rounded results
    max_absolute : largest absolute error among the results of magnitude 16 or less
    """

    function: Function
    count: int
    max_ulp: float
    at: float
    correct: float
    max_absolute: float


#: Numbers around which functions are centred, as FP32.
_CENTERS = [
    np.float32(control["center"] / 2**T.CENTER_FRACTION).view(np.int32)
    for control in (T.field_bits(T.CONTROL, word) for word in T.tables().controls.values())
    if control["center"]
]


def samples(per_binade: int, seed: int = 1) -> Bits:
    """Returns FP32 bit patterns: all special values, and about `per_binade` of each binade."""
    rng = np.random.default_rng(seed)
    edges = np.arange(0, 1 << 23, 1 << 15, dtype=np.int64)  # 256 segments is the most there are
    near = (edges[:, None] + np.arange(-2, 3)).reshape(-1) & 0x7FFFFF
    spread = np.linspace(0, 1 << 23, per_binade, endpoint=False).astype(np.int64)
    chunks = []
    for sign in (0, 1):
        for exponent in range(256):
            jitter = rng.integers(0, max(1, (1 << 23) // per_binade), per_binade)
            mantissa = np.concatenate([near, spread + jitter])
            if exponent == 255:
                mantissa = np.array([0, 1, 1 << 22, (1 << 23) - 1])
            chunks.append(sign << 31 | exponent << 23 | mantissa)
    tiny = np.arange(1024)
    centers = [center + np.arange(-4096, 4096) for center in _CENTERS]
    extra = np.concatenate([tiny, *centers])
    return np.concatenate([*chunks, extra, extra | 1 << 31]).astype(np.uint32)


def errors(got: Bits, want: Doubles) -> Doubles:
    """Errors in ULP. Infinities and NaNs must match (0.0), or the error is infinite; -0 and +0
    are taken for equal."""
    value = got.view(np.float32).astype(np.float64)
    with np.errstate(all="ignore"):
        rounded = want.astype(np.float32)
        exponent = np.frexp(want)[1]
        ulp = np.ldexp(1.0, np.clip(exponent - 24, -149, 104))
        error = np.abs(value - want) / ulp
        # what rounds to infinity counts as 2**128 for those that stop short of it
        special_value = ~np.isfinite(value) | ~np.isfinite(rounded)
        same = (np.isnan(value) & np.isnan(rounded)) | (value == rounded)
        beyond = np.where(np.isfinite(value), value, np.copysign(2.0**128, value))
        limit = np.where(np.isfinite(want), want, np.copysign(2.0**128, want))
        off = np.abs(beyond - limit) / 2.0**104
    off = np.where(np.isnan(value) | np.isnan(want), np.inf, off)
    return np.where(special_value, np.where(same, 0.0, off), error)


def measure(function: Function, y: Bits) -> Accuracy:
    """Compares a function with its truth at the given numbers."""
    with np.errstate(all="ignore"):
        want = TRUTH[function](y.view(np.float32).astype(np.float64))
    got = evaluate(function, y)
    error = errors(got, want)
    worst = int(np.argmax(error))
    with np.errstate(all="ignore"):
        small = np.abs(want) <= 16
        absolute = np.abs(got.view(np.float32).astype(np.float64) - want)[small]
        correct = got.view(np.float32) == want.astype(np.float32)
    correct |= np.isnan(want) & np.isnan(got.view(np.float32))
    return Accuracy(
        function=function,
        count=y.size,
        max_ulp=float(error[worst]),
        at=float(y.view(np.float32)[worst]),
        correct=float(np.mean(correct)),
        max_absolute=float(np.nanmax(absolute)),
    )


_PAGE = """# Accuracy of the scalar engine's functions

Measured by `python -m systolith.golden.accuracy`, which writes this page. The golden model, to
which the chip is equal bit for bit, is compared with float64 over every binade of FP32, both
signs, subnormals, infinities and NaN included, with the neighbourhoods of all segment boundaries.
0.5 ULP is a correctly rounded result; one ULP is the spacing of FP32 numbers at the true value.
Overflow, infinities and NaN count as C99 has them: a missed one would show as a huge or infinite
error. Subnormals are neither read nor written as zero. The largest absolute error is taken among
results of magnitude 16 or less.

| function | max ULP | at y = | correctly rounded | max absolute error | numbers |
|---|---|---|---|---|---|
"""


def page(results: list[Accuracy]) -> str:
    """Formats the documentation page."""
    lines = [
        f"| {r.function.name} | {r.max_ulp:.3f} | {r.at:.9g} | {100 * r.correct:.2f} % "
        f"| {r.max_absolute:.2e} | {r.count} |"
        for r in results
    ]
    return _PAGE + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-binade", type=int, default=32768, help="numbers of each binade")
    parser.add_argument("--output", type=Path, help="page to write; default: the docs folder")
    options = parser.parse_args(argv)
    y = samples(options.per_binade)
    text = page([measure(function, y) for function in TRUTH])
    print(text)
    output = options.output
    docs = Path(__file__).parents[3] / "docs"
    if output is None and docs.is_dir():
        output = docs / "activation-accuracy.md"
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
