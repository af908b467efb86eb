"""RANDOM and DROPOUT, as kernels use them."""

from collections.abc import Callable

import numpy as np
import pytest
import systolith
from systolith.errors import KernelError
from systolith.kernel import AluOp, DType, KernelBuilder, View

N = 4
COLUMNS = 500


def run(
    build: Callable[[KernelBuilder, View, View], None],
    *,
    seed: int = 1,
    dtype: DType = DType.FP32,
    repeat: int = 1,
) -> list[np.ndarray]:
    """What runs of a program leave in a tile, given another one of ones."""
    nc = KernelBuilder("nano")
    out = nc.dram.tensor("out", (N, COLUMNS), dtype, kind="output")
    ones, target = (nc.sbuf.tile(COLUMNS).view() for _ in range(2))
    nc.vector.memset(ones, 1.0)
    build(nc, ones, target.astype(dtype))
    nc.dma.store(target, out, lane_stride=4 * COLUMNS)
    found = []
    with systolith.Device("golden", config="nano", seed=seed, check=True) as device:
        loaded = device.driver.load(nc.finish())
        for _ in range(repeat):
            loaded.run()
            found.append(device.driver.read(loaded.tensors["out"]))
    return found


def fill(key: int) -> Callable[[KernelBuilder, View, View], None]:
    return lambda nc, _, dst: nc.vector.random(dst, key)


def test_words_and_numbers() -> None:
    """The numbers are the words' upper bits; both are spread evenly."""
    (words,) = run(fill(7), dtype=DType.INT32)
    (numbers,) = run(fill(7))
    np.testing.assert_array_equal(numbers, (words.view(np.uint32) >> 9) / np.float32(2**23))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(np.unique(words)) == words.size
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * numbers.size)
    counts = np.histogram(numbers, 10, (0, 1))[0]
    expected = numbers.size / 10
    assert ((counts - expected) ** 2 / expected).sum() < 30  # of 9 degrees: 0.04 %
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(32 * words.size)


def test_what_they_follow_from() -> None:
    """Key and seed, which goes on with each run, and not the instructions before."""
    first, second = run(fill(7), repeat=2)
    (again,) = run(fill(7))
    (other_key,) = run(fill(8))
    (next_seed,) = run(fill(7), seed=2)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(second, next_seed)
    for other in (second, other_key):
        assert (first == other).mean() < 0.01
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(first.size)

    def later(nc: KernelBuilder, ones: View, dst: View) -> None:
        nc.vector.memset(dst, 0.0)
        nc.vector.random(dst, 7)

    np.testing.assert_array_equal(run(later)[0], first)

    def rounded(nc: KernelBuilder, ones: View, dst: View) -> None:
        """The rounding noise of the instruction whose number is the key."""
        nc.vector.memset(ones, 1 + 2**-8)
        nc.vector.random(dst, 3)  # instruction 2; the next one is instruction 3
        nc.vector.copy(ones.astype(DType.BF16), ones, rounding="stochastic")
        nc.vector.tensor_tensor(dst, dst, AluOp.MUL, ones)

    up = run(rounded)[0] / run(fill(3))[0] > 1.004
    assert abs(up.mean() - 0.5) < 0.06
    assert abs(np.corrcoef(up.ravel(), run(fill(3))[0].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout(rate: float) -> None:
    def drop(nc: KernelBuilder, ones: View, dst: View) -> None:
        nc.vector.dropout(dst, ones, rate, key=5)

    (found,) = run(drop)
    kept = found != 0
    np.testing.assert_array_equal(found[kept], np.float32(1 / (1 - rate)))
    slack = 5 * np.sqrt(rate * (1 - rate) / found.size)
    assert abs(kept.mean() - (1 - rate)) <= slack
    (words,) = run(fill(5), dtype=DType.INT32)
    np.testing.assert_array_equal(kept, words.view(np.uint32) >= round(rate * 2**32))


def test_the_gradient_drops_what_the_forward_pass_dropped() -> None:
    def both(nc: KernelBuilder, ones: View, dst: View) -> None:
        forward, backward = (nc.sbuf.tile(COLUMNS).view() for _ in range(2))
        nc.vector.dropout(forward, ones, 0.5, key=9)
        nc.vector.memset(ones, -3.0)
        nc.vector.dropout(backward.reshape(5, 100), ones.reshape(5, 100), 0.5, key=9, scale=1.0)
        nc.vector.tensor_tensor(dst, backward, AluOp.SUB, forward)

    (found,) = run(both)
    assert set(np.unique(found)) == {-5.0, 0.0}


REFUSED: dict[str, tuple[Callable[[KernelBuilder, View, View], object], str]] = {
    "rate": (lambda nc, a, b: nc.vector.dropout(b, a, 1.0, key=1), "rate must be from 0 to 1"),
    "key": (lambda nc, a, b: nc.vector.random(b, 1 << 32), "key must be a number of 32 bits"),
    "no key": (lambda nc, a, b: nc.vector.dropout(b, a, 0.5, key=None), "key must be a number"),
    "type": (
        lambda nc, a, b: nc.vector.random(b.astype(DType.FP16), 1),
        "dst of random must be FP32 or INT32, not FP16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    nc = KernelBuilder("nano")
    a, b = (nc.sbuf.tile(8).view() for _ in range(2))
    with pytest.raises(KernelError, match=message):
        call(nc, a, b)
