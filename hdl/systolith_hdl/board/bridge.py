"""The bridge from a serial line to the host port of the chip and to device DRAM."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Shape, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .. import regs
from ..ports import axi4_lite
from .protocol import (
    ANSWER,
    CHECKSUM,
    HEADER,
    INFO_WORDS,
    SYNC,
    VERSION,
    Operation,
    Status,
)

_CHECKSUM_BYTES = 2
_OKAY = 0


class Bridge(wiring.Component):
    """Answers the requests of `protocol`, one at a time.

    Whatever comes in, it is ready for a request again, and has answered if a SYNC came in, at the
    latest `silence` cycles after the line has fallen silent: a request with a wrong header, whose
    length nobody knows, is over when the line is silent, and so is one that stops within. Bytes
    that arrive while it answers are lost.

    Parameters
    ----------
    dram_bytes : size of the DRAM
    clock_hz : for INFO
    silence : cycles without a byte after which the line is silent, at least that of a byte

    Members
    -------
    received : In(stream of {data, error}), always taken
    sent : Out(stream of 8 bits)
    axil : Out(axi4_lite), of the host port
    memory : Out(stream of {word, write, data}), to the DRAM
    read : In(stream of 32 bits, always ready), what was read
    """

    def __init__(self, *, dram_bytes: int, clock_hz: int, silence: int) -> None:
        self._dram_bytes = dram_bytes
        self._clock_hz = clock_hz
        self._silence = silence
        word = Shape.cast(range(dram_bytes // 4))
        super().__init__(
            {
                "received": In(
                    stream.Signature(data.StructLayout({"data": unsigned(8), "error": unsigned(1)}))
                ),
                "sent": Out(stream.Signature(unsigned(8))),
                "axil": Out(axi4_lite(address_bits=regs.ADDRESS_BITS)),
                "memory": Out(
                    stream.Signature(
                        data.StructLayout(
                            {"word": word, "write": unsigned(1), "data": unsigned(32)}
                        )
                    )
                ),
                "read": In(stream.Signature(unsigned(32), always_ready=True)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        axil, memory, sent = self.axil, self.memory, self.sent
        byte = self.received.payload.data
        arrived = self.received.valid
        m.d.comb += self.received.ready.eq(1)

        # One checksum, first of what is received, then of what is sent.
        m.submodules.checksum = checksum = CHECKSUM.create()
        header_bytes = HEADER.size // 8
        header = Signal(HEADER)
        left = Signal(18)  # bytes to come of this part of the request, or of the answer
        status = Signal(Status)
        word = Signal(32)  # received, or to be sent
        at = Signal(2)  # byte of the word
        address = Signal(30)  # of the next word
        silent = Signal(range(self._silence + 1))
        is_silent = Signal()
        m.d.comb += is_silent.eq(silent == self._silence)
        with m.If(arrived):
            m.d.sync += silent.eq(0)
        with m.Elif(~is_silent):
            m.d.sync += silent.eq(silent + 1)

        operation = header.operation
        writes = (operation == Operation.WRITE_REGISTER) | (operation == Operation.WRITE_DRAM)
        of_register = (operation == Operation.READ_REGISTER) | (
            operation == Operation.WRITE_REGISTER
        )
        known = Signal()
        with m.Switch(operation):
            for each in Operation:
                with m.Case(each):
                    m.d.comb += known.eq(1)
        aligned = header.address[:2] == 0
        end = Signal(33)
        exists = Signal()
        m.d.comb += end.eq(header.address + (header.count << 2))
        with m.If(of_register):
            m.d.comb += exists.eq(
                aligned & (header.count == 1) & (header.address[regs.ADDRESS_BITS :] == 0)
            )
        with m.Elif(operation == Operation.INFO):
            m.d.comb += exists.eq(1)
        with m.Else():
            m.d.comb += exists.eq(aligned & (header.count != 0) & (end <= self._dram_bytes))

        info = Array([Const(VERSION, 32), Const(self._dram_bytes, 32), Const(self._clock_hz, 32)])
        assert len(info) == len(INFO_WORDS)
        m.d.comb += [
            axil.aw.payload.addr.eq(header.address),
            axil.w.payload.data.eq(word),
            axil.w.payload.strb.eq(0xF),
            axil.ar.payload.addr.eq(header.address),
            memory.payload.word.eq(address),
            memory.payload.data.eq(Cat(word[8:], byte)),
        ]
        for channel in (axil.aw, axil.w, axil.ar):
            with m.If(channel.ready):
                m.d.sync += channel.valid.eq(0)

        words_left = Signal(16)
        taken = Signal()
        m.d.comb += taken.eq(sent.valid & sent.ready)

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += checksum.start.eq(1)
                m.d.sync += [left.eq(header_bytes + _CHECKSUM_BYTES - 1), words_left.eq(0)]
                with m.If(arrived & (byte == SYNC) & ~self.received.payload.error):
                    m.next = "HEADER"
            with m.State("HEADER"):
                m.d.comb += [checksum.valid.eq(arrived), checksum.data.eq(byte)]
                with m.If(arrived):
                    m.d.sync += left.eq(left - 1)
                    with m.If(left >= _CHECKSUM_BYTES):
                        m.d.sync += header.eq(Cat(header.as_value()[8:], byte))
                    with m.If(self.received.payload.error):
                        m.d.sync += status.eq(Status.BAD_HEADER)
                        m.next = "SKIP"
                    with m.Elif(left == 0):
                        m.next = "CHECK"
                with m.Elif(is_silent):
                    m.d.sync += status.eq(Status.INCOMPLETE)
                    m.next = "ANSWER"
            with m.State("CHECK"):
                m.d.comb += checksum.start.eq(1)
                m.d.sync += [
                    status.eq(Mux(exists, Status.OK.value, Status.BAD_ADDRESS.value)),
                    address.eq(header.address[2:]),
                    at.eq(0),
                    left.eq((header.count << 2) + (_CHECKSUM_BYTES - 1)),
                ]
                with m.If(~checksum.match_detected):
                    m.d.sync += status.eq(Status.BAD_HEADER)
                    m.next = "SKIP"
                with m.Elif(~known):
                    m.d.sync += status.eq(Status.UNKNOWN_OPERATION)
                    m.next = "SKIP"
                with m.Elif(writes):
                    m.next = "WORDS"
                with m.Elif(~exists):
                    m.next = "ANSWER"
                with m.Elif(operation == Operation.READ_REGISTER):
                    m.d.sync += axil.ar.valid.eq(1)
                    m.next = "REGISTER"
                with m.Else():
                    info_words = Const(len(INFO_WORDS), 16)
                    m.d.sync += words_left.eq(
                        Mux(operation == Operation.INFO, info_words, header.count)
                    )
                    m.next = "ANSWER"
            with m.State("WORDS"):
                m.d.comb += [checksum.valid.eq(arrived), checksum.data.eq(byte)]
                with m.If(arrived):
                    m.d.sync += left.eq(left - 1)
                    with m.If(left >= _CHECKSUM_BYTES):
                        m.d.sync += [word.eq(Cat(word[8:], byte)), at.eq(at + 1)]
                        m.d.comb += [
                            memory.payload.write.eq(1),
                            memory.valid.eq(
                                (at == 3)
                                & (operation == Operation.WRITE_DRAM)
                                & (status == Status.OK)
                                & ~self.received.payload.error
                            ),
                        ]
                        with m.If(at == 3):
                            m.d.sync += address.eq(address + 1)
                    with m.If(self.received.payload.error):
                        m.d.sync += status.eq(Status.BAD_DATA)
                        m.next = "SKIP"
                    with m.Elif(left == 0):
                        m.next = "WRITE"
                with m.Elif(is_silent):
                    m.d.sync += status.eq(Status.INCOMPLETE)
                    m.next = "ANSWER"
            with m.State("WRITE"):
                m.next = "ANSWER"
                with m.If(~checksum.match_detected):
                    m.d.sync += status.eq(Status.BAD_DATA)
                with m.Elif((operation == Operation.WRITE_REGISTER) & (status == Status.OK)):
                    m.d.sync += [axil.aw.valid.eq(1), axil.w.valid.eq(1)]
                    m.next = "REGISTER"
            with m.State("REGISTER"):
                m.d.comb += [axil.b.ready.eq(1), axil.r.ready.eq(1)]
                with m.If(axil.b.valid):
                    m.d.sync += status.eq(
                        Mux(axil.b.payload.resp == _OKAY, Status.OK.value, Status.REFUSED.value)
                    )
                    m.next = "ANSWER"
                with m.Elif(axil.r.valid):
                    m.d.sync += word.eq(axil.r.payload.data)
                    with m.If(axil.r.payload.resp == _OKAY):
                        m.d.sync += words_left.eq(1)
                    with m.Else():
                        m.d.sync += status.eq(Status.REFUSED)
                    m.next = "ANSWER"
            with m.State("SKIP"):
                with m.If(is_silent & ~arrived):
                    m.next = "ANSWER"

            with m.State("ANSWER"):
                m.d.comb += [
                    sent.valid.eq(1),
                    sent.payload.eq(ANSWER),
                    checksum.start.eq(1),
                ]
                m.d.sync += at.eq(0)
                with m.If(taken):
                    m.next = "STATUS"
            with m.State("STATUS"):
                m.d.comb += [
                    sent.valid.eq(1),
                    sent.payload.eq(status),
                    checksum.valid.eq(taken),
                    checksum.data.eq(status),
                ]
                with m.If(taken):
                    m.next = "NEXT"
            with m.State("NEXT"):
                m.d.sync += words_left.eq(words_left - 1)
                with m.If(words_left == 0):
                    m.next = "SUM_HIGH"
                with m.Elif(operation == Operation.READ_DRAM):
                    m.next = "FETCH"
                with m.Else():
                    with m.If(operation == Operation.INFO):
                        m.d.sync += word.eq(info[3 - words_left[:2]])
                    m.next = "SEND"
            with m.State("FETCH"):
                m.d.comb += memory.valid.eq(1)
                with m.If(memory.ready):
                    m.d.sync += address.eq(address + 1)
                    m.next = "FETCHED"
            with m.State("FETCHED"):
                m.d.sync += word.eq(self.read.payload)
                with m.If(self.read.valid):
                    m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += [
                    sent.valid.eq(1),
                    sent.payload.eq(word[:8]),
                    checksum.valid.eq(taken),
                    checksum.data.eq(word[:8]),
                ]
                with m.If(taken):
                    m.d.sync += [word.eq(word >> 8), at.eq(at + 1)]
                    with m.If(at == 3):
                        m.next = "NEXT"
            with m.State("SUM_HIGH"):
                m.d.comb += [sent.valid.eq(1), sent.payload.eq(checksum.crc[8:])]
                with m.If(taken):
                    m.next = "SUM_LOW"
            with m.State("SUM_LOW"):
                m.d.comb += [sent.valid.eq(1), sent.payload.eq(checksum.crc[:8])]
                with m.If(taken):
                    m.next = "IDLE"
        return m
