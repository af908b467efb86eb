"""Numbers for benches: random bit patterns with corners, and the arithmetic in numpy."""

import random

import numpy as np
from systolith_hdl.formats import CANONICAL_NAN, FORMATS, DType

# Corners, signs apart: zero, smallest and largest subnormals, the binades around them, one and its
# neighbours, ties, the largest numbers, infinity, quiet and signaling NaN.
_MAGNITUDES = [
    *(0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x003FFFFF, 0x00400000, 0x007FFFFF),
    *(0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x01800000, 0x0BFFFFFF, 0x0C000000),
    *(0x1F800000, 0x20000000, 0x33000000, 0x33800000, 0x33800001, 0x34000000, 0x337FFFFF),
    *(0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F808000, 0x3F818000, 0x3FFFFFFF),
    *(0x40000000, 0x40490FDB, 0x4B000000, 0x4B7FFFFF, 0x4B800000, 0x5F000000, 0x5F7FFFFF),
    *(0x72800000, 0x73000000, 0x7E800000, 0x7EFFFFFF, 0x7F000000, 0x7F7FFFFE, 0x7F7FFFFF),
    *(0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FA00000, 0x7FC00000, 0x7FFFFFFF),
]
#: FP32 words worth trying in every place.
CORNERS = np.array([m | s for m in _MAGNITUDES for s in (0, 1 << 31)], np.uint32)


def canonical(words: np.ndarray) -> np.ndarray:
    """Returns uint32 FP32 words with every NaN made the canonical one."""
    return np.where((words & 0x7FFFFFFF) > 0x7F800000, np.uint32(CANONICAL_NAN), words)


def random_words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random FP32 bit patterns: uniform bits, few exponents, few significant bits, corners."""
    uniform = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    sign = uniform & np.uint32(1 << 31)
    near = (rng.integers(120, 134, count, dtype=np.uint32) << 23) | (uniform & 0x807FFFFF)
    low = (rng.integers(0, 30, count, dtype=np.uint32) << 23) | (uniform & 0x807FFFFF)
    high = (rng.integers(225, 256, count, dtype=np.uint32) << 23) | (uniform & 0x807FFFFF)
    mask = np.uint32(0xFFFFFFFF) << rng.integers(0, 24, count, dtype=np.uint32)
    corner = rng.choice(CORNERS, count)
    kinds = [uniform, near, low, high, corner, near & mask, uniform & mask, sign | (uniform >> 9)]
    return np.choose(rng.integers(0, len(kinds), count), kinds).astype(np.uint32)


def round_to(words: np.ndarray, dtype: DType) -> np.ndarray:
    """Rounds FP32 words to a type, kept as FP32, NaNs canonical."""
    with np.errstate(all="ignore"):
        narrow = words.view(np.float32).astype(FORMATS[dtype].numpy).astype(np.float32)
    return canonical(narrow.view(np.uint32))


def operand(words: np.ndarray, dtype: DType) -> np.ndarray:
    """FP32 words of what the tensor engine takes words of a type for."""
    if dtype is DType.INT8:
        return (words & 0xFF).astype(np.uint8).view(np.int8).astype(np.float32).view(np.uint32)
    return round_to(words, dtype)


def to_int32(words: np.ndarray) -> np.ndarray:
    """INT32 words of FP32 words: toward zero, the nearest of what there is, 0 for NaN."""
    values = double(words)
    limit = 1 << 31
    inside = np.abs(values) < limit
    whole = np.where(inside, values, 0).astype(np.int64)
    ends = np.where(values < 0, -limit, limit - 1)
    integers = np.where(inside | np.isnan(values), whole, ends)
    return (integers & 0xFFFFFFFF).astype(np.uint32)


def double(words: np.ndarray) -> np.ndarray:
    """float64 of FP32 words."""
    return words.view(np.float32).astype(np.float64)


def mac(acc: np.ndarray, a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """FP32 words of ``acc + a * w`` for FP32 words, of which `a` and `w` hold narrow floats."""
    with np.errstate(all="ignore"):
        total = double(acc) + double(a) * double(w)
        return canonical(total.astype(np.float32).view(np.uint32))


def pair_mac(
    acc: np.ndarray, a: tuple[np.ndarray, np.ndarray], w: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """FP32 words of ``acc + float32(a[0] * w[0] + a[1] * w[1])`` for FP32 words, of which `a` and
    `w` hold FP8 numbers."""
    with np.errstate(all="ignore"):
        pair = (double(a[0]) * double(w[0]) + double(a[1]) * double(w[1])).astype(np.float32)
        return canonical((acc.view(np.float32) + pair).view(np.uint32))


def tile(
    stationary: np.ndarray,
    moving: np.ndarray,
    rows: int,
    second: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Sums (M, F) as FP32 words: words of narrow floats, stationary (K, M) and moving (K, F), in
    K order. `second` holds the second numbers of both where row k is a pair."""
    acc = np.zeros((stationary.shape[1], moving.shape[1]), np.uint32)
    for k in range(rows):
        a, w = np.broadcast_arrays(moving[k][None, :], stationary[k][:, None])
        if second is None:
            acc = mac(acc, a, w)
        else:
            b, v = np.broadcast_arrays(second[1][k][None, :], second[0][k][:, None])
            acc = pair_mac(acc, (a, b), (w, v))
    return acc


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FP32 words of the sum of FP32 words."""
    with np.errstate(all="ignore"):
        return canonical((a.view(np.float32) + b.view(np.float32)).view(np.uint32))


def pack(words: np.ndarray) -> int:
    """The integer a port holding `words` has, element 0 lowest."""
    return int.from_bytes(np.ascontiguousarray(words).tobytes(), "little")


def unpack(handle: object, dtype: type, count: int) -> np.ndarray:
    """The array of `count` elements that a port holds."""
    raw = int(handle.value).to_bytes(count * np.dtype(dtype).itemsize, "little")  # type: ignore[attr-defined]
    return np.frombuffer(raw, dtype)


def numpy_rng() -> np.random.Generator:
    """Generator that follows from the seed the runner prints."""
    return np.random.default_rng(random.getrandbits(32))


def random_values(rng: np.random.Generator, shape: tuple[int, ...], special: bool) -> np.ndarray:
    """FP32 words: all bit patterns, or (`special` False) numbers whose sums mean something."""
    count = int(np.prod(shape))
    if special:
        return random_words(rng, count).reshape(shape)
    return rng.normal(size=shape).astype(np.float32).view(np.uint32)
