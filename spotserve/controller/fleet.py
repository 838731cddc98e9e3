"""All instances and replicas, and what can be read off them. The one owner of both."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spotserve.controller.methods import PRODUCTION, Methods
from spotserve.controller.records import Instance, Replica
from spotserve.core.cluster import DeviceId, InstanceState, ReplicaState
from spotserve.core.hardware import InstanceType, Link
from spotserve.core.messages import Address, Deactivate, HeldSlot
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Slot
from spotserve.migration.flows import InstanceLinks
from spotserve.migration.verdicts import Destination, InstanceSpeed
from spotserve.planner.planner import number_of

LINK_BYTES_PER_S = 200e6
"""What one worker moves to another until it has been measured: half of what one loopback stream of small frames gives."""

UNKNOWN_LINKS = InstanceLinks(network=Link(0.0, LINK_BYTES_PER_S), inside=Link(0.0, LINK_BYTES_PER_S))
"""Of a machine that does not say what kind it is."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica has to do."""

    num_sequences: int
    context_tokens: int
    """Of these sequences."""
    kv_tokens: int
    """In its KV cache."""


class Fleet:
    """The fleet as the controller knows it."""

    def __init__(self, methods: Methods = PRODUCTION) -> None:
        self.methods = methods
        """By what is decided."""
        self.instances: dict[str, Instance] = {}
        self.replicas: dict[str, Replica] = {}
        self.model: ModelSpec | None = None
        self.hardware: dict[str, InstanceType] = {}
        """Kinds of machines by name; `controller.refitting` keeps them."""
        self.dropped: set[str] = set()
        """Replicas that have ended; a worker that still reports a part of one has not heard it yet."""

    # ------------------------------------------------------------------ instances and devices

    def alive(self) -> list[Instance]:
        """Instances that are not gone."""
        return [instance for instance in self.instances.values() if instance.state is not InstanceState.GONE]

    def ready_devices(self) -> list[DeviceId]:
        """Devices that are there to stay."""
        return [device for instance in self.alive() if instance.state is InstanceState.READY for device in instance.devices]

    def held(self) -> dict[DeviceId, Sequence[HeldSlot]]:
        """What every device that can be reached has in memory."""
        return {device: instance.held.get(device.index, ()) for instance in self.alive() for device in instance.devices}

    def rank_of(self, device: DeviceId) -> Address:
        """Where the rank of a device listens whose instance has registered."""
        return self.instances[device.instance_id].ranks[device.index]

    def links(self) -> dict[str, InstanceLinks]:
        """How fast bytes get out of, into and about every machine that is not gone."""
        known = {name: InstanceLinks(each.network, each.device_link) for name, each in self.hardware.items()}
        return {instance.instance_id: known.get(instance.instance_type, UNKNOWN_LINKS) for instance in self.alive()}

    def deadlines_s(self) -> dict[str, float]:
        """When machines that are under notice are taken."""
        return {each.instance_id: each.notice.deadline_s for each in self.alive() if each.notice is not None}

    # ------------------------------------------------------------------ replicas

    def in_state(self, state: ReplicaState) -> list[Replica]:
        """Replicas in this state, oldest first."""
        found = [replica for replica in self.replicas.values() if replica.state is state]
        return sorted(found, key=lambda each: number_of(each.replica_id))

    def replicas_on(self, instance_id: str) -> list[Replica]:
        """Replicas with a slot on this instance."""
        return [replica for replica in self.replicas.values() if instance_id in replica.instance_ids]

    def on_devices(self, devices: Iterable[DeviceId]) -> list[Replica]:
        """Replicas with a slot on one of these devices."""
        wanted = set(devices)
        return [replica for replica in self.replicas.values() if not wanted.isdisjoint(replica.devices.values())]

    def is_undisturbed(self, replica: Replica) -> bool:
        """Whether all machines of a replica are there to stay."""
        known = (self.instances.get(instance_id) for instance_id in replica.instance_ids)
        return all(instance is not None and instance.state is InstanceState.READY for instance in known)

    def leader_of(self, replica: Replica) -> Instance | None:
        """The instance that takes a replica's requests, when it can be reached."""
        leader = self.instances.get(replica.leader_id or "")
        return leader if leader is not None and leader.address is not None else None

    def note_ready(self, replica: Replica, slot: Slot) -> None:
        """A device holds the weights of its slot. What it held for slots that have ended it keeps no longer."""
        replica.ready_slots.add(slot)
        device = replica.devices[slot]
        self._keep_what_is_used(device, self.replicas_on(device.instance_id))

    def drop(self, replica: Replica, *, but: Slot | None = None) -> list[Deactivate]:
        """Forgets a replica; what its devices are to be told, except the one of slot `but`."""
        replica.move_to(ReplicaState.STOPPED)
        del self.replicas[replica.replica_id]
        self.dropped.add(replica.replica_id)
        there = [each for each in replica.instance_ids if self.instances[each].state is not InstanceState.GONE]
        others = {instance_id: self.replicas_on(instance_id) for instance_id in there}
        told = []
        for slot, device in replica.devices.items():
            if device.instance_id not in others:
                continue
            self._keep_what_is_used(device, others[device.instance_id])
            if slot != but:
                told.append(Deactivate(instance_id=device.instance_id, device_index=device.index, slot=slot))
        return told

    def _keep_what_is_used(self, device: DeviceId, replicas: Iterable[Replica]) -> None:
        """A device has the weights of its ready slots; when there are none, it keeps what it had."""
        used = tuple(
            HeldSlot(device.index, slot, replica.plan.parallel)
            for replica in replicas
            for slot in sorted(replica.ready_slots)
            if replica.devices[slot] == device
        )
        if used:
            self.instances[device.instance_id].held[device.index] = used

    # ------------------------------------------------------------------ load

    def loads(self, replicas: Iterable[Replica]) -> list[Load]:
        """What replicas have to do, in their order, as their leaders' last heartbeats tell.

        A heartbeat counts for all replicas that the instance leads, in equal parts; one that began to serve after it has none.
        """
        sharing = Counter(
            leader.instance_id
            for each in self.replicas.values()
            if each.state in (ReplicaState.SERVING, ReplicaState.DRAINING)
            and (leader := self.leader_of(each)) is not None
            and each.serving_since_s < leader.last_heard_s
        )
        loads = []
        for replica in replicas:
            leader = self.leader_of(replica)
            if leader is None or leader.heartbeat is None or replica.serving_since_s >= leader.last_heard_s:
                loads.append(Load(0, 0, 0))
                continue
            heartbeat, share = leader.heartbeat, max(1, sharing[leader.instance_id])
            context_tokens = sum([sequence.context_tokens for sequence in heartbeat.sequences])
            num_sequences = -(-(heartbeat.running + heartbeat.waiting) // share)
            loads.append(Load(num_sequences, context_tokens // share, heartbeat.kv_tokens_used // share))
        return loads

    def destinations(self) -> list[Destination]:
        """Replicas that can take sequences over."""
        serving = self.in_state(ReplicaState.SERVING)
        destinations = []
        for replica, load in zip(serving, self.loads(serving), strict=True):
            leader = self.leader_of(replica)
            if leader is None or leader.address is None:
                continue
            destinations.append(
                Destination(
                    replica_id=replica.replica_id,
                    instance_id=leader.instance_id,
                    address=leader.address,
                    free_sequences=max(0, replica.plan.parallel.max_batch - load.num_sequences),
                    speed=self.speed_of(leader),
                    context_tokens=load.context_tokens,
                )
            )
        return destinations

    def speed_of(self, instance: Instance) -> InstanceSpeed:
        """What heartbeats say of an instance's speed, and its kind of its network; 0 where nothing is known yet."""
        heartbeat, hardware = instance.heartbeat, self.hardware.get(instance.instance_type)
        return InstanceSpeed(
            step_s=heartbeat.step_s if heartbeat is not None else 0.0,
            prefill_tokens_per_s=heartbeat.prefill_tokens_per_s if heartbeat is not None else 0.0,
            link_bytes_per_s=LINK_BYTES_PER_S if hardware is None else hardware.network.bytes_per_s,
        )
