"""What a policy makes of a transition, and what that comes to: one judge for all policies.

A policy is asked what should run on the machines that will be there, given what runs. The judge alone puts figures on the answer,
and does so without knowing whose it is: dollars per hour of the machines that are held, modelled latency of the replicas, bytes
from device to device, and the seconds that the busiest port needs for them when every machine sends and receives at once.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol, TypeAlias

from transition_traces import Transition

from spotserve.core.cluster import DeviceId
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Placement, ReplicaPlan
from spotserve.migration.spotserve_2024 import PublishedShape
from spotserve.planner.profile_speed import ProfileSpeed, profile_speed
from spotserve.planner.profiles import Profile
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Latency, Workload


@dataclass(frozen=True, slots=True)
class Machines:
    """What machines are like; all alike."""

    kind: InstanceType
    """Devices, their memory and the network count; how fast devices are is the profile's."""
    usd_per_hour: float
    grace_s: float
    """How long before a transition it is known."""

    def on(self, instances: frozenset[str]) -> tuple[DeviceId, ...]:
        """Devices of these instances, in order."""
        return tuple(DeviceId(instance, index) for instance in sorted(instances) for index in range(self.kind.num_devices))


@dataclass(frozen=True, slots=True)
class Case:
    """A model, what is asked of it, and on what it runs: everything that does not change along a trace."""

    name: str
    profile: Profile
    model: ModelSpec
    """Layers that exist only; float32."""
    published: PublishedShape
    """The same as the artifact keeps it."""
    required_rps: float
    """What the published rule is told to reach."""
    workload: Workload
    """What comes in fact."""
    min_devices: int
    """Of a replica; the published rule allows no smaller one."""
    filled_tokens: int
    """Tokens with KV of a sequence in flight."""
    memory_share: float
    """Of a device's memory, that weights and KV may take."""
    machines: Machines

    def speed_of(self, parallel: Parallel, kind: InstanceType) -> ProfileSpeed | str:
        """How fast a replica of this shape is, or why it cannot be; fit for `planner.search`."""
        memory = round(self.memory_share * kind.device.memory_bytes)
        return profile_speed(self.profile, parallel, model=self.model, device_memory_bytes=memory)


@dataclass(frozen=True, slots=True)
class State:
    """What is placed where."""

    replicas: tuple[ReplicaPlan, ...] = ()
    placement: Placement = field(default_factory=lambda: Placement(devices={}))

    def running(self, sequences: int) -> dict[str, int]:
        """How many of so many sequences in flight each replica has: dealt out one by one, none above its max_batch."""
        counts = {replica.replica_id: 0 for replica in self.replicas}
        for _ in range(sequences):
            free = [each for each in self.replicas if counts[each.replica_id] < each.parallel.max_batch]
            if not free:
                break
            counts[min(free, key=lambda each: counts[each.replica_id]).replica_id] += 1
        return counts


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes of the model or of KV from device to device; what the model does not need does not count."""

    source: DeviceId
    destination: DeviceId
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy makes of a transition."""

    state: State
    transfers: tuple[Transfer, ...]
    held: frozenset[str]
    """Machines that are paid for from then on."""
    interrupted: int
    """Replicas that stop serving for it."""
    label: str
    """The configuration, in words."""
    own: Mapping[str, float] = field(default_factory=dict)
    """Figures that only this policy has, by name."""


class Policy(Protocol):
    """Decides for one case."""

    def decide(self, transition: Transition, state: State, running: Mapping[str, int]) -> Decision:
        """What should run after `transition`, and what moves for it.

        `state` is what runs; `running` has the sequences in flight of each of its replicas. Sources may be machines that leave.
        """
        ...


Modelled: TypeAlias = Callable[[Sequence[ReplicaSpeed], Workload], Latency]
"""Latency of replicas under a workload."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a decision comes to."""

    transition: Transition
    decision: Decision
    usd_per_hour: float
    e2e_p99_s: float | None
    """Modelled; infinite when the load is too much or nothing runs; None: nothing to model it with was given."""
    moved_bytes: float
    """From device to device, within machines too."""
    network_bytes: float
    """From machine to machine."""
    makespan_s: float
    """The bytes of the busiest port, of those of all machines and both directions, at full speed: no schedule is shorter."""
    idle_instances: int
    """Held, with no device that works."""


def judge(case: Case, transition: Transition, decision: Decision, modelled: Modelled | None) -> Verdict:
    """Puts figures on a decision, whosever it is.

    It is a mistake of the policy, and an assertion, when the placement is not on machines that are there, or a replica cannot be.
    """
    used = {device.instance_id for device in decision.state.placement.devices.values()}
    assert used <= decision.held <= transition.after
    assert {slot for each in decision.state.replicas for slot in each.slots} == set(decision.state.placement.devices)
    speeds = [case.speed_of(replica.parallel, case.machines.kind) for replica in decision.state.replicas]
    assert not (refused := [each for each in speeds if isinstance(each, str)]), refused
    ports = _ports(decision.transfers)
    return Verdict(
        transition=transition,
        decision=decision,
        usd_per_hour=len(decision.held) * case.machines.usd_per_hour,
        e2e_p99_s=_p99_s(case, [each for each in speeds if not isinstance(each, str)], modelled),
        moved_bytes=sum(each.num_bytes for each in decision.transfers),
        network_bytes=sum(size for (_, direction), size in ports.items() if direction == "out"),
        makespan_s=max(ports.values(), default=0.0) / case.machines.kind.network.bytes_per_s,
        idle_instances=len(decision.held - used),
    )


def walk(
    case: Case,
    transitions: Sequence[Transition],
    policies: Mapping[str, Policy],
    *,
    sequences: int,
    modelled: Modelled | None,
    leader: str | None = None,
) -> dict[str, list[Verdict]]:
    """Every policy along one trace.

    Args:
        case: model, load and machines.
        transitions: the trace.
        policies: by name.
        sequences: in flight at every transition.
        modelled: gives the latency; None: no latency.
        leader: the policy whose state all start from at every transition; None: each from its own.
    """
    states = {name: State() for name in policies}
    verdicts: dict[str, list[Verdict]] = {name: [] for name in policies}
    for transition in transitions:
        after = {}
        for name, policy in policies.items():
            state = states[leader or name]
            decision = policy.decide(transition, state, state.running(sequences))
            verdicts[name].append(judge(case, transition, decision, modelled))
            after[name] = decision.state
        states = after
    return verdicts


def _p99_s(case: Case, speeds: Sequence[ReplicaSpeed], modelled: Modelled | None) -> float | None:
    if modelled is None:
        return None
    return modelled(speeds, case.workload).e2e_p99_s if speeds else inf


def _ports(transfers: Sequence[Transfer]) -> dict[tuple[str, str], float]:
    """Bytes through each port, by machine and direction."""
    ports: defaultdict[tuple[str, str], float] = defaultdict(float)
    for each in transfers:
        if each.source.instance_id != each.destination.instance_id:
            ports[each.source.instance_id, "out"] += each.num_bytes
            ports[each.destination.instance_id, "in"] += each.num_bytes
    return dict(ports)
