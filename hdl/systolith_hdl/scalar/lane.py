"""One lane of the scalar engine: multiply, add, evaluate the function."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from ..arith import FP32_LATENCY, SHORT_LATENCY, Fp32Add, Fp32Mul, leading_zeros, pack_fp32
from ..arith.rounding import (
    EXP_BITS,
    RAW_BITS,
    RAW_INF,
    normalize,
    saturate5,
    shift_right_sticky,
)
from ..emit import Once
from ..isa import SEGMENT_WORDS, TABLE_ROWS, TABLE_SEGMENTS, TABLE_WORDS
from . import tables as T

#: Enabled cycles from y to the function's result.
FUNCTION_LATENCY = 8
#: Enabled cycles from a lane's operand to its result.
LANE_LATENCY = FP32_LATENCY + SHORT_LATENCY + FUNCTION_LATENCY

_M = T.MANTISSA
_INDEX = T.MAX_COUNT_LOG2
_EXP2_LOW = T.FIXED - T.EXP2_SEGMENTS_LOG2  # bits of f below the segment number
_CURVE = 14  # of these, those that the square's term of 2**f has
_UNIT = 11  # exponents: 9 bits of the table's, plus K (-298..254), plus p0's integer part


#: Lanes that share one `FunctionTables`.
SHARING = 2


class FunctionTables(wiring.Component):
    """Directory and segments, for two lanes: a block RAM has two ports, so both read every cycle.

    Members
    -------
    en : In(1), low freezes the reads
    row0, row1 : In, addresses of the directory
    entry0, entry1 : Out(`tables.ENTRY`), what stands there, an enabled cycle later
    index0, index1 : In, numbers of segments
    segment0, segment1 : Out(`tables.SEGMENT`), an enabled cycle later
    weight0, weight1 : In, numbers of pieces of 2/pi
    piece0, piece1 : Out(`tables.PIECE`), an enabled cycle later
    """

    def __init__(self) -> None:
        ports: dict[str, wiring.Member] = {"en": In(1)}
        for user in range(SHARING):
            ports |= {
                f"row{user}": In(range(T.DIRECTORY)),
                f"entry{user}": Out(T.ENTRY),
                f"index{user}": In(range(T.SEGMENTS)),
                f"segment{user}": Out(T.SEGMENT),
                f"weight{user}": In(range(len(T.TWO_OVER_PI))),
                f"piece{user}": Out(T.PIECE),
            }
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        content = T.tables()
        low = [word & (1 << 64) - 1 for word in content.segments]
        high = [word >> 64 for word in content.segments]
        directory = _rom(m, "directory", T.ENTRY.size, T.DIRECTORY, content.directory)
        halves = [
            _rom(m, "segments_low", 64, T.SEGMENTS, low),
            _rom(m, "segments_high", 64, T.SEGMENTS, high),
        ]
        depth = 1 << len(self.weight0)
        pieces = _rom(m, "pieces", T.PIECE, depth, T.TWO_OVER_PI)
        for user in range(SHARING):
            piece = pieces.read_port()
            m.d.comb += [
                piece.en.eq(self.en),
                piece.addr.eq(getattr(self, f"weight{user}")),
                getattr(self, f"piece{user}").eq(piece.data),
            ]
            entry, segment = directory.read_port(), [half.read_port() for half in halves]
            m.d.comb += [
                entry.en.eq(self.en),
                entry.addr.eq(getattr(self, f"row{user}")),
                getattr(self, f"entry{user}").eq(entry.data),
                getattr(self, f"segment{user}").eq(Cat(port.data for port in segment)),
            ]
            for port in segment:
                index = getattr(self, f"index{user}")
                m.d.comb += [port.en.eq(self.en), port.addr.eq(index)]
        return m


class CustomTable(wiring.Component):
    """The directory and the segments of CUSTOM, which each lane has for itself. It stands between
    the lane and what it shares with others, and answers in place of that.

    Members
    -------
    write : In(1), writes `word` to `address`, in every cycle
    address : In, word of the table, less than `TABLE_WORDS`
    word : In(32)
    en : In(1), low freezes the reads
    custom : In(1), the function is CUSTOM; constant while its operands are in the pipeline
    row, index : In, of the lane
    shared_entry, shared_segment : In, of `FunctionTables`
    entry : Out(`tables.ENTRY`), the shared one or, if `custom`, what stands at `row`, an enabled
        cycle later
    segment : Out(`tables.SEGMENT`), likewise that of number `index`

    Of `row` and `index` those bits count that such a table has. What is written is read from the
    next cycle on. The memories are zero at power-up and keep their contents over a reset.
    """

    write: In(1)
    address: In(range(TABLE_WORDS))
    word: In(32)
    en: In(1)
    custom: In(1)
    row: In(range(T.DIRECTORY))
    shared_entry: In(T.ENTRY)
    entry: Out(T.ENTRY)
    index: In(range(T.SEGMENTS))
    shared_segment: In(T.SEGMENT)
    segment: Out(T.SEGMENT)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # It never reads what it writes in the same cycle. Synthesis sees that where the register
        # of a read port stands outside of it, and makes no bypass.
        reading = self.en & self.custom & ~self.write
        part_bits = (SEGMENT_WORDS - 1).bit_length()
        in_directory = self.address[-1]
        part = self.address[:part_bits]
        parts = []
        for number in range(SEGMENT_WORDS):
            ram = memory.Memory(shape=unsigned(32), depth=TABLE_SEGMENTS, init=[])
            m.submodules[f"segments{number}"] = ram
            write, read = ram.write_port(), ram.read_port(domain="comb")
            found = Signal(32, name=f"found{number}", reset_less=True)
            m.d.comb += [
                write.en.eq(self.write & ~in_directory & (part == number)),
                write.addr.eq(self.address[part_bits:]),
                write.data.eq(self.word),
                read.addr.eq(self.index),
            ]
            with m.If(reading):
                m.d.sync += found.eq(read.data)
            parts.append(found)
        m.submodules.directory = ram = memory.Memory(shape=T.ENTRY, depth=TABLE_ROWS, init=[])
        write, read = ram.write_port(), ram.read_port(domain="comb")
        entry = Signal(T.ENTRY.size, reset_less=True)
        m.d.comb += [
            write.en.eq(self.write & in_directory),
            write.addr.eq(self.address),
            Value.cast(write.data).eq(self.word),
            read.addr.eq(self.row),
        ]
        with m.If(reading):
            m.d.sync += entry.eq(Value.cast(read.data))
        for answer, own, shared in (
            (self.entry, entry, self.shared_entry),
            (self.segment, Cat(parts), self.shared_segment),
        ):
            chosen = Mux(self.custom, Value.cast(own), Value.cast(shared))
            m.d.comb += Value.cast(answer).eq(chosen)
        return m


# Bit 11 of a word's address tells the directory from the segments.
assert SEGMENT_WORDS * TABLE_SEGMENTS == 1 << (TABLE_WORDS - 1).bit_length() - 1


def _rom(m: Module, name: str, width: int, depth: int, words: Sequence[int]) -> memory.Memory:
    m.submodules[name] = cells = memory.Memory(shape=unsigned(width), depth=depth, init=words)
    return cells


class Turning(data.Struct):
    """What all lanes do in a cycle to reduce angles: see `AngleReducer`."""

    load: unsigned(1)
    multiply: unsigned(1)
    first: unsigned(1)
    shift: unsigned(1)
    fold: unsigned(1)


#: Enabled cycles that reducing an angle takes, and least distance of two: one to load, one for
#: each piece of 2/pi, three to shift.
TURN_CYCLES = 1 + T.PIECES + 3
_BYTE = 8
_DISTANCE = 31  # bits of the distance that go on: 24 significant ones and less than a byte of zeros


class AngleReducer(wiring.Component):
    """Distance of |y| from where sine or cosine is zero, in quarters of a turn.

    Members
    -------
    en : In(1), low freezes everything
    turning : In(`Turning`): `load` takes y; then PIECES cycles of `multiply`, the first marked;
        then three of `shift`, the first marked `fold`
    quarter : In(1), of `tables.CONTROL`
    y : In(32), FP32
    weight, piece : of one user of `FunctionTables`
    held : Out(32), the y that is being reduced
    distance, exponent, negate : Out, valid in the cycle behind the last `shift`: the top bits, the
        exponent of the topmost, and whether the quadrant inverts the sign; of no meaning for
        |y| < 1/2, infinity and NaN
    """

    en: In(1)
    turning: In(Turning)
    quarter: In(1)
    y: In(32)
    weight: Out(range(len(T.TWO_OVER_PI)))
    piece: In(T.PIECE)
    held: Out(32)
    distance: Out(_DISTANCE)
    exponent: Out(signed(9))
    negate: Out(1)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # The running sum, of 24 + PIECE bits: 2 of quadrant and 15 of the distance are what is left
        # of it in the end; and behind it what was shifted out.
        sum_bits = _M + 1 + T.PIECE
        kept = T.PIECE - 2
        low_bits = T.DISTANCE - kept
        total, low = Signal(sum_bits), Signal(low_bits)
        next_weight = Signal.like(self.weight)
        bytes_shifted = Signal(2)
        negate = Signal()

        m.d.comb += self.weight.eq(next_weight)
        with m.If(self.turning.load):
            # Below 1/2 the number makes no sense, and neither does the result.
            m.d.comb += self.weight.eq(self.y[_M:31] - 126 + T.PIECE * (T.PIECES - 1))

        quadrant = Signal(2)
        invert = (self.turning.fold & quadrant[0]).replicate(T.DISTANCE)
        folded, shifted = Signal(T.DISTANCE), Signal(T.DISTANCE)
        m.d.comb += [
            quadrant.eq(total[kept : kept + 2] + self.quarter),
            folded.eq(Cat(low, total[:kept]) ^ invert),
            shifted.eq(folded),
        ]
        empty = ~folded[-_BYTE:].any()
        with m.If(empty):
            m.d.comb += shifted.eq(folded << _BYTE)

        with m.If(self.en):
            m.d.sync += next_weight.eq(self.weight - T.PIECE)
            with m.If(self.turning.load):
                m.d.sync += self.held.eq(self.y)
            with m.If(self.turning.multiply):
                carried = Mux(self.turning.first, 0, total >> T.PIECE)
                product = Cat(self.held[:_M], 1) * self.piece
                m.d.sync += [
                    total.eq(product + carried),
                    low.eq(Cat(low, total[: T.PIECE])[-low_bits:]),
                ]
            with m.If(self.turning.shift):
                m.d.sync += [
                    low.eq(shifted),
                    total.eq(shifted[low_bits:]),
                    bytes_shifted.eq(Mux(self.turning.fold, 0, bytes_shifted) + empty),
                ]
            with m.If(self.turning.fold):
                m.d.sync += negate.eq(quadrant[1])
        m.d.comb += [
            self.distance.eq(Cat(low, total[:kept])[-_DISTANCE:]),
            self.exponent.eq(-1 - _BYTE * bytes_shifted),
            self.negate.eq(negate),
        ]
        return m


class FunctionUnit(wiring.Component):
    """Evaluates one of the tabulated functions: the steps of `tables` as a pipeline.

    Members
    -------
    en : In(1), low freezes every stage
    control : In(`tables.CONTROL`), the function; constant while its operands are in the pipeline
    y : In(32), FP32
    turning : In(`Turning`), used by functions with `turn`
    row, entry, index, segment, weight, piece : of one user of `FunctionTables`, which has the same
        `en`
    o : Out(32), FP32, registered

    Latency `FUNCTION_LATENCY` enabled cycles, one result per enabled cycle; of functions with
    `turn` that from y with `Turning.load` on is `TURN_CYCLES` more, and there is a result in as
    many cycles. A small table of powers of two is its own.
    """

    en: In(1)
    control: In(T.CONTROL)
    y: In(32)
    row: Out(range(T.DIRECTORY))
    entry: In(T.ENTRY)
    index: Out(range(T.SEGMENTS))
    segment: In(T.SEGMENT)
    turning: In(Turning)
    weight: Out(range(len(T.TWO_OVER_PI)))
    piece: In(T.PIECE)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        control = self.control
        exp2 = T.tables().exp2
        powers = _rom(m, "powers", T.EXP2_ENTRY.size, len(exp2), exp2).read_port()
        m.d.comb += powers.en.eq(self.en)

        def stage(number: int, **shapes: object) -> dict[str, Signal]:
            return {
                name: Signal(shape, name=f"{name}_{number}", reset_less=True)
                for name, shape in shapes.items()
            }

        def step(old: dict[str, Signal], new: dict[str, Signal], **values: object) -> None:
            """Registers `values`, and whatever else has the same name in both stages."""
            with m.If(self.en):
                for name, register in new.items():
                    m.d.sync += register.eq(values[name] if name in values else old[name])

        m.submodules.reducer = reducer = AngleReducer()
        m.d.comb += [
            reducer.en.eq(self.en),
            reducer.turning.eq(self.turning),
            reducer.quarter.eq(control.quarter),
            reducer.y.eq(self.y),
            self.weight.eq(reducer.weight),
            reducer.piece.eq(self.piece),
        ]

        # Stage 1: unpack; the exact distance from the centre, or that of an angle; how many zeros
        # are in front.
        y = Signal(32)
        m.d.comb += y.eq(Mux(control.turn, reducer.held, self.y))
        biased, fraction, sign = y[_M:31], y[:_M], y[31]
        subnormal, extreme = Signal(), Signal()
        magnitude, zeros = Signal(_DISTANCE), Signal(5)
        in_center = Signal(2)
        centered, below = Signal(), Signal()
        turned = Signal()
        operand = Signal(_M + 2)
        distance = Signal(signed(_M + 3))
        m.d.comb += [
            subnormal.eq(biased == 0),
            extreme.eq(biased == 255),
            in_center.eq(Mux(sign, control.center_negative, control.center_positive)),
            centered.eq(((biased == 126) & in_center[0]) | ((biased == 127) & in_center[1])),
            # units of 2**-24 in [1/2, 2): what lies below the centre is an exact number too
            operand.eq(Mux(biased[0], Cat(0, fraction, 1), Cat(fraction, 1, 0))),
            distance.eq(operand - control.center),
            below.eq(centered & (distance < 0)),
            turned.eq(control.turn & ~extreme & (biased >= 126)),
        ]
        plain = Cat(0, fraction, ~subnormal)
        centre_distance = Mux(below, control.center - operand, distance)[: _M + 2]
        spare = Const(0, _DISTANCE - _M - 2)
        m.d.comb += [
            magnitude.eq(
                Mux(turned, reducer.distance, Cat(spare, Mux(centered, centre_distance, plain)))
            ),
            zeros.eq(leading_zeros(m, magnitude)),
        ]
        s1 = stage(
            1, magnitude=_DISTANCE, zeros=5, exponent=signed(9), page=2, sign=1, extreme=1, nan=1
        )
        step(
            {},
            s1,
            magnitude=magnitude,
            zeros=zeros,
            exponent=Mux(
                turned,
                reducer.exponent,
                Mux(centered, 0, Cat(biased[0] | subnormal, biased[1:]) - 127),
            ),
            page=Mux(turned, T.TURN_PAGE, Cat(Mux(centered, below, sign), centered)),
            sign=(sign & ~control.quarter) ^ (turned & reducer.negate),
            extreme=extreme,
            nan=extreme & (fraction != 0),
        )

        # Stage 2: normalise; directory.
        shifted = Signal(_DISTANCE)
        k = Signal(signed(9))
        column = Signal(signed(9))
        offset = Signal(signed(10))
        row = Signal(7)
        m.d.comb += [
            shifted.eq(s1["magnitude"] << s1["zeros"]),
            k.eq(s1["exponent"] - s1["zeros"]),
            column.eq(Mux(control.parity, k[0], k)),
            offset.eq(column - control.low),
        ]
        with m.If(s1["extreme"]):
            m.d.comb += row.eq(control.span + (T.ROW_LOW + 1))
        with m.Elif(s1["zeros"].all()):
            m.d.comb += row.eq(T.ROW_ZERO)
        with m.Elif(offset < 0):
            m.d.comb += row.eq(T.ROW_UNDER)
        with m.Elif(offset >= control.span):
            m.d.comb += row.eq(control.span + T.ROW_LOW)
        with m.Else():
            m.d.comb += row.eq(offset[:6] + T.ROW_LOW)
        m.d.comb += self.row.eq(Mux(s1["nan"], T.NAN_ADDRESS, control.pages[s1["page"]] + row))
        s2 = stage(2, m=_M, k=signed(9), sign=1)
        step(s1, s2, m=shifted[-1 - _M : -1], k=k)

        # Stage 3: segment.
        split = Signal(_M + _INDEX)
        m.d.comb += [
            split.eq(s2["m"] << self.entry.log2_count),
            self.index.eq(self.entry.base + split[_M:]),
        ]
        s3 = stage(3, t=_M, k=signed(9), sign=1)
        step(s2, s3, t=split[:_M])

        # Stages 4 to 6: Horner; the last also looks up 2**f.
        segment = self.segment
        k = s3["k"]
        scaling = Signal(signed(10))
        with m.Switch(control.scaling):
            with m.Case(T.Scaling.PLUS):
                m.d.comb += scaling.eq(k)
            with m.Case(T.Scaling.MINUS):
                m.d.comb += scaling.eq(-k)
            with m.Case(T.Scaling.HALF):
                m.d.comb += scaling.eq(k >> 1)
            with m.Case(T.Scaling.MINUS_HALF):
                m.d.comb += scaling.eq(-(k >> 1))
            with m.Case(T.Scaling.DOUBLE):
                m.d.comb += scaling.eq(k << 1)
        # An FPGA's multiplier takes 18 bits with the sign: the top one of these 18 is added apart.
        c3, t18 = segment.c3, s3["t"][5:]
        cubic = c3 * t18[:17] + (Mux(t18[17], c3, 0) << 17)
        flags = {"exp2": 1, "negate": 1, "nan": 1, "unit": signed(_UNIT)}
        s4 = stage(
            4,
            t=_M,
            p=signed(25),
            c1=signed(T.P0_BITS),
            c0=signed(T.P0_BITS),
            log=signed(T.P0_BITS),
            **flags,
        )
        step(
            s3,
            s4,
            p=segment.c2 + (cubic >> 18),
            c1=segment.c1,
            c0=segment.c0,
            log=Mux(segment.log, k * Const(T.LN2), 0),
            exp2=segment.exp2,
            negate=segment.negate ^ (s3["sign"] & control.odd),
            nan=segment.nan,
            unit=segment.exponent + Mux(segment.relative, scaling, 0),
        )
        s5 = stage(5, t=_M, p=signed(T.P0_BITS), c0=signed(T.P0_BITS), **flags)
        step(
            s4,
            s5,
            p=s4["c1"] + ((s4["p"] * s4["t"]) >> _M),
            c0=s4["c0"] + s4["log"],
        )
        s6 = stage(6, p=signed(T.P0_BITS), **flags)
        p0 = Signal(signed(T.P0_BITS))
        m.d.comb += [
            p0.eq(s5["c0"] + ((s5["p"] * s5["t"]) >> _M)),
            powers.addr.eq(p0[_EXP2_LOW : T.FIXED]),
        ]
        # The biased exponent less one of a power, before its integer part; or of p's top bit.
        step(s5, s6, p=p0, unit=s5["unit"] + Mux(s5["exp2"], 126, 125 + T.P0_BITS))

        # Stage 7: absolute value, normalised; or the terms of 2**f.
        p = s6["p"]
        power = data.View(T.EXP2_ENTRY, powers.data)
        u = p[:_EXP2_LOW]
        square = u[8:] * u[8:]
        linear = power.c1 * u
        wide = Signal(T.P0_BITS)
        exponent = Signal(signed(_UNIT))  # less one
        leading, places = normalize(m, wide, early=True)
        m.d.comb += [
            wide.eq(Mux(p[-1], -p, p)),
            # -n is ~n + 1
            exponent.eq(
                s6["unit"]
                + Mux(s6["exp2"], p >> T.FIXED, Cat(~places, Const(1, 1)).as_signed())
                + ~s6["exp2"]
            ),
        ]
        s7 = stage(
            7, wide=T.P0_BITS, curve=T.FIXED + _CURVE, exp2=1, exponent=EXP_BITS, shift=5, sign=1,
            nan=1,
        )  # fmt: skip
        step(
            s6,
            s7,
            wide=Mux(s6["exp2"], linear[_EXP2_LOW - _CURVE :], leading)[: T.P0_BITS],
            curve=Cat(Const(0, _CURVE), power.c0) + power.c2 * square[12:],
            exponent=Mux(exponent < 0, 0, Mux(exponent > RAW_INF, RAW_INF, exponent))[:EXP_BITS],
            shift=Mux(exponent < 0, saturate5((-exponent)[:_UNIT]), 0),
            sign=s6["negate"] ^ (p[-1] & ~s6["exp2"]),
        )

        # Stage 8: finish 2**f, which is in [1, 2); shift down into the subnormal range, round.
        f = (s7["wide"] + s7["curve"])[_CURVE : _CURVE + T.FIXED]
        normal = Signal(T.P0_BITS)
        cut = T.P0_BITS - RAW_BITS + 1
        down = Signal(RAW_BITS)
        m.d.comb += [
            normal.eq(Mux(s7["exp2"], Cat(Const(0, T.P0_BITS - 1 - T.FIXED), f, 1), s7["wide"])),
            down.eq(shift_right_sticky(m, Cat(normal[:cut] != 0, normal[cut:]), s7["shift"])),
        ]
        with m.If(self.en):
            m.d.sync += self.o.eq(
                pack_fp32(m, sign=s7["sign"], exponent=s7["exponent"], raw=down, nan=s7["nan"])
            )
        return m


class ScalarLane(wiring.Component):
    """``function(x * scale + bias)``.

    Members
    -------
    en : In(1), low freezes every stage
    control : In(`tables.CONTROL`), constant while its operands are in the pipeline
    turning : In(`Turning`), as that of `FunctionUnit`; LANE_LATENCY - FUNCTION_LATENCY enabled
        cycles behind the operand
    row, entry, index, segment, weight, piece : of one user of `FunctionTables`, which has the same
        `en`
    x, scale, bias : In(32), FP32, sampled together in each enabled cycle
    o : Out(32), FP32, registered

    Latency `LANE_LATENCY` enabled cycles, one result per enabled cycle; of functions with `turn`
    both `TURN_CYCLES` more, as those of `FunctionUnit`.
    """

    en: In(1)
    control: In(T.CONTROL)
    x: In(32)
    scale: In(32)
    bias: In(32)
    row: Out(range(T.DIRECTORY))
    entry: In(T.ENTRY)
    index: Out(range(T.SEGMENTS))
    segment: In(T.SEGMENT)
    turning: In(Turning)
    weight: Out(range(len(T.TWO_OVER_PI)))
    piece: In(T.PIECE)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.mul = mul = Once(Fp32Mul(), "fp32_mul")
        m.submodules.add = add = Once(Fp32Add(short=True), "fp32_add_short")
        m.submodules.function = function = FunctionUnit()
        bias = self.bias
        for number in range(FP32_LATENCY):  # as long as the product takes
            delayed = Signal(32, name=f"bias_{number + 1}", reset_less=True)
            with m.If(self.en):
                m.d.sync += delayed.eq(bias)
            bias = delayed
        m.d.comb += [
            mul.en.eq(self.en),
            mul.a.eq(self.x),
            mul.b.eq(self.scale),
            add.en.eq(self.en),
            add.a.eq(mul.o),
            add.b.eq(bias),
            function.en.eq(self.en),
            function.control.eq(self.control),
            function.y.eq(add.o),
            self.row.eq(function.row),
            function.entry.eq(self.entry),
            self.index.eq(function.index),
            function.segment.eq(self.segment),
            function.turning.eq(self.turning),
            self.weight.eq(function.weight),
            function.piece.eq(self.piece),
            self.o.eq(function.o),
        ]
        return m
