"""Policy `spothedge`: how SkyServe runs a fleet (SpotHedge: Mao et al., EuroSys'25), on machines of one kind.

A replica is a whole model of one shape on as few machines as hold it (SkyServe's own take one). Of N replicas that the load needs,
N and a spare are held on spot, spread over zones; as long as fewer of them are ready, that many on demand stand in, and go when
they are not needed any more. A zone that takes a machine is left alone while two others can be had; one that gives a machine is
good again.

It knows no notice and moves nothing: a new replica reads its weights from files, and clients send what was lost once more.
A baseline, not what this project does: `planner.hedge` is. Pure; a `simulate.Mind`.
"""

from collections import deque
from collections.abc import Sequence
from math import ceil

from spotserve.controller.proposals import EngineTerms, engine_speed
from spotserve.controller.records import FleetEvent, Instance, Replica
from spotserve.core.cluster import DeviceId, InstanceState, ReplicaState
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
    Publish,
    Registered,
    RoutingTable,
    SlotReady,
    Terminate,
    Tick,
)
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Plan, ReplicaPlan
from spotserve.planner.queueing import capacity_rps, latency
from spotserve.planner.workload import Lengths, Workload
from spotserve.replay.outcome import Replayed
from spotserve.replay.scenario import Scenario, Show
from spotserve.replay.simulate import Simulation
from spotserve.replay.timeline import Launch as TraceLaunch

SPARES = 1
"""Replicas beyond what the load needs (N_extra of the paper's experiments)."""

TARGET_SHARE = 0.7
"""Of a replica's capacity, that the autoscaler fills; SkyServe asks its user for requests per second and replica."""

RETRY_S = 30.0
"""After a refusal nothing is asked for so long: the tick of the paper's policy study."""

SILENCE_S = 3.0
EVENTS_KEPT = 512
_MOST_DEVICES = 64


class SpotHedge:
    """The fleet, and what is asked of the cloud."""

    def __init__(self, shape: Parallel, wanted: int, zones: Sequence[str], *, machine_devices: int, falls_back: bool) -> None:
        """`wanted`: replicas that the load needs."""
        self._shape = shape
        self._wanted = wanted
        self._machine_devices = machine_devices
        self._group = -(-shape.num_slots // machine_devices)
        self._falls_back = falls_back
        self._zones = dict.fromkeys(sorted(zones), True)
        """Zones, and whether they are good at present."""
        self._instances: dict[str, Instance] = {}
        self._asked = {True: 0, False: 0}
        """By market, machines asked for that have not started."""
        self._retry_s: float | None = 0.0
        """When it is time to ask, though nothing has happened."""
        self._numbers = 0
        self._version = 0
        self._model: ModelSpec | None = None
        self.replicas: dict[str, Replica] = {}
        self.events: deque[FleetEvent] = deque(maxlen=EVENTS_KEPT)
        plans = tuple(ReplicaPlan(replica_id=f"wanted-{index}", parallel=shape) for index in range(wanted))
        self.plan: Plan | None = Plan(epoch=1, replicas=plans, reason=f"{wanted} needed, {SPARES} spare on spot")

    @property
    def next_deadline_s(self) -> float | None:
        """When a machine counts as silent, or a zone may be asked again."""
        due = [each.last_heard_s + SILENCE_S for each in self._instances.values() if each.address is not None]
        return min([*due, *([self._retry_s] if self._retry_s is not None else [])], default=None)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about something that has happened."""
        commands: list[Command] = []
        match event:
            case Heartbeat():
                if (instance := self._instances.get(event.instance_id)) is not None:
                    instance.last_heard_s = now_s
                return []
            case InstanceLaunched():
                self._launched(event, now_s)
            case Registered():
                self._registered(event, now_s)
            case LaunchRefused():
                self._asked[event.spot] -= event.count
                self._retry_s = now_s + RETRY_S
                self._note("refused", "", now_s, spot=event.spot, count=event.count)
            case SlotReady():
                commands += self._ready(event)
            case InstanceLost():
                commands += self._lost(event.instance_id, now_s, returned=event.reason == TERMINATED)
            case Tick():
                if self._retry_s is not None and now_s >= self._retry_s:
                    self._retry_s = None
                silent = [name for name, each in self._instances.items() if each.address and now_s >= each.last_heard_s + SILENCE_S]
                for name in silent:
                    commands += [Terminate(instance_id=name), *self._lost(name, now_s, returned=False)]
            case _:
                return []
        return [*commands, *self._grouped(), *self._sized()]

    # ------------------------------------------------------------------ machines

    def _launched(self, event: InstanceLaunched, now_s: float) -> None:
        self._asked[event.spot] = max(0, self._asked[event.spot] - 1)
        found = Instance(event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=event.usd_per_hour, launched_s=now_s)
        self._instances[event.instance_id] = found
        if event.spot:
            self._zones[event.zone] = True
        self._note("launched", event.instance_id, now_s, spot=event.spot, usd_per_hour=event.usd_per_hour)

    def _registered(self, event: Registered, now_s: float) -> None:
        instance = self._instances[event.instance_id]
        instance.address, instance.ranks, instance.last_heard_s = event.address, event.ranks, now_s
        instance.move_to(InstanceState.READY)
        self._model = event.model
        self._note("registered", event.instance_id, now_s)

    def _lost(self, instance_id: str, now_s: float, *, returned: bool) -> list[Command]:
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return []
        if instance.spot and not returned:
            self._zones[instance.zone] = False
            if sum(self._zones.values()) < min(2, len(self._zones)):
                self._zones = dict.fromkeys(self._zones, True)
        self._note("terminated" if returned else "lost", instance_id, now_s, notice=False)
        for replica in [each for each in self.replicas.values() if instance_id in each.instance_ids]:
            del self.replicas[replica.replica_id]
        return [self._published()]

    def _grouped(self) -> list[Command]:
        """Machines that are free, of one market and up, become replicas."""
        busy = {name for replica in self.replicas.values() for name in replica.instance_ids}
        commands: list[Command] = []
        for spot in (True, False):
            free = [each for name, each in self._instances.items() if each.spot is spot and each.address and name not in busy]
            for start in range(0, len(free) - self._group + 1, self._group):
                commands += self._begin(free[start : start + self._group])
        return commands

    def _begin(self, machines: Sequence[Instance]) -> list[Command]:
        self._numbers += 1
        plan = ReplicaPlan(replica_id=f"h-{self._numbers}", parallel=self._shape)
        devices = [DeviceId(each.instance_id, index) for each in machines for index in range(self._machine_devices)]
        placed = dict(zip(plan.slots, devices, strict=False))
        self.replicas[plan.replica_id] = Replica(plan, placed)
        members = tuple(
            Member(slot, device, self._instances[device.instance_id].ranks[device.index]) for slot, device in placed.items()
        )
        return [
            Activate(
                instance_id=device.instance_id, device_index=device.index, replica=plan, slot=slot, plan_epoch=1, members=members
            )
            for slot, device in placed.items()
        ]

    def _ready(self, event: SlotReady) -> list[Command]:
        replica = self.replicas.get(event.slot.replica_id)
        if replica is None:
            return []
        replica.ready_slots.add(event.slot)
        if not replica.is_complete or replica.state is not ReplicaState.LOADING:
            return []
        replica.move_to(ReplicaState.SERVING)
        return [self._published()]

    def _published(self) -> Publish:
        self._version += 1
        serving = [replica for replica in self.replicas.values() if replica.state is ReplicaState.SERVING]
        if self.plan is not None:
            self.plan = Plan(
                epoch=self.plan.epoch + 1,
                replicas=tuple([each.plan for each in self.replicas.values()][: self._wanted]) or self.plan.replicas,
                reason=self.plan.reason,
            )
        routes = tuple(replica.route(self._instances[replica.instance_ids[0]]) for replica in serving)
        return Publish(table=RoutingTable(version=self._version, replicas=routes, model=self._model))

    # ------------------------------------------------------------------ the fleet's size

    def _sized(self) -> list[Command]:
        """Spot machines for all replicas and the spare, on demand for those that are not ready."""
        held = {spot: [each for each in self._instances.values() if each.spot is spot] for spot in (True, False)}
        ready = sum(
            replica.state is ReplicaState.SERVING and self._instances[replica.instance_ids[0]].spot
            for replica in self.replicas.values()
        )
        commands: list[Command] = []
        spot = (self._wanted + SPARES) * self._group - len(held[True]) - self._asked[True]
        stand_ins = min(self._wanted, self._wanted + SPARES - ready) if self._falls_back else 0
        on_demand = max(0, stand_ins) * self._group - len(held[False]) - self._asked[False]
        if spot > 0 and self._retry_s is None:
            self._asked[True] += spot
            commands += [Launch(count=1, spot=True, zone=self._next_zone(number)) for number in range(spot)]
        if on_demand > 0:
            self._asked[False] += on_demand
            commands.append(Launch(count=on_demand, spot=False))
        surplus = held[False][on_demand:] if on_demand < 0 else []
        return [*commands, *(Terminate(instance_id=each.instance_id) for each in surplus)]

    def _next_zone(self, number: int) -> str | None:
        """The good zone with fewest of ours."""
        good = [zone for zone, is_good in self._zones.items() if is_good] or list(self._zones)
        if not good:
            return None
        counts = {zone: sum(each.spot and each.zone == zone for each in self._instances.values()) for zone in good}
        return sorted(good, key=lambda zone: (counts[zone], zone))[number % len(good)]

    def _note(self, kind: str, instance_id: str, now_s: float, **details: object) -> None:
        number = self.events[-1].seq + 1 if self.events else 0
        self.events.append(FleetEvent(number, now_s, kind, instance_id, details))


def play(scenario: Scenario, show: Show) -> Replayed:
    """Plays it. It rents what it wants of what the trace has, whatever the scenario says.

    Raises:
        ConfigError: the model fits no replica.
    """
    engine = EngineTerms(scenario.max_batch, speed_of=scenario.speed_of, draft=scenario.draft)
    workload = (scenario.workload or _mean_load(scenario)).within(scenario.model.context_tokens)
    shape, capacity = _fastest(scenario, engine, workload)
    wanted = max(1, ceil(workload.rate_rps / (TARGET_SHARE * capacity)))
    zones = {*scenario.timeline.initial.values(), *(a.zone for a in scenario.timeline.actions if isinstance(a, TraceLaunch))}
    mind = SpotHedge(shape, wanted, sorted(zones), machine_devices=scenario.machine.num_devices, falls_back=scenario.falls_back)
    return Simulation(scenario, mind, engine, policy="spothedge", rents=True, resumes=False, show=show).play()


def _mean_load(scenario: Scenario) -> Workload:
    """What the trace asks on average: SkyServe is told by its user."""
    arrivals = scenario.timeline.arrivals
    return Workload(
        rate_rps=len(arrivals) / max(1.0, scenario.timeline.duration_s),
        prompt=Lengths.of([arrive.prompt_tokens for arrive in arrivals]),
        output=Lengths.of([arrive.output_tokens for arrive in arrivals]),
    )


def _fastest(scenario: Scenario, engine: EngineTerms, workload: Workload) -> tuple[Parallel, float]:
    """The quickest shape on the fewest machines that hold the model, and what it serves."""
    per_machine = scenario.machine.num_devices
    idle = Workload(0.0, workload.prompt, workload.output)
    for machines in range(1, _MOST_DEVICES // per_machine + 1):
        found = []
        for tensor in (2**power for power in range((machines * per_machine).bit_length())):
            parallel = Parallel(pipeline=machines * per_machine // tensor, tensor=tensor, max_batch=scenario.max_batch)
            speed = engine_speed(scenario.model, parallel, scenario.machine, engine)
            if not isinstance(speed, str):
                found.append((latency([speed], idle).e2e_mean_s, tensor, parallel, capacity_rps(speed, workload)))
        if found:
            _, _, shape, capacity = min(found, key=lambda each: each[:2])
            return shape, capacity
    raise ConfigError(f"{scenario.model.name} fits no replica of up to {_MOST_DEVICES} devices of {scenario.machine.name}")
