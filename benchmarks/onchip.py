"""GEMM between on-chip memories: operands in SBUF, sums in PSUM, nothing in DRAM but instructions.

A kernel of the kernel builder, in three programs: one loads the operands, one multiplies, one
stores the result for the comparison. Only the second is measured. Part of ``make bench``, which
runs it from gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from systolith.kernel import KernelBuilder, Tile
from systolith.program import Program
from systolith.runtime import Driver, open_backend
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.formats import DType
from systolith_hdl.isa import Function

BF16 = ml_dtypes.bfloat16
#: (m, k, n) -> (peer's figure, target), utilization in percent. The peer is RedMulE.
PRODUCTS = {
    (64, 64, 64): (87.4, 90.0),
    (256, 256, 256): (96.9, 99.5),
    (384, 512, 512): (100.0, 99.9),
}


class Product:
    """``y[M, N] = a[M, K] @ b[K, N]`` with everything on chip; sizes are whole tiles.

    Each program is built with the same tiles at the same addresses: what one leaves in SBUF and
    PSUM, the next finds.
    """

    def __init__(self, config: CoreConfig, m: int, k: int, n: int) -> None:
        self._config = config
        self._m, self._k, self._n = m, k, n
        self._tiles_of_k, self._blocks = k // config.lanes, m // config.lanes
        #: whether PSUM holds the whole result; if not, it goes on to SBUF
        self.in_psum = self._blocks * n <= config.psum_depth

    def _builder(self, name: str) -> tuple[KernelBuilder, Tile, Tile, Tile, list[Tile]]:
        nc = KernelBuilder(self._config, name=name)
        a = nc.sbuf.tile(self._tiles_of_k * self._m, "a")
        b = nc.sbuf.tile(self._tiles_of_k * self._n, "b")
        y = nc.sbuf.tile(self._blocks * self._n, "y")
        blocks = self._blocks if self.in_psum else self._config.psum_depth // self._n
        return nc, a, b, y, [nc.psum.tile(self._n) for _ in range(blocks)]

    def load(self) -> Program:
        """Operands from DRAM, K across the lanes."""
        nc, a, b, _, _ = self._builder("load")
        lanes, m, k, n = self._config.lanes, self._m, self._k, self._n
        a_dram = nc.dram.tensor("a", (m, k), DType.BF16, kind="input")
        b_dram = nc.dram.tensor("b", (k, n), DType.BF16, kind="input")
        nc.dma.load(a.view((self._tiles_of_k, m)), a_dram, 0, (lanes * 2, k * 2), 2)
        nc.dma.load(b.view((self._tiles_of_k, n)), b_dram, 0, (lanes * n * 2, 2), n * 2)
        return nc.finish()

    def multiply(self) -> Program:
        """What is measured."""
        nc, a, b, y, sums = self._builder("multiply")
        lanes, m, n = self._config.lanes, self._m, self._n
        half = n // 2
        for block in range(self._blocks):
            psum = sums[block % len(sums)]
            for tile in range(self._tiles_of_k):
                weights = a.view((lanes,), offset=tile * m + block * lanes)
                nc.tensor.load_stationary(weights.astype(DType.BF16))
                moving = b.view((n,), offset=tile * n).astype(DType.BF16)
                nc.tensor.matmul(psum.view((n,)), moving, accumulate=tile > 0)
            if not self.in_psum:
                # Both engines that read PSUM take a half each, while the array works on.
                low, high = (
                    (y.view((half,), offset=block * n + start), psum.view((half,), offset=start))
                    for start in (0, half)
                )
                nc.vector.copy(*low)
                nc.scalar.activate(*high, Function.IDENTITY, 1.0, -0.0)
        return nc.finish()

    def store(self) -> Program:
        """The result to DRAM, FP32."""
        nc, _, _, y, sums = self._builder("store")
        lanes, n = self._config.lanes, self._n
        if self.in_psum:
            for block, psum in enumerate(sums):
                nc.vector.copy(y.view((n,), offset=block * n), psum.view((n,)))
        y_dram = nc.dram.tensor("y", (self._m, n), DType.FP32, kind="output")
        nc.dma.store(y.view((self._blocks, n)), y_dram, 0, (lanes * n * 4, 4), n * 4)
        return nc.finish()


def rows(
    kind: str,
    config: str,
    formula: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    progress: Callable[[str], None],
) -> list[dict]:
    """Measures every product; `formula` gives the FP32 result it must have, bit for bit."""
    core = get_config(config)
    found = []
    with Driver(open_backend(kind, core, progress=progress)) as driver:
        for (m, k, n), (peer, target) in PRODUCTS.items():
            progress(f"{m} x {k} x {n}, on chip")
            rng = np.random.default_rng(m + k + n)
            a, b = (rng.standard_normal(shape).astype(BF16) for shape in ((m, k), (k, n)))
            product = Product(core, m, k, n)
            load, multiply, store = map(
                driver.load, (product.load(), product.multiply(), product.store())
            )
            driver.write(load.tensors["a"], a)
            driver.write(load.tensors["b"], b)
            driver.run(load)
            counters = driver.run(multiply)
            driver.run(store)
            got = driver.read(store.tensors["y"])
            wanted = formula(a, b, core.lanes)
            assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32)), (m, k, n)
            assert counters.macs == m * k * n
            for program in (load, multiply, store):
                program.unload()
            ideal = m * k * n / core.lanes**2
            found.append(
                {
                    "shape": [m, k, n],
                    "peer": peer,
                    "target": target,
                    "tensor_cycles": counters.busy["tensor"],
                    "utilization": 100 * ideal / counters.busy["tensor"],
                    "program_cycles": counters.cycles,
                    "program_utilization": 100 * ideal / counters.cycles,
                }
            )
    return found
