"""The machines of a fleet as the planner's search knows them: how many devices of which kind, and which of them are free."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Instance, Replica
from spotserve.core.cluster import InstanceState
from spotserve.planner.fleets import Pool

Kind = tuple[str, bool]
"""Type of machine, and whether it is rented on the spot market."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Devices of machines that are there to stay and say what they are."""

    all: tuple[Pool, ...]
    free: tuple[Pool, ...]
    """Those beside the replicas that are kept; pools without any are left out."""

    @property
    def num_devices(self) -> int:
        """Of all pools."""
        return sum(pool.num_devices for pool in self.all)


def offer_of(fleet: Fleet, kept: Sequence[Replica]) -> Offer:
    """What there is to plan with when the devices of `kept` are taken. Machines of one kind in several zones are one pool, at the
    mean of their prices: where a replica goes is a matter of placement."""
    machines = [each for each in fleet.alive() if each.state is InstanceState.READY and each.instance_type in fleet.hardware]
    by_kind: dict[Kind, list[Instance]] = {}
    for machine in machines:
        by_kind.setdefault(kind_of(machine), []).append(machine)
    used = Counter([device.instance_id for replica in kept for device in set(replica.devices.values())])
    taken: Counter[Kind] = Counter()
    for instance_id, num_devices in used.items():
        taken[kind_of(fleet.instances[instance_id])] += num_devices
    pools = []
    for (name, spot), members in sorted(by_kind.items()):
        usd_per_hour = sum(each.usd_per_hour for each in members) / len(members)
        num_devices = sum(len(each.devices) for each in members)
        pools.append((Pool(fleet.hardware[name], num_devices, usd_per_hour, spot=spot), taken[name, spot]))
    return Offer(
        tuple(pool for pool, _ in pools),
        tuple(replace(pool, num_devices=pool.num_devices - gone) for pool, gone in pools if pool.num_devices > gone),
    )


def kind_of(machine: Instance) -> Kind:
    """What its pool has in common."""
    return machine.instance_type, machine.spot
