"""What a fleet consists of, and the life of each part as a table.

A transition that is not in its table raises `IllegalTransition`: it would be a bug of ours.
"""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

import msgspec

from spotserve.core.errors import IllegalTransition


class InstanceState(Enum):
    """A rented machine."""

    PENDING = "pending"
    """Asked for; its worker has not registered yet."""
    READY = "ready"
    """Its worker is registered and takes commands."""
    DRAINING = "draining"
    """It will be taken at a known deadline."""
    GONE = "gone"
    """Taken, terminated or dead. Final."""


class ReplicaState(Enum):
    """A set of slots that together hold one copy of the model."""

    LOADING = "loading"
    """Weights are on their way."""
    SERVING = "serving"
    """In the routing table."""
    DRAINING = "draining"
    """Out of the routing table; its sequences finish or leave."""
    STOPPED = "stopped"
    """Final."""


class RequestState(Enum):
    """A sequence, as its gateway sees it."""

    QUEUED = "queued"
    """Accepted; no replica has it yet."""
    RUNNING = "running"
    """One replica owns it."""
    SUSPENDED = "suspended"
    """Its owner was lost or let go of it; the next one is not chosen yet."""
    FINISHED = "finished"
    """Final."""


INSTANCE_TRANSITIONS: Mapping[InstanceState, frozenset[InstanceState]] = {
    InstanceState.PENDING: frozenset({InstanceState.READY, InstanceState.DRAINING, InstanceState.GONE}),
    InstanceState.READY: frozenset({InstanceState.DRAINING, InstanceState.GONE}),
    InstanceState.DRAINING: frozenset({InstanceState.READY, InstanceState.GONE}),
    InstanceState.GONE: frozenset(),
}

REPLICA_TRANSITIONS: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.LOADING: frozenset({ReplicaState.SERVING, ReplicaState.DRAINING, ReplicaState.STOPPED}),
    ReplicaState.SERVING: frozenset({ReplicaState.DRAINING, ReplicaState.STOPPED}),
    ReplicaState.DRAINING: frozenset({ReplicaState.SERVING, ReplicaState.STOPPED}),
    ReplicaState.STOPPED: frozenset(),
}

REQUEST_TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.SUSPENDED, RequestState.FINISHED}),
    RequestState.SUSPENDED: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}

State = TypeVar("State", InstanceState, ReplicaState, RequestState)


def advance(table: Mapping[State, frozenset[State]], current: State, target: State) -> State:
    """`target`, when the table allows it after `current`.

    Raises:
        IllegalTransition: the table does not have this transition.
    """
    if target not in table[current]:
        raise IllegalTransition(f"{type(current).__name__} cannot go from {current.name} to {target.name}")
    return target


class DeviceId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One accelerator (or, on a CPU machine, the machine itself): the `index`-th device of an instance."""

    instance_id: str
    index: int


class NoticeKind(Enum):
    """How sure the cloud is."""

    HARD = "hard"
    """The instance will be taken at the deadline: drain."""
    SOFT = "soft"
    """The instance is at raised risk (a rebalance recommendation): pre-warm, do not drain."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """The cloud's word that an instance will be taken.

    Its identity derives from instance and deadline, so that two sources of one notice collapse to one.
    """

    instance_id: str
    deadline_s: float
    """When the instance goes, seconds since the Unix epoch."""
    kind: NoticeKind = NoticeKind.HARD
    source: str = "local"

    @property
    def notice_id(self) -> str:
        """Equal for equal instance and deadline (to the second), whatever the source."""
        return f"{self.instance_id}@{self.deadline_s:.0f}"
