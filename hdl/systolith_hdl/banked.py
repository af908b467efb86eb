"""The banked memory behind SBUF and PSUM, and the controller that arbitrates it."""

import functools
import operator
from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Module, Mux, Shape, Signal, Value, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .emit import Once
from .ports import READ_LATENCY, ReadPort, WritePort


class RoundRobin(wiring.Component):
    """Grants one of several requests, fairly: the search starts after the one granted last, so a
    request waits at most ``count - 1`` grants.

    Members
    -------
    requests : In(count)
    grants : Out(count), one-hot, combinational; zero without a request. With `hold` high the
        memory of who was last is kept.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        super().__init__({"requests": In(count), "hold": In(1), "grants": Out(count)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count = self._count
        if count == 1:
            m.d.comb += self.grants.eq(self.requests)
            return m
        # Bit i: requester i comes after the one granted last, in this round.
        later = Signal(count)
        candidates = Signal(count)
        after = Signal(count)
        m.d.comb += [
            after.eq(self.requests & later),
            candidates.eq(Mux(after.any(), after, self.requests)),
            self.grants.eq(candidates & (~candidates + 1)),  # lowest set bit
        ]
        with m.If(self.requests.any() & ~self.hold):
            # Everyone above the granted bit: complement of (grant - 1) without the grant itself.
            m.d.sync += later.eq(~((self.grants - 1) | self.grants))
        return m


def one_hot_mux(select: Value, values: Sequence[Value]) -> Value:
    """Returns the one of `values` whose bit of `select` is high, 0 if none is; one at most may be.

    A tree of gates: one ``m.If`` after the other would be a chain.
    """
    masked = (Mux(bit, value, 0) for bit, value in zip(select, values, strict=True))
    return functools.reduce(operator.or_, masked)


class BankRam(wiring.Component):
    """One bank: `rows` columns of `lanes` words, one read and one write port, write mask per lane.

    `read_data` follows `read_row` by one cycle when `read_enable` is high and holds otherwise; a
    read of the row written in the same cycle gives the old value.
    """

    def __init__(self, *, lanes: int, rows: int) -> None:
        self._lanes = lanes
        self._rows = rows
        row = Shape.cast(range(rows))
        super().__init__(
            {
                "read_row": In(row),
                "read_enable": In(1),
                "read_data": Out(32 * lanes),
                "write_row": In(row),
                "write_data": In(32 * lanes),
                "write_mask": In(lanes),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.ram = ram = memory.Memory(
            shape=unsigned(32 * self._lanes), depth=self._rows, init=[]
        )
        read = ram.read_port()
        write = ram.write_port(granularity=32)
        m.d.comb += [
            read.addr.eq(self.read_row),
            read.en.eq(self.read_enable),
            self.read_data.eq(read.data),
            write.addr.eq(self.write_row),
            write.data.eq(self.write_data),
            write.en.eq(self.write_mask),
        ]
        return m


class BankedMemory(wiring.Component):
    """N partitions x `depth` words in the config's banks, interleaved by the low address bits.

    Each bank is one column wide and has one read and one write port; per bank and cycle one read
    and one write is granted, round-robin. Different banks serve different requesters at once, so
    streams of consecutive addresses settle into different banks and run at full rate together.

    Parameters
    ----------
    depth : words per partition, a multiple of the banks
    reads, writes : numbers of ports
    priority : port 0 of each kind always wins and so is never held back (the accumulator of the
        tensor engine, which cannot wait)

    Members
    -------
    read : In(ReadPort) x reads; the response comes READ_LATENCY = 2 cycles after acceptance
    write : In(WritePort) x writes; visible to reads accepted in later cycles
    stalled : Out(1), high when a request was held back by a bank conflict

    The requests of one port are served in the order made. After reset every word keeps its value;
    at power-up it is zero.
    """

    def __init__(
        self, config: CoreConfig, *, depth: int, reads: int, writes: int, priority: bool = False
    ) -> None:
        if depth % config.banks:
            raise ValueError(f"depth must be a multiple of {config.banks}, not {depth}")
        self._config = config
        self._low = config.banks.bit_length() - 1  # bits of an address that are the bank
        self._depth = depth
        self._priority = priority
        super().__init__(
            {
                "read": In(ReadPort(config, depth)).array(reads),
                "write": In(WritePort(config, depth)).array(writes),
                "stalled": Out(1),
            }
        )

    def _arbitrate(self, m: Module, name: str, ports: list, addresses: list[Value]) -> list[Value]:
        """Returns for each bank its one-hot grants over `ports`, and drives their `ready`."""
        grants: list[Value] = []
        for bank in range(self._config.banks):
            wanted = Cat(
                port.request.valid & (address[: self._low] == bank)
                for port, address in zip(ports, addresses, strict=True)
            )
            if self._priority:
                first, rest = wanted[0], wanted[1:]
                m.submodules[f"{name}_arbiter{bank}"] = arbiter = RoundRobin(len(ports) - 1)
                m.d.comb += [arbiter.requests.eq(rest), arbiter.hold.eq(first)]
                granted = Cat(first, Mux(first, 0, arbiter.grants))
            else:
                m.submodules[f"{name}_arbiter{bank}"] = arbiter = RoundRobin(len(ports))
                m.d.comb += arbiter.requests.eq(wanted)
                granted = arbiter.grants
            grants.append(granted)
        for index, port in enumerate(ports):
            m.d.comb += port.request.ready.eq(Cat(g[index] for g in grants).any())
        return grants

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        low = self._low
        rows = self._depth // config.banks

        reads = list(self.read)
        writes = list(self.write)
        read_addresses = [port.request.payload for port in reads]
        write_addresses = [port.request.payload.address for port in writes]
        read_grants = self._arbitrate(m, "read", reads, read_addresses)
        write_grants = self._arbitrate(m, "write", writes, write_addresses)

        outputs = []
        for bank in range(config.banks):
            m.submodules[f"bank{bank}"] = ram = Once(
                BankRam(lanes=config.lanes, rows=rows), f"bank_ram_{config.lanes}x{rows}"
            )
            # Wide and rarely used, so a simulation is faster with branches than with a tree.
            request = Signal(writes[0].request.payload.shape(), name=f"write_request{bank}")
            for index, port in enumerate(writes):
                with m.If(write_grants[bank][index]):
                    m.d.comb += request.eq(port.request.payload)
            m.d.comb += [
                ram.read_row.eq(
                    one_hot_mux(read_grants[bank], [address[low:] for address in read_addresses])
                ),
                ram.read_enable.eq(read_grants[bank].any()),
                ram.write_row.eq(request.address[low:]),
                ram.write_data.eq(request.data),
                ram.write_mask.eq(Mux(write_grants[bank].any(), request.mask, 0)),
            ]
            outputs.append(ram.read_data)

        assert READ_LATENCY == 2
        columns = Array(outputs)
        for index, (port, address) in enumerate(zip(reads, read_addresses, strict=True)):
            # A block of its own, as its clock may be that of whom it answers.
            m.submodules[f"response{index}"] = stage = Module()
            granted = Signal(name=f"granted{index}")
            bank_of = Signal(unsigned(low), name=f"bank{index}", reset_less=True)
            response = Signal.like(columns[0], name=f"response{index}", reset_less=True)
            stage.d.sync += [
                granted.eq(port.request.valid & port.request.ready),
                bank_of.eq(address[:low]),
                port.response.valid.eq(granted),
            ]
            with stage.If(granted):
                stage.d.sync += response.eq(columns[bank_of])
            stage.d.comb += port.response.payload.as_value().eq(response)
        m.d.comb += self.stalled.eq(
            Cat(p.request.valid & ~p.request.ready for p in (*reads, *writes)).any()
        )
        return m
