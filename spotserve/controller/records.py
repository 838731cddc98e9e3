"""What the controller knows of instances, replicas and changes. Plain records; `controller.fleet` and `controller.changes` own
them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

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
    launched_s: float = 0.0
    pid: int | None = None
    """None: its worker has not registered."""
    address: Address | None = None
    ranks: tuple[Address, ...] = ()
    """One for each of its devices."""
    instance_type: str = ""
    """Name of its hardware; empty: not known."""
    held: dict[int, tuple[HeldSlot, ...]] = field(default_factory=dict)
    """By device: the slots that it serves or is ready to, or else those whose weights it still has."""
    notice: Notice | None = None
    ready_s: float | None = None
    """Since when its worker takes commands; None: it has not registered yet."""
    is_returned: bool = False
    """It is too many: its notice is our own."""
    is_given_back: bool = False
    """The cloud has been told to end it."""
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
        return _devices(self.instance_id, len(self.ranks))


@lru_cache(maxsize=65_536)
def _devices(instance_id: str, count: int) -> tuple[DeviceId, ...]:
    return tuple(DeviceId(instance_id, index) for index in range(count))


@dataclass(frozen=True, slots=True)
class Leaving:
    """How a draining replica is to be emptied."""

    deadline_s: float
    """It has to be empty by then."""
    tell_by_s: float
    """Its worker is told then at the latest; until then it goes on with what it has."""
    is_replaced: bool
    """Others have taken its place and its machines stay; otherwise a machine of it will be taken."""
    is_told: bool = False


@dataclass(slots=True)
class Replica:
    """One replica of the current plan, or one that is on its way out."""

    plan: ReplicaPlan
    devices: dict[Slot, DeviceId]
    """In the order of slots; see `learn`."""
    state: ReplicaState = ReplicaState.LOADING
    ready_slots: set[Slot] = field(default_factory=set)
    begun_s: float = 0.0
    """When its slots were told to come up, or heard of when another controller had told them."""
    serving_since_s: float = 0.0
    leaving: Leaving | None = None
    """Set while it drains."""
    complete_by_s: float | None = None
    """Of a replica that another controller had brought up, until all of its slots have been heard of."""

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
    def is_complete(self) -> bool:
        """Whether all of its slots are ready."""
        return self.ready_slots.issuperset(self.plan.slots)

    @property
    def leader_id(self) -> str | None:
        """The instance of its first slot, which takes its requests; None while that is not known."""
        device = self.devices.get(Slot(self.replica_id, 0, 0))
        return None if device is None else device.instance_id

    @property
    def instance_ids(self) -> tuple[str, ...]:
        """Instances that hold a part of it, first stage first."""
        return tuple(dict.fromkeys([device.instance_id for device in self.devices.values()]))

    def learn(self, held: Mapping[Slot, DeviceId]) -> None:
        """Somebody has told where these slots are."""
        self.devices = dict(sorted({**self.devices, **held}.items()))

    def route(self, instance: Instance) -> Route:
        """How gateways reach it, given the instance of its first slot, which must be registered."""
        assert instance.address is not None
        return Route(
            replica_id=self.replica_id,
            instance_id=instance.instance_id,
            address=instance.address,
            state=self.state,
            max_batch=self.plan.parallel.max_batch,
        )


@dataclass(slots=True)
class Change:
    """One change of what runs where: replicas that come, replicas that go, and what that moved."""

    epoch: int
    reason: str
    started_s: float
    incoming: frozenset[str]
    outgoing: frozenset[str]
    planned_bytes: int
    """Weights that devices are to take from each other."""
    moved_bytes: int = 0
    """Weights that they have taken."""
    kv_bytes: int = 0
    """KV that has moved with running sequences."""
    switched_s: float | None = None
    """When those that come served and those that go did not any more."""
    finished_s: float | None = None
    """When those that go were empty, or a later plan had overtaken this one."""


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
