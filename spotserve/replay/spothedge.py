"""Policy `spothedge`: how SkyServe keeps a fleet (SpotHedge: Mao et al., EuroSys'25), on machines of one kind.

    spot       = N_tar + N_extra replicas, spread over zones
    on demand  = min(N_tar, N_tar + N_extra - spot replicas that are ready)

A zone that took a machine, or gave none, is left alone while others are *active*; one that gives a machine is active again. It
knows no notices and moves nothing: a new replica reads its weights from files, and clients send again, from the beginning, what a
replica lost. Sources: SkyServe (`sky/serve`: spot_placer, autoscalers, replica_managers) and the artifact's simulation
(github.com/MaoZiming/spothedge_ae).

Where it is kinder than SkyServe, or else: a replica may take several machines, and when one of them goes the others are used again
with what they have in memory (SkyServe's take one, or end together); gateways hear of a loss when it does, not at their next look
20 s later; where a notice had come, whoever heard it or not, a loss is heard of at once. The load is known beforehand: its
autoscaler would follow it with minutes of delay, on a number of requests per second and replica that its user has to find.

A baseline, not what this project does: that is `planner.hedge`. Pure; a `simulate.Mind`.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from spotserve.controller.demand import UNKNOWN
from spotserve.controller.fleet import Fleet
from spotserve.controller.journal import Journal
from spotserve.controller.proposals import engine_speed
from spotserve.controller.records import FleetEvent, Instance, Replica
from spotserve.controller.routing import Routing
from spotserve.core.cluster import InstanceState, ReplicaState
from spotserve.core.errors import ConfigError
from spotserve.core.messages import (
    TERMINATED,
    Activate,
    Command,
    Event,
    Heartbeat,
    InstanceLaunched,
    InstanceLost,
    Launch,
    LaunchRefused,
    Member,
    Registered,
    SlotReady,
    Terminate,
    Tick,
)
from spotserve.core.plan import Parallel, Plan, ReplicaPlan
from spotserve.planner.planner import number_of
from spotserve.planner.queueing import capacity_rps, latency
from spotserve.planner.shapes import grow
from spotserve.planner.workload import Lengths, Objective, Workload
from spotserve.replay import timeline
from spotserve.replay.outcome import Replayed
from spotserve.replay.scenario import Scenario, Show
from spotserve.replay.simulate import Simulation
from spotserve.replay.timeline import Timeline

NUM_EXTRA = 1
"""Replicas beyond what the load needs (N_extra of the paper's experiments; `num_overprovision` of the artifact's service)."""

TARGET_UTILISATION = 0.7
"""Of what a replica can serve for ever. SkyServe's user names `target_qps_per_replica`; this share is our choice for them."""

TICK_S = 30.0
"""After a refusal spot machines are asked for again so much later: the step of the artifact's simulation."""

DRAIN_S = 120.0
"""What is too many takes no new requests and ends so much later, whatever still runs there (SkyServe's drain)."""

PROBE_S = 10.0
"""SkyServe looks at every replica so often: a machine that has been silent for as long is lost."""

LEAST_ACTIVE = 2
"""With fewer active zones than this, all are active again."""


@dataclass(frozen=True, slots=True)
class ReplicaKind:
    """What every replica is."""

    parallel: Parallel
    num_machines: int
    """That one takes."""
    capacity_rps: float
    """That one can serve for ever."""


class Zones:
    """The two sets of SpotHedge: active zones, and those that preempt. One owner."""

    def __init__(self, names: Iterable[str]) -> None:
        self._is_active = dict.fromkeys(sorted(names), True)
        self._turns = dict.fromkeys(self._is_active, 0)
        """When each was asked last, counted from 1."""
        # The rule would never leave one of two zones alone: an empty one would be asked for ever, while the other gives machines.
        self._least = max(1, min(LEAST_ACTIVE, len(self._is_active) - 1))

    @property
    def active(self) -> tuple[str, ...]:
        """Where machines are asked for, by name."""
        return tuple(name for name, is_active in self._is_active.items() if is_active)

    def launched(self, name: str) -> None:
        """It has given a machine."""
        self._is_active[name] = True

    def preempted(self, name: str) -> None:
        """It has taken a machine, or has none to give."""
        self._is_active[name] = False
        if len(self.active) < self._least:
            self._is_active = dict.fromkeys(self._is_active, True)

    def next(self, held: Mapping[str, int]) -> str:
        """An active zone that has none of ours, else any active one, the one first that was asked longest ago.

        SkyServe takes the cheapest of them, the artifact draws one. Prices of zones do not differ here; without turns the same
        one would be asked for ever, though it is empty.
        """
        unused = [name for name in self.active if not held.get(name, 0)]
        chosen = min(unused or self.active, key=lambda name: self._turns.get(name, 0))
        self._turns[chosen] = max(self._turns.values(), default=0) + 1
        return chosen


def on_demand_wanted(num_target: int, num_ready_spot: int) -> int:
    """Replicas on demand while so many spot ones are ready: never more than the load needs, spares are not stood in for."""
    return min(num_target, max(0, num_target + NUM_EXTRA - num_ready_spot))


class SpotHedge:
    """The fleet, and what is asked of the cloud."""

    def __init__(
        self, kind: ReplicaKind, num_target: int, zones: Iterable[str], *, most_machines: int = 64, falls_back: bool = True
    ) -> None:
        """A policy that has no machines yet.

        Args:
            kind: what every replica is.
            num_target: replicas that the load needs (N_tar); fewer where `most_machines` do not suffice for as many.
            zones: where machines can be had; at least one.
            most_machines: that are held at once; spot ones have the first claim.
            falls_back: whether machines on demand stand in.
        """
        most = most_machines // kind.num_machines
        assert num_target >= 1 and most >= 1
        self._kind = kind
        self._num_target = min(num_target, most)
        self._num_spot = min(self._num_target + NUM_EXTRA, most)
        self._most_on_demand = (most - self._num_spot) if falls_back else 0
        self._zones = Zones(zones)
        self._fleet = Fleet()
        self._routing = Routing(self._fleet)
        self._journal = Journal()
        self._asked_spot: Counter[str] = Counter()
        """By zone: machines asked for of which nothing has been heard."""
        self._asked_on_demand = 0
        self._ask_s: float | None = 0.0
        """When spot machines are asked for again; None: as soon as some are missing."""
        self._ends_s: dict[str, float] = {}
        """By replica that is too many: when it ends."""
        self._next_number = 1
        self._plan = Plan(epoch=0, replicas=(), reason="")
        self._replan()

    # ------------------------------------------------------------------ reading

    @property
    def events(self) -> deque[FleetEvent]:
        """What happened to the fleet, newest last."""
        return self._journal.events

    @property
    def plan(self) -> Plan:
        """N_tar replicas: those that serve, then those that will."""
        return self._plan

    @property
    def replicas(self) -> dict[str, Replica]:
        """All that have not ended."""
        return self._fleet.replicas

    @property
    def next_deadline_s(self) -> float | None:
        """When a machine counts as silent, a replica ends, or it is time to ask again."""
        due = [each.last_heard_s + PROBE_S for each in self._fleet.alive() if each.address is not None]
        due += [*self._ends_s.values(), *([self._ask_s] if self._ask_s is not None else [])]
        return min(due, default=None)

    # ------------------------------------------------------------------ one turn

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about something that has happened."""
        commands: list[Command] = []
        match event:
            case Heartbeat():
                if (instance := self._fleet.instances.get(event.instance_id)) is not None:
                    instance.last_heard_s = now_s
                return []
            case InstanceLaunched():
                self._launched(event, now_s)
            case LaunchRefused():
                self._refused(event, now_s)
            case Registered():
                self._registered(event, now_s)
            case SlotReady():
                self._ready(event, now_s)
            case InstanceLost():
                commands += self._lost(event, now_s)
            case Tick():
                commands += self._tick(now_s)
            case _:
                return []  # notices as well: SkyServe does not listen to them
        commands += self._grouped()
        commands += self._given_back(now_s)
        commands += self._asked()
        self._replan()
        return [*self._routing.publish(), *commands]

    def _tick(self, now_s: float) -> list[Command]:
        commands: list[Command] = []
        for instance in self._fleet.alive():
            if instance.address is not None and now_s >= instance.last_heard_s + PROBE_S:
                commands.append(Terminate(instance_id=instance.instance_id))
                commands += self._lost(InstanceLost(instance_id=instance.instance_id, reason="silent"), now_s)
        if self._ask_s is not None and now_s >= self._ask_s:
            self._ask_s = None
        for replica_id in [replica_id for replica_id, end_s in self._ends_s.items() if now_s >= end_s]:
            commands += self._end(self.replicas[replica_id])
        return commands

    # ------------------------------------------------------------------ machines

    def _launched(self, event: InstanceLaunched, now_s: float) -> None:
        if event.spot:
            self._asked_spot[event.zone] = max(0, self._asked_spot[event.zone] - 1)
            self._zones.launched(event.zone)
        else:
            self._asked_on_demand = max(0, self._asked_on_demand - 1)
        self._fleet.instances[event.instance_id] = Instance(
            event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=event.usd_per_hour, launched_s=now_s
        )
        self._journal.note_event("launched", event.instance_id, now_s, spot=event.spot, usd_per_hour=event.usd_per_hour)

    def _refused(self, event: LaunchRefused, now_s: float) -> None:
        """As in the artifact's simulation, a zone that has no machine counts as one that has taken it."""
        if event.spot and event.zone is not None:
            self._asked_spot[event.zone] = max(0, self._asked_spot[event.zone] - event.count)
            self._zones.preempted(event.zone)
            self._ask_s = now_s + TICK_S
        self._journal.note_event("refused", "", now_s, spot=event.spot, zone=event.zone, count=event.count, reason=event.reason)

    def _registered(self, event: Registered, now_s: float) -> None:
        instance = self._fleet.instances.get(event.instance_id)
        if instance is None or instance.state is not InstanceState.PENDING:
            return
        instance.address, instance.ranks = event.address, event.ranks
        instance.instance_type = event.hardware.name if event.hardware is not None else ""
        instance.last_heard_s = instance.ready_s = now_s
        instance.move_to(InstanceState.READY)
        self._fleet.model = event.model
        self._journal.note_event("registered", event.instance_id, now_s)

    def _lost(self, event: InstanceLost, now_s: float) -> list[Command]:
        instance = self._fleet.instances.get(event.instance_id)
        if instance is None or instance.state is InstanceState.GONE:
            return []
        instance.move_to(InstanceState.GONE)
        instance.address = None
        is_taken = event.reason != TERMINATED
        if is_taken and instance.spot:
            self._zones.preempted(instance.zone)
        self._journal.note_event("lost" if is_taken else "terminated", event.instance_id, now_s, reason=event.reason, notice=False)
        return [command for replica in self._fleet.replicas_on(event.instance_id) for command in self._end(replica)]

    # ------------------------------------------------------------------ replicas

    def _grouped(self) -> list[Command]:
        """Machines of one market that have nothing to do become replicas, the oldest first."""
        busy = {instance_id for replica in self.replicas.values() for instance_id in replica.instance_ids}
        ready = [each for each in self._counting() if each.state is InstanceState.READY and each.instance_id not in busy]
        size = self._kind.num_machines
        commands: list[Command] = []
        for spot in (True, False):
            free = [each for each in ready if each.spot is spot]
            for start in range(0, len(free) - size + 1, size):
                commands += self._begin(free[start : start + size])
        return commands

    def _begin(self, machines: Sequence[Instance]) -> list[Activate]:
        """A new replica, which reads all of its weights from files."""
        plan = ReplicaPlan(
            replica_id=f"r-{self._next_number}", parallel=self._kind.parallel, instance_type=machines[0].instance_type
        )
        self._next_number += 1
        devices = [device for each in machines for device in each.devices]
        placed = dict(zip(plan.slots, devices, strict=False))  # the smallest shape may leave some of the last machine's idle
        self.replicas[plan.replica_id] = Replica(plan, placed)
        members = tuple(Member(slot, device, self._fleet.rank_of(device)) for slot, device in placed.items())
        return [
            Activate(
                instance_id=device.instance_id,
                device_index=device.index,
                replica=plan,
                slot=slot,
                plan_epoch=self._plan.epoch,
                members=members,
            )
            for slot, device in placed.items()
        ]

    def _ready(self, event: SlotReady, now_s: float) -> None:
        replica = self.replicas.get(event.slot.replica_id)
        if replica is None:
            return
        self._fleet.note_ready(replica, event.slot)
        if replica.is_complete and replica.state is ReplicaState.LOADING:
            replica.move_to(ReplicaState.SERVING)
            replica.serving_since_s = now_s

    def _end(self, replica: Replica) -> list[Command]:
        """It serves no more; machines that were to go with it go."""
        self._ends_s.pop(replica.replica_id, None)
        machines = [self._fleet.instances[instance_id] for instance_id in replica.instance_ids]
        commands: list[Command] = [*self._fleet.drop(replica)]
        return commands + [command for each in machines if each.is_returned for command in self._terminated(each)]

    def _is_spot(self, replica: Replica) -> bool:
        return self._fleet.instances[replica.instance_ids[0]].spot

    def _replan(self) -> None:
        """Names N_tar replicas: as few others as can be than before, and what does not exist yet as it will be called."""
        before = {each.replica_id for each in self._plan.replicas}
        staying = [each for each in self.replicas.values() if each.state is not ReplicaState.DRAINING]
        staying.sort(
            key=lambda each: (each.state is not ReplicaState.SERVING, each.replica_id not in before, number_of(each.replica_id))
        )
        chosen = [each.plan for each in staying[: self._num_target]]
        chosen += [
            ReplicaPlan(replica_id=f"r-{self._next_number + number}", parallel=self._kind.parallel)
            for number in range(self._num_target - len(chosen))
        ]
        if {each.replica_id for each in chosen} != before:
            self._plan = Plan(
                epoch=self._plan.epoch + 1,
                replicas=tuple(chosen),
                reason=f"{self._num_target} for the load, {self._num_spot - self._num_target} spare",
            )

    # ------------------------------------------------------------------ the fleet's size

    def _counting(self) -> list[Instance]:
        """Machines that are there to stay."""
        return [each for each in self._fleet.alive() if not each.is_returned]

    def _on_demand_machines(self) -> int:
        """That should stand in."""
        ready = sum(self._is_spot(each) for each in self._fleet.in_state(ReplicaState.SERVING))
        return min(on_demand_wanted(self._num_target, ready), self._most_on_demand) * self._kind.num_machines

    def _asked(self) -> list[Command]:
        """Asks for what is missing."""
        size, counting = self._kind.num_machines, self._counting()
        held = Counter(each.zone for each in counting if each.spot) + self._asked_spot
        missing = self._num_spot * size - held.total()
        commands: list[Command] = []
        while missing > 0 and self._ask_s is None:
            zone, count = self._zones.next(held), min(size, missing)
            commands.append(Launch(count=count, spot=True, zone=zone, reason=f"{missing} spot machines are missing"))
            held[zone] += count
            self._asked_spot[zone] += count
            missing -= count
        num_on_demand = sum(not each.spot for each in counting) + self._asked_on_demand
        num_draining = sum(not each.spot and each.is_returned for each in self._fleet.alive())
        most = self._most_on_demand * size - num_draining
        standing_in = min(self._on_demand_machines(), most) - num_on_demand
        if standing_in > 0:
            self._asked_on_demand += standing_in
            commands.append(Launch(count=standing_in, spot=False, reason="spot replicas are not ready"))
        return commands

    def _given_back(self, now_s: float) -> list[Command]:
        """Ends what stands in for nothing: what serves least first, then the newest. What serves is emptied before."""
        held = [each for each in self._counting() if not each.spot]
        surplus = len(held) - self._on_demand_machines()
        if surplus <= 0:
            return []
        mine = sorted(
            (each for each in self.replicas.values() if each.state is not ReplicaState.DRAINING and not self._is_spot(each)),
            key=lambda each: (each.state is ReplicaState.SERVING, -number_of(each.replica_id)),
        )
        busy = {instance_id for replica in mine for instance_id in replica.instance_ids}
        commands: list[Command] = []
        for instance in [each for each in reversed(held) if each.instance_id not in busy][:surplus]:
            commands += self._terminated(instance)
            surplus -= 1
        for replica in mine[: surplus // self._kind.num_machines]:
            for instance_id in replica.instance_ids:
                self._fleet.instances[instance_id].is_returned = True
            if replica.state is ReplicaState.SERVING:
                replica.move_to(ReplicaState.DRAINING)
                self._ends_s[replica.replica_id] = now_s + DRAIN_S
            else:
                commands += self._end(replica)
        return commands

    def _terminated(self, instance: Instance) -> list[Command]:
        """Gives a machine back, once."""
        if instance.is_given_back or instance.state is InstanceState.GONE:
            return []
        instance.is_returned = instance.is_given_back = True
        return [Terminate(instance_id=instance.instance_id)]


# --------------------------------------------------------------------------- playing


def play(scenario: Scenario, show: Show) -> Replayed:
    """Plays it. It rents what it wants of what the trace has, and pays for nothing else, whatever `scenario.rents` says.

    Raises:
        ConfigError: no replica of as many machines as may be rented holds the model.
    """
    workload = (scenario.workload or mean_workload(scenario.timeline)).within(scenario.model.context_tokens)
    kind = replica_kind(scenario, workload)
    mind = SpotHedge(
        kind,
        num_target(kind, workload),
        _zones(scenario.timeline),
        most_machines=scenario.most_machines,
        falls_back=scenario.falls_back,
    )
    return Simulation(scenario, mind, policy="spothedge", rents=True, resumes=False, show=show).play()


def num_target(kind: ReplicaKind, workload: Workload) -> int:
    """Replicas that the load needs (N_tar): so many that they are not busier than `TARGET_UTILISATION`."""
    return max(1, ceil(workload.rate_rps / (TARGET_UTILISATION * kind.capacity_rps)))


def mean_workload(whole: Timeline) -> Workload:
    """What a timeline asks on the whole; `UNKNOWN` where it asks nothing."""
    arrivals = whole.arrivals
    if not arrivals or whole.duration_s <= 0:
        return UNKNOWN
    return Workload(
        rate_rps=len(arrivals) / whole.duration_s,
        prompt=Lengths.of([arrive.prompt_tokens for arrive in arrivals]),
        output=Lengths.of([arrive.output_tokens for arrive in arrivals]),
    )


def replica_kind(scenario: Scenario, workload: Workload) -> ReplicaKind:
    """The shape that answers a lone request soonest, on as few machines as hold the model and a request.

    The service of the paper's experiments is the like: one machine, tensor-parallel over all of its devices.

    Raises:
        ConfigError: no replica of as many machines as may be rented holds the model.
    """
    lone = replace(workload, rate_rps=0.0)
    model, machine = scenario.model, scenario.machine
    for num_machines in range(1, scenario.most_machines + 1):
        tree = grow(
            model,
            machine,
            num_machines * machine.num_devices,
            workload,
            Objective(),
            speed_of=lambda parallel, hardware: engine_speed(model, parallel, hardware, scenario.engine),
            max_batch=scenario.max_batch,
        )
        shapes = [*tree.shapes, *tree.dominated]
        if shapes:
            best = min(shapes, key=lambda shape: (latency([shape.speed], lone).e2e_mean_s, shape.size))
            return ReplicaKind(best.parallel, num_machines, capacity_rps(best.speed, workload))
    raise ConfigError(f"{model.name} fits no replica of up to {scenario.most_machines} machines {machine.name}")


def _zones(whole: Timeline) -> set[str]:
    """Every zone that the trace names, now or later."""
    named = {*whole.initial.values(), *(action.zone for action in whole.actions if isinstance(action, timeline.Launch))}
    return named or {""}
