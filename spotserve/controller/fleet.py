"""What the controller knows of instances and replicas. Plain records; `controller.state` is their one owner."""

from dataclasses import dataclass, field

from spotserve.core.cluster import (
    INSTANCE_TRANSITIONS,
    REPLICA_TRANSITIONS,
    DeviceId,
    InstanceState,
    Notice,
    ReplicaState,
    advance,
)
from spotserve.core.messages import Address, Heartbeat, HeldSlot, Route
from spotserve.core.plan import ReplicaPlan, Slot


@dataclass(slots=True)
class Instance:
    """One rented machine."""

    instance_id: str
    spot: bool
    zone: str
    usd_per_hour: float
    state: InstanceState = InstanceState.PENDING
    pid: int | None = None
    """None: its worker has not registered."""
    address: Address | None = None
    num_devices: int = 0
    held: tuple[HeldSlot, ...] = ()
    notice: Notice | None = None
    heartbeat: Heartbeat | None = None
    last_heard_s: float = 0.0

    def move_to(self, target: InstanceState) -> None:
        """Next state of its life.

        Raises:
            IllegalTransition: the table does not allow it.
        """
        self.state = advance(INSTANCE_TRANSITIONS, self.state, target)

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All of its devices."""
        return tuple(DeviceId(self.instance_id, index) for index in range(self.num_devices))


@dataclass(slots=True)
class Replica:
    """One replica of the current plan, or one that is on its way out."""

    plan: ReplicaPlan
    devices: dict[Slot, DeviceId]
    state: ReplicaState = ReplicaState.LOADING
    ready_slots: set[Slot] = field(default_factory=set)

    def move_to(self, target: ReplicaState) -> None:
        """Next state of its life.

        Raises:
            IllegalTransition: the table does not allow it.
        """
        self.state = advance(REPLICA_TRANSITIONS, self.state, target)

    @property
    def replica_id(self) -> str:
        """Its name in plan, routing table and metrics."""
        return self.plan.replica_id

    @property
    def instance_ids(self) -> tuple[str, ...]:
        """Instances that hold a part of it, first stage first."""
        return tuple(dict.fromkeys(device.instance_id for _, device in sorted(self.devices.items())))

    def route(self, address: Address) -> Route:
        """How gateways reach it, given the address of its first instance."""
        return Route(
            replica_id=self.replica_id,
            instance_id=self.instance_ids[0],
            address=address,
            state=self.state,
            max_batch=self.plan.parallel.max_batch,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """One turn of the state: what happened, what was decided, and why."""

    number: int
    time_s: float
    cause: str
    """The event, and whom it is about."""
    commands: tuple[str, ...]
    """Printable commands that follow."""
    reason: str


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """One thing that happened to the fleet, for timelines and reports."""

    seq: int
    time_s: float
    kind: str
    instance: str
    detail: dict[str, object]
