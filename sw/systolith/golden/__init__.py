"""The golden model: what every instruction means, in numpy."""

from .checker import Fault, check
from .core import Core, FaultRecord
from .device import GoldenDevice

__all__ = ["Core", "Fault", "FaultRecord", "GoldenDevice", "check"]
