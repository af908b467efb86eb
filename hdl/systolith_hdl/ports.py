"""Signatures at the block boundaries, and the fixed latencies they promise."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Shape, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .isa import INSTRUCTION_BITS

#: Cycles from an accepted read request to its data on the response, for SBUF and PSUM alike.
READ_LATENCY = 2


def column_shape(config: CoreConfig) -> data.ArrayLayout:
    """One column: a 32-bit word of every partition, lane 0 first."""
    return data.ArrayLayout(unsigned(32), config.lanes)


def split_words(m: Module, column: data.View, *, name: str) -> list[Signal]:
    """Returns the words of a column (any array view) as signals of their own.

    Amaranth handles a whole column for each word taken out of one; this way it does so once, which
    keeps wide configurations quick to emit.
    """
    shape = column.shape()
    words = [Signal(shape.elem_shape, name=f"{name}{i}") for i in range(shape.length)]
    m.d.comb += Cat(words).eq(Value.cast(column))
    return words


def lane_mask(lanes: Value, count: int) -> Value:
    """One bit for each of `count` lanes, high in the first `lanes`."""
    return Cat(Const(lane, 8) < lanes for lane in range(count))


def write_request(config: CoreConfig, depth: int) -> data.StructLayout:
    """A column write: word address, data, and a bit for each lane that is written.

    Wide fields come first, here as elsewhere: the simulator takes words that lie at multiples of 32
    bits as they are.
    """
    return data.StructLayout(
        {
            "data": column_shape(config),
            "mask": unsigned(config.lanes),
            "address": unsigned(Shape.cast(range(depth)).width),
        }
    )


class ReadPort(wiring.Signature):
    """A read port of a banked memory, seen from the requester.

    Members
    -------
    request : Out(stream of word address); accepted when valid and ready
    response : In, always ready; one column for each accepted request, in order, exactly
        `READ_LATENCY` cycles after it was accepted. The requester must have room.
    """

    def __init__(self, config: CoreConfig, depth: int) -> None:
        super().__init__(
            {
                "request": Out(stream.Signature(unsigned(Shape.cast(range(depth)).width))),
                "response": In(stream.Signature(column_shape(config), always_ready=True)),
            }
        )


class WritePort(wiring.Signature):
    """A write port of a banked memory, seen from the requester.

    Members
    -------
    request : Out(stream of `write_request`); once accepted, every read accepted in a later cycle
        sees the new value; a read accepted in the same cycle sees the old one.
    """

    def __init__(self, config: CoreConfig, depth: int) -> None:
        super().__init__({"request": Out(stream.Signature(write_request(config, depth)))})


class IssuePort(wiring.Signature):
    """Instructions from a sequencer to its engine, seen from the sequencer.

    Every instruction offered is legal (checked, in bounds) and its waits are satisfied; NOP and
    END never get here.

    Members
    -------
    instruction : Out(stream of 512 bits); an engine takes it when it can start or queue it.
        In-order: an engine begins an instruction's memory accesses only after those of the
        instruction before it that could conflict are finished.
    counter : Out(32), number of instructions before the offered one in the engine's stream
    seed : Out(32), of stochastic rounding; steady while a program runs
    done : In(1), high for one cycle for each finished instruction, in order. All its writes are
        visible to reads accepted in later cycles. An engine with two classes of instruction
        (tensor) has `done_load` as well, for LOAD_STATIONARY: its reads are finished.
    busy : In(1), high while the engine executes at least one instruction.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "instruction": Out(stream.Signature(unsigned(INSTRUCTION_BITS))),
                "counter": Out(32),
                "seed": Out(32),
                "done": In(1),
                "busy": In(1),
            }
        )


def axi4(config: CoreConfig, *, id_width: int) -> wiring.Signature:
    """AXI4 manager: 48-bit addresses, INCR bursts, data `config.axi_bytes` wide. Caller is the
    manager. Members are the channels aw, w, b, ar, r, each a stream."""
    bits = 8 * config.axi_bytes
    address = data.StructLayout(
        {
            "id": unsigned(id_width),
            "addr": unsigned(48),
            "len": unsigned(8),
            "size": unsigned(3),
            "burst": unsigned(2),
        }
    )
    return wiring.Signature(
        {
            "aw": Out(stream.Signature(address)),
            "w": Out(
                stream.Signature(
                    data.StructLayout(
                        {"data": unsigned(bits), "strb": unsigned(bits // 8), "last": unsigned(1)}
                    )
                )
            ),
            "b": In(
                stream.Signature(data.StructLayout({"id": unsigned(id_width), "resp": unsigned(2)}))
            ),
            "ar": Out(stream.Signature(address)),
            "r": In(
                stream.Signature(
                    data.StructLayout(
                        {
                            "data": unsigned(bits),
                            "id": unsigned(id_width),
                            "resp": unsigned(2),
                            "last": unsigned(1),
                        }
                    )
                )
            ),
        }
    )


def axi4_read(config: CoreConfig, *, id_width: int) -> wiring.Signature:
    """The ar and r channels of `axi4`: what a requester inside the core sees."""
    members = axi4(config, id_width=id_width).members
    return wiring.Signature({"ar": members["ar"], "r": members["r"]})


def axi4_write(config: CoreConfig, *, id_width: int) -> wiring.Signature:
    """The aw, w and b channels of `axi4`: what a requester inside the core sees."""
    members = axi4(config, id_width=id_width).members
    return wiring.Signature({name: members[name] for name in ("aw", "w", "b")})


def axi4_lite(*, address_bits: int) -> wiring.Signature:
    """AXI4-Lite manager with 32-bit data: the channels aw, w, b, ar, r, each a stream."""
    return wiring.Signature(
        {
            "aw": Out(stream.Signature(data.StructLayout({"addr": unsigned(address_bits)}))),
            "w": Out(
                stream.Signature(data.StructLayout({"data": unsigned(32), "strb": unsigned(4)}))
            ),
            "b": In(stream.Signature(data.StructLayout({"resp": unsigned(2)}))),
            "ar": Out(stream.Signature(data.StructLayout({"addr": unsigned(address_bits)}))),
            "r": In(
                stream.Signature(data.StructLayout({"data": unsigned(32), "resp": unsigned(2)}))
            ),
        }
    )
