"""Random bits for stochastic rounding: a hash of seed, instruction counter, engine, element, lane.

Nothing is kept from one instruction to the next, so the bits do not depend on timing, and a model
without a clock produces the same ones. The hash is made of rounds of the block cipher Speck, which
need an adder and exclusive ors; few rounds of it, since nobody is to be kept from guessing, only
from seeing a pattern.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..emit import Once, side_by_side

#: Rounds of Speck64 that all lanes share, and of Speck32 that each lane has.
COLUMN_ROUNDS = 5
LANE_ROUNDS = 4
_LANE_STAGES = LANE_ROUNDS // 2  # two of a lane's short rounds in each
#: The first shared round is keyed by the seed, the second by the engine and the seed rotated left
#: by so much (entering once, neighbouring seeds would show a pattern), the others by these.
SEED_ROTATION = 13
COLUMN_KEYS = (0xCBBB9D5D, 0x629A292A, 0x9159015A)
#: Cycles from `start` to the first words.
DITHER_LATENCY = COLUMN_ROUNDS + _LANE_STAGES

assert len(COLUMN_KEYS) == COLUMN_ROUNDS - 2


#: In place of an engine's number: the words of RANDOM and DROPOUT, whose key takes the counter's
#: place. So they are none of those that any engine rounds with.
RANDOM_STREAM = 255


def engine_key(engine: int) -> int:
    """Key of an engine's second round, from its number."""
    return (engine + 1) * 0x9E3779B9 & 0xFFFFFFFF


def lane_key(lane: int) -> int:
    """What a lane's block is exclusive-ored with."""
    return (lane + 1) * 0x85EBCA6B & 0xFFFFFFFF


def _round(x: Value, y: Value, key: Value | int, *, right: int, left: int) -> tuple[Value, Value]:
    bits = len(x)
    mixed = (x.rotate_right(right) + y)[:bits] ^ key
    return mixed, y.rotate_left(left) ^ mixed


class DitherLane(wiring.Component):
    """The rounds that each lane has of its own.

    Members
    -------
    move : In(1), low freezes the lane
    x : In(32), of the shared rounds
    key : In(32), see `lane_key`
    shared : In(16) x LANE_ROUNDS, keys of the rounds, each in the cycle of its round
    word : Out(32), _LANE_STAGES moves after `x`
    """

    move: In(1)
    x: In(32)
    key: In(32)
    shared: In(data.ArrayLayout(16, LANE_ROUNDS))
    word: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        block = self.x ^ self.key
        a, b = block[16:], block[:16]
        for stage in range(_LANE_STAGES):
            a_next = Signal(16, name=f"a{stage}", reset_less=True)
            b_next = Signal(16, name=f"b{stage}", reset_less=True)
            for number in (2 * stage, 2 * stage + 1):
                a, b = _round(a, b, self.shared[number], right=7, left=2)
            with m.If(self.move):
                m.d.sync += [a_next.eq(a), b_next.eq(b)]
            a, b = a_next, b_next
        m.d.comb += self.word.eq(Cat(b, a))
        return m


def _pipeline(
    m: Module, move: Value, x: Value, y: Value, keys: tuple[Value | int, ...], lanes: int
) -> Value:
    """Returns the words of all lanes, lane 0 lowest, of the element `x` and counter `y` that
    entered `DITHER_LATENCY` movements ago. `keys` are those of the shared rounds.
    """
    for number, round_key in enumerate(keys):
        x_next = Signal(32, name=f"x{number}", reset_less=True)
        y_next = Signal(32, name=f"y{number}", reset_less=True)
        new_x, new_y = _round(x, y, round_key, right=8, left=3)
        with m.If(move):
            m.d.sync += [x_next.eq(new_x), y_next.eq(new_y)]
        x, y = x_next, y_next

    m.submodules.lanes = cells = side_by_side(
        DitherLane(), "dither_lane", lanes, shared=("move", "x", "shared")
    )
    m.d.comb += [
        cells.move.eq(move),
        cells.x.eq(x),
        *(cells.key[lane].eq(lane_key(lane)) for lane in range(lanes)),
    ]
    shared: Value = y
    for stage in range(_LANE_STAGES):
        m.d.comb += [
            cells.shared[2 * stage].eq(shared[16:]),
            cells.shared[2 * stage + 1].eq(shared[:16]),
        ]
        moved = Signal(32, name=f"shared{stage}", reset_less=True)
        with m.If(move):
            m.d.sync += moved.eq(shared)
        shared = moved
    return Cat(cells.word)


class Dither(wiring.Component):
    """Random words for the result columns of an instruction, one after the other.

    Parameters
    ----------
    lanes : N
    present : whether there are any; if not, `valid` and `words` stay zero

    Members
    -------
    start : In(1), begins with element 0 of an instruction
    seed, counter, key : In(32), of the instruction, see `engine_key`; sampled with `start`
    valid : Out(1), `words` are those of the next element: `DITHER_LATENCY` cycles after `start`,
        and then always
    take : In(1), moves on to the next element; only when `valid`
    words : Out, a 32-bit word for each lane
    """

    def __init__(self, *, lanes: int, present: bool = True) -> None:
        self._lanes = lanes
        self._present = present
        super().__init__(
            {
                "start": In(1),
                "seed": In(32),
                "counter": In(32),
                "key": In(32),
                "valid": Out(1),
                "take": In(1),
                "words": Out(data.ArrayLayout(unsigned(32), lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if not self._present:
            return m
        seed, counter, key = (Signal(32, name=name) for name in ("seed", "counter", "key"))
        element = Signal(32)
        full = Signal(DITHER_LATENCY)
        active = Signal()
        move = Signal()
        with m.If(self.start):
            m.d.sync += [
                seed.eq(self.seed),
                counter.eq(self.counter),
                key.eq(self.key),
            ]
        # The first round works on the inputs of `start`, so that no cycle is lost.
        m.d.comb += [
            move.eq(self.start | (active & (self.take | ~full[-1]))),
            self.valid.eq(full[-1]),
        ]
        with m.If(self.start):
            m.d.sync += [active.eq(1), element.eq(1), full.eq(1)]
        with m.Elif(move):
            m.d.sync += [element.eq(element + 1), full.eq(Cat(1, full))]

        keys: tuple[Value | int, ...] = (
            Mux(self.start, self.seed, seed),
            key ^ seed.rotate_left(SEED_ROTATION),
            *COLUMN_KEYS,
        )
        words = _pipeline(
            m,
            move,
            Mux(self.start, 0, element),
            Mux(self.start, self.counter, counter),
            keys,
            self._lanes,
        )
        m.d.comb += self.words.as_value().eq(words)
        return m


def dither_of(config: CoreConfig) -> wiring.Component:
    """The `Dither` of one of the core's engines."""
    if config.random:
        return Once(Dither(lanes=config.lanes), f"dither_{config.lanes}")
    return Dither(lanes=config.lanes, present=False)


class DitherStream(wiring.Component):
    """Random words for the columns of one instruction after the other, without a gap between them.

    Parameters
    ----------
    lanes : N

    Members
    -------
    seed, key : In(32), see `engine_key`; steady while elements are under way
    element : In(stream of {counter, element})
    words : Out(stream of a 32-bit word for each lane), one for each element, in order

    Latency: `DITHER_LATENCY`. Throughput: one element per cycle.
    """

    def __init__(self, *, lanes: int) -> None:
        self._lanes = lanes
        super().__init__(
            {
                "seed": In(32),
                "key": In(32),
                "element": In(
                    stream.Signature(
                        data.StructLayout({"counter": unsigned(32), "element": unsigned(32)})
                    )
                ),
                "words": Out(stream.Signature(data.ArrayLayout(unsigned(32), lanes))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        valid = Signal(DITHER_LATENCY)
        move = Signal()
        m.d.comb += [
            move.eq(~valid[-1] | self.words.ready),
            self.element.ready.eq(move),
            self.words.valid.eq(valid[-1]),
        ]
        with m.If(move):
            m.d.sync += valid.eq(Cat(self.element.valid, valid))
        element = self.element.payload
        keys: tuple[Value | int, ...] = (
            self.seed,
            self.key ^ self.seed.rotate_left(SEED_ROTATION),
            *COLUMN_KEYS,
        )
        # With nothing under way the registers stand still.
        some = move & (self.element.valid | valid.any())
        words = _pipeline(m, some, element.element, element.counter, keys, self._lanes)
        m.d.comb += self.words.payload.as_value().eq(words)
        return m
