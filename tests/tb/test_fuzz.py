"""A slice of the fuzzer: random programs on the gates and in the golden model; `make fuzz` runs
thousands."""

from __future__ import annotations

import collections
import dataclasses
import random

import numpy as np
import pytest
from systolith.golden.checker import check
from systolith.golden.device import GoldenDevice
from systolith_hdl.config import CoreConfig, get_config
from systolith_hdl.isa import (
    FIELDS,
    SPECS,
    AluOp,
    Function,
    Opcode,
    Rounding,
    decode,
    encode,
    engine_kind,
    operation_enums,
)
from systolith_tb.configs import NANO_FP8
from systolith_tb.fuzz import (
    CAUSES,
    Case,
    Loop,
    Pair,
    describe,
    draw_case,
    fuzz,
    illegal_program,
    program,
    shrink,
    unroll,
)

NANO = get_config("nano")
#: Without divider, TOP, random words and loops: none is drawn for legal programs.
TINY = get_config("tiny")


@pytest.mark.parametrize(
    ("config", "first", "latency", "rate"),
    [
        (NANO, 0, 20, None),
        (NANO, 1000, 1, 64),
        (NANO_FP8, 2000, 100, None),
        (NANO_FP8, 3000, 7, 3),
        (TINY, 4000, 3, 8),
    ],
)
def test_random_programs(config: CoreConfig, first: int, latency: int, rate: int | None) -> None:
    """Everything equal after legal programs, the same fault of illegal ones."""
    pair = Pair.of_gates(config, dram_latency=latency, dram_bytes_per_cycle=rate)
    tally = fuzz(pair, range(first, first + 60))
    pair.close()
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.programs == 75 and tally.cycles > 0


def test_everything_is_drawn() -> None:
    """Every opcode, operation, type, space and rounding occurs, and every fault that can."""
    cases = [draw_case(NANO_FP8, seed) for seed in range(250)]
    seen: dict[str, set[int]] = collections.defaultdict(set)
    for case in cases:
        for _, opcode, fields in case.instructions():
            seen["opcode"].add(opcode.value)
            for name, kind in operation_enums(opcode).items():
                seen[kind.__name__].add(fields[name])
            for name, value in fields.items():
                if name.endswith((".dtype", ".space")) or name in ("dram_dtype", "rounding"):
                    seen[f"{opcode.name}.{name}"].add(value)
    streams = [program(case).instructions() for case in cases]
    everything = [decode(raw) for stream in streams for _, _, raw in stream]
    assert {opcode for opcode, _ in everything} == set(SPECS)
    for kind in (AluOp, Function):
        assert seen[kind.__name__] == {member.value for member in kind}
    for opcode, spec in SPECS.items():
        for operand, (spaces, types) in spec.operands.items():
            assert seen[f"{opcode.name}.{operand}.dtype"] == {t.value for t in types}
            assert seen[f"{opcode.name}.{operand}.space"] == {s.value for s in spaces}
        if "rounding" in FIELDS[opcode]:
            assert seen[f"{opcode.name}.rounding"] == {r.value for r in Rounding}

    waits = collections.Counter(
        fields[f"wait.{slot}.mode"] for _, fields in everything for slot in range(3)
    )
    assert min(waits[mode] for mode in (0, 1, 2)) > 100


def test_data_end_loops() -> None:
    """Of the loops that data may end, some do all their iterations and some do not."""
    rig = Pair(NANO, GoldenDevice(NANO, dram_bytes=1 << 20)).golden
    found: collections.Counter[bool] = collections.Counter()
    for seed in range(300):
        case = draw_case(NANO, seed, length=12)
        for loop in case.elements:
            if isinstance(loop, Loop) and loop.conditional and loop.count > 2:
                executed = [
                    rig.run(program(dataclasses.replace(case, elements=(variant,))), seed)
                    .state["instructions"]
                    .sum()
                    for variant in (loop, dataclasses.replace(loop, conditional=False))
                ]
                found[bool(executed[0] < executed[1])] += 1
    assert min(found[True], found[False]) > 5, found


def test_every_fault_is_met() -> None:
    """Illegal programs fault, and all causes are among theirs."""
    device = Pair(NANO, GoldenDevice(NANO, dram_bytes=1 << 20))
    met = set()
    for seed in range(250):
        found, cause = device.illegal(draw_case(NANO, seed, length=12))
        assert found is None, f"seed {seed}: {found}"
        met.add(cause)
    assert met == {cause.name for cause in CAUSES}


def test_cases_repeat() -> None:
    """A seed is a case, whatever was drawn before it."""
    first, broken = draw_case(NANO, 5), illegal_program(draw_case(NANO, 5))
    random.random()
    assert draw_case(NANO, 5) == first
    assert program(first).streams == program(draw_case(NANO, 5)).streams
    assert illegal_program(first).streams == broken.streams
    for element in first.elements:
        for engine, opcode, fields in unroll(element):
            assert check(encode(opcode, fields), engine_kind(engine), NANO) is None


def test_a_difference_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that gets one operation wrong: what is left of the case is one instruction."""
    mine = GoldenDevice(NANO, dram_bytes=1 << 20)
    pair = Pair(NANO, mine)
    prepare = mine.core._prepare

    def wrong(engine: int, raw: bytes) -> object:
        prepared = prepare(engine, raw)
        opcode, fields = decode(raw)
        if opcode is Opcode.TENSOR_SCALAR and fields["op1"] == AluOp.SUB.value:
            return prepare(engine, encode(opcode, {**fields, "op1": AluOp.RSUB}))
        return prepared

    monkeypatch.setattr(mine.core, "_prepare", wrong)

    def fails(case: Case) -> bool:
        return pair.legal(case) is not None

    cases = (draw_case(NANO, seed, length=12) for seed in range(1000))
    case = next(filter(fails, cases))
    least = shrink(case, fails)
    assert [i.opcode for i in least.instructions()] == [Opcode.TENSOR_SCALAR]
    (only,) = least.instructions()
    assert only.fields["op1"] == AluOp.SUB.value
    assert np.prod([only.fields[f"counts.{d}"] for d in range(4)]) == 1 == only.fields["lanes"]
    text = describe(least, pair.legal(least) or "")
    assert "op1=SUB" in text and f"seed {case.seed}" in text
    assert not fails(dataclasses.replace(least, elements=()))


def test_a_race_is_found() -> None:
    """A program whose waits are gone: the golden model says so."""
    pair = Pair(NANO, GoldenDevice(NANO, dram_bytes=1 << 20))
    races = 0
    for seed in range(10):
        case = draw_case(NANO, seed)
        made = program(case)
        for engine, index, _ in made.instructions():
            none = {
                f"wait.{slot}.{name}": 0 for slot in range(3) for name in ("sem", "mode", "value")
            }
            made = made.with_fields(engine, index, none)
        found, _ = pair.compare(made, seed)
        races += found is not None and "no semaphore orders" in found
    assert races > 5
