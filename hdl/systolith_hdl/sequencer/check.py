"""The instruction checker: an instruction that faults does nothing."""

import functools

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..config import CoreConfig
from ..formats import DType
from ..isa import (
    DMA_TYPES,
    FIELDS,
    INSTRUCTION_BITS,
    SPECS,
    USED_BITS,
    DmaBody,
    EngineKind,
    FaultCause,
    Header,
    IndexedBody,
    Opcode,
    Operand,
    Rounding,
    ScalarTensorTensorBody,
    Space,
    TensorBody,
    WaitMode,
    field_of,
    legal_operations,
    operation_enums,
    operation_types,
)

_BODY = 128
#: Every body has its counts first and its local operands in these slots after them.
_OPERAND_SLOTS = {"dst": 0, "local": 0, "src0": 1, "src1": 2}
_SLOTS = 3
#: An operand of one column, without strides, is last in the body of some vector instructions.
_SCALAR_SLOT = 3
#: The DMA queues' check has the vector of indices in place of an operand that they do not have.
_INDEX_SLOT = 1


class Fault(data.Struct):
    """Why an instruction, and so its engine, stopped."""

    cause: FaultCause
    address: signed(64)


def _one_of(value: Value, codes: object) -> Value:
    return Cat(value == code for code in sorted(codes)).any()  # type: ignore[call-overload]


def _slot(operand: str) -> int:
    return _SCALAR_SLOT if operand == "scalar" else _OPERAND_SLOTS[operand]


class Check(wiring.Component):
    """Checks the instructions of one engine, in the order that `FaultCause` documents.

    Members
    -------
    instruction : In(stream of 512 bits)
    checked : Out(stream of {word, fault}); fault.cause is NONE for a legal instruction
    idle : Out(1), holds no instruction
    moves : Out(1), some register may change

    Latency: 2 cycles, and ``2 + d`` for each local operand and vector of indices, whose bounds are
    worked out with one multiplier, d being the dimensions of more than one element; the next
    instruction is checked while those before it execute.
    """

    def __init__(self, config: CoreConfig, kind: EngineKind) -> None:
        self._config = config
        self._kind = kind
        self._slots = _SLOTS + (kind is EngineKind.VECTOR)
        super().__init__(
            {
                "instruction": In(stream.Signature(unsigned(INSTRUCTION_BITS))),
                "checked": Out(
                    stream.Signature(
                        data.StructLayout({"word": unsigned(INSTRUCTION_BITS), "fault": Fault})
                    )
                ),
                "idle": Out(1),
                "moves": Out(1),
            }
        )

    def _legality(self, m: Module, word: Value) -> tuple[Value, Value]:
        """Returns the cause that needs no arithmetic (or NONE) and the operand slots in use."""
        config = self._config
        header = data.View(Header, word[:_BODY])
        tensor = data.View(TensorBody, word[_BODY:])
        operands = self._operands(word)

        opcodes = {
            opcode: spec
            for opcode, spec in SPECS.items()
            if spec.kind in (None, self._kind) and spec.exists(config)
        }
        # Bits that the same opcodes reserve are looked at together, not once for each of these.
        together: dict[frozenset[Opcode], list[int]] = {}
        for bit in range(INSTRUCTION_BITS):
            users = frozenset(o for o in opcodes if not USED_BITS[o] >> bit & 1)
            together.setdefault(users, []).append(bit)
        code = word[:8]
        reserved = Signal()
        m.d.comb += reserved.eq(
            Cat(
                Cat(word[bit] for bit in bits).any() & _one_of(code, {o.value for o in users})
                for users, bits in together.items()
                if users
            ).any()
        )

        cause = Signal(FaultCause)
        slots = Signal(self._slots)
        with m.Switch(code):
            for opcode, spec in opcodes.items():
                with m.Case(opcode.value):
                    last_mode = WaitMode.ACQUIRE.value
                    bad_operation = [w.mode.as_value() > last_mode for w in header.wait]
                    for name in operation_enums(opcode):
                        code = getattr(header, name)
                        bad_operation.append(~_one_of(code, legal_operations(opcode, name, config)))
                    if "rounding" in spec.header and not config.random:
                        bad_operation.append(header.rounding == Rounding.STOCHASTIC)
                    bad_type, bad_space = [], []
                    for name, (spaces, types) in spec.operands.items():
                        operand = operands[_slot(name)]
                        bad_type.append(
                            ~_one_of(operand.dtype.as_value(), {t.value for t in types})
                        )
                        bad_space.append(
                            ~_one_of(operand.space.as_value(), {s.value for s in spaces})
                        )
                    if "dram_dtype" in FIELDS[opcode]:
                        dma = data.View(DmaBody, word[_BODY:])
                        allowed = {t.value for t in DMA_TYPES}
                        bad_type.append(~_one_of(dma.dram_dtype.as_value(), allowed))
                    for name in sorted(spec.alike):
                        operand = operands[_slot(name)]
                        src0 = operands[_OPERAND_SLOTS["src0"]]
                        bad_type.append(operand.dtype.as_value() != src0.dtype.as_value())
                    for operation, types in operation_types(opcode, config).items():
                        src0 = operands[_slot("src0")]
                        legal = _one_of(src0.dtype.as_value(), {t.value for t in types})
                        bad_type.append((header.op1 == operation) & ~legal)
                    if opcode is Opcode.MATMUL:
                        # Only sums of integers are integers.
                        dst, src0 = (operands[_OPERAND_SLOTS[name]] for name in ("dst", "src0"))
                        bad_type.append((dst.dtype == DType.INT32) & (src0.dtype != DType.INT8))
                    bad_count = []
                    if spec.operands:
                        bad_count += [count == 0 for count in tensor.counts]
                    if "lanes" in spec.header:
                        bad_count += [header.lanes == 0, header.lanes > config.lanes]
                    if "columns" in FIELDS[opcode]:
                        columns = data.View(spec.body, word[_BODY:]).columns
                        bad_count += [columns == 0, columns > config.lanes]
                    field = functools.partial(field_of, word, opcode)
                    for name, limit in spec.limits.items():
                        least, most = limit(field, config)
                        bad_count += [field(name) < least, field(name) > most]
                    signal = header.signal
                    bad_semaphore = [
                        (signal.amount != 0)
                        & ((signal.sem >= config.semaphores) | (signal.chip != 0)),
                        *(
                            (w.mode != WaitMode.NONE) & (w.sem >= config.semaphores)
                            for w in header.wait
                        ),
                    ]
                    checks = [
                        (FaultCause.RESERVED_BITS, reserved),
                        (FaultCause.ILLEGAL_OPERATION, Cat(bad_operation).any()),
                        (FaultCause.BAD_TYPE, Cat(bad_type).any()),
                        (FaultCause.BAD_SPACE, Cat(bad_space).any()),
                        (FaultCause.BAD_COUNT, Cat(bad_count).any()),
                        (FaultCause.BAD_SEMAPHORE, Cat(bad_semaphore).any()),
                    ]
                    m.d.comb += cause.eq(FaultCause.NONE)
                    for found, failed in reversed(checks):
                        with m.If(failed):
                            m.d.comb += cause.eq(found)
                    used = sum(1 << _slot(name) for name in spec.operands)
                    used |= spec.indexed << _INDEX_SLOT
                    m.d.comb += slots.eq(used)
            with m.Default():
                m.d.comb += cause.eq(FaultCause.ILLEGAL_OPCODE)
        return cause, slots

    def _operands(self, word: Value) -> list[data.View]:
        size = Shape.cast(Operand).width
        first = _BODY + 64
        found = [
            data.View(Operand, word[first + slot * size : first + (slot + 1) * size])
            for slot in range(_SLOTS)
        ]
        if self._slots > _SCALAR_SLOT:
            scalar = data.View(ScalarTensorTensorBody, word[_BODY:]).scalar
            strides = Const(0, size - len(scalar.as_value()))
            whole = Cat(scalar.base, strides, scalar.space, scalar.dtype, scalar.reserved)
            found.append(data.View(Operand, whole))
        return found

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self._config
        word = Signal(INSTRUCTION_BITS, reset_less=True)
        fault = Signal(Fault, reset_less=True)
        cause, slots = self._legality(m, word)
        counts = list(data.View(TensorBody, word[_BODY:]).counts)

        slot = Signal(range(self._slots))
        first = Signal()  # cycle of an operand
        todo = Signal(4)  # dimensions to multiply
        multiplied = Signal()  # `product` is to be added
        product = Signal(signed(33), reset_less=True)
        low = Signal(signed(40), reset_less=True)
        high = Signal(signed(40), reset_less=True)
        operand = Signal(Operand)
        indices = Signal()
        m.d.comb += indices.eq((self._kind is EngineKind.DMA) & (slot == _INDEX_SLOT))
        with m.Switch(slot):
            for index, view in enumerate(self._operands(word)):
                with m.Case(index):
                    m.d.comb += operand.eq(view)
        with m.If(indices):
            vector = data.View(IndexedBody, word[_BODY:]).index
            m.d.comb += [operand.eq(0), operand.base.eq(vector.base), operand.strides[0].eq(1)]
        limit = Mux(operand.space == Space.SBUF, config.sbuf_depth, config.psum_depth)
        after = Signal(self._slots)  # operands still to check once this one is
        here = Const(1, self._slots) << slot
        m.d.comb += after.eq(slots & ~here & ~(here - 1))

        def goto_first(mask: Value) -> None:
            for index in reversed(range(self._slots)):
                with m.If(mask[index]):
                    m.d.sync += slot.eq(index)

        # An operand walks the counts, but for the innermost one of some. Where it lacks a stride,
        # that is zero, and so is what it reaches.
        inner = Signal(16)
        other = Signal()  # an operand of this instruction walks another one
        m.d.comb += inner.eq(counts[3])
        with m.Switch(word[:8]):
            for opcode, spec in SPECS.items():
                if not spec.inner or spec.kind is not self._kind or not spec.exists(config):
                    continue
                field = functools.partial(field_of, word, opcode)
                with m.Case(opcode.value):
                    m.d.comb += other.eq(1)
                    for name, walks in spec.inner.items():
                        with m.If(slot == _slot(name)):
                            m.d.comb += inner.eq(walks(field))
        long = Cat(*(count != 1 for count in counts[:3]), (counts[3] != 1) | other)
        stride = Signal(signed(16))
        steps = Signal(16)  # from the first to the last of a dimension
        for d in reversed(range(4)):
            with m.If(todo[d]):
                count = inner if d == 3 else counts[d]
                m.d.comb += [stride.eq(operand.strides[d]), steps.eq(count - 1)]
                if d == 0:
                    # N indices lie in a column.
                    with m.If(indices):
                        m.d.comb += steps.eq((counts[0] - 1) >> config.lanes.bit_length() - 1)

        m.d.comb += self.moves.eq(1)
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += [
                    self.instruction.ready.eq(1),
                    self.idle.eq(1),
                    self.moves.eq(self.instruction.valid),
                ]
                with m.If(self.instruction.valid):
                    m.d.sync += [word.eq(self.instruction.payload), fault.eq(0)]
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += [fault.cause.eq(cause), first.eq(1), todo.eq(long)]
                goto_first(slots)
                with m.If((cause == FaultCause.NONE) & slots.any()):
                    m.next = "BOUNDS"
                with m.Else():
                    m.next = "GIVE"
            with m.State("BOUNDS"):
                # Each cycle multiplies one dimension and adds the product of the one before; the
                # last one compares.
                m.d.sync += [first.eq(0), todo.eq(todo & (todo - 1)), multiplied.eq(todo.any())]
                m.d.sync += product.eq(stride * steps)
                with m.If(first):
                    m.d.sync += [low.eq(operand.base), high.eq(operand.base)]
                with m.Elif(multiplied):
                    with m.If(product < 0):
                        m.d.sync += low.eq(low + product)
                    with m.Else():
                        m.d.sync += high.eq(high + product)
                with m.Else():
                    m.d.sync += [first.eq(1), todo.eq(long)]
                    goto_first(after)
                    with m.If((low < 0) | (high >= limit)):
                        m.d.sync += [
                            fault.cause.eq(FaultCause.OUT_OF_BOUNDS),
                            fault.address.eq(Mux(low < 0, low, high)),
                        ]
                        m.next = "GIVE"
                    with m.Elif(~after.any()):
                        m.next = "GIVE"
            with m.State("GIVE"):
                m.d.comb += [self.checked.valid.eq(1), self.moves.eq(self.checked.ready)]
                with m.If(self.checked.ready):
                    m.next = "TAKE"

        m.d.comb += [
            self.checked.payload.word.eq(word),
            self.checked.payload.fault.eq(fault),
        ]
        return m
