"""What a load adds to SBUF."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..arith import FP32_LATENCY, Fp32Add
from ..config import CoreConfig
from ..emit import Once
from ..ports import READ_LATENCY, column_shape, split_words


def column_cycles(lanes: int) -> int:
    """Cycles from one sum to the next, if SBUF does not stall: the column there is asked for and
    arrives, the words are added one after the other, and the sums are given."""
    return 1 + READ_LATENCY + lanes + FP32_LATENCY + 1


class ColumnAdder(wiring.Component):
    """Adds columns to what SBUF holds, with one adder: a word per cycle.

    Members
    -------
    column : In(stream of {words, integer}); must stay as it is until it is taken, with its sum.
        `integer`: the words are integers, added modulo 2**32, else FP32
    ask : Out(1), the column's word of SBUF is to be read; `asked` : In(1), that has been accepted
    old : In(stream of a column, always ready), what was read
    sum : Out(stream of a column)

    Throughput: a column every `column_cycles` cycles.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        shape = column_shape(config)
        super().__init__(
            {
                "column": In(
                    stream.Signature(data.StructLayout({"words": shape, "integer": unsigned(1)}))
                ),
                "ask": Out(1),
                "asked": In(1),
                "old": In(stream.Signature(shape, always_ready=True)),
                "sum": Out(stream.Signature(shape)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = self._config.lanes
        m.submodules.add = add = Once(Fp32Add(), "fp32_add")
        integer = self.column.payload.integer
        words = split_words(m, self.column.payload.words, name="word")
        old = split_words(m, self.old.payload, name="old")
        held = [Signal(32, name=f"held{lane}", reset_less=True) for lane in range(lanes)]

        # Word `lane` enters, and the FP32 sum of the word FP32_LATENCY before it leaves.
        lane = Signal(range(lanes + FP32_LATENCY))
        leaving = Signal(range(-FP32_LATENCY, lanes + FP32_LATENCY))
        result = Signal(32)
        place = lane[: (lanes - 1).bit_length()]
        m.d.comb += [
            leaving.eq(Mux(integer, lane, lane - FP32_LATENCY)),
            add.en.eq(1),
            add.a.eq(Array(held)[place]),
            add.b.eq(Array(words)[place]),
            result.eq(Mux(integer, add.a + add.b, add.o)),
            Cat(*(self.sum.payload[i] for i in range(lanes))).eq(Cat(held)),
        ]
        with m.FSM():
            with m.State("ASK"):
                m.d.comb += self.ask.eq(self.column.valid)
                with m.If(self.asked):
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.sync += [lane.eq(0), *(h.eq(o) for h, o in zip(held, old, strict=True))]
                with m.If(self.old.valid):
                    m.next = "ADD"
            with m.State("ADD"):
                m.d.sync += lane.eq(lane + 1)
                for i in range(lanes):
                    with m.If(leaving == i):
                        m.d.sync += held[i].eq(result)
                with m.If(lane == lanes + FP32_LATENCY - 1):
                    m.next = "GIVE"
            with m.State("GIVE"):
                m.d.comb += [self.sum.valid.eq(1), self.column.ready.eq(self.sum.ready)]
                with m.If(self.sum.ready):
                    m.next = "ASK"
        return m
