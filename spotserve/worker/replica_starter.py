"""From `Activate` to a slot that is ready, and from `Deactivate` or a lost peer to one that is gone.

Brings slots up in threads of low priority beside whatever serves; starts the engine of replicas that this worker leads, and a
thread that obeys the leader for those that others lead. Says what came of it; does not know why.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from spotserve.config import EngineSettings, WorkerSettings
from spotserve.core.errors import ModelError, PeerLost
from spotserve.core.messages import Activate, Address, Deactivate, HeldSlot, KvHolder, SlotFailed, SlotReady, WorkerEvent
from spotserve.core.model import ModelSpec
from spotserve.core.plan import ReplicaPlan, Slot
from spotserve.engine.bring_up import load_draft_model
from spotserve.engine.draft_model import PagedDraftModel
from spotserve.engine.engine import Engine
from spotserve.engine.ranks.group import Group
from spotserve.engine.ranks.leader import LinkedRanks, Ranks, SingleRank
from spotserve.engine.ranks.pulse import watch
from spotserve.engine.speculators import make_speculator
from spotserve.engine.weights import OpenModel, open_model
from spotserve.worker.devices import ChildDevice, DeviceDoor, OwnDevice, gently
from spotserve.worker.engine_thread import EngineThread
from spotserve.worker.prefill import PrefillChunks
from spotserve.worker.replicas import Fetcher, KvHome, LedReplica
from spotserve.worker.slots import JOIN_TIMEOUT_S, Device, group_plan, nothing_to_do
from spotserve.worker.worker import Worker

log = logging.getLogger(__name__)


class ReplicaStarter:
    """Owner of this worker's devices and of what is brought up on them."""

    def __init__(
        self,
        worker: Worker,
        settings: EngineSettings,
        worker_settings: WorkerSettings,
        *,
        host: str,
        secret: str,
        rank_processes: Sequence[socket.socket],
        report: Callable[[WorkerEvent], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`rank_processes`: of the devices after the first; `report` tells the controller; `on_failure` hears of what ends the
        worker: errors that nobody expected, and the end of a rank process."""
        self._worker = worker
        self._settings = settings
        self._silence_s = worker_settings.rank_silence_s
        self._secret = secret
        self._report = report
        self._on_failure = on_failure
        self._own = Device(host, settings, secret=secret, silence_s=self._silence_s)
        self._devices: list[DeviceDoor] = [OwnDevice(self._own, self._broken)]
        self._devices += [ChildDevice(control, self._broken, on_failure) for control in rank_processes]
        self._model: OpenModel | None = None
        self._opening = asyncio.Lock()
        self._active: dict[Slot, Activate] = {}
        """Slots that are up or coming up."""
        self._turns: WeakValueDictionary[Slot, asyncio.Lock] = WeakValueDictionary()
        """A slot that was given up while it came up, and is wanted again, comes up after it has gone."""
        self._up: set[Slot] = set()
        self._idle: dict[int, HeldSlot] = {}
        """What a device still holds of a slot that it has left, by device."""

    @property
    def ranks(self) -> tuple[Address, ...]:
        """Where the ranks of this worker listen, by device."""
        return tuple(device.rank for device in self._devices)

    @property
    def model(self) -> ModelSpec | None:
        """The model, once it is known."""
        return self._model.catalogue.spec if self._model is not None else None

    @property
    def serving(self) -> tuple[ReplicaPlan, ...]:
        """Replicas that have a slot here that is up."""
        return tuple(dict.fromkeys(self._active[slot].replica for slot in self._up))

    @property
    def held(self) -> tuple[HeldSlot, ...]:
        """Weights in the memory of its devices."""
        return (*(_held(self._active[slot]) for slot in self._up), *self._idle.values())

    async def read_model(self) -> ModelSpec:
        """What the model is, from its configuration; no weights are read.

        Raises:
            ModelError: it cannot be found, or not be served.
        """
        return (await self._open()).catalogue.spec

    def activate(self, activate: Activate) -> Coroutine[Any, Any, None]:
        """Takes note that a slot is wanted; what it returns brings it up and says so, or why not. A slot that is up, or coming up,
        is left alone."""
        if activate.slot in self._active:
            return nothing_to_do()
        self._active[activate.slot] = activate
        return self._come_up(activate)

    def deactivate(self, deactivate: Deactivate) -> None:
        """Leaves a slot. Harmless when it is not here."""
        self._leave(deactivate.slot, "its replica has ended")

    def give_up_coming(self) -> None:
        """Leaves slots that are not up yet: the controller that wanted them is gone, and the next one plans anew."""
        for slot in [slot for slot in self._active if slot not in self._up]:
            self._leave(slot, "the controller that wanted it is gone")

    # ------------------------------------------------------------------ inner

    async def _come_up(self, activate: Activate) -> None:
        async with self._turns.setdefault(activate.slot, asyncio.Lock()):
            pulled_bytes = await self._try(activate)
        if pulled_bytes is None:
            return
        self._up.add(activate.slot)
        self._idle.pop(activate.device_index, None)
        assert self.model is not None
        self._report(
            SlotReady(
                instance_id=self._worker.instance_id,
                device_index=activate.device_index,
                slot=activate.slot,
                plan_epoch=activate.plan_epoch,
                model=self.model,
                pulled_bytes=pulled_bytes,
                invariant=self._settings.invariant,
            )
        )

    async def _try(self, activate: Activate) -> int | None:
        """Brings a slot up; bytes of weights that came from other devices. None when nothing came of it, which has been said."""
        slot = activate.slot
        pulled_bytes = None
        try:
            pulled_bytes = await self._bring_up(activate)
        except (ModelError, PeerLost) as error:
            if self._active.get(slot) is activate:
                del self._active[slot]
                self._failed(activate, str(error), is_permanent=isinstance(error, ModelError))
        if self._active.get(slot) is activate:
            return pulled_bytes
        if activate.device_index < len(self._devices):
            self._devices[activate.device_index].take_down(slot)  # it failed in part, or was given up meanwhile
        return None

    async def _bring_up(self, activate: Activate) -> int:
        """Bytes of weights that came from other devices."""

        def is_wanted() -> bool:
            return self._active.get(activate.slot) is activate

        model = await self._open()
        if activate.device_index >= len(self._devices):
            raise ModelError(
                f"{self._worker.instance_id} has {len(self._devices)} devices, not one of index {activate.device_index}"
            )
        device = self._devices[activate.device_index]
        leads = (activate.slot.stage, activate.slot.shard) == (0, 0)
        draft_model = await self._load_draft_model(model) if leads else None
        if leads and device.rank != self._own.server.address:
            coming = device.bring_up(activate, model, is_wanted)
            (pulled_bytes, _), joined = await asyncio.gather(coming, gently(lambda: self._join(activate)))
            ranks: Ranks = LinkedRanks(None, joined)
            group: Group | None = joined
        else:
            pulled_bytes, up = await device.bring_up(activate, model, is_wanted)
            if up is None:
                return pulled_bytes
            group = up.group
            ranks = SingleRank(up.rank) if group is None else LinkedRanks(up.rank, group)
        if is_wanted():
            self._lead(activate, ranks, model, draft_model)
            if group is not None:  # an idle engine would not notice
                group.on_broken(partial(self._broken_elsewhere, asyncio.get_running_loop(), activate))
        else:
            ranks.close()
        return pulled_bytes

    async def _open(self) -> OpenModel:
        async with self._opening:
            if self._model is None:
                self._model = await gently(lambda: open_model(self._settings))
        return self._model

    async def _load_draft_model(self, model: OpenModel) -> PagedDraftModel | None:
        """The draft model of a replica that this worker leads; without it the replica serves all the same."""
        try:
            return await gently(lambda: load_draft_model(self._settings, model.catalogue.spec))
        except ModelError as error:
            log.warning("no draft model: %s", error)
            return None

    def _join(self, activate: Activate) -> Group:
        """Joins the group of a replica as a leader without a slot."""
        group = Group(group_plan(activate, place=None, leads=True))
        group.join(secret=self._secret, deadline_s=time.monotonic() + JOIN_TIMEOUT_S)
        watch(group, silence_s=self._silence_s)
        return group

    def _lead(self, activate: Activate, ranks: Ranks, model: OpenModel, draft_model: PagedDraftModel | None) -> None:
        spec, parallel = model.catalogue.spec, activate.replica.parallel
        settings = self._settings.model_copy(update={"max_batch": parallel.max_batch})
        chunks = None
        if parallel.pipeline > 1:
            chunks = PrefillChunks(num_stages=parallel.pipeline, max_tokens=settings.max_step_tokens)
        speculator = make_speculator(settings, draft_model)
        engine = Engine(ranks, settings, spec=spec, end_token_ids=model.end_token_ids, speculator=speculator, chunks=chunks)
        thread = EngineThread(engine, on_step=self._worker.on_step, on_failure=partial(self._broken, activate))
        fetcher = Fetcher(
            activate, spec, dtype=self._settings.dtype, own=self._own.server.address, memory=self._own.memory, secret=self._secret
        )
        holders = tuple(KvHolder(member.slot.stage, member.slot.shard, member.rank) for member in activate.members)
        thread.start()
        self._worker.lead(LedReplica(activate, thread, fetcher, KvHome(parallel, holders, self._settings.dtype)))

    def _broken_elsewhere(self, loop: asyncio.AbstractEventLoop, activate: Activate, reason: str) -> None:
        """`_broken`, from another thread."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._broken, activate, PeerLost(reason))

    def _broken(self, activate: Activate, error: BaseException) -> None:
        """A replica broke: other instances may be gone, this one is not."""
        if not isinstance(error, PeerLost):
            self._on_failure(error)
        elif self._active.get(activate.slot) is activate:
            self._leave(activate.slot, str(error))
            self._failed(activate, str(error), is_permanent=False)

    def _leave(self, slot: Slot, reason: str) -> None:
        activate = self._active.pop(slot, None)
        if activate is None:
            return
        device = activate.device_index
        if slot in self._up:
            self._up.discard(slot)
            if not any(self._active[other].device_index == device for other in self._up):
                self._idle[device] = _held(activate)
        if (slot.stage, slot.shard) == (0, 0):
            self._worker.leave(slot.replica_id, reason)
        self._devices[device].take_down(slot)

    def _failed(self, activate: Activate, reason: str, *, is_permanent: bool) -> None:
        self._report(
            SlotFailed(
                instance_id=self._worker.instance_id,
                device_index=activate.device_index,
                slot=activate.slot,
                plan_epoch=activate.plan_epoch,
                reason=reason,
                is_permanent=is_permanent,
            )
        )


def _held(activate: Activate) -> HeldSlot:
    return HeldSlot(activate.device_index, activate.slot, activate.replica.parallel)
