"""Replicas of several ranks in one process: real devices, links and engines, without workers and controller."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from spotserve.config import EngineSettings
from spotserve.core.cluster import DeviceId
from spotserve.core.errors import PeerLost
from spotserve.core.messages import Activate, KvHolder, Member, WeightTransfer
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.engine.engine import Engine
from spotserve.engine.ranks.leader import LinkedRanks, Ranks, SingleRank
from spotserve.engine.weights import OpenModel
from spotserve.speculation.speculator import Speculator
from spotserve.worker.replicas import Fetcher, KvHome
from spotserve.worker.slots import Device, SlotUp

SECRET = "of the replicas"
SILENCE_S = 5.0
PATIENCE_S = 20.0
Shape = tuple[int, int] | tuple[int, int, tuple[int, ...]]
"""(P, M), and how many layers each stage has where it is not as usual."""


@contextmanager
def devices(count: int, settings: EngineSettings) -> Iterator[list[Device]]:
    """So many devices, until the end of the block."""
    made = [Device("127.0.0.1", settings, secret=SECRET, silence_s=SILENCE_S) for _ in range(count)]
    try:
        yield made
    finally:
        for device in made:
            device.close()


@dataclass
class Replica:
    """A replica that computes."""

    replica: ReplicaPlan
    engine: Engine
    devices: Sequence[Device]
    ups: Sequence[SlotUp]
    fetcher: Fetcher
    home: KvHome

    @property
    def pulled_bytes(self) -> int:
        return sum(up.pulled_bytes for up in self.ups)

    def end(self) -> None:
        """Leaves every slot."""
        self.engine.close()
        self.fetcher.close()
        for device, up in zip(self.devices, self.ups, strict=True):
            device.take_down(up.slot)


def start(
    name: str,
    shape: Shape,
    on: Sequence[Device],
    model: OpenModel,
    settings: EngineSettings,
    *,
    transfers: Mapping[Slot, tuple[WeightTransfer, ...]] | None = None,
    epoch: int = 1,
    speculator: Speculator | None = None,
) -> Replica:
    """Brings a replica up on the first devices, stage by stage."""
    cut = shape[2] if len(shape) > 2 else ()
    replica = ReplicaPlan(replica_id=name, parallel=Parallel(pipeline=shape[0], tensor=shape[1], stage_layers=cut))
    used = on[: replica.parallel.num_slots]
    members = tuple(
        Member(slot, DeviceId("i", index), device.server.address)
        for index, (slot, device) in enumerate(zip(replica.slots, used, strict=True))
    )

    def bring_up(index: int) -> SlotUp:
        slot = replica.slots[index]
        activate = Activate(
            instance_id="i",
            device_index=index,
            replica=replica,
            slot=slot,
            plan_epoch=epoch,
            members=members,
            transfers=(transfers or {}).get(slot, ()),
        )
        return used[index].bring_up(activate, model, leads=index == 0, is_wanted=lambda: True)

    with ThreadPoolExecutor(len(used)) as pool:
        ups = list(pool.map(bring_up, range(len(used))))
    for up in ups[1:]:
        threading.Thread(target=_serve, args=(up,), daemon=True).start()
    first = ups[0]
    ranks: Ranks = SingleRank(first.rank) if first.group is None else LinkedRanks(first.rank, first.group)
    activate = Activate(instance_id="i", device_index=0, replica=replica, slot=replica.slots[0], plan_epoch=epoch, members=members)
    fetcher = Fetcher(
        activate, model.catalogue.spec, dtype=settings.dtype, own=used[0].server.address, memory=used[0].memory, secret=SECRET
    )
    holders = tuple(KvHolder(member.slot.stage, member.slot.shard, member.rank) for member in members)
    engine = Engine(ranks, settings, spec=model.catalogue.spec, end_token_ids=model.end_token_ids, speculator=speculator)
    return Replica(replica, engine, used, ups, fetcher, KvHome(replica.parallel, holders, settings.dtype))


def _serve(up: SlotUp) -> None:
    try:
        up.rank.serve()
    except PeerLost:
        return  # the test took it down


def hand_over(request_id: str, old: Replica, new: Replica) -> int:
    """Moves a running sequence; the bytes of KV that went from one device to another."""
    frozen = old.engine.freeze(request_id)
    assert frozen is not None
    moved_bytes = new.fetcher.fetch(frozen, old.home).result(PATIENCE_S)
    assert new.engine.adopt(frozen)
    old.engine.release(request_id)
    return moved_bytes
