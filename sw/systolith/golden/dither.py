"""The random words of stochastic rounding: the definition."""

from __future__ import annotations

import numpy as np
from systolith_hdl.arith.dither import (
    COLUMN_KEYS,
    LANE_ROUNDS,
    SEED_ROTATION,
    engine_key,
    lane_key,
)

from .arithmetic import Words


def _round(
    x: np.ndarray, y: np.ndarray, key: np.ndarray | int, *, bits: int, right: int, left: int
) -> tuple[np.ndarray, np.ndarray]:
    """One round of the block cipher Speck on halves of `bits`."""
    mask = (1 << bits) - 1
    x = ((x >> right | x << (bits - right)) & mask) + y & mask ^ key
    y = (y << left | y >> (bits - left)) & mask ^ x
    return x, y


def random_words(seed: int, counter: int, engine: int, *, elements: int, lanes: int) -> Words:
    """Random words [lanes, elements] of an instruction, element after element.

    For every element a Speck64 of few rounds on (element, counter), keyed by the seed and the
    engine, gives 64 bits that all lanes share. For every lane a Speck32 on the first half of them,
    with the lane's number mixed in and keyed by the second half, gives its word.

    Parameters
    ----------
    seed : the SEED register
    counter : number of instructions before it in its engine's stream; of RANDOM and DROPOUT, `key`
    engine : number of the engine; of RANDOM and DROPOUT, `RANDOM_STREAM`
    """
    x = np.arange(elements, dtype=np.int64) & 0xFFFFFFFF
    y = np.full(elements, counter, np.int64)
    rotated = (seed << SEED_ROTATION | seed >> (32 - SEED_ROTATION)) & 0xFFFFFFFF
    for key in (seed, engine_key(engine) ^ rotated, *COLUMN_KEYS):
        x, y = _round(x, y, key, bits=32, right=8, left=3)
    mine = np.array([lane_key(lane) for lane in range(lanes)], np.int64)[:, None]
    block = x ^ mine
    a, b = block >> 16, block & 0xFFFF
    halves = (y >> 16, y & 0xFFFF)
    for number in range(LANE_ROUNDS):
        a, b = _round(a, b, halves[number % 2], bits=16, right=7, left=2)
    return (a << 16 | b).astype(np.uint32)
