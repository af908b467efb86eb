"""Sizes of a Systolith core: one frozen dataclass, and the named presets.

Everything scales with ``lanes`` (N): partitions of SBUF and PSUM, rows and columns of the
systolic array, lanes of the vector and scalar engines.
"""

from __future__ import annotations

import dataclasses
import json
import zlib

MAX_AXI_BITS = 1024  #: widest data bus AXI4 allows
INSTRUCTION_BYTES = 64

#: Fields that say whether a core has something -> what that is, and what does instead.
LEFT_OUT = {
    "divider": (
        "the divider of the vector engine",
        "the scalar engine has RECIPROCAL, SQRT and RSQRT, to multiply by",
    ),
    "top": ("the instruction TOP", "REDUCE with MAX or MIN finds one word of each row"),
    "random": (
        "random words, for stochastic rounding, RANDOM and DROPOUT",
        "results can be rounded to nearest, and masks come from DRAM",
    ),
    "loops": ("the instructions LOOP, NEXT and TEST", "a loop of Python in the kernel is unrolled"),
}


def axi_bytes(lanes: int) -> int:
    """Bytes of one AXI data beat: 2 per lane, 8 at least, the bus's maximum at most."""
    return min(max(2 * lanes, 8), MAX_AXI_BITS // 8)


class ConfigError(ValueError):
    """A configuration is unknown or holds a value out of range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Sizes of one core.

    Parameters
    ----------
    name : preset name, informative only
    lanes : N; a power of two, 2 to 128
    sbuf_depth : 32-bit words of SBUF per partition; a multiple of 8
    psum_bank_depth : FP32 words per partition in each PSUM bank; a power of two
    dma_queues : DMA queues, each with a sequencer of its own; 1 to 4
    semaphores : counting semaphores of 16 bits each; 16 to 64
    fp8_rate : products that a PE adds up in a cycle when all operands are FP8: 1, or 2, which
        brings the instructions LOAD_STATIONARY_PAIR and MATMUL_PAIR
    banks : of SBUF and of PSUM, interleaved by the low address bits: 2, 4 or 8
    prefetch : instructions that each sequencer has fetched ahead: 1, or 4, with which the tensor
        engine also takes 8 of either class ahead, else 1
    outstanding : bursts that a DMA queue may have in flight: a power of two, 8 to 64
    divider : whether the vector engine has DIVIDE, MOD, RECIPROCAL, SQRT and RSQRT
    top : whether the vector engine has TOP
    random : whether there are random words: stochastic rounding, RANDOM and DROPOUT
    loops : whether the sequencers have LOOP, NEXT and TEST
    """

    name: str
    lanes: int
    sbuf_depth: int
    psum_bank_depth: int
    dma_queues: int = 2
    semaphores: int = 32
    fp8_rate: int = 1
    banks: int = 8
    prefetch: int = 4
    outstanding: int = 64
    divider: bool = True
    top: bool = True
    random: bool = True
    loops: bool = True

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, wanted: str) -> None:
            if not ok:
                raise ConfigError(
                    f"config {self.name!r}: {field} must be {wanted}, not {getattr(self, field)!r}"
                )

        require(self.lanes in (2, 4, 8, 16, 32, 64, 128), "lanes", "a power of two from 2 to 128")
        require(
            self.sbuf_depth % 8 == 0 and 64 <= self.sbuf_depth <= 1 << 20,
            "sbuf_depth",
            f"a multiple of 8 from 64 to {1 << 20}",
        )
        require(
            self.psum_bank_depth & (self.psum_bank_depth - 1) == 0
            and 8 <= self.psum_bank_depth <= 1 << 12,
            "psum_bank_depth",
            "a power of two from 8 to 4096",
        )
        require(1 <= self.dma_queues <= 4, "dma_queues", "1 to 4")
        require(16 <= self.semaphores <= 64, "semaphores", "16 to 64")
        require(self.fp8_rate in (1, 2), "fp8_rate", "1 or 2")
        require(self.banks in (2, 4, 8), "banks", "2, 4 or 8")
        require(self.prefetch in (1, 4), "prefetch", "1 or 4")
        require(self.outstanding in (8, 16, 32, 64), "outstanding", "a power of two from 8 to 64")
        for unit in LEFT_OUT:
            require(isinstance(getattr(self, unit), bool), unit, "True or False")

    @property
    def psum_depth(self) -> int:
        """FP32 words of PSUM per partition, all banks."""
        return self.banks * self.psum_bank_depth

    @property
    def axi_bytes(self) -> int:
        """Bytes of one AXI data beat: see `axi_bytes`."""
        return axi_bytes(self.lanes)

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the sequencers, in the order of their numbers."""
        return ("tensor", "vector", "scalar", *(f"dma{i}" for i in range(self.dma_queues)))

    @property
    def peak_macs_per_cycle(self) -> int:
        """MACs of the systolic array; with an `fp8_rate` of 2 those of pairs, of which other
        operands reach half."""
        return self.lanes * self.lanes * self.fp8_rate

    @property
    def hash(self) -> int:
        """32-bit identification of everything a program depends on (the name is left out)."""
        fields = dataclasses.asdict(self)
        del fields["name"]
        return zlib.crc32(json.dumps(fields, sort_keys=True).encode())

    def differences(self, other: dict[str, object]) -> list[str]:
        """Names the fields in which a stored config (``dataclasses.asdict``) differs from this."""
        mine = dataclasses.asdict(self)
        return [
            f"{field}: {other.get(field)!r} there, {mine[field]!r} here"
            for field in mine
            if field != "name" and other.get(field) != mine[field]
        ]

    def lacks(self, field: str, what: str) -> str:
        """What is wrong with `what`, which needs a field of `LEFT_OUT` that is False here."""
        name, instead = LEFT_OUT[field]
        return (
            f"config {self.name!r} is without {name} ({field}=False), which {what} needs; "
            f"{instead}, or take a config that has it"
        )


PRESETS: dict[str, CoreConfig] = {
    preset.name: preset
    for preset in (
        # An FPGA of 84,000 LUTs with DRAM and host bridge beside it: 16 KiB SBUF, 4 KiB PSUM.
        CoreConfig(
            name="tiny",
            lanes=2,
            sbuf_depth=2048,
            psum_bank_depth=256,
            dma_queues=1,
            semaphores=16,
            banks=2,
            prefetch=1,
            outstanding=16,
            divider=False,
            top=False,
            random=False,
            loops=False,
        ),
        # Unit tests: 32 KiB SBUF, 8 KiB PSUM.
        CoreConfig(name="nano", lanes=4, sbuf_depth=2048, psum_bank_depth=64),
        # The default: 128 KiB SBUF, 32 KiB PSUM.
        CoreConfig(name="small", lanes=8, sbuf_depth=4096, psum_bank_depth=128),
        # Benchmarks: Trainium's 192 KiB of SBUF and 16 KiB of PSUM per partition.
        CoreConfig(name="medium", lanes=16, sbuf_depth=49152, psum_bank_depth=512),
        CoreConfig(name="medium-fp8", lanes=16, sbuf_depth=49152, psum_bank_depth=512, fp8_rate=2),
        CoreConfig(name="large", lanes=32, sbuf_depth=49152, psum_bank_depth=512),
        # A NeuronCore-v3: 28 MiB of SBUF, 2 MiB of PSUM.
        CoreConfig(name="trn", lanes=128, sbuf_depth=57344, psum_bank_depth=512),
    )
}


def get_config(config: str | CoreConfig) -> CoreConfig:
    """Returns the preset of that name, or ``config`` itself if it is one already."""
    if isinstance(config, CoreConfig):
        return config
    if config not in PRESETS:
        raise ConfigError(f"unknown config {config!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[config]
