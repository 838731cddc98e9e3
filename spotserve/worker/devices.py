"""The devices of an instance as its worker sees them: one in its own process, the others in rank processes.

Both are asked alike to bring a slot up; both say, later, that a slot has broken.
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias, TypeVar

from spotserve.core.errors import ModelError, PeerLost
from spotserve.core.messages import Activate, Address
from spotserve.core.plan import Slot
from spotserve.engine.weights import OpenModel
from spotserve.link import Link
from spotserve.worker.rank_process import BringUp, FromRank, Listening, TakeDown, ToRank, Up
from spotserve.worker.slots import Device, SlotUp

LOADING_NICENESS = 5
"""A quarter of a busy core at least: a fleet that is short of replicas still gets its next one soon."""

Result = TypeVar("Result")
OnBroken = Callable[[Activate, Exception], None]
"""Hears that a slot that was up has broken, or ended."""

IsWanted = Callable[[], bool]
"""Whether a slot is still to come up."""

Coming: TypeAlias = tuple[Slot, int]
"""A slot, and the epoch of the plan that wants it."""


class DeviceDoor(Protocol):
    """One device."""

    @property
    def rank(self) -> Address:
        """Where its rank listens for other ranks."""
        ...

    async def bring_up(self, activate: Activate, model: OpenModel, is_wanted: IsWanted) -> tuple[int, SlotUp | None]:
        """Makes a slot ready; the bytes of weights that came from other devices, and the slot itself when it is in this process
        and this worker leads its replica.

        Raises:
            ModelError: the model cannot be cut like this, read or computed.
            PeerLost: a peer is gone, or did not join in time; or the slot was given up before this began.
        """
        ...

    def take_down(self, slot: Slot) -> None:
        """Leaves a slot, up or coming up. Harmless when it is not here."""
        ...


class OwnDevice:
    """The device in the worker's process."""

    def __init__(self, device: Device, on_broken: OnBroken) -> None:
        self.device = device
        self._on_broken = on_broken

    @property
    def rank(self) -> Address:
        """See `DeviceDoor.rank`."""
        return self.device.server.address

    async def bring_up(self, activate: Activate, model: OpenModel, is_wanted: IsWanted) -> tuple[int, SlotUp | None]:
        """See `DeviceDoor.bring_up`."""
        leads = (activate.slot.stage, activate.slot.shard) == (0, 0)
        up = await gently(lambda: self.device.bring_up(activate, model, leads=leads, is_wanted=is_wanted))
        if not leads:
            self._obey(activate, up)
        return up.pulled_bytes, up if leads else None

    def take_down(self, slot: Slot) -> None:
        """See `DeviceDoor.take_down`."""
        self.device.take_down(slot)

    def _obey(self, activate: Activate, up: SlotUp) -> None:
        loop = asyncio.get_running_loop()

        def serve() -> None:
            try:
                up.rank.serve()
            except Exception as error:  # noqa: BLE001 -- top of the thread: whoever knows the slot judges the error
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._on_broken, activate, error)

        threading.Thread(target=serve, name=f"rank {up.slot.stage},{up.slot.shard}", daemon=True).start()


class ChildDevice:
    """A device in a rank process."""

    def __init__(self, control: socket.socket, on_broken: OnBroken, on_lost: Callable[[Exception], None]) -> None:
        """`on_lost` hears that the process has ended. Waits for the process to listen."""
        self._control: Link[FromRank] = Link(control, FromRank)
        self._on_broken = on_broken
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._coming: dict[Coming, tuple[Activate, asyncio.Future[int]]] = {}
        self._up: dict[Coming, Activate] = {}
        first, _ = self._control.receive()
        assert isinstance(first, Listening)
        self._rank = first.rank
        threading.Thread(target=self._listen, name="rank process", daemon=True).start()

    @property
    def rank(self) -> Address:
        """See `DeviceDoor.rank`."""
        return self._rank

    async def bring_up(
        self,
        activate: Activate,
        model: OpenModel,  # noqa: ARG002 -- the process opens its own
        is_wanted: IsWanted,
    ) -> tuple[int, SlotUp | None]:
        """See `DeviceDoor.bring_up`."""
        if not is_wanted():
            raise PeerLost("the slot was given up")
        name = activate.slot, activate.plan_epoch
        coming: asyncio.Future[int] = self._loop.create_future()
        self._coming[name] = activate, coming
        self._tell(BringUp(activate))
        return await coming, None

    def take_down(self, slot: Slot) -> None:
        """See `DeviceDoor.take_down`."""
        self._tell(TakeDown(slot))

    def _tell(self, message: ToRank) -> None:
        try:
            self._control.send(message)
        except PeerLost as error:
            self._on_lost(error)

    def _listen(self) -> None:
        """Hands what the process says to the event loop."""
        try:
            while True:
                message, _ = self._control.receive()
                self._loop.call_soon_threadsafe(self._heard, message)
        except PeerLost as error:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._on_lost, error)

    def _heard(self, message: FromRank) -> None:
        assert not isinstance(message, Listening)
        name = message.slot, message.plan_epoch
        if isinstance(message, Up):
            activate, coming = self._coming.pop(name)
            self._up[name] = activate
            if not coming.done():
                coming.set_result(message.pulled_bytes)
            return
        error = (ModelError if message.is_permanent else PeerLost)(message.reason)
        if name in self._up:
            self._on_broken(self._up.pop(name), error)
            return
        _, coming = self._coming.pop(name)
        if not coming.done():
            coming.set_exception(error)


async def gently(load: Callable[[], Result]) -> Result:
    """Runs `load` in a thread of lower priority, so that what serves on the same machine does not feel it."""
    loader = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=_lower_priority)
    try:
        return await asyncio.get_running_loop().run_in_executor(loader, load)
    finally:
        loader.shutdown(wait=False)


def _lower_priority() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICENESS)
