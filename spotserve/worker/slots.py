"""The slots that one device serves, or is about to serve: bringing them up beside what runs, taking them down.

A slot is brought up while the device goes on serving another: weights that are here already are shared, what peers have is
pulled, the rest is read from files; then the rank is joined to its group. Knows nothing of requests, and of the controller only
what `Activate` says.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spotserve.config import EngineSettings
from spotserve.core.cut import layers_of
from spotserve.core.errors import PeerLost
from spotserve.core.messages import Activate
from spotserve.core.plan import Slot
from spotserve.engine.assemble import Pull
from spotserve.engine.bring_up import prepare
from spotserve.engine.cuts import StageSlice
from spotserve.engine.ranks.group import Group, GroupPlan, LinkedShards, Place
from spotserve.engine.ranks.memory import HeldWeights, RankMemory
from spotserve.engine.ranks.pulse import watch
from spotserve.engine.ranks.rank import Rank
from spotserve.engine.ranks.server import RankServer
from spotserve.engine.shards import Alone
from spotserve.engine.weights import OpenModel

JOIN_TIMEOUT_S = 60.0
"""How long a rank that is ready waits for the others of its replica, which may still load."""


@dataclass(frozen=True, slots=True)
class SlotUp:
    """A slot that can be computed with."""

    slot: Slot
    rank: Rank
    group: Group | None
    weights: HeldWeights
    pulled_bytes: int
    """Weights that came from other devices."""


class Device:
    """One device of this process: its memory, where it listens for other ranks, and its slots."""

    def __init__(self, host: str, settings: EngineSettings, *, secret: str, silence_s: float) -> None:
        """`silence_s`: after how long without a sign of life a peer is given up."""
        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._secret = secret
        self._silence_s = silence_s
        self.memory = RankMemory()
        self.server = RankServer(host, self.memory, secret=secret)
        self.server.start()
        self._slots: dict[Slot, SlotUp] = {}
        self._idle: HeldWeights | None = None
        """Of the last slot that was taken down, while there is no other."""
        self._groups: dict[Slot, Group] = {}
        """Of slots that are up or coming up."""
        self._lock = threading.Lock()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Slots that are up."""
        with self._lock:
            return tuple(self._slots)

    def bring_up(self, activate: Activate, model: OpenModel, *, leads: bool, is_wanted: Callable[[], bool]) -> SlotUp:
        """Makes a slot ready, and joins it to its group. Takes as long as its weights take; for a thread of its own.

        Args:
            activate: what to bring up.
            model: its files and catalogue.
            leads: whether the leader of the replica calls this rank directly.
            is_wanted: whether the slot is still to come up. Asked once `take_down` would find it: one that came earlier, while
                the thread had not begun, has found nothing to take down.

        Raises:
            ModelError: the model cannot be cut like this, read or computed.
            PeerLost: a peer is gone, or did not join in time; or the slot was given up.
        """
        parallel, slot = activate.replica.parallel, activate.slot
        spec = model.catalogue.spec
        group = (
            Group(group_plan(activate, place=(slot.stage, slot.shard), leads=leads))
            if parallel.num_slots > 1 or not leads
            else None
        )
        if group is not None:
            self._groups[slot] = group
            self.server.expect(group)
        try:
            if not is_wanted():
                raise PeerLost("the slot was given up")
            layers = layers_of(spec, parallel)[slot.stage]
            prepared = prepare(
                model,
                StageSlice(layers, spec.num_layers, slot.shard, parallel.tensor),
                self._settings,
                memory=self.memory,
                shards=Alone() if group is None or parallel.tensor == 1 else LinkedShards(group),
                pulls=[Pull(transfer.layer, transfer.rank) for transfer in activate.transfers],
                secret=self._secret,
            )
            if group is not None:
                group.join(secret=self._secret, deadline_s=time.monotonic() + JOIN_TIMEOUT_S)
                watch(group, silence_s=self._silence_s)
        except BaseException as error:
            self._leave_group(slot, str(error))
            raise
        up = SlotUp(slot, prepared.make_rank(group), group, prepared.weights, prepared.pulled_bytes)
        with self._lock:
            self._slots[slot] = up
            idle, self._idle = self._idle, None
        self.memory.add_weights(prepared.weights)
        if idle is not None:
            self.memory.drop_weights(idle)
        return up

    def take_down(self, slot: Slot) -> None:
        """Leaves a slot, up or coming up (`bring_up` raises PeerLost then). The weights of the last one stay, for the next.
        Harmless when it is not here."""
        self._leave_group(slot, "the slot was taken down")
        with self._lock:
            up = self._slots.pop(slot, None)
            if up is None:
                return
            self._idle = None if self._slots else up.weights
        if self._idle is None:
            self.memory.drop_weights(up.weights)
        self.memory.drop_kv_of(up.rank.cache)
        del up
        _give_memory_back()

    def close(self) -> None:
        """Takes every slot down and stops listening."""
        for slot in self.slots:
            self.take_down(slot)
        self.server.close()

    def _leave_group(self, slot: Slot, reason: str) -> None:
        group = self._groups.pop(slot, None)
        if group is not None:
            group.break_off(reason)
            self.server.forget(group)


def _give_memory_back() -> None:
    """To the operating system: the allocator would keep what a slot has freed, and every re-cut would add to it."""
    gc.collect()  # a stage and its module refer to each other
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def group_plan(activate: Activate, *, place: Place | None, leads: bool) -> GroupPlan:
    """The group of a replica, from one of its members or from a leader that has no slot."""
    parallel = activate.replica.parallel
    return GroupPlan(
        group_id=f"{activate.replica.replica_id}@{activate.plan_epoch}",
        pipeline=parallel.pipeline,
        tensor=parallel.tensor,
        place=place,
        leads=leads,
        addresses={(member.slot.stage, member.slot.shard): member.rank for member in activate.members},
    )


async def nothing_to_do() -> None:
    """Brings up what is up."""
