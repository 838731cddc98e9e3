"""Memory of devices while a migration runs: what may arrive, and what goes when nobody needs it any more.

Invariant: on no device do bytes that have arrived or are arriving exceed the bytes that were free plus those that have gone.
After the memory-bounded order of SpotServe's migration planner (ASPLOS'24, section 3.4): there layers are sorted beforehand so that
buffers stay small; here a flow waits until there is room for it. When nothing can go on, weights that files have too go early.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from spotserve.core.cluster import DeviceId
from spotserve.migration.flows import Flow


@dataclass(frozen=True, slots=True)
class Leaving:
    """Bytes on a device that go once nobody reads them any more."""

    what: str
    device: DeviceId
    num_bytes: int
    readers: frozenset[Flow] = frozenset()
    """Flows that read them; all have to have ended."""
    from_s: float = 0.0
    """Not before this time: what has them serves until then."""
    on_files: bool = False
    """Whether they may go earlier, because readers can read them from files; not while something serves with them."""

    def __post_init__(self) -> None:
        assert self.num_bytes > 0


@dataclass(frozen=True, slots=True)
class Memory:
    """The bound."""

    free_bytes: Mapping[DeviceId, int] = field(default_factory=dict)
    """May arrive before anything has gone. A device without an entry has no bound."""
    leaving: tuple[Leaving, ...] = ()


class Room:
    """What is free now. One owner, mutable."""

    def __init__(self, memory: Memory, flows: Collection[Flow]) -> None:
        self._free = dict(memory.free_bytes)
        sent = set(flows)
        self._readers: dict[Leaving, set[Flow]] = {}
        """Of what has not gone yet, flows that have not ended."""
        self._read: dict[Flow, list[Leaving]] = {}
        self._tie = count()
        self._due: list[tuple[float, int, Leaving]] = []
        """What nobody reads any more, by when it may go; the number makes equal times comparable."""
        for each in memory.leaving:
            if each.device in self._free:
                self._readers[each] = set(each.readers & sent)
                for flow in each.readers & sent:
                    self._read.setdefault(flow, []).append(each)
                self._note_unread(each)

    def fits(self, flow: Flow) -> bool:
        """Whether a flow may begin to arrive."""
        return flow.num_bytes <= self._free.get(flow.destination, flow.num_bytes)

    def take(self, flow: Flow) -> None:
        """It begins to arrive."""
        if flow.destination in self._free:
            assert self.fits(flow), "began without room"
            self._free[flow.destination] -= flow.num_bytes

    def ended(self, flow: Flow) -> None:
        """It has arrived, or will not be sent."""
        for each in self._read.pop(flow, ()):
            if each in self._readers:
                self._readers[each].discard(flow)
                self._note_unread(each)

    def next_s(self) -> float | None:
        """When time alone will make room; None: never."""
        return self._due[0][0] if self._due else None

    def release(self, now_s: float) -> set[DeviceId]:
        """Lets go of what nobody needs; devices that have more room."""
        devices = set()
        while self._due and self._due[0][0] <= now_s:
            _, _, leaving = heappop(self._due)
            if leaving in self._readers:
                self._go(leaving)
                devices.add(leaving.device)
        return devices

    def evict(self, blocked: Iterable[DeviceId], now_s: float) -> tuple[Leaving, set[Flow]] | None:
        """Lets go early of what costs its readers least per byte of room, on one of the `blocked` devices; who has to read it from
        files. None: there is nothing."""
        devices = set(blocked)
        may_go = [each for each in self._readers if each.device in devices and each.on_files and each.from_s <= now_s]
        if not may_go:
            return None
        cheapest = min(may_go, key=lambda each: (self._reread_bytes(each) / each.num_bytes, each.device, each.what))
        readers = self._readers[cheapest]
        self._go(cheapest)
        return cheapest, readers

    def _reread_bytes(self, leaving: Leaving) -> int:
        return sum(flow.num_bytes for flow in self._readers[leaving])

    def _note_unread(self, leaving: Leaving) -> None:
        if not self._readers[leaving]:
            heappush(self._due, (leaving.from_s, next(self._tie), leaving))

    def _go(self, leaving: Leaving) -> None:
        del self._readers[leaving]
        self._free[leaving.device] += leaving.num_bytes
