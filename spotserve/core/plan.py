"""The target of a fleet (plan) and where it goes (placement), general in (D, P, M, B).

A *slot* is one (replica, stage, shard). A stage holds a contiguous range of decoder layers, the first stage also the
embedding, the last one also the final norm and head; a shard holds an equal part of each of the stage's layers.
"""

import msgspec

from spotserve.core.cluster import DeviceId


class Parallel(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of one replica: P stages x M shards, at most B sequences at once."""

    pipeline: int = 1
    tensor: int = 1
    max_batch: int = 32
    stage_layers: tuple[int, ...] = ()
    """How many decoder layers each stage has; empty: as `core.cut.stage_cuts` divides them."""

    def __post_init__(self) -> None:
        assert self.pipeline >= 1 and self.tensor >= 1 and self.max_batch >= 1
        assert len(self.stage_layers) in (0, self.pipeline) and min(self.stage_layers, default=1) >= 1

    @property
    def num_slots(self) -> int:
        """Devices that one replica of this shape takes."""
        return self.pipeline * self.tensor


class Slot(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One place in a plan."""

    replica_id: str
    stage: int
    shard: int


class ReplicaPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of a plan. Replicas of one plan need not be alike."""

    replica_id: str
    parallel: Parallel
    instance_type: str = ""
    """The type of machine that it is planned for; empty: any."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot, stage by stage."""
        return tuple(
            Slot(self.replica_id, stage, shard) for stage in range(self.parallel.pipeline) for shard in range(self.parallel.tensor)
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What should run: D replicas. `epoch` grows by one with every new plan."""

    epoch: int
    replicas: tuple[ReplicaPlan, ...]
    reason: str

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot of every replica."""
        return tuple(slot for replica in self.replicas for slot in replica.slots)


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Which device takes which slot. A device takes one slot at most."""

    devices: dict[Slot, DeviceId]

    def __post_init__(self) -> None:
        assert len(set(self.devices.values())) == len(self.devices), "a device has two slots"
