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

from amaranth.hdl import Cat, Module, Mux, Shape, ShapeLike, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..emit import Once, grid, side_by_side
from ..ports import column_shape, split_words
from .delay import Delay, skew
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


class Edge(wiring.Component):
    """What an element of each operand passes on its way into the array: recoded for the PEs, once.

    Members
    -------
    moving, weight : In(OPERAND_BITS)
    active : In(1), the row takes part in the sum
    moving_out : Out({value, active}), registered
    weight_out : Out, the factor, registered

    With an `fp8_rate` of 2 also the seconds of pairs, ``moving_second`` and ``weight_second``, and
    whether they count, ``moving_pair`` and ``weight_pair``.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        factor = _factor(config)
        members: dict[str, ShapeLike] = {"active": 1}
        for bus in ("moving", "weight"):
            members[bus] = OPERAND_BITS
            if config.fp8_rate == 2:
                members |= {f"{bus}_second": SECOND_BITS, f"{bus}_pair": 1}
        super().__init__(
            {
                **{member: In(shape) for member, shape in members.items()},
                "moving_out": Out(data.StructLayout({"value": factor, "active": 1})),
                "weight_out": Out(factor),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        def recoded(bus: str) -> Value:
            word = getattr(self, bus)
            if self._config.fp8_rate == 1:
                return recode(m, word)
            second, pair = getattr(self, f"{bus}_second"), getattr(self, f"{bus}_pair")
            return recode_factor(m, word, second, pair)

        moving = Signal(self.moving_out.shape(), reset_less=True)
        weight = Signal(self.weight_out.shape(), reset_less=True)
        m.d.sync += [
            moving.value.as_value().eq(recoded("moving")),
            moving.active.eq(self.active),
            weight.as_value().eq(recoded("weight")),
        ]
        m.d.comb += [self.moving_out.eq(moving), self.weight_out.eq(weight)]
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
    sums : Out {data, valid, tag}: N FP32 words; lane m is the sum over active rows k, in
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
                    data.StructLayout({"data": column_shape(config), "valid": 1, "tag": tag})
                ),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes

        weight_valid, weight_first, swap = Signal(), Signal(), Signal()
        m.d.sync += [
            weight_valid.eq(self.weight.valid),
            weight_first.eq(self.weight.first),
            swap.eq(self.moving.swap),
        ]

        # The array's edge: recode, then wait for the row's turn.
        pairs = ("moving_pair", "weight_pair") if config.fp8_rate == 2 else ()
        name = f"array_edge{_variant(config)}"
        m.submodules.edge = edge = side_by_side(Edge(config), name, lanes, shared=pairs)
        size = Shape.cast(moving_element(config)).width + Shape.cast(weight_element(config)).width
        m.submodules.skew = rows = skew(size, lanes, first=0, step=ADD_LATENCY)
        m.submodules.pes = pes = grid(
            ProcessingElement(config),
            f"processing_element{_variant(config)}",
            lanes,
            lanes,
            down=("acc",),
        )
        m.submodules.deskew = columns = skew(32, lanes, first=lanes - 1, step=-1)
        for bus, operand in (("moving", self.moving), ("weight", self.weight)):
            for lane, word in enumerate(split_words(m, operand.data, name=f"{bus}_word")):
                m.d.comb += getattr(edge, bus)[lane].eq(word)
            if pairs:
                m.d.comb += getattr(edge, f"{bus}_pair").eq(operand.pair)
                seconds = split_words(m, operand.second, name=f"{bus}_second")
                for lane, word in enumerate(seconds):
                    m.d.comb += getattr(edge, f"{bus}_second")[lane].eq(word)
        for lane in range(lanes):
            moving, weight = edge.moving_out[lane], edge.weight_out[lane]
            m.d.comb += [
                edge.active[lane].eq(self.moving.rows[lane]),
                rows.i[lane].eq(Cat(moving, swap, weight, weight_valid, weight_first)),
                Cat(pes.moving_in[lane].as_value(), pes.weight_in[lane].as_value()).eq(
                    rows.o[lane]
                ),
                pes.acc_in[lane].eq(0),
                columns.i[lane].eq(pes.acc_out[lane]),
            ]
        m.d.comb += self.sums.data.as_value().eq(Cat(columns.o))

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
