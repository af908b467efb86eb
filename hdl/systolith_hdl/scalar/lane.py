"""One lane of the scalar engine: multiply, add, evaluate the function."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from ..arith import FP32_LATENCY, Fp32Add, Fp32Mul, leading_zeros, pack_fp32
from ..arith.rounding import EXP_BITS, RAW_BITS, RAW_INF, saturate5, shift_right_sticky
from ..emit import Once
from . import tables as T

#: Enabled cycles from y to the function's result.
FUNCTION_LATENCY = 10
#: Enabled cycles from a lane's operand to its result.
LANE_LATENCY = 2 * FP32_LATENCY + FUNCTION_LATENCY

_M = T.MANTISSA
_INDEX = T.MAX_COUNT_LOG2
_EXP2_LOW = T.FIXED - T.EXP2_SEGMENTS_LOG2  # bits of f below the segment number
_UNIT = 11  # exponents: 9 bits of the table's, plus K (-149..149), plus p0's integer part


class FunctionUnit(wiring.Component):
    """Evaluates one of the tabulated functions: the steps of `tables` as a pipeline.

    Members
    -------
    en : In(1), low freezes every stage
    control : In(`tables.CONTROL`), the function; constant while its operands are in the pipeline
    y : In(32), FP32
    o : Out(32), FP32, registered

    Latency `FUNCTION_LATENCY` enabled cycles, one result per enabled cycle. The tables are memories
    with synchronous read: `tables.SEGMENTS` times two words of 64 bits, a directory and a small
    table of powers of two.
    """

    en: In(1)
    control: In(T.CONTROL)
    y: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        content = T.tables()
        control = self.control

        def rom(name: str, width: int, depth: int, words: list[int]) -> memory.ReadPort:
            cells: memory.Memory = memory.Memory(shape=unsigned(width), depth=depth, init=words)
            m.submodules[name] = cells
            port = cells.read_port()
            m.d.comb += port.en.eq(self.en)
            return port

        directory = rom("directory", T.ENTRY.size, T.DIRECTORY, list(content.directory))
        low_words = [word & (1 << 64) - 1 for word in content.segments]
        high_words = [word >> 64 for word in content.segments]
        segments_low = rom("segments_low", 64, T.SEGMENTS, low_words)
        segments_high = rom("segments_high", 64, T.SEGMENTS, high_words)
        powers = rom("powers", T.EXP2_ENTRY.size, 1 << T.EXP2_SEGMENTS_LOG2, list(content.exp2))

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

        # Stage 1: unpack; the exact distance from the centre.
        biased, fraction, sign = self.y[_M:31], self.y[:_M], self.y[31]
        subnormal, extreme = Signal(), Signal()
        in_center = Signal(2)
        centered, below = Signal(), Signal()
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
        ]
        plain = Cat(0, fraction, ~subnormal)
        s1 = stage(1, magnitude=_M + 2, exponent=signed(9), page=2, sign=1, extreme=1, nan=1)
        step(
            {},
            s1,
            magnitude=Mux(centered, Mux(below, control.center - operand, distance), plain),
            exponent=Mux(centered, 0, Cat(biased[0] | subnormal, biased[1:]) - 127),
            page=Cat(Mux(centered, below, sign), centered),
            sign=sign,
            extreme=extreme,
            nan=extreme & (fraction != 0),
        )

        # Stage 2: normalise.
        zeros = Signal(5)
        shifted = Signal(_M + 2)
        m.d.comb += [
            zeros.eq(leading_zeros(m, s1["magnitude"])),
            shifted.eq(s1["magnitude"] << zeros),
        ]
        s2 = stage(2, m=_M, k=signed(9), zero=1, page=2, sign=1, extreme=1, nan=1)
        step(
            s1,
            s2,
            m=shifted[1 : _M + 1],
            k=s1["exponent"] - zeros,
            zero=~shifted[-1],
        )

        # Stage 3: directory.
        k = s2["k"]
        column = Signal(signed(9))
        offset = Signal(signed(10))
        row = Signal(7)
        m.d.comb += [
            column.eq(Mux(control.parity, k[0], k)),
            offset.eq(column - control.low),
        ]
        with m.If(s2["extreme"]):
            m.d.comb += row.eq(control.span + (T.ROW_LOW + 1))
        with m.Elif(s2["zero"]):
            m.d.comb += row.eq(T.ROW_ZERO)
        with m.Elif(offset < 0):
            m.d.comb += row.eq(T.ROW_UNDER)
        with m.Elif(offset >= control.span):
            m.d.comb += row.eq(control.span + T.ROW_LOW)
        with m.Else():
            m.d.comb += row.eq(offset[:6] + T.ROW_LOW)
        m.d.comb += directory.addr.eq(
            Mux(s2["nan"], T.NAN_ADDRESS, control.pages[s2["page"]] + row)
        )
        s3 = stage(3, m=_M, k=signed(9), sign=1)
        step(s2, s3)

        # Stage 4: segment.
        entry = data.View(T.ENTRY, directory.data)
        split = Signal(_M + _INDEX)
        address = Signal(len(segments_low.addr))
        m.d.comb += [
            split.eq(s3["m"] << entry.log2_count),
            address.eq(entry.base + split[_M:]),
            segments_low.addr.eq(address),
            segments_high.addr.eq(address),
        ]
        s4 = stage(4, t=_M, k=signed(9), sign=1)
        step(s3, s4, t=split[:_M])

        # Stages 5 to 7: Horner.
        segment = data.View(T.SEGMENT, Cat(segments_low.data, segments_high.data))
        k = s4["k"]
        scaling = Signal(signed(9))
        with m.Switch(control.scaling):
            with m.Case(T.Scaling.PLUS):
                m.d.comb += scaling.eq(k)
            with m.Case(T.Scaling.MINUS):
                m.d.comb += scaling.eq(-k)
            with m.Case(T.Scaling.HALF):
                m.d.comb += scaling.eq(k >> 1)
            with m.Case(T.Scaling.MINUS_HALF):
                m.d.comb += scaling.eq(-(k >> 1))
        # An FPGA's multiplier takes 18 bits with the sign: the top one of these 18 is added apart.
        c3, t18 = segment.c3, s4["t"][5:]
        cubic = c3 * t18[:17] + (Mux(t18[17], c3, 0) << 17)
        flags = {"exp2": 1, "negate": 1, "nan": 1, "unit": signed(_UNIT)}
        s5 = stage(
            5,
            t=_M,
            p=signed(25),
            c1=signed(T.P0_BITS),
            c0=signed(T.P0_BITS),
            log=signed(T.P0_BITS),
            **flags,
        )
        step(
            s4,
            s5,
            p=segment.c2 + (cubic >> 18),
            c1=segment.c1,
            c0=segment.c0,
            log=Mux(segment.log, k * Const(T.LN2), 0),
            exp2=segment.exp2,
            negate=segment.negate ^ (s4["sign"] & control.odd),
            nan=segment.nan,
            unit=segment.exponent + Mux(segment.relative, scaling, 0),
        )
        s6 = stage(6, t=_M, p=signed(T.P0_BITS), c0=signed(T.P0_BITS), **flags)
        step(
            s5,
            s6,
            p=s5["c1"] + ((s5["p"] * s5["t"]) >> _M),
            c0=s5["c0"] + s5["log"],
        )
        s7 = stage(7, p=signed(T.P0_BITS), **flags)
        step(s6, s7, p=s6["c0"] + ((s6["p"] * s6["t"]) >> _M))

        # Stage 8: absolute value; or look up 2**f.
        p = s7["p"]
        negative = p[-1] & ~s7["exp2"]
        u = p[:_EXP2_LOW]
        square = u[8:] * u[8:]
        m.d.comb += powers.addr.eq(p[_EXP2_LOW : T.FIXED])
        s8 = stage(
            8,
            magnitude=T.P0_BITS,
            u=_EXP2_LOW,
            square=14,
            exp2=1,
            sign=1,
            nan=1,
            unit=signed(_UNIT),
        )
        step(
            s7,
            s8,
            magnitude=Mux(p[-1], -p, p)[: T.P0_BITS],
            u=u,
            square=square[12:],
            sign=s7["negate"] ^ negative,
            # from here on: the biased exponent of the magnitude's top bit, or of the power
            unit=s7["unit"]
            + Mux(s7["exp2"], 127 + (p >> T.FIXED), Const(127 + T.P0_BITS - 1, signed(_UNIT))),
        )

        # Stage 9: normalise; or finish 2**f, which is in [1, 2).
        power = data.View(T.EXP2_ENTRY, powers.data)
        f = Signal(T.FIXED)
        wide = s8["magnitude"]
        zeros = Signal(6)
        shifted = Signal(T.P0_BITS)
        normal = Signal(T.P0_BITS)
        unit = Signal(signed(_UNIT))
        m.d.comb += [
            f.eq(power.c0 + ((power.c1 * s8["u"] + ((power.c2 * s8["square"]) << 7)) >> _EXP2_LOW)),
            zeros.eq(_zeros(m, wide)),
            shifted.eq(wide << zeros),
            normal.eq(Mux(s8["exp2"], Cat(Const(0, T.P0_BITS - 1 - T.FIXED), f, 1), shifted)),
            unit.eq(s8["unit"] - Mux(s8["exp2"], 0, zeros)),
        ]
        s9 = stage(9, raw=RAW_BITS, exponent=EXP_BITS, shift=5, sign=1, nan=1)
        cut = T.P0_BITS - RAW_BITS + 1
        step(
            s8,
            s9,
            raw=Cat(normal[:cut] != 0, normal[cut:]),
            exponent=Mux(unit <= 0, 0, Mux(unit > RAW_INF, RAW_INF, unit - 1))[:EXP_BITS],
            shift=Mux(unit <= 0, saturate5((1 - unit)[:_UNIT]), 0),
        )

        # Stage 10: shift down into the subnormal range, round.
        down = Signal(RAW_BITS)
        m.d.comb += down.eq(shift_right_sticky(m, s9["raw"], s9["shift"]))
        with m.If(self.en):
            m.d.sync += self.o.eq(
                pack_fp32(m, sign=s9["sign"], exponent=s9["exponent"], raw=down, nan=s9["nan"])
            )
        return m


def _zeros(m: Module, value: Value) -> Value:
    """Leading zeros of 36 bits; 36 for zero. `leading_zeros` does 31: the top five come first."""
    top = value[31:]
    count: Value = leading_zeros(m, value[:31]) + 5
    for zeros in reversed(range(5)):
        count = Mux(top[4 - zeros], zeros, count)
    return count


class ScalarLane(wiring.Component):
    """``function(x * scale + bias)``.

    Members
    -------
    en : In(1), low freezes every stage
    control : In(`tables.CONTROL`), constant while its operands are in the pipeline
    x, scale, bias : In(32), FP32, sampled together in each enabled cycle
    o : Out(32), FP32, registered

    Latency `LANE_LATENCY` enabled cycles, one result per enabled cycle.
    """

    en: In(1)
    control: In(T.CONTROL)
    x: In(32)
    scale: In(32)
    bias: In(32)
    o: Out(32)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.mul = mul = Once(Fp32Mul(), "fp32_mul")
        m.submodules.add = add = Once(Fp32Add(), "fp32_add")
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
            self.o.eq(function.o),
        ]
        return m
