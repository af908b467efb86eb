"""The affine number of IOTA and AFFINE_SELECT: what the lanes have in common of it."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..access import AddressGenerator, walk_layout
from ..config import CoreConfig

#: Bits of the number.
NUMBER_BITS = 32


def affine_setup(config: CoreConfig) -> int:
    """Cycles from the start of an instruction to the number of its first element."""
    return 1 + (config.lanes - 1).bit_length()


class Affine(wiring.Component):
    """Steps through an instruction's elements, and drives the number in each `FrontLane`.

    Members
    -------
    begin : In(stream of the instruction's walk); taken when the walk before it is over
    numbered : In(1), with `begin`: the lanes' numbers count
    lane_step : In(16), with `begin`, signed: what a lane's number has more than the one's before
    element : Out(stream of {index}), index in the innermost dimension: one for each element, from
        the cycle after `begin` or, with `numbered`, `affine_setup` cycles after it
    start, base, step, increment : Out, of all lanes
    chosen : Out(N), of each

    Each lane has one adder, and no multiplier. In one cycle for each bit of the lanes' numbers, the
    lanes whose number has that bit add `lane_step` times its weight; with each element that goes,
    all add what the walk goes on by.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._lanes = config.lanes
        super().__init__(
            {
                "begin": In(stream.Signature(walk_layout(NUMBER_BITS))),
                "numbered": In(1),
                "lane_step": In(16),
                "element": Out(stream.Signature(data.StructLayout({"index": unsigned(16)}))),
                "start": Out(1),
                "base": Out(NUMBER_BITS),
                "step": Out(1),
                "increment": Out(NUMBER_BITS),
                "chosen": Out(config.lanes),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.walk = walk = AddressGenerator(width=NUMBER_BITS)
        wiring.connect(m, wiring.flipped(self.begin), walk.start)

        numbered = Signal()
        bit = Signal((self._lanes - 1).bit_length())  # of lane numbers, one-hot; 0: all are done
        weighted = Signal(NUMBER_BITS)
        settling = bit.any()
        starting = self.begin.valid & self.begin.ready
        m.d.sync += [bit.eq(bit << 1), weighted.eq(weighted << 1)]
        with m.If(starting):
            m.d.sync += [
                numbered.eq(self.numbered),
                bit.eq(self.numbered),
                weighted.eq(self.lane_step.as_signed()),
            ]

        going = self.element.valid & self.element.ready
        address = walk.address.payload

        def has_bit(lane: int) -> Value:
            return Cat(bit[place] for place in range(len(bit)) if lane >> place & 1).any()

        m.d.comb += [
            self.element.valid.eq(walk.address.valid & ~settling),
            self.element.payload.index.eq(address.address),
            walk.address.ready.eq(going),
            self.start.eq(starting & self.numbered),
            self.base.eq(self.begin.payload.base),
            self.step.eq(settling | (going & numbered)),
            self.increment.eq(
                Mux(settling, weighted, (address.following - address.address)[:NUMBER_BITS])
            ),
            self.chosen.eq(Cat(~settling | has_bit(lane) for lane in range(self._lanes))),
        ]
        return m
