"""The ranks of one replica under one plan, joined by links: who is joined to whom, and what shards do together.

Slot (s, m) is joined to the other shards of its stage, to shard m of the stages before and after, and to the leader, which
schedules for all. The leader is in the process of slot (0, 0), or has no slot. Of two the one that comes first dials, the leader
before all. A group is formed beside the one that still serves, in
milliseconds, and never changes: another plan has another group. When any member is lost the whole group breaks, at once and
for good, so that nobody waits for somebody who waits for the dead.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spotserve.core.errors import PeerLost
from spotserve.core.messages import Address
from spotserve.engine.ranks.messages import JoinOrders, JoinPeer, JoinPulse, Order, Sampled
from spotserve.link import BUFFER_BYTES, Link, dial

_HERE = b"!"
"""What a rank that is ready sends on its pulse link, and what the leader answers when all are."""

CHUNK_BYTES = BUFFER_BYTES // 16
"""Two of these fit into the kernel's buffers even where it gives only a part of what was asked, so that two ranks that both
send first do not wait for each other."""

Place = tuple[int, int]
"""(stage, shard)"""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Who is in a group."""

    group_id: str
    pipeline: int
    tensor: int
    place: Place | None
    """Of this rank; None: a leader that has no slot."""
    leads: bool
    addresses: Mapping[Place, Address]

    @property
    def peers(self) -> tuple[Place, ...]:
        """Ranks with which this one exchanges tensors."""
        if self.place is None:
            return ()
        stage, shard = self.place
        shards = [(stage, other) for other in range(self.tensor) if other != shard]
        stages = [(other, shard) for other in (stage - 1, stage + 1) if 0 <= other < self.pipeline]
        return tuple(sorted([*shards, *stages]))

    @property
    def others(self) -> tuple[Place, ...]:
        """Everybody else."""
        return tuple(sorted(place for place in self.addresses if place != self.place))


class Group:
    """The links of one rank in one group. `close` may be called from any thread."""

    def __init__(self, plan: GroupPlan) -> None:
        self.plan = plan
        self.peers: dict[Place, Link[None]] = {}
        self.orders: dict[Place, Link[Sampled]] = {}
        """On the leader: to every other rank."""
        self.order_link: Link[Order] | None = None
        """On the others: from the leader."""
        self.pulses: list[Link[None]] = []
        self._arrived = threading.Condition()
        self._broken: str | None = None
        self._tell: Callable[[str], None] | None = None

    @property
    def broken(self) -> str | None:
        """Why the group has ended; None while it has not."""
        return self._broken

    def on_broken(self, tell: Callable[[str], None]) -> None:
        """`tell` hears once why the group has ended, in whatever thread notices it: also when nobody waits on a link."""
        with self._arrived:
            self._tell = tell
            reason = self._broken
        if reason is not None:
            tell(reason)

    def take(self, hello: JoinOrders | JoinPulse | JoinPeer, link: Link[Any]) -> None:
        """A link that another member opened."""
        with self._arrived:
            if self._broken is not None:
                link.close()
                return
            match hello:
                case JoinPeer():
                    self.peers[hello.stage, hello.shard] = link
                case JoinOrders():
                    self.order_link = link
                case JoinPulse():
                    self.pulses.append(link)
            self._arrived.notify_all()

    def join(self, *, secret: str, deadline_s: float) -> None:
        """Opens the links that are this rank's to open, and waits until every rank of the group has called this.

        Links to a rank that still loads are taken by its device's server, so being linked does not mean that it is there: each
        one tells the leader that it is, and the leader tells all. `deadline_s` is of `time.monotonic`.

        Raises:
            PeerLost: somebody did not come in time.
        """
        try:
            for place in self.plan.peers:
                if self.plan.place is not None and self.plan.place < place:
                    hello = JoinPeer(self.plan.group_id, *self.plan.place)
                    self.peers[place] = self._dial(place, hello, None, secret, deadline_s)
            if self.plan.leads:
                for place in self.plan.others:
                    self.orders[place] = self._dial(place, JoinOrders(self.plan.group_id), Sampled, secret, deadline_s)
                    self.pulses.append(self._dial(place, JoinPulse(self.plan.group_id), None, secret, deadline_s))
            with self._arrived:
                complete = self._arrived.wait_for(
                    lambda: self._broken is not None or self._complete, max(0.0, deadline_s - time.monotonic())
                )
            if self._broken is not None or not complete:
                missing = [place for place in self.plan.peers if place not in self.peers]
                raise PeerLost(self._broken or f"{self.plan.group_id}: ranks {missing or 'of the leader'} did not join in time")
            self._meet(deadline_s)
        except PeerLost as error:
            self.break_off(str(error))
            raise
        for link in self._links():
            link.set_timeout(None)  # whoever hangs is found by its pulse

    def _meet(self, deadline_s: float) -> None:
        """Waits until all are here. The pulse links carry it: nothing else is on them before `watch`."""
        for pulse in self.pulses:
            pulse.set_timeout(max(0.05, deadline_s - time.monotonic()))
        if not self.plan.leads:
            self.pulses[0].write(_HERE)
            self.pulses[0].read(len(_HERE))
            return
        for pulse in self.pulses:
            pulse.read(len(_HERE))
        for pulse in self.pulses:
            pulse.write(_HERE)

    def break_off(self, reason: str) -> None:
        """Ends the group: whoever waits on one of its links wakes with `PeerLost`. The first reason stays."""
        with self._arrived:
            tell = self._tell if self._broken is None else None
            self._broken = self._broken or reason
            links = [*self._links(), *self.pulses]
            self._arrived.notify_all()
        for link in links:
            link.close()
        if tell is not None:
            tell(reason)

    def lost(self, error: PeerLost) -> PeerLost:
        """The error to raise for `error`: the reason why the group broke, when that came first. Breaks the group."""
        self.break_off(str(error))
        return PeerLost(f"{self.plan.group_id}: {self._broken}")

    def _links(self) -> list[Link[Any]]:
        return [*self.peers.values(), *self.orders.values(), *([self.order_link] if self.order_link is not None else [])]

    @property
    def _complete(self) -> bool:
        led = self.plan.leads or (self.order_link is not None and bool(self.pulses))
        return led and set(self.peers) == set(self.plan.peers)

    def _dial(
        self, place: Place, hello: JoinOrders | JoinPulse | JoinPeer, inbound: Any, secret: str, deadline_s: float
    ) -> Link[Any]:
        timeout_s = max(0.05, deadline_s - time.monotonic())
        link: Link[Any] = dial(self.plan.addresses[place], secret=secret, inbound=inbound, timeout_s=timeout_s)
        link.send(hello)
        return link


class LinkedShards:
    """The shards of one stage, each on a rank of its own. Sums are made in the same order on every one of them."""

    def __init__(self, group: Group) -> None:
        """The group need not be joined yet."""
        assert group.plan.place is not None
        self._group = group
        self._stage, self.shard = group.plan.place
        self.tensor = group.plan.tensor

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Shards.sum`."""
        return tree_sum(self._all(partial))

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Shards.gather`."""
        return torch.cat(self._all(part), dim=-1)

    def _all(self, own: torch.Tensor) -> list[torch.Tensor]:
        own = own.contiguous()
        links = [self._group.peers.get((self._stage, shard)) for shard in range(self.tensor)]  # None: this one
        parts = [own if link is None else torch.empty_like(own) for link in links]
        try:
            for link, part in zip(links, parts, strict=True):
                if link is not None:
                    _exchange(link, own, part)
        except PeerLost as error:
            raise self._group.lost(error) from error
        return parts


def tree_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """((0 + 1) + (2 + 3)) + ...: neighbours first, so that a shard that holds 2^k neighbours may add them beforehand."""
    while len(parts) > 1:
        pairs = [parts[index] + parts[index + 1] for index in range(0, len(parts) - 1, 2)]
        parts = pairs if len(parts) % 2 == 0 else [*pairs, parts[-1]]
    return parts[0]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy when it is the processor's."""
    flat: Any = tensor.detach().cpu().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _exchange(link: Link[None], own: torch.Tensor, other: torch.Tensor) -> None:
    """Sends one tensor and receives another of the same size; both ends do the same."""
    on_processor = other if other.device.type == "cpu" else torch.empty_like(other, device="cpu")
    sent, received = raw_bytes(own), raw_bytes(on_processor)
    for start in range(0, sent.nbytes, CHUNK_BYTES):
        link.write(sent[start : start + CHUNK_BYTES])
        link.read_into(received[start : start + CHUNK_BYTES])
    if on_processor is not other:
        other.copy_(on_processor)


def neighbours(group: Group) -> tuple[Link[None] | None, Link[None] | None]:
    """Links of a rank to the same shard of the stage before and of the stage after."""
    assert group.plan.place is not None
    stage, shard = group.plan.place
    return group.peers.get((stage - 1, shard)), group.peers.get((stage + 1, shard))


def send_hidden(link: Link[None], hidden: torch.Tensor) -> None:
    """To the next stage, which knows the shape from the step."""
    link.write(raw_bytes(hidden.contiguous()))


def receive_hidden(link: Link[None], shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """From the stage before."""
    hidden = torch.empty(shape, dtype=dtype)
    link.read_into(raw_bytes(hidden))
    return hidden.to(device)


def to_bytes(values: np.ndarray) -> bytes:
    """Numbers as int64, for a message."""
    return np.ascontiguousarray(values, dtype=np.int64).tobytes()


def from_bytes(data: bytes) -> np.ndarray:
    """The reverse, writable: tensors are made of it without a copy."""
    return np.frombuffer(bytearray(data), dtype=np.int64)
