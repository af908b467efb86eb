"""What a board needs beside the chip: DRAM made of block RAM, and a bridge from its serial line."""

from .bridge import Bridge
from .ram import AxiRam
from .top import Board, PoweredBoard
from .uart import UartReceiver, UartTransmitter

__all__ = ["AxiRam", "Board", "Bridge", "PoweredBoard", "UartReceiver", "UartTransmitter"]
