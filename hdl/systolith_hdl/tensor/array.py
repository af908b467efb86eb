"""The weight-stationary systolic array.

The stationary operand stays in the processing elements (PEs): PE (k, m) holds w[k, m]. Elements
of moving columns enter row k at its left edge and go right, one PE a cycle; partial sums go down,
a row in ADD_LATENCY cycles, so row k works k * ADD_LATENCY cycles behind row 0.

The next stationary operand is loaded in the background, on a second bus that also goes right: row k
is sent w[k, 0], w[k, 1], ..., and each PE keeps the first word of a load that reaches it and marks
the word after it as first for its right neighbour. Bubbles do no harm. With column m sent in cycle
s[m], PE m takes its word in cycle s[m] + m (plus the row's skew), into a shadow register. A moving
column sent with `swap` in cycle t meets PE m in cycle t + m, and from this very column on the PE
multiplies by its shadow. Hence:

- a column with `swap` may be sent one cycle after the last column of a load, no sooner;
- the next load may begin in the cycle in which the `swap` column is sent, no sooner.

Both are conditions on the sender only, whatever N is, and with them matmuls of N + 1 columns follow
each other without a bubble while each loads the stationary operand of the next.
"""

from amaranth.hdl import Cat, Const, Module, Mux, ShapeLike, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..emit import Once, side_by_side
from ..ports import column_shape, split_words
from .delay import Delay
from .mac import ADD_LATENCY, MUL_LATENCY, OPERAND_BITS, Mac, Narrow, recode
from .mac_fp8x2 import PAIR_MUL_LATENCY, SECOND_BITS, Factor, MacFp8x2, recode_factor


def mul_latency(config: CoreConfig) -> int:
    """Cycles from a moving element reaching a PE to its product meeting the running sum."""
    return MUL_LATENCY if config.fp8_rate == 1 else PAIR_MUL_LATENCY


def array_latency(config: CoreConfig) -> int:
    """Cycles from a moving column being sent to its sums leaving the array."""
    # Edge register, N rows, the product of the first, N - 1 PEs to the right.
    return 1 + config.lanes * ADD_LATENCY + mul_latency(config) + config.lanes - 1


def _factor(config: CoreConfig) -> type[data.Struct]:
    """What the PEs multiply."""
    return Narrow if config.fp8_rate == 1 else Factor


def row_name(config: CoreConfig) -> str:
    """Module name of a `Row`."""
    return f"pe_row_{config.lanes}{_variant(config)}"


def _variant(config: CoreConfig) -> str:
    """Suffix of the names of modules that differ with the MAC."""
    return "" if config.fp8_rate == 1 else "_fp8x2"


def moving_element(config: CoreConfig) -> data.StructLayout:
    """What goes right on a row's moving bus: the factor; whether the row takes part in the sum;
    whether this is the first column for which the loaded stationary operand counts."""
    return data.StructLayout({"value": _factor(config), "active": 1, "swap": 1})


def weight_element(config: CoreConfig) -> data.StructLayout:
    """What goes right on a row's weight bus: the factor, and whether it is meant for the PE it
    reaches."""
    return data.StructLayout({"value": _factor(config), "valid": 1, "first": 1})


class ProcessingElement(wiring.Component):
    """One MAC, its active and its shadow weight.

    Members
    -------
    moving_in, weight_in : In, from the left
    moving_out, weight_out : Out, to the right, one cycle later
    acc_in : In(32), sum from above, `mul_latency` cycles after the moving element it belongs to
    acc_out : Out(32), ADD_LATENCY cycles after `acc_in`
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        super().__init__(
            {
                "moving_in": In(moving_element(config)),
                "moving_out": Out(moving_element(config)),
                "weight_in": In(weight_element(config)),
                "weight_out": Out(weight_element(config)),
                "acc_in": In(32),
                "acc_out": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self._config.fp8_rate == 1:
            m.submodules.mac = mac = Once(Mac(), "mac_narrow")
        else:
            m.submodules.mac = mac = Once(MacFp8x2(), "mac_fp8x2")
        factor = _factor(self._config)

        # Registers of this cell that a reset need not touch: what is stale in them is overtaken
        # by no new element, and counts for nothing until a new load.
        moving = Signal(moving_element(self._config), reset_less=True)
        weight = Signal(factor, reset_less=True)
        shadow = Signal(factor, reset_less=True)
        active = Signal(factor, reset_less=True)
        weight_valid, weight_first, mark_next = Signal(), Signal(), Signal()

        m.d.sync += [
            moving.eq(self.moving_in),
            weight.eq(self.weight_in.value),
            weight_valid.eq(self.weight_in.valid & ~self.weight_in.first),
            weight_first.eq(mark_next),
        ]
        with m.If(self.weight_in.valid):
            m.d.sync += mark_next.eq(self.weight_in.first)
            with m.If(self.weight_in.first):
                m.d.sync += shadow.eq(self.weight_in.value)
        with m.If(self.moving_in.swap):
            m.d.sync += active.eq(shadow)

        m.d.comb += [
            self.moving_out.eq(moving),
            self.weight_out.value.eq(weight),
            self.weight_out.valid.eq(weight_valid),
            self.weight_out.first.eq(weight_first),
            mac.a.eq(self.moving_in.value),
            mac.w.eq(Mux(self.moving_in.swap, shadow, active)),
            mac.active.eq(self.moving_in.active),
            mac.acc.eq(self.acc_in),
            self.acc_out.eq(mac.o),
        ]
        return m


class Row(wiring.Component):
    """N processing elements side by side: the unit that Verilator keeps whole.

    Members
    -------
    moving : In(moving_element), at PE 0 in this cycle
    weight : In(weight_element), at PE 0 in this cycle
    acc_in : In, sums from the row above; that of PE m belongs to the element `moving` held
        m + `mul_latency` cycles ago
    acc_out : Out, ADD_LATENCY cycles after `acc_in`
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        super().__init__(
            {
                "moving": In(moving_element(config)),
                "weight": In(weight_element(config)),
                "acc_in": In(column_shape(config)),
                "acc_out": Out(column_shape(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        moving, weight = self.moving, self.weight
        name = f"processing_element{_variant(self._config)}"
        m.submodules.pes = pes = side_by_side(
            ProcessingElement(self._config), name, self._config.lanes
        )
        for lane, acc_in in enumerate(split_words(m, self.acc_in, name="acc_in")):
            m.d.comb += [
                pes.moving_in[lane].eq(moving),
                pes.weight_in[lane].eq(weight),
                pes.acc_in[lane].eq(acc_in),
            ]
            moving, weight = pes.moving_out[lane], pes.weight_out[lane]
        m.d.comb += self.acc_out.as_value().eq(Cat(pes.acc_out))
        return m


class SystolicArray(wiring.Component):
    """N x N array with its skew and deskew. Never stalls; bubbles are allowed anywhere.

    Parameters
    ----------
    tag : shape of what accompanies each moving column to the output

    Members
    -------
    weight : In {valid, first, data}: one column of the stationary operand, N operands of
        `OPERAND_BITS` (row 0 first); `first` with column 0 of a load
    moving : In {valid, swap, rows, data, tag}: one moving column, N operands; a row whose bit in
        `rows` is clear takes no part. `swap` and `rows` must be 0 when not `valid`.
    sums : Out {valid, data, tag}: N FP32 words; lane m is the sum over active rows k, in
        ascending order from +0, of moving[k] * stationary[k, m]. `array_latency` cycles after
        `moving`, one column per cycle.

    With an `fp8_rate` of 2 `weight` and `moving` have two fields more: `second`, N operands of
    `SECOND_BITS`, and `pair`, high if they count. Where both are pairs, what a row adds is
    moving[k] * stationary[k, m] + moving.second[k] * stationary.second[k, m]: see `MacFp8x2`.
    """

    def __init__(self, config: CoreConfig, *, tag: ShapeLike) -> None:
        self._config = config
        self._tag = tag
        lanes = config.lanes
        operands: dict[str, ShapeLike] = {"data": data.ArrayLayout(unsigned(OPERAND_BITS), lanes)}
        if config.fp8_rate == 2:
            operands |= {"second": data.ArrayLayout(unsigned(SECOND_BITS), lanes), "pair": 1}
        super().__init__(
            {
                "weight": In(data.StructLayout({"valid": 1, "first": 1, **operands})),
                "moving": In(
                    data.StructLayout(
                        {"valid": 1, "swap": 1, "rows": lanes, **operands, "tag": tag}
                    )
                ),
                "sums": Out(
                    data.StructLayout({"valid": 1, "data": column_shape(config), "tag": tag})
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes

        above: data.View = data.View(column_shape(config), Const(0, 32 * lanes))
        weight_valid, weight_first, swap = Signal(), Signal(), Signal()
        m.d.sync += [
            weight_valid.eq(self.weight.valid),
            weight_first.eq(self.weight.first),
            swap.eq(self.moving.swap),
        ]
        moving_words = split_words(m, self.moving.data, name="moving_word")
        weight_words = split_words(m, self.weight.data, name="weight_word")
        moving_seconds: list[Signal] = []
        weight_seconds: list[Signal] = []
        if config.fp8_rate == 2:
            moving_seconds = split_words(m, self.moving.second, name="moving_second")
            weight_seconds = split_words(m, self.weight.second, name="weight_second")

        def recoded(bus: data.View, words: list[Signal], seconds: list[Signal], lane: int) -> Value:
            if config.fp8_rate == 1:
                return recode(m, words[lane])
            return recode_factor(m, words[lane], seconds[lane], bus.pair)

        for lane in range(lanes):
            # The array's edge: recode, then wait for the row's turn.
            moving = Signal(moving_element(config), name=f"moving{lane}", reset_less=True)
            weight = Signal(_factor(config), name=f"weight{lane}", reset_less=True)
            m.d.sync += [
                moving.value.as_value().eq(
                    recoded(self.moving, moving_words, moving_seconds, lane)
                ),
                moving.active.eq(self.moving.rows[lane]),
                weight.as_value().eq(recoded(self.weight, weight_words, weight_seconds, lane)),
            ]
            edge = Cat(moving.value, moving.active, swap, weight, weight_valid, weight_first)
            cycles = lane * ADD_LATENCY
            m.submodules[f"skew{lane}"] = skew = Once(
                Delay(width=len(edge), cycles=cycles), f"delay_{len(edge)}x{cycles}"
            )
            m.submodules[f"row{lane}"] = row = Once(Row(config), row_name(config))
            m.d.comb += [
                skew.i.eq(edge),
                Cat(row.moving.as_value(), row.weight.as_value()).eq(skew.o),
                row.acc_in.eq(above),
            ]
            above = row.acc_out

        sums = []
        for lane, bottom in enumerate(split_words(m, above, name="bottom")):
            cycles = lanes - 1 - lane
            m.submodules[f"deskew{lane}"] = deskew = Once(
                Delay(width=32, cycles=cycles), f"delay_32x{cycles}"
            )
            m.d.comb += deskew.i.eq(bottom)
            sums.append(deskew.o)
        m.d.comb += self.sums.data.as_value().eq(Cat(sums))

        # Only `valid` has to be reset; the tag means nothing without it.
        latency = array_latency(config)
        valids = Signal(latency)
        m.d.sync += valids.eq(Cat(self.moving.valid, valids))
        m.d.comb += self.sums.valid.eq(valids[-1])
        tag = Signal(self._tag)
        m.d.comb += tag.eq(self.moving.tag)
        bits = tag if isinstance(tag, Signal) else tag.as_value()
        m.submodules.tag = tags = Once(
            Delay(width=len(bits), cycles=latency), f"delay_{len(bits)}x{latency}"
        )
        m.d.comb += [tags.i.eq(bits), self.sums.tag.eq(tags.o)]
        return m
