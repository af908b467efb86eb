"""Boards that a bitstream can be made for: their device, and where the pins are."""

from __future__ import annotations

import dataclasses
from typing import Any

from amaranth_boards.ulx3s import ULX3S_85F_Platform
from systolith_hdl.board.top import CLOCK_HZ

from .targets import Target, TargetError, get_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoardTarget:
    """A board.

    Parameters
    ----------
    name : on the command line
    platform : of amaranth-boards, which knows the pins
    target : the FPGA on it
    pins : port of `systolith_hdl.board.PoweredBoard` -> (resource, number, subsignal or "")
    """

    name: str
    platform: Any
    target: Target
    pins: dict[str, tuple[str, int, str]]

    @property
    def pin_hz(self) -> int:
        """Of the pin of the board's clock."""
        return round(self.platform.default_clk_frequency)

    @property
    def divider(self) -> int:
        """By which that becomes the clock of everything, CLOCK_HZ."""
        return self.pin_hz // CLOCK_HZ

    def constraints(self) -> str:
        """The pins of the ports, as LPF."""
        lines = []
        for port, (name, number, part) in self.pins.items():
            resource = self.platform.lookup(name, number)
            attributes = dict(resource.attrs)
            (pins,) = (io for io in resource.ios if not part or io.name == part)
            if part:
                attributes |= pins.attrs
                (pins,) = pins.ios
            (pin,) = pins.names
            settings = " ".join(f"{key}={value}" for key, value in attributes.items())
            lines += [f'LOCATE COMP "{port}" SITE "{pin}";', f'IOBUF PORT "{port}" {settings};']
        lines.append(f'FREQUENCY PORT "clk" {self.pin_hz / 1e6} MHZ;')
        return "\n".join(lines) + "\n"


def _ulx3s() -> BoardTarget:
    chip = get_target("ecp5-85k-area")
    options = list(chip.nextpnr)
    options[options.index("--speed") + 1] = ULX3S_85F_Platform.speed
    return BoardTarget(
        name="ulx3s",
        platform=ULX3S_85F_Platform(),
        target=dataclasses.replace(
            chip,
            device=f"ULX3S, Lattice LFE5U-85F, speed grade {ULX3S_85F_Platform.speed}, mapped for "
            "area",
            # A device this full is beyond the defaults: `static` leaves wires a seventh shorter
            # than `heap`, more so if it only looks at them, and `router1` hardly gets on. Around
            # the fullest places `router2` must be allowed a longer way (9 tiles out of a net's
            # box, not 3) and time to find it: with its own weights, which grow four times as fast,
            # a few hundred wires end up pushing each other about.
            nextpnr=(*options, "--placer", "static", "--router", "router2", "--no-tmdriv"),
            settings={
                "router2/bbMargin/x": "9",
                "router2/bbMargin/y": "9",
                "router2/currCongWeightMult": "0.5",
            },
        ),
        pins={
            "clk": (ULX3S_85F_Platform.default_clk, 0, ""),
            "rx": ("uart", 0, "rx"),
            "tx": ("uart", 0, "tx"),
            "irq": ("led", 0, ""),
        },
    )


BOARDS = {"ulx3s": _ulx3s}


def get_board(name: str) -> BoardTarget:
    """Returns the board of that name."""
    if name not in BOARDS:
        raise TargetError(f"unknown board {name!r}; the boards are {', '.join(BOARDS)}")
    return BOARDS[name]()
