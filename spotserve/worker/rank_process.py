"""A further device of an instance: a process of its own that brings slots up and obeys their leaders.

The worker forks it before anything else happens, and tells it over an inherited socket what to serve. It ends when the worker
does, however that happens: the socket ends with it.
"""

import logging
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn, TypeAlias

import msgspec

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError, PeerLost
from spotserve.core.messages import Activate, Address
from spotserve.core.plan import Slot
from spotserve.engine.weights import OpenModel, open_model
from spotserve.link import Link
from spotserve.worker.slots import Device

log = logging.getLogger(__name__)


class RankControl(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of what worker and rank process say to each other."""


class Listening(RankControl, frozen=True):
    """From the rank, first: where it listens for other ranks."""

    rank: Address


class BringUp(RankControl, frozen=True):
    """To the rank. A slot that is brought up again, after `TakeDown`, has another `plan_epoch`."""

    activate: Activate


class TakeDown(RankControl, frozen=True):
    """To the rank. Harmless when the slot is not up."""

    slot: Slot


class Up(RankControl, frozen=True):
    """From the rank: the slot is ready, and is served from now on."""

    slot: Slot
    plan_epoch: int
    pulled_bytes: int


class Broke(RankControl, frozen=True):
    """From the rank: the slot could not be brought up, or is not served any more."""

    slot: Slot
    plan_epoch: int
    reason: str
    is_permanent: bool


ToRank: TypeAlias = BringUp | TakeDown
FromRank: TypeAlias = Listening | Up | Broke


def fork_ranks(devices: int, settings: EngineSettings, *, host: str, secret: str, silence_s: float) -> list[socket.socket]:
    """Starts the rank processes of the devices after the first; the worker's ends of their sockets. Call it before threads and
    torch operations."""
    controls: list[socket.socket] = []
    for index in range(1, devices):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            for inherited in (*controls, ours):  # kept open, they would hide the worker's end from its other rank processes
                inherited.close()
            _become_rank(index, theirs, settings, host=host, secret=secret, silence_s=silence_s)
        theirs.close()
        controls.append(ours)
    return controls


def _become_rank(
    index: int, control: socket.socket, settings: EngineSettings, *, host: str, secret: str, silence_s: float
) -> NoReturn:
    exit_code = 1
    try:
        logging.basicConfig(  # in place of the worker's
            level=logging.INFO, format=f"%(asctime)s device {index} %(levelname)s %(message)s", stream=sys.stderr, force=True
        )
        device = Device(host, settings, secret=secret, silence_s=silence_s)
        _RankProcess(device, settings, Link(control, ToRank)).run()
        exit_code = 0
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


class _RankProcess:
    """Obeys the worker."""

    def __init__(self, device: Device, settings: EngineSettings, control: Link[ToRank]) -> None:
        self._device = device
        self._settings = settings
        self._control = control
        self._saying = threading.Lock()
        self._opening = threading.Lock()
        self._model: OpenModel | None = None
        self._wanted: dict[Slot, Activate] = {}

    def run(self) -> None:
        """Until the worker ends."""
        self._say(Listening(self._device.server.address))
        while True:
            try:
                message, _ = self._control.receive()
            except PeerLost:
                return
            match message:
                case BringUp():
                    self._wanted[message.activate.slot] = message.activate
                    threading.Thread(target=self._serve, args=(message.activate,), name="slot", daemon=True).start()
                case TakeDown():
                    self._wanted.pop(message.slot, None)
                    self._device.take_down(message.slot)

    def _serve(self, activate: Activate) -> None:
        """Brings a slot up and serves it to its end."""
        try:
            with self._opening:
                self._model = self._model or open_model(self._settings)
            up = self._device.bring_up(
                activate, self._model, leads=False, is_wanted=lambda: self._wanted.get(activate.slot) is activate
            )
            self._say(Up(activate.slot, activate.plan_epoch, up.pulled_bytes))
            up.rank.serve()
        except (ModelError, PeerLost) as error:
            self._say(Broke(activate.slot, activate.plan_epoch, str(error), isinstance(error, ModelError)))
        except Exception:  # top of the thread: nobody may wait for a rank that does not compute any more
            log.exception("%s of %s broke", activate.slot, activate.instance_id)
            self._control.close()  # ends this process, and tells the worker so

    def _say(self, message: FromRank) -> None:
        with self._saying, suppress(PeerLost):  # without its worker this process ends
            self._control.send(message)
