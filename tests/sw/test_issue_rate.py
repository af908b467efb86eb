"""Rates on the gates: a long product has no bubble, and two sources cost what one does."""

import numpy as np
from systolith.kernel import AluOp, KernelBuilder
from systolith.runtime import Driver, open_backend
from systolith_hdl.config import get_config
from systolith_hdl.formats import DType
from systolith_hdl.vector.engine import FIXED_CYCLES

NANO = get_config("nano")
COLUMNS = 64


def test_matmuls_with_a_load_each_follow_without_a_bubble() -> None:
    """A cycle a column, whatever their number, by both counters: BUSY would miss gaps in which the
    engine holds nothing."""
    lanes = NANO.lanes
    spent = []
    with Driver(open_backend("rtl", NANO)) as driver:
        for products in (8, 24):
            nc = KernelBuilder(NANO, name="products")
            weights, moving = nc.sbuf.tile(products * lanes), nc.sbuf.tile(COLUMNS)
            sums = nc.psum.tile(COLUMNS)
            nc.vector.memset(moving.view(), 1.0)
            nc.vector.memset(weights.view(), 1.0)  # last: the first load waits for everything
            for index in range(products):
                nc.tensor.load_stationary(weights.view((lanes,), offset=index * lanes))
                nc.tensor.matmul(sums.view(), moving.view(), accumulate=index > 0)
            y = nc.dram.tensor("y", (lanes, COLUMNS), DType.FP32, kind="output")
            copy = nc.sbuf.tile(COLUMNS)
            nc.vector.copy(copy.view(), sums.view())
            nc.dma.store(copy.view(), y, 0, (4,), COLUMNS * 4)
            loaded = driver.load(nc.finish())
            counters = driver.run(loaded)
            np.testing.assert_array_equal(driver.read(loaded.tensors["y"]), products * lanes)
            loaded.unload()
            ideal = counters.macs // lanes**2
            assert ideal == products * COLUMNS
            # Setting the weights takes a cycle each, before the first load.
            spent.append(
                (counters.busy["tensor"] - ideal, counters.cycles - ideal - weights.columns)
            )
    assert spent[0] == spent[1]
    assert spent[0][0] < 40


def test_two_sources_cost_what_one_does() -> None:
    """A column a cycle whatever banks the sources begin in; where they begin in the same one, they
    part in the first cycle and conflict no more."""
    with Driver(open_backend("rtl", NANO)) as driver:
        for phase in range(8):
            nc = KernelBuilder(NANO, name="sums")
            first, second, dst = (nc.sbuf.tile(COLUMNS + 8) for _ in range(3))
            sources = first.view((COLUMNS,)), second.view((COLUMNS,), offset=phase)
            nc.vector.tensor_tensor(dst.view((COLUMNS,)), sources[0], AluOp.ADD, sources[1])
            loaded = driver.load(nc.finish())
            counters = driver.run(loaded)
            loaded.unload()
            together = phase == 0
            assert counters.busy["vector"] == COLUMNS + FIXED_CYCLES + together
            assert counters.conflicts == {"SBUF": int(together), "PSUM": 0}
