"""Everything that one process can say to another: a closed, typed set.

Each edge of the process graph has its own union, so that the graph can be read from the types:

    worker  -> controller   WorkerEvent         what happened on an instance
    cloud   -> controller   CloudEvent          what the provider says (inside the controller's process)
    controller -> worker    WorkerCommand       what an instance is to do
    controller -> cloud     CloudCommand        machines to rent and to return
    controller -> gateway   RoutingTable        where requests may go
    gateway -> controller   GatewayMessage
    gateway -> worker       GatewayCommand
    worker  -> gateway      WorkerReply
    worker <-> worker       PeerMessage         hand-over of a running sequence

`PROTOCOL_VERSION` is compared when two processes meet.
"""

from enum import Enum
from typing import TypeAlias

import msgspec

from spotserve.core.cluster import DeviceId, Notice, ReplicaState
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.core.request import Request, TokenDelta

PROTOCOL_VERSION = 3


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of every message; the tag is the class name."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a process listens for other processes of the system."""

    host: str
    port: int


# --------------------------------------------------------------------------- worker -> controller


class SequenceReport(msgspec.Struct, frozen=True, array_like=True):
    """One running sequence, as far as deciding needs to know it."""

    request_id: str
    context_tokens: int
    """Prompt and output so far."""
    computed_tokens: int
    """Tokens whose KV is in the cache."""
    remaining_tokens: int
    """At most this many output tokens are still to come."""


class HeldSlot(msgspec.Struct, frozen=True, array_like=True):
    """Weights that a device has in memory: those of `slot` in a replica of the shape `parallel`.

    While a device is re-cut it has two: the slot that still serves, and the one that will.
    """

    device_index: int
    slot: Slot
    parallel: Parallel


class Registered(Message, frozen=True):
    """A worker is up; sent first on every connection to the controller, so that a new controller learns what runs."""

    instance_id: str
    address: Address
    pid: int
    ranks: tuple[Address, ...]
    """Where the rank of each of its devices listens for other ranks."""
    spot: bool
    zone: str
    replicas: tuple[ReplicaPlan, ...] = ()
    """Replicas whose slots it already serves."""
    held: tuple[HeldSlot, ...] = ()
    model: ModelSpec | None = None
    """The model that it is to serve, once it has read what that is."""
    hardware: InstanceType | None = None
    """What kind of machine it is; None: it does not know."""


class Calibrated(Message, frozen=True):
    """A worker has measured how fast its devices are."""

    instance_id: str
    hardware: InstanceType


class ModelRead(Message, frozen=True):
    """A worker has read what the model is that it is to serve, or cannot; it holds no weights of it yet."""

    instance_id: str
    model: ModelSpec | None
    reason: str = ""
    """Why not, when `model` is None."""


class Heartbeat(Message, frozen=True):
    """Load and speed of an instance, a few times a second."""

    instance_id: str
    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    step_s: float
    """Typical time of one decode step now; 0 before the first."""
    prefill_tokens_per_s: float
    """Measured speed of computing prompts; 0 before the first."""
    store_healthy: bool
    """Whether its last commit reached the store."""
    sequences: tuple[SequenceReport, ...]


class SlotReady(Message, frozen=True):
    """A device holds the weights of its slot and is joined to the other ranks of its replica."""

    instance_id: str
    device_index: int
    slot: Slot
    plan_epoch: int
    model: ModelSpec
    pulled_bytes: int
    """Weights that came from other devices; what the device had already, and what came from files, does not count."""
    invariant: str
    """What its arithmetic keeps bit-equal: a name of `config.Invariant`."""


class SlotFailed(Message, frozen=True):
    """A device cannot serve its slot: it could not be brought up, or another rank of its replica was lost."""

    instance_id: str
    device_index: int
    slot: Slot
    plan_epoch: int
    reason: str
    is_permanent: bool
    """Whether trying again is pointless (the model cannot be served) or not (a peer was lost)."""


class SequenceMoved(Message, frozen=True):
    """A running sequence and its KV went to another instance."""

    instance_id: str
    request_id: str
    destination_replica_id: str
    kv_bytes: int
    """That went from one device to another; what was on its device already does not count."""
    seconds: float


class Drained(Message, frozen=True):
    """Nothing runs any more on a replica that was told to drain."""

    instance_id: str
    replica_id: str


WorkerEvent: TypeAlias = Registered | Calibrated | ModelRead | Heartbeat | SlotReady | SlotFailed | SequenceMoved | Drained

# --------------------------------------------------------------------------- cloud -> controller


class InstanceLaunched(Message, frozen=True):
    """The provider starts a machine; its worker will register."""

    instance_id: str
    spot: bool
    zone: str
    usd_per_hour: float


TERMINATED = "terminated"
"""Reason of an `InstanceLost` that the user wished for."""


class LaunchRefused(Message, frozen=True):
    """The provider does not start machines that were asked for; those of them that had started by then have been told of."""

    count: int
    spot: bool
    zone: str | None
    reason: str


class InstanceLost(Message, frozen=True):
    """A machine is gone, with or without a notice before."""

    instance_id: str
    reason: str


class NoticeReceived(Message, frozen=True):
    """The provider will take a machine, or says that the risk has grown."""

    notice: Notice


class Reshape(Message, frozen=True):
    """The user wants another shape from now on, or leaves it to the planner."""

    data: int | None
    """Replicas; None: as many as the devices allow."""
    pipeline: int | None
    """Stages; None, and `tensor` None: the planner chooses shapes."""
    tensor: int | None

    def __post_init__(self) -> None:
        assert (self.pipeline is None) is (self.tensor is None) and (self.pipeline is not None or self.data is None)


class Tick(Message, frozen=True):
    """Time has passed; sent when a deadline that the state asked for is reached."""


CloudEvent: TypeAlias = InstanceLaunched | LaunchRefused | InstanceLost | NoticeReceived | Reshape | Tick

# --------------------------------------------------------------------------- controller -> worker


class SequenceAction(Enum):
    """What becomes of a running sequence when its instance goes."""

    FINISH = "finish"
    """It ends before the deadline where it is."""
    MOVE = "move"
    """Its KV goes to its next owner."""
    RESUME = "resume"
    """Its next owner computes it again from its tokens."""
    SPLIT = "split"
    """Its next owner computes the first tokens again while the KV of the others is sent. Given only to workers that can do so."""


class SequenceOrder(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The verdict on one sequence, and why."""

    request_id: str
    action: SequenceAction
    destination_replica_id: str | None
    destination: Address | None
    """Where its KV goes, if it is moved; None when nobody takes it."""
    reason: str
    recompute_tokens: int = 0
    """Of SPLIT: how many of the first tokens are computed again."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One slot of a replica, the device that has it, and where that device's rank listens."""

    slot: Slot
    device: DeviceId
    rank: Address


class WeightTransfer(msgspec.Struct, frozen=True, array_like=True):
    """Take from `source` what you lack of one layer and it has. Transfers are carried out in the order in which they are listed."""

    layer: int
    """Index of a decoder layer, or a pseudo-layer of `core.cut`."""
    source: DeviceId
    rank: Address
    """Where the source's rank listens."""
    num_bytes: int
    """What that comes to."""


class Activate(Message, frozen=True):
    """Bring up `slot` of `replica` on a device, beside what it serves now, and join the other ranks.

    What the device has already is shared, then `transfers` are carried out, and what is still missing is read from files.
    """

    instance_id: str
    device_index: int
    replica: ReplicaPlan
    slot: Slot
    plan_epoch: int
    members: tuple[Member, ...]
    """Every slot of the replica, stage by stage. The instance of the first one schedules for all."""
    transfers: tuple[WeightTransfer, ...] = ()


class Deactivate(Message, frozen=True):
    """Leave `slot`: its replica has ended. Weights stay until the device has another slot to serve."""

    instance_id: str
    device_index: int
    slot: Slot


class Drain(Message, frozen=True):
    """Take nothing new; carry out `orders` before the deadline; treat sequences without an order as `fallback` says."""

    instance_id: str
    replica_id: str
    deadline_s: float
    orders: tuple[SequenceOrder, ...]
    fallback: SequenceOrder
    """`request_id` is empty: the verdict on every sequence that the controller had not heard of yet. What does not finish in
    time moves to its destination."""


class Undrain(Message, frozen=True):
    """The notice did not come true: take requests again."""

    instance_id: str
    replica_id: str


class Stop(Message, frozen=True):
    """Leave: the instance is no longer wanted."""

    instance_id: str


WorkerCommand: TypeAlias = Activate | Deactivate | Drain | Undrain | Stop

# --------------------------------------------------------------------------- controller -> cloud and gateway


class Launch(Message, frozen=True):
    """Rent machines."""

    count: int
    spot: bool
    zone: str | None = None
    """Where; None: the provider chooses."""
    reason: str = ""
    """For people."""


class Terminate(Message, frozen=True):
    """Return a machine."""

    instance_id: str


CloudCommand: TypeAlias = Launch | Terminate


class Route(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One replica, as a gateway needs to know it."""

    replica_id: str
    instance_id: str
    """The instance of its first stage, which takes its requests."""
    address: Address
    state: ReplicaState
    max_batch: int


class RoutingTable(Message, frozen=True):
    """All replicas that gateways may talk to. New requests go to those that serve, and to no other."""

    version: int
    replicas: tuple[Route, ...]
    model: ModelSpec | None


class Publish(Message, frozen=True):
    """Send the routing table to every gateway."""

    table: RoutingTable


Command: TypeAlias = WorkerCommand | CloudCommand | Publish

# --------------------------------------------------------------------------- gateway -> controller


class GatewayAttached(Message, frozen=True):
    """A gateway wants routing tables."""

    gateway_id: str


class Served(msgspec.Struct, frozen=True, array_like=True):
    """Size of one sequence that was answered in full."""

    prompt_tokens: int
    output_tokens: int


class GatewayReport(Message, frozen=True):
    """What one gateway has to do: sequences by state now, and what came and went since its last report."""

    gateway_id: str
    queued: int
    running: int
    suspended: int
    finished: int
    lost: int
    arrived: int = 0
    """Sequences accepted since the last report."""
    served: tuple[Served, ...] = ()
    """Some of the sequences answered since the last report: the newest ones when there are many."""


class SequenceResumed(Message, frozen=True):
    """A sequence lost its owner, or its owner let go of it, and goes on elsewhere from its tokens."""

    request_id: str
    reason: str


GatewayMessage: TypeAlias = GatewayAttached | GatewayReport | SequenceResumed

# --------------------------------------------------------------------------- gateway <-> worker


class Attach(Message, frozen=True):
    """First message of a gateway to a worker: from here on, deltas of its sequences go to this connection.

    The worker answers with the whole progress of every sequence it has for this gateway.
    """

    gateway_id: str


class Submit(Message, frozen=True):
    """Run a request, from `emitted_token_ids` on. A worker that already has it under an older epoch keeps its progress."""

    request: Request
    epoch: int
    emitted_token_ids: tuple[int, ...] = ()


class Claim(Message, frozen=True):
    """If you have this sequence, whoever its gateway was: it is mine now, send its whole progress."""

    request_id: str


class Cancel(Message, frozen=True):
    """Forget the sequence, unless it is owned under a newer epoch."""

    request_id: str
    epoch: int


GatewayCommand: TypeAlias = Attach | Submit | Claim | Cancel


class Deltas(Message, frozen=True):
    """What one engine step made, for one gateway."""

    deltas: tuple[TokenDelta, ...]


class Released(Message, frozen=True):
    """The worker does not run this sequence any more (drain, or it never could); its gateway finds it another owner."""

    request_id: str
    epoch: int
    reason: str
    destination_replica_id: str | None = None
    """Where the controller suggests to go on."""


class Moved(Message, frozen=True):
    """The sequence and its KV went to another worker, which owns it under `epoch` from now on."""

    request_id: str
    epoch: int
    destination_replica_id: str


class ClaimAnswered(Message, frozen=True):
    """Answer to `Claim`: whether the sequence is here. Its progress follows when it is."""

    request_id: str
    found: bool


WorkerReply: TypeAlias = Deltas | Released | Moved | ClaimAnswered

# --------------------------------------------------------------------------- worker <-> worker


class KvHolder(msgspec.Struct, frozen=True, array_like=True):
    """A rank that has part of a sequence's KV, and where it listens."""

    stage: int
    shard: int
    rank: Address


class HandOver(Message, frozen=True):
    """A sequence on its way to its next owner, whose ranks pull its KV from the ranks of the old one.

    The old owner has stopped computing it and keeps its KV until it has the answer.
    """

    gateway_id: str
    request: Request
    epoch: int
    progress: TokenDelta
    """What the old owner can tell of it: log-probabilities and gaps from where they are known."""
    emitted_token_ids: tuple[int, ...]
    """All output so far, from position 0."""
    computed_tokens: int
    """Tokens whose KV is held."""
    replica_id: str
    """The old owner's: with the request's id the name under which its ranks give out the KV."""
    parallel: Parallel
    """Shape of the old owner."""
    holders: tuple[KvHolder, ...]
    dtype: str
    learned: dict[str, tuple[float, float]] = {}
    """What drafters were worth for it: by drafter, accepted and expected tokens. Their KV stays behind."""


class HandOverAnswered(Message, frozen=True):
    """Whether the sequence has a new owner; if not, the old one keeps it."""

    request_id: str
    accepted: bool
    reason: str = ""
    kv_bytes: int = 0
    """That came from other devices."""


PeerMessage: TypeAlias = HandOver | HandOverAnswered

WorkerInbound: TypeAlias = GatewayCommand | HandOver
"""What may arrive at a worker's listening port."""

Event: TypeAlias = WorkerEvent | CloudEvent | SequenceResumed | GatewayReport
"""What the controller's state handles."""

ControllerInbound: TypeAlias = WorkerEvent | GatewayMessage
"""What may arrive at the controller's listening port."""
