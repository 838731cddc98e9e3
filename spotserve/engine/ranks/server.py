"""Where one device listens for other ranks: it sorts links to their groups and answers reads.

One thread accepts, each link has a thread until it is handed to its group. Nothing that a stranger sends gets past the handshake.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from spotserve.core.errors import PeerLost, WireError
from spotserve.core.messages import Address
from spotserve.engine.ranks.exchange import Readers, fetch_kv, give_kv, give_weights
from spotserve.engine.ranks.group import Group
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.ranks.messages import (
    Answer,
    Fetched,
    FetchKv,
    ForgetKv,
    Given,
    Hello,
    JoinOrders,
    JoinPeer,
    JoinPulse,
    Order,
    Read,
    Reader,
    ReadKv,
    ReadWeights,
    Refused,
)
from spotserve.link import Link, accept

MAX_EARLY_LINKS = 256
"""Links that wait for their group; the oldest group's are closed when there are more."""

Early: TypeAlias = tuple[JoinOrders | JoinPulse | JoinPeer, Link[Any]]

log = logging.getLogger(__name__)


class RankServer:
    """The listening end of one device."""

    def __init__(self, host: str, memory: RankMemory, *, secret: str) -> None:
        self._memory = memory
        self._secret = secret
        self._socket = socket.create_server((host, 0))
        self.address = Address(host, int(self._socket.getsockname()[1]))
        self._lock = threading.Lock()
        self._groups: dict[str, Group] = {}
        self._early: dict[str, list[Early]] = {}
        """Links of groups that this device has not heard of yet: another member was faster than the controller."""

    def start(self) -> None:
        """Accepts from now on."""
        threading.Thread(target=self._accept, name="rank server", daemon=True).start()

    def close(self) -> None:
        """Stops listening, and hangs up on whoever waits for a group that never came."""
        with contextlib.suppress(OSError):  # not every system wakes the accepting thread like this; on the others close does
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            early, self._early = self._early, {}
        _hang_up(early.values())

    def expect(self, group: Group) -> None:
        """Links for this group are its own from now on."""
        with self._lock:
            self._groups[group.plan.group_id] = group
            early = self._early.pop(group.plan.group_id, [])
        for hello, link in early:
            group.take(hello, link)

    def forget(self, group: Group) -> None:
        """The group has ended."""
        with self._lock:
            if self._groups.get(group.plan.group_id) is group:
                del self._groups[group.plan.group_id]

    # ------------------------------------------------------------------ links

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(connection,), name="rank link", daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        try:
            link: Link[Hello] = accept(connection, secret=self._secret, inbound=Hello)
            hello, _ = link.receive()
            if isinstance(hello, Reader):
                self._answer_reads(link.expecting(Read))
            else:
                self._hand_over(hello, link.expecting(Order if isinstance(hello, JoinOrders) else None))
        except PeerLost as error:
            log.debug("rank link: %s", error)
        except WireError as error:
            log.warning("rank link: %s", error)

    def _hand_over(self, hello: JoinOrders | JoinPulse | JoinPeer, link: Link[Any]) -> None:
        with self._lock:
            group = self._groups.get(hello.group_id)
            if group is None:
                self._early.setdefault(hello.group_id, []).append((hello, link))
        if group is not None:
            group.take(hello, link)
        else:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Keeps the links that wait for their group few."""
        forgotten = []
        with self._lock:
            while sum(map(len, self._early.values())) > MAX_EARLY_LINKS:
                forgotten.append(self._early.pop(next(iter(self._early))))
        _hang_up(forgotten)

    def _answer_reads(self, link: Link[Read]) -> None:
        """Until the other end hangs up."""
        link.set_timeout(None)
        readers = Readers(secret=self._secret)
        try:
            while True:
                request, _ = link.receive()
                answer, payload = self._answer(request, readers)
                link.send(answer, payload)
        finally:
            readers.close()
            link.close()

    def _answer(self, request: Read, readers: Readers) -> tuple[Answer, list[memoryview]]:
        with torch.inference_mode():
            match request:
                case ReadWeights():
                    return give_weights(request, self._memory)
                case ReadKv():
                    return give_kv(request, self._memory)
                case FetchKv():
                    try:
                        return Fetched(fetch_kv(request, self._memory, self.address, readers)), []
                    except PeerLost as error:
                        return Refused(str(error)), []
                case ForgetKv():
                    self._memory.take_fetched(request.key)
                    return Given(0), []


def _hang_up(groups: Iterable[list[Early]]) -> None:
    for links in groups:
        for _, link in links:
            link.close()
