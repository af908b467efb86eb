"""DMA queues: strided copies between device DRAM and SBUF.

`queue.DmaQueue` is the engine; `rows` splits instructions with indices into rows, `runs` walks the
DRAM side and makes AXI bursts, `tiles` counts the tiles an instruction is cut into, `align`
converts between beats and rows of elements, and `corner_turn` holds two tiles and turns rows into
columns, and `accumulate` adds to SBUF.
"""

from .queue import DmaQueue, FaultPort

__all__ = ["DmaQueue", "FaultPort"]
