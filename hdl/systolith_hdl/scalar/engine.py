"""The scalar engine."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from ..access import elementwise_ports, pattern, place_streamers
from ..arith import DITHER_LATENCY, Dither, engine_key
from ..config import CoreConfig
from ..emit import Once, side_by_side
from ..formats import DType
from ..isa import SPECS, Opcode, Rounding
from ..ports import IssuePort, split_words
from . import tables as T
from .lane import LANE_LATENCY, ScalarLane

#: Cycles an instruction takes from being taken to `done`, beyond one per column, when no memory
#: port stalls: 4 to the first column, the lanes, 1 more to write.
FIXED_CYCLES = 4 + LANE_LATENCY + 1

# The first result finds its random words: stochastic rounding costs no cycle.
assert DITHER_LATENCY <= 4 + LANE_LATENCY


class ScalarEngine(wiring.Component):
    """Executes ACTIVATE and ACTIVATE_TENSOR_BIAS on N lanes.

    ``dst = function(src0 * imm0 + imm1)`` or ``function(src0 * imm0 + src1)``: a multiplication
    and an addition in FP32, each rounded, then the function, then rounding to the type of dst.

    Parameters
    ----------
    number : of the engine in `config.engines`, of which the random words of stochastic rounding
        depend

    Members
    -------
    issue : In(IssuePort)
    src0_sbuf, src0_psum, src1_sbuf, src1_psum : Out(ReadPort)
    dst_sbuf, dst_psum : Out(WritePort)

    One column per cycle, whatever the function and with one source or two. An instruction of n
    columns is done ``n + FIXED_CYCLES`` cycles after it is taken when no port stalls. The next is
    taken in the cycle of `done`, when all writes are accepted.
    """

    def __init__(self, config: CoreConfig, *, number: int) -> None:
        self._config = config
        self._number = number
        super().__init__({"issue": In(IssuePort()), **elementwise_ports(config)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        lanes = config.lanes

        src0, src1, dst = place_streamers(m, self, config)

        # -- Issue: the streamers start in the cycle the instruction is taken.
        incoming = self.issue.instruction
        tensor = data.View(SPECS[Opcode.ACTIVATE_TENSOR_BIAS].layout, incoming.payload)
        scalar = data.View(SPECS[Opcode.ACTIVATE].layout, incoming.payload)
        take = Signal()
        active = Signal()
        has_src1 = Signal()
        m.d.comb += [
            incoming.ready.eq(~active | dst.done),
            take.eq(incoming.valid & incoming.ready),
            has_src1.eq(tensor.header.opcode == Opcode.ACTIVATE_TENSOR_BIAS),
            self.issue.busy.eq(active),
            self.issue.done.eq(dst.done),
            src0.start.payload.eq(pattern(tensor.body.src0, tensor.body.counts)),
            src0.start.valid.eq(take),
            src1.start.payload.eq(pattern(tensor.body.src1, tensor.body.counts)),
            src1.start.valid.eq(take & has_src1),
            dst.start.payload.eq(pattern(tensor.body.dst, tensor.body.counts)),
            dst.start.valid.eq(take),
        ]

        # -- What the lanes need of the running instruction.
        control = Signal(T.CONTROL)
        scale, bias = Signal(32), Signal(32)
        two_sources, dtype = Signal(), Signal(DType)
        mask = Signal(lanes)
        with m.If(take):
            m.d.sync += [
                active.eq(1),
                scale.eq(scalar.body.imm0),
                bias.eq(scalar.body.imm1),
                two_sources.eq(has_src1),
                dtype.eq(tensor.body.dst.dtype),
                mask.eq(Cat(Const(lane, 8) < tensor.header.lanes for lane in range(lanes))),
            ]
            with m.Switch(tensor.header.op0):
                for function, word in T.tables().controls.items():
                    with m.Case(function.value):
                        m.d.sync += control.eq(Const(word, T.CONTROL.size))
        with m.Elif(dst.done):
            m.d.sync += active.eq(0)

        # -- Random words for the results, one column after the other.
        m.submodules.dither = dither = Once(Dither(lanes=lanes), f"dither_{lanes}")
        stochastic = Signal()
        wanted = (tensor.header.rounding == Rounding.STOCHASTIC) & (
            tensor.body.dst.dtype != DType.FP32
        )
        with m.If(take):
            m.d.sync += stochastic.eq(wanted)
        m.d.comb += [
            dither.start.eq(take & wanted),
            dither.seed.eq(self.issue.seed),
            dither.counter.eq(self.issue.counter),
            dither.key.eq(engine_key(self._number)),
            dither.take.eq(dst.columns.valid & dst.columns.ready & stochastic),
        ]

        # -- Lanes: the whole pipeline stands still while the write side is full.
        enable, enter = Signal(), Signal()
        valid = Signal(LANE_LATENCY)
        m.d.comb += [
            # An idle engine stands still: nothing is in its pipelines.
            enable.eq(active & (~valid[-1] | dst.columns.ready)),
            enter.eq(enable & src0.columns.valid & (src1.columns.valid | ~two_sources)),
            src0.columns.ready.eq(enter),
            src1.columns.ready.eq(enter & two_sources),
            dst.columns.valid.eq(valid[-1]),
            dst.columns.payload.mask.eq(mask),
        ]
        with m.If(enable):
            m.d.sync += valid.eq(Cat(enter, valid))
        random = split_words(m, dither.words, name="random")
        m.submodules.lanes = cells = side_by_side(
            ScalarLane(), "scalar_lane", lanes,
            shared=("en", "control", "dtype", "stochastic", "scale"),
        )  # fmt: skip
        m.d.comb += [
            cells.en.eq(enable),
            cells.control.eq(control),
            cells.dtype.eq(dtype),
            cells.stochastic.eq(stochastic),
            cells.scale.eq(scale),
        ]
        for lane in range(lanes):
            m.d.comb += [
                cells.random[lane].eq(random[lane]),
                cells.x[lane].eq(src0.columns.payload.data[lane]),
                cells.bias[lane].eq(Mux(two_sources, src1.columns.payload.data[lane], bias)),
                dst.columns.payload.data[lane].eq(cells.o[lane]),
            ]
        return m
