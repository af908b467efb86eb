"""DMA queues behind the AXI arbiters, on cocotb."""

import pytest
from amaranth.hdl import Module, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from systolith_hdl.arith import engine_key
from systolith_hdl.axi import AxiReadArbiter, AxiWriteArbiter, axi4_pins, connect_pins
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.dma import DmaQueue, FaultPort
from systolith_hdl.ports import IssuePort, ReadPort, WritePort, axi4_read
from systolith_tb.bench_dma import FIRST_ENGINE
from systolith_tb.runner import run_bench

QUEUES = 2


class DmaBench(wiring.Component):
    """Two queues and the port of a fetcher, merged onto AXI pins."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        super().__init__(
            {
                "issue": In(IssuePort()).array(QUEUES),
                "read": Out(ReadPort(config, config.sbuf_depth)).array(QUEUES),
                "write": Out(WritePort(config, config.sbuf_depth)).array(QUEUES),
                "fault": Out(FaultPort()).array(QUEUES),
                "stop": In(1).array(QUEUES),
                "active": Out(1).array(QUEUES),
                "fetch": In(axi4_read(config, id_width=0)),
                "m_axi": Out(axi4_pins(config, id_width=2)),
                "outstanding_reads": Out(unsigned(1)),
                "outstanding_writes": Out(unsigned(1)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.reads = reads = AxiReadArbiter(self._config, requesters=QUEUES + 1)
        m.submodules.writes = writes = AxiWriteArbiter(self._config, requesters=QUEUES, id_width=2)
        for index in range(QUEUES):
            m.submodules[f"queue{index}"] = queue = DmaQueue(self._config)
            for name in ("issue", "read", "write", "fault"):
                wiring.connect(m, wiring.flipped(getattr(self, name)[index]), getattr(queue, name))
            wiring.connect(m, queue.axi_read, reads.requester[index])
            wiring.connect(m, queue.axi_write, writes.requester[index])
            m.d.comb += [
                queue.key.eq(engine_key(FIRST_ENGINE + index)),
                queue.stop.eq(self.stop[index]),
                self.active[index].eq(queue.active),
            ]
        wiring.connect(m, wiring.flipped(self.fetch), reads.requester[QUEUES])
        connect_pins(m, self.m_axi, read=reads.bus, write=writes.bus)
        m.d.comb += [
            self.outstanding_reads.eq(reads.outstanding),
            self.outstanding_writes.eq(writes.outstanding),
        ]
        return m


@pytest.mark.parametrize("name", ["nano", "small"])
def test_dma_bench(name: str) -> None:
    ran = run_bench(
        DmaBench(get_config(name)),
        f"dma_bench_{name}",
        "systolith_tb.bench_dma",
        env={"SYSTOLITH_BENCH_CONFIG": name},
    )
    assert ran == 26
