"""Who must wait for whom: intervals of memory, and vector clocks over progress streams.

A *progress stream* is a class of instructions that complete in order: each DMA queue, the vector
engine, the scalar engine, and of the tensor engine the LOAD_STATIONARYs and the MATMULs. An
instruction is known by (stream, index), and "index i of a stream is complete" implies the same
of every lower index.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence


class _Segment:
    """Accesses of one interval since it was last written."""

    __slots__ = ("readers", "writer")

    def __init__(self, writer: tuple[int, int] | None, readers: dict[int, int]) -> None:
        self.writer = writer  #: (stream, index)
        self.readers = readers  #: stream -> its last index that read


class IntervalMap:
    """Last writer and readers of every address of one memory.

    Holds sorted disjoint segments that together cover all addresses; a write makes one segment
    of its interval, so a memory has no more segments than live access patterns.
    """

    def __init__(self) -> None:
        self._starts = [0]
        self._segments = [_Segment(None, {})]

    def _split(self, address: int) -> int:
        """Makes a segment start at `address`; returns its index."""
        i = bisect.bisect_right(self._starts, address) - 1
        if self._starts[i] == address:
            return i
        segment = self._segments[i]
        self._starts.insert(i + 1, address)
        self._segments.insert(i + 1, _Segment(segment.writer, dict(segment.readers)))
        return i + 1

    def access(
        self, low: int, high: int, node: tuple[int, int], write: bool, needed: dict[int, int]
    ) -> None:
        """Records that `node` reads or writes addresses `low` to `high`.

        What it must come after is added to `needed`: stream -> index.
        """
        first = self._split(low)
        last = self._split(high + 1)
        stream, index = node
        for segment in self._segments[first:last]:
            if segment.writer is not None:
                other, at = segment.writer
                if needed.get(other, -1) < at:
                    needed[other] = at
            if write:
                for other, at in segment.readers.items():
                    if needed.get(other, -1) < at:
                        needed[other] = at
            else:
                segment.readers[stream] = index
        if write:
            self._starts[first:last] = [low]
            self._segments[first:last] = [_Segment(node, {})]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A progress stream.

    Parameters
    ----------
    name : shown in messages
    engine : number of the engine whose instructions it holds
    implies : stream of the same engine whose earlier instructions are complete whenever one of
        this is: a MATMUL starts after the LOAD_STATIONARYs before it
    """

    name: str
    engine: int
    implies: int | None = None


class Clocks:
    """Decides for each instruction which completions it has to wait for.

    An engine issues in order, so what one instruction waited for holds for all that follow on
    the engine; and when an instruction is complete, so is everything it waited for. Both make
    waits superfluous, transitively.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        engines = 1 + max(stream.engine for stream in streams)
        #: engine -> for each stream the last index known complete when the engine issues next
        self._known = [[-1] * len(streams) for _ in range(engines)]
        #: stream -> index -> what is complete when that instruction is
        self._complete: list[list[tuple[int, ...]]] = [[] for _ in streams]

    def next_node(self, stream: int) -> tuple[int, int]:
        """The (stream, index) that the next `add` to `stream` gets."""
        return stream, len(self._complete[stream])

    def add(self, stream: int, needed: dict[int, int]) -> list[tuple[int, int]]:
        """Appends an instruction that must come after `needed`; returns what it waits for.

        Order between instructions of one engine is the hardware's, so it needs no wait.
        """
        engine = self._streams[stream].engine
        known = self._known[engine]
        missing = [
            (other, at)
            for other, at in needed.items()
            if self._streams[other].engine != engine and known[other] < at
        ]
        if len(missing) > 1:
            missing = [
                (other, at)
                for other, at in missing
                if not any(
                    self._complete[third][index][other] >= at
                    for third, index in missing
                    if third != other
                )
            ]
        for other, at in missing:
            for s, index in enumerate(self._complete[other][at]):
                if known[s] < index:
                    known[s] = index
        complete = list(known)
        complete[stream] = len(self._complete[stream])
        implied = self._streams[stream].implies
        if implied is not None:
            complete[implied] = len(self._complete[implied]) - 1
        self._complete[stream].append(tuple(complete))
        return missing
