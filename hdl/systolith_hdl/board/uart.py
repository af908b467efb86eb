"""A UART: 8 data bits, no parity, one stop bit."""

from amaranth.hdl import Cat, Const, Module, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

MIN_DIVISOR = 4


def _check(divisor: int) -> None:
    if divisor < MIN_DIVISOR:
        raise ValueError(f"divisor must be at least {MIN_DIVISOR} clocks per bit, not {divisor!r}")


class UartReceiver(wiring.Component):
    """Bytes from a serial line.

    Parameters
    ----------
    divisor : clock cycles per bit, at least 4

    Members
    -------
    rx : In(1), the line, asynchronous
    byte : Out(stream of {data, error}), never waits: a byte that is not taken at once is lost.
        `error`: there was no stop bit. The next byte begins after the line has been high.

    A byte is there after the middle of its stop bit. With a divisor of 8 or more the sender may be
    3 % too slow or too fast.
    """

    def __init__(self, *, divisor: int) -> None:
        _check(divisor)
        self._divisor = divisor
        super().__init__(
            {
                "rx": In(1),
                "byte": Out(
                    stream.Signature(data.StructLayout({"data": unsigned(8), "error": unsigned(1)}))
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rx = Signal(init=1)
        m.submodules.synchronizer = FFSynchronizer(self.rx, rx, init=1)
        timer = Signal(range(self._divisor))
        left = Signal(range(11))  # samples to come, the start and stop bits' included
        shift = Signal(9)
        last = Signal()
        rest = Signal(init=1)  # the line has been high since the last byte
        m.d.comb += [
            self.byte.payload.data.eq(shift[:8]),
            self.byte.payload.error.eq(~shift[8]),
            self.byte.valid.eq(last),
        ]
        m.d.sync += last.eq(0)
        with m.If(left == 0):
            with m.If(rx):
                m.d.sync += rest.eq(1)
            with m.Elif(rest):
                m.d.sync += [left.eq(10), rest.eq(0), timer.eq(self._divisor // 2 - 1)]
        with m.Elif(timer != 0):
            m.d.sync += timer.eq(timer - 1)
        with m.Else():
            m.d.sync += [
                timer.eq(self._divisor - 1),
                shift.eq(Cat(shift[1:], rx)),
                left.eq(left - 1),
                last.eq(left == 1),
                rest.eq(rx & (left == 1)),
            ]
            # A start bit that is over before its middle was none.
            with m.If((left == 10) & rx):
                m.d.sync += left.eq(0)
        return m


class UartTransmitter(wiring.Component):
    """Bytes to a serial line, 10 x `divisor` cycles each without a gap between them.

    Parameters
    ----------
    divisor : clock cycles per bit, at least 4

    Members
    -------
    byte : In(stream of 8 bits)
    tx : Out(1), the line
    """

    def __init__(self, *, divisor: int) -> None:
        _check(divisor)
        self._divisor = divisor
        super().__init__({"byte": In(stream.Signature(unsigned(8))), "tx": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        timer = Signal(range(self._divisor))
        left = Signal(range(11))
        shift = Signal(10, init=1)
        m.d.comb += [
            self.tx.eq(shift[0]),
            self.byte.ready.eq((left == 0) | ((left == 1) & (timer == 0))),
        ]
        with m.If(self.byte.valid & self.byte.ready):
            m.d.sync += [
                shift.eq(Cat(Const(0, 1), self.byte.payload, Const(1, 1))),
                left.eq(10),
                timer.eq(self._divisor - 1),
            ]
        with m.Elif(timer != 0):
            m.d.sync += timer.eq(timer - 1)
        with m.Elif(left != 0):
            m.d.sync += [
                shift.eq(Cat(shift[1:], Const(1, 1))),
                left.eq(left - 1),
                timer.eq(self._divisor - 1),
            ]
        return m
