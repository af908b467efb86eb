"""Bench of the systolic array: loads and moving columns as early as allowed, or at random."""

from collections import deque

import cocotb
import numpy as np
from amaranth.hdl import Cat, Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import FallingEdge
from systolith_hdl.config import CoreConfig
from systolith_hdl.formats import NARROW_FLOATS, DType
from systolith_hdl.ports import column_shape
from systolith_hdl.tensor import SystolicArray, array_latency
from systolith_hdl.tensor.mac import OPERAND_BITS
from systolith_hdl.tensor.mac_fp8x2 import SECOND_BITS

from systolith_tb.clocking import start
from systolith_tb.configs import bench_config
from systolith_tb.numerics import numpy_rng, pack, random_values, round_to, tile, unpack


class ArrayBench(wiring.Component):
    """`SystolicArray` with its structures taken apart, and a 16-bit tag. Operands are FP32 words,
    of which the array gets the upper bits. A core without pairs ignores the members of pairs."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        narrow_column = data.ArrayLayout(unsigned(32), config.lanes)
        super().__init__(
            {
                "weight_valid": In(1),
                "weight_first": In(1),
                "weight_data": In(narrow_column),
                "weight_second": In(narrow_column),
                "weight_pair": In(1),
                "moving_valid": In(1),
                "moving_swap": In(1),
                "moving_rows": In(config.lanes),
                "moving_data": In(narrow_column),
                "moving_second": In(narrow_column),
                "moving_pair": In(1),
                "moving_tag": In(16),
                "sums_valid": Out(1),
                "sums_data": Out(column_shape(config)),
                "sums_tag": Out(16),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.array = array = SystolicArray(self._config, tag=16)
        for bus in ("weight", "moving", "sums"):
            for field, _ in getattr(array, bus).shape():
                inner, outer = getattr(array, bus)[field], getattr(self, f"{bus}_{field}")
                if bus != "sums" and field in ("data", "second"):
                    bits = OPERAND_BITS if field == "data" else SECOND_BITS
                    words = (outer[lane][-bits:] for lane in range(self._config.lanes))
                    m.d.comb += inner.as_value().eq(Cat(words))
                    continue
                m.d.comb += outer.eq(inner) if bus == "sums" else inner.eq(outer)
        return m


async def run_array(dut, *, tiles: int, bubbles: float, tight: bool, special: bool) -> None:
    """Sends loads and moving columns as early as the array allows (`tight`) or at random, and
    checks every sum, its tag and its latency."""
    config = bench_config()
    lanes = config.lanes
    rng = numpy_rng()

    def operand(width: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Words, the second words of pairs, and whether they are pairs."""
        pair = config.fp8_rate == 2 and bool(rng.random() < 0.6)
        types = (DType.FP8_E4M3, DType.FP8_E5M2) if pair else NARROW_FLOATS
        first, second = (
            round_to(random_values(rng, (lanes, width), special), types[rng.integers(len(types))])
            for _ in range(2)
        )
        return first, second, pair

    loads: list[tuple[np.ndarray, np.ndarray, bool]] = []
    matmuls: list[tuple[np.ndarray, np.ndarray, bool, int, bool]] = []
    expected: deque[tuple[int, np.ndarray]] = deque()  # tag, sums
    current, current_second = np.zeros((2, lanes, lanes), np.uint32)
    current_pairs = np.zeros(lanes, bool)
    for index in range(tiles):
        swap = index == 0 or tight or rng.random() < 0.7
        if swap:
            columns = lanes if tight or index == 0 else int(rng.integers(1, lanes + 1))
            loads.append(operand(columns))
            # Columns that are not loaded keep the last load that had them.
            current[:, :columns], current_second[:, :columns], current_pairs[:columns] = loads[-1]
        rows = int(rng.integers(1, lanes + 1))
        width = lanes + 1 if tight else int(rng.integers(1, 2 * lanes + 2))
        moving, second, pair = operand(width)
        matmuls.append((moving, second, pair, rows, swap))
        sums = tile(current, moving, rows)
        pairs = tile(current, moving, rows, (current_second, second))
        sums = np.where((current_pairs & pair)[:, None], pairs, sums)
        for f in range(width):
            expected.append((int(rng.integers(0, 1 << 16)), sums[:, f]))
    total = len(expected)

    await start(dut)
    tags = deque(tag for tag, _ in expected)
    load_index = load_column = 0
    index = column = 0
    loads_sent = swaps_sent = 0  # loads finished and swaps sent, by the end of the last cycle
    sent_at: deque[int] = deque()
    injected: list[int] = []
    compared = 0
    cycle = 0
    while compared < total:
        await FallingEdge(dut.clk)
        cycle += 1
        assert cycle < 100 * total, "the array says nothing"
        if int(dut.sums_valid.value):
            tag, sums = expected.popleft()
            assert int(dut.sums_tag.value) == tag
            assert cycle - sent_at.popleft() == array_latency(config)
            got = unpack(dut.sums_data, np.uint32, lanes)
            assert (got == sums).all(), f"column {compared}: got {got}, wanted {sums}"
            compared += 1
        swap_now = False
        send = index < len(matmuls) and rng.random() >= bubbles
        if send:
            moving, second, pair, rows, swap = matmuls[index]
            swap_now = swap and column == 0
            send = not swap_now or loads_sent == swaps_sent + 1
        dut.moving_valid.value = send
        dut.moving_swap.value = send and swap_now
        dut.moving_rows.value = (1 << rows) - 1 if send else 0
        if send:
            dut.moving_data.value = pack(moving[:, column])
            dut.moving_second.value = pack(second[:, column])
            dut.moving_pair.value = pair
            dut.moving_tag.value = tags.popleft()
            sent_at.append(cycle)
            injected.append(cycle)
            swaps_sent += swap_now
            column += 1
            if column == moving.shape[1]:
                index, column = index + 1, 0
        # A load may begin in the very cycle of the swap before it.
        send = (
            load_index < len(loads)
            and rng.random() >= bubbles
            and (load_column > 0 or swaps_sent == load_index)
        )
        dut.weight_valid.value = send
        dut.weight_first.value = send and load_column == 0
        if send:
            load, load_second, load_pair = loads[load_index]
            dut.weight_data.value = pack(load[:, load_column])
            dut.weight_second.value = pack(load_second[:, load_column])
            dut.weight_pair.value = load_pair
            load_column += 1
            if load_column == load.shape[1]:
                load_index, load_column = load_index + 1, 0
                loads_sent += 1
    assert not expected and not sent_at and not tags
    if tight and not bubbles:
        assert injected[-1] - injected[0] + 1 == total, "bubbles between matmuls of N + 1 columns"
    cocotb.log.info("compared %d columns of %d tiles", compared, tiles)


def _array_test(name: str, **options: object) -> None:
    async def test(dut) -> None:
        await run_array(dut, **options)  # type: ignore[arg-type]

    test.__name__ = test.__qualname__ = name
    globals()[name] = cocotb.test(timeout_time=10, timeout_unit="ms")(test)


_array_test("array_tight", tiles=60, bubbles=0.0, tight=True, special=False)
_array_test("array_tight_special", tiles=60, bubbles=0.0, tight=True, special=True)
_array_test("array_random", tiles=100, bubbles=0.0, tight=False, special=False)
_array_test("array_bubbles", tiles=100, bubbles=0.4, tight=False, special=True)
