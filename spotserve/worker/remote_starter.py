"""From `Activate` to a replica that a server computes, and from `Deactivate` or a lost server to one that is gone.

Stands in for `ReplicaStarter` where the engine is a server: there are no weights, no ranks and no KV to move, and a replica is one
slot. Says what came of it; does not know why.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError, PeerLost
from spotserve.core.messages import Activate, Address, Deactivate, HeldSlot, SlotFailed, SlotReady, WorkerEvent
from spotserve.core.model import ModelSpec
from spotserve.core.plan import ReplicaPlan, Slot
from spotserve.engine.remote.remote_engine import RemoteEngine
from spotserve.worker.engine_thread import EngineThread
from spotserve.worker.replicas import KvHome, LedReplica
from spotserve.worker.slots import nothing_to_do
from spotserve.worker.worker import Worker


class RemoteStarter:
    """Owner of this worker's connections to a model server."""

    def __init__(
        self,
        worker: Worker,
        settings: EngineSettings,
        *,
        host: str,
        report: Callable[[WorkerEvent], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """`report` tells the controller; `on_failure` hears of errors that nobody expected."""
        self._worker = worker
        self._settings = settings
        self._host = host
        self._report = report
        self._on_failure = on_failure
        self._active: dict[Slot, Activate] = {}
        """Slots that are up or coming up."""
        self._up: set[Slot] = set()
        self.model: ModelSpec | None = None
        """The model, once it is known."""
        self.held: tuple[HeldSlot, ...] = ()
        """Weights in the memory of its devices: none."""

    @property
    def ranks(self) -> tuple[Address, ...]:
        """One device, where no rank listens."""
        return (Address(self._host, 0),)

    @property
    def serving(self) -> tuple[ReplicaPlan, ...]:
        """Replicas that are up here."""
        return tuple(self._active[slot].replica for slot in self._up)

    def activate(self, activate: Activate) -> Coroutine[Any, Any, None]:
        """Takes note that a slot is wanted; what it returns connects its replica to the server and says so, or why not. A slot that
        is up, or coming up, is left alone."""
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

    async def _come_up(self, activate: Activate) -> None:
        slot, parallel = activate.slot, activate.replica.parallel
        settings = self._settings.model_copy(update={"max_batch": parallel.max_batch})
        try:
            if parallel.num_slots > 1:
                raise ModelError("a model server is taken whole: one stage and one shard")
            engine = await asyncio.to_thread(RemoteEngine, settings)
        except (ModelError, PeerLost) as error:
            if self._active.get(slot) is activate:
                self._give_up(activate, error)
            return
        if self._active.get(slot) is not activate:
            engine.close()  # it was given up meanwhile
            return
        self.model = engine.spec
        thread = EngineThread(engine, on_step=self._worker.on_step, on_failure=partial(self._broken, activate))
        thread.start()
        self._up.add(slot)
        self._worker.lead(LedReplica(activate, thread, None, KvHome(parallel, (), self._settings.dtype)))
        self._report(
            SlotReady(
                instance_id=self._worker.instance_id,
                device_index=activate.device_index,
                slot=slot,
                plan_epoch=activate.plan_epoch,
                model=engine.spec,
                pulled_bytes=0,
                invariant=engine.invariant,
            )
        )

    def _broken(self, activate: Activate, error: BaseException) -> None:
        """The server is gone, or turns everyone away: what ran there goes back to its gateways."""
        if not isinstance(error, ModelError | PeerLost):
            self._on_failure(error)
        elif self._active.get(activate.slot) is activate:
            self._give_up(activate, error)

    def _give_up(self, activate: Activate, error: ModelError | PeerLost) -> None:
        self._leave(activate.slot, str(error))
        self._report(
            SlotFailed(
                instance_id=self._worker.instance_id,
                device_index=activate.device_index,
                slot=activate.slot,
                plan_epoch=activate.plan_epoch,
                reason=str(error),
                is_permanent=isinstance(error, ModelError),
            )
        )

    def _leave(self, slot: Slot, reason: str) -> None:
        if self._active.pop(slot, None) is not None:
            self._up.discard(slot)
            self._worker.leave(slot.replica_id, reason)
