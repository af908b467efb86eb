"""What a design can be synthesized for: the device's cells and capacity, and the Yosys script."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping


class TargetError(ValueError):
    """A target is unknown, or lacks what was asked of it."""


class Kind(enum.StrEnum):
    """Classes that a device's cells are counted in."""

    lut = "LUTs"
    carry = "carry cells"
    ff = "flip-flops"
    lutram = "distributed RAM"
    bram = "block RAM"
    dsp = "DSPs"
    mux = "wide multiplexers"
    latch = "latches"
    other = "other"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A library cell: its class, the resources it takes of that class, and the LUTs it occupies."""

    kind: Kind
    units: float = 1
    luts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A device.

    Parameters
    ----------
    name, device : on the command line, and in full
    cells : library cell -> what it counts as
    capacity : how many units of a class the device has; LUTs: all that occupy LUTs together
    bram_bits : bits of one block RAM unit
    before, after : Yosys commands of synthesis for module `unit`, before and after LUT mapping
    mappers : alternatives of LUT mapping, the next is tried when one fails
    library : Yosys commands that load the cells as black boxes
    nextpnr : arguments that choose the device; empty if there is no place-and-route
    settings : nextpnr's settings that no argument sets, by their names in its sources
    simulation : Verilog files of the cells in Yosys' share folder
    """

    name: str
    device: str
    cells: Mapping[str, Cell]
    capacity: Mapping[Kind, int]
    bram_bits: int
    before: str
    after: str
    mappers: tuple[str, ...]
    library: str
    nextpnr: tuple[str, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    simulation: tuple[str, ...] = ()

    def cell(self, name: str) -> Cell:
        """Returns what a library cell counts as."""
        if name.startswith("$_DLATCH"):
            return Cell(Kind.latch)
        return self.cells.get(name, Cell(Kind.other))


_ECP5_CELLS = {
    "LUT4": Cell(Kind.lut, luts=1),
    "CCU2C": Cell(Kind.carry, luts=2),
    "TRELLIS_FF": Cell(Kind.ff),
    "TRELLIS_DPR16X4": Cell(Kind.lutram, luts=4),
    "DP16KD": Cell(Kind.bram),
    "PDPW16KD": Cell(Kind.bram),
    "MULT18X18D": Cell(Kind.dsp),
    "PFUMX": Cell(Kind.mux),
    "L6MUX21": Cell(Kind.mux),
}


#: What LUT mapping is for -> how, and how if that fails. ABC9 knows the delay of carry chains, but
#: ends without a word on some modules. LUTs wider than 4, made of multiplexers, are faster and cost
#: more area: docs/synthesis.md.
_ECP5_MAPPERS = {
    "": ("abc9 -maxlut 4 -W 300", "abc -lut 4"),
    "speed": ("abc9 -W 300", "abc -lut 4"),
    "area": ("abc -lut 4 -script +strash;ifraig;scorr;dc2;fraig;dch,-f;if,-a;mfs2;lutpack,-S,1",),
}


def _ecp5(size: int, *, luts: int, brams: int, dsps: int, mapped_for: str) -> Target:
    return Target(
        name=f"ecp5-{size}k" + (f"-{mapped_for}" if mapped_for else ""),
        device=f"Lattice LFE5U-{size}F, speed grade 8"
        + (f", mapped for {mapped_for}" if mapped_for else ""),
        cells=_ECP5_CELLS,
        capacity={Kind.lut: luts, Kind.ff: luts, Kind.bram: brams, Kind.dsp: dsps},
        bram_bits=18432,
        before="synth_ecp5 -latches warn -top unit -run :map_luts",
        after="synth_ecp5 -latches warn -run map_cells:check\nautoname",
        mappers=_ECP5_MAPPERS[mapped_for],
        library="read_verilog -lib +/lattice/cells_sim_ecp5.v +/lattice/cells_bb_ecp5.v",
        nextpnr=(f"--{size}k", "--package", "CABGA381", "--speed", "8"),
        simulation=("lattice/cells_sim_ecp5.v",),
    )


_XILINX_FFS = ("FDRE", "FDSE", "FDCE", "FDPE", "FDRE_1", "FDSE_1", "FDCE_1", "FDPE_1")

_XILINX_CELLS = {
    **{f"LUT{n}": Cell(Kind.lut, luts=1) for n in range(1, 7)},
    "INV": Cell(Kind.lut, luts=1),
    "CARRY4": Cell(Kind.carry),
    **{name: Cell(Kind.ff) for name in _XILINX_FFS},
    "LDCE": Cell(Kind.latch),
    "LDPE": Cell(Kind.latch),
    "SRL16E": Cell(Kind.lutram, luts=1),
    "SRLC32E": Cell(Kind.lutram, luts=1),
    "RAM32M": Cell(Kind.lutram, luts=4),
    "RAM64M": Cell(Kind.lutram, luts=4),
    "RAM32X1D": Cell(Kind.lutram, luts=2),
    "RAM64X1D": Cell(Kind.lutram, luts=2),
    "RAM128X1D": Cell(Kind.lutram, luts=4),
    "RAM32X1S": Cell(Kind.lutram, luts=1),
    "RAM64X1S": Cell(Kind.lutram, luts=1),
    "RAM128X1S": Cell(Kind.lutram, luts=2),
    "RAM256X1S": Cell(Kind.lutram, luts=4),
    "RAMB36E1": Cell(Kind.bram),
    "RAMB18E1": Cell(Kind.bram, units=0.5),
    "DSP48E1": Cell(Kind.dsp),
    "MUXF7": Cell(Kind.mux),
    "MUXF8": Cell(Kind.mux),
}

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(
            _ecp5(size, luts=luts, brams=brams, dsps=dsps, mapped_for=mapped_for)
            for size, luts, brams, dsps in (
                (25, 24288, 56, 28),
                (45, 43848, 108, 72),
                (85, 83640, 208, 156),
            )
            for mapped_for in _ECP5_MAPPERS
        ),
        Target(
            name="xilinx7",
            device="AMD Artix-7 XC7A200T",
            cells=_XILINX_CELLS,
            capacity={Kind.lut: 134600, Kind.ff: 269200, Kind.bram: 365, Kind.dsp: 740},
            bram_bits=36864,
            before="synth_xilinx -family xc7 -noiopad -noclkbuf -flatten -top unit -run :map_luts",
            after="synth_xilinx -family xc7 -noiopad -noclkbuf -run finalize:check",
            mappers=("synth_xilinx -family xc7 -noiopad -noclkbuf -run map_luts:finalize",),
            library="read_verilog -lib +/xilinx/cells_sim.v +/xilinx/cells_xtra.v",
        ),
    )
}


def get_target(name: str) -> Target:
    """Returns the target of that name."""
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; the targets are {', '.join(TARGETS)}")
    return TARGETS[name]
