"""Tables of the scalar engine: reproducible, within their widths, and accurate."""

import decimal
import re
from pathlib import Path

import numpy as np
import pytest
from systolith.golden import accuracy, activation
from systolith.golden.activation import evaluate
from systolith_hdl.formats import CANONICAL_NAN
from systolith_hdl.isa import Function
from systolith_hdl.scalar import tables as T

_PI = "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482\
534211706798214808651328230664709384460955058223172535940812848111745028410270193852110555964462\
29489549303819644288109756659334461284756482337"

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-149  #: smallest subnormal


@pytest.fixture(scope="module")
def segments() -> list[dict[str, int]]:
    return [T.field_bits(T.SEGMENT, word) for word in T.tables().segments]


def test_committed_tables_are_what_the_generator_makes() -> None:
    assert T.generate() == T.tables()


def test_dump_and_parse_are_inverse() -> None:
    assert T.Tables.parse(T.tables().dump()) == T.tables()


def test_every_function_has_a_description() -> None:
    assert set(T.tables().controls) == set(Function)
    assert set(T.DESCRIPTIONS) == set(Function) - {Function.CUSTOM}  # loaded


def test_intermediates_fit_the_lane(segments: list[dict[str, int]]) -> None:
    limit = 1 << T.P0_BITS - 1
    largest_log = 150 * T.LN2
    for segment in segments:
        for t in range(0, 1 << T.MANTISSA, 1 << 18):
            for at in (t, t + (1 << 18) - 1):
                c0, c1, c2, c3 = (segment[f"c{i}"] for i in range(4))
                p2, p1, p0 = T.horner(c0, c1, c2, c3, at)
                assert abs(p2) < 1 << 24 and abs(p1) < limit
                assert abs(p0) + (largest_log if segment["log"] else 0) < limit


def test_powers_of_two_stay_in_their_binade() -> None:
    """The lane takes the top bit of 2**f for granted."""
    low = T.FIXED - T.EXP2_SEGMENTS_LOG2
    u = np.arange(1 << low, dtype=np.int64)
    for word in (T.tables().exp2[0], T.tables().exp2[-1]):
        c = T.field_bits(T.EXP2_ENTRY, word)
        f = c["c0"] + (c["c1"] * u + (c["c2"] * ((u >> 8) ** 2 >> 12) << 7) >> low)
        assert 0 <= f.min() and f.max() < 1 << T.FIXED
        assert (np.diff(f) >= 0).all()


#: function -> (y, result); a list because 0.0 == -0.0
SPECIAL = {
    Function.IDENTITY: [
        (0.0, 0.0),
        (-0.0, -0.0),
        (INF, INF),
        (-INF, -INF),
        (TINY, TINY),
        (-1.5, -1.5),
    ],
    Function.EXP: [
        (0.0, 1.0),
        (-0.0, 1.0),
        (INF, INF),
        (-INF, 0.0),
        (89.0, INF),
        (-104.0, 0.0),
        (TINY, 1.0),
    ],
    Function.LOG: [
        (0.0, -INF),
        (-0.0, -INF),
        (INF, INF),
        (-INF, NAN),
        (-1.0, NAN),
        (-TINY, NAN),
        (1.0, 0.0),
    ],
    Function.TANH: [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (TINY, TINY), (10.0, 1.0)],
    Function.RECIPROCAL: [
        (0.0, INF),
        (-0.0, -INF),
        (INF, 0.0),
        (-INF, -0.0),
        (TINY, INF),
        (-2.0, -0.5),
    ],
    Function.RSQRT: [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-INF, NAN), (-1.0, NAN), (4.0, 0.5)],
    Function.SQRT: [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, NAN), (-TINY, NAN), (9.0, 3.0)],
    Function.GELU: [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -0.0), (-15.0, -0.0), (9.0, 9.0)],
    Function.GELU_DX: [
        (0.0, 0.5),
        (-0.0, 0.5),
        (INF, 1.0),
        (-INF, -0.0),
        (-15.0, -0.0),
        (TINY, 0.5),
    ],
    Function.SIGMOID: [
        (0.0, 0.5),
        (-0.0, 0.5),
        (INF, 1.0),
        (-INF, 0.0),
        (-104.0, 0.0),
        (20.0, 1.0),
    ],
    Function.ERF: [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (4.0, 1.0), (TINY, TINY)],
    Function.SOFTPLUS: [
        (0.0, np.log(2)),
        (-0.0, np.log(2)),
        (INF, INF),
        (-INF, 0.0),
        (-104.0, 0.0),
        (20.0, 20.0),
        (3e38, 3e38),
    ],
    Function.ARCTAN: [
        (0.0, 0.0),
        (-0.0, -0.0),
        (INF, np.pi / 2),
        (-INF, -np.pi / 2),
        (TINY, TINY),
        (-1.0, -np.pi / 4),
    ],
    Function.SIGN: [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (TINY, 1.0), (-TINY, -1.0)],
    Function.ABS: [(0.0, 0.0), (-0.0, 0.0), (INF, INF), (-INF, INF), (-TINY, TINY), (-1.5, 1.5)],
    Function.RELU: [(0.0, 0.0), (-0.0, 0.0), (INF, INF), (-INF, 0.0), (-TINY, 0.0), (1.5, 1.5)],
    **{
        function: [
            (0.0, 0.0),
            (-0.0, -0.0),
            (INF, INF),
            (-INF, -0.0),
            (-200.0, -0.0),
            (90.0, 90.0),
            (3e38, 3e38),
            (-3e38, -0.0),
        ]
        for function in (Function.SILU, Function.GELU_TANH, Function.MISH)
    },
    **{
        function: [
            (0.0, at_zero),
            (-0.0, at_zero),
            (INF, 1.0),
            (-INF, -0.0),
            (TINY, at_zero),
            (-200.0, -0.0),
            (3e38, 1.0),
        ]
        for function, at_zero in (
            (Function.SILU_DX, 0.5),
            (Function.GELU_TANH_DX, 0.5),
            (Function.MISH_DX, 0.6),
        )
    },
    Function.SQUARE: [
        (0.0, 0.0),
        (-0.0, 0.0),
        (INF, INF),
        (-INF, INF),
        (-3.0, 9.0),
        (2.0**-74, 2.0**-148),
        (2.0**-76, 0.0),
        (TINY, 0.0),
        (1.5 * 2.0**-75, 2.0**-149),
        (2.0**64, INF),
        (4095.0, 4095.0**2),
    ],
    Function.SIN: [
        (0.0, 0.0),
        (-0.0, -0.0),
        (INF, NAN),
        (-INF, NAN),
        (TINY, TINY),
        (-TINY, -TINY),
        (-1e-4, -1e-4),
    ],
    Function.COS: [
        (0.0, 1.0),
        (-0.0, 1.0),
        (INF, NAN),
        (-INF, NAN),
        (TINY, 1.0),
        (-1e-4, 1.0),
        (-np.pi, -1.0),
    ],
}


@pytest.mark.parametrize("function", T.DESCRIPTIONS)
def test_special_values(function: Function) -> None:
    """As C99 has them; every NaN gives the canonical one."""
    y, wanted = (np.array(values, np.float32) for values in zip(*SPECIAL[function], strict=True))
    want = wanted.view(np.uint32)
    want[np.isnan(wanted)] = CANONICAL_NAN
    assert evaluate(function, y.view(np.uint32)).tolist() == want.tolist()
    nans = np.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFF800001], np.uint32)
    assert (evaluate(function, nans) == CANONICAL_NAN).all()


def test_angles_are_reduced_exactly() -> None:
    """The distances to multiples of a quarter, against whole numbers of 600 bits: every binade,
    and the closest number of all, 16367173 * 2**72."""
    rng = np.random.default_rng(7)
    with decimal.localcontext(prec=240):
        pi = decimal.Decimal(_PI)
        bits = int(2 / pi * (1 << 600))
    for biased in range(126, 255):
        mantissa = rng.integers(1 << 23, 1 << 24, 200)
        if biased == 127 + 72 + 23:
            mantissa[0] = 16367173
        quadrant, distance = activation._turn(
            np.full(len(mantissa), biased), mantissa & (1 << 23) - 1
        )
        for m, q, d in zip(mantissa.tolist(), quadrant.tolist(), distance.tolist(), strict=True):
            exact = m * bits << biased - 126 >> 24  # 2**600 is a quarter
            assert q == exact >> 600 & 3
            # what is dropped of 2/pi, of the product and of the distance
            assert 0 <= (exact & (1 << 600) - 1) - (d << 600 - T.DISTANCE) < 2 << 600 - T.DISTANCE
            nearest = min(d, (1 << T.DISTANCE) - 1 - d)
            assert nearest >> T.DISTANCE - 30  # so 30 leading zeros are the most


@pytest.mark.parametrize("function", T.DESCRIPTIONS)
def test_accuracy(function: Function) -> None:
    """The documentation states no less than what is measured, and that is below one ULP; below
    1.5 of sine and cosine."""
    result = accuracy.measure(function, accuracy.samples(1024, seed=2))
    assert result.max_ulp < (1.5 if function in (Function.SIN, Function.COS) else 1)
    page = (Path(__file__).parents[2] / "docs" / "activation-accuracy.md").read_text()
    row = re.search(rf"^\| {function.name} \| ([\d.]+) \|", page, re.MULTILINE)
    assert row is not None
    # random samples may meet a number slightly worse than any of the page's
    assert result.max_ulp < float(row[1]) + 0.02


def test_shape_and_empty() -> None:
    y = np.zeros((3, 0, 2), np.uint32)
    assert evaluate(Function.EXP, y).shape == y.shape
    y = np.full((2, 3), 0x3F800000, np.uint32)
    assert (evaluate(Function.IDENTITY, y) == y).all()
