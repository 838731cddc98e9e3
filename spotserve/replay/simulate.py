"""A replay without machines: the production controller decides, the production router sends, and this is the world around them.

Commands of `controller.state` become later events: weights arrive (`loading`), replicas empty themselves (`replica`), machines
start. Calls go through the line of `dispatch` into batches (`batching`), whose times are those of `planner.speed`. Nothing here
decides anything that a running system decides elsewhere.

Deterministic: equal scenarios give equal results, to the last bit. No clock, no draw: what chance there is, is in the timeline.
Cost grows with requests and fleet events, not with tokens or seconds, but for heartbeats: machines send one in three seconds.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from spotserve.controller.demand import WINDOW_S
from spotserve.controller.proposals import engine_speed, shapes_text
from spotserve.controller.records import FleetEvent, Replica
from spotserve.core.cluster import DeviceId, Notice, ReplicaState
from spotserve.core.messages import (
    TERMINATED,
    Activate,
    Address,
    Command,
    Deactivate,
    Drain,
    Drained,
    Event,
    GatewayReport,
    Heartbeat,
    InstanceLaunched,
    InstanceLost,
    Launch,
    LaunchRefused,
    NoticeReceived,
    Publish,
    Registered,
    RoutingTable,
    SequenceMoved,
    Served,
    SlotFailed,
    Terminate,
    Tick,
    Undrain,
)
from spotserve.core.plan import Plan, ReplicaPlan, Slot
from spotserve.planner.speed import ReplicaSpeed
from spotserve.replay import record, timeline
from spotserve.replay.agenda import Agenda, Appointment
from spotserve.replay.batching import Batch
from spotserve.replay.call import Call
from spotserve.replay.dispatch import Dispatch
from spotserve.replay.loading import Loader
from spotserve.replay.market import Market
from spotserve.replay.outcome import Gaps, Outcomes, Replayed
from spotserve.replay.ports import Ports
from spotserve.replay.replica import Doings, SimulatedReplica
from spotserve.replay.scenario import Scenario, Show, show_nothing
from spotserve.replay.token_times import token_times

WARM_UP_S = 1800.0
"""The fleet of the start has at most so long to serve before the traces begin."""

CALM_S = 30.0
"""It is up when all that is wanted has served for so long, and no machine is starting."""

PATIENCE_S = 7200.0
"""So long after the traces have ended, requests that have no answer yet are lost."""

BEAT_S = 0.25
"""Between heartbeats while the controller waits for news; otherwise machines are only heard of before they count as silent."""

SERVED_KEPT = 256
"""Sizes of answers that a gateway reports at once."""

SHOW_EVERY = 256
_PROBE_TOKENS = 512

_SELDOM = (Heartbeat, GatewayReport, SequenceMoved, InstanceLaunched)
"""Events before which nobody has to say how they are."""


class Mind(Protocol):
    """What decides: `controller.state.ControllerState`, or a baseline that is told and commands the same."""

    @property
    def events(self) -> Sequence[FleetEvent]:
        """What happened to the fleet, newest last; only the newest ones are kept."""
        ...

    @property
    def plan(self) -> Plan | None:
        """What should run."""
        ...

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """All that have not ended."""
        ...

    @property
    def next_deadline_s(self) -> float | None:
        """When time alone changes something; None: never."""
        ...

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about something that has happened."""
        ...


class Simulation:
    """One fleet, one controller, one gateway. Plays once."""

    def __init__(
        self,
        scenario: Scenario,
        mind: Mind,
        *,
        policy: str,
        rents: bool = False,
        resumes: bool = True,
        show: Show = show_nothing,
    ) -> None:
        """One that is about to begin.

        Args:
            scenario: what happens to it.
            mind: who decides.
            policy: a name for reports.
            rents: whether machines are there only when the mind asks for them; otherwise it has all that the trace has.
            resumes: whether a request that loses its replica goes on from its tokens; otherwise it begins anew.
            show: told now and then how far it is.
        """
        self._scenario = scenario
        self._policy = policy
        self._show = show
        self._rents = rents
        self._resumes = resumes
        self._engine = scenario.engine
        self.state = mind
        self._agenda = Agenda()
        self._ports = Ports(scenario.machine, at_once=scenario.delays.moves_at_once)
        self._loader = Loader(scenario.model, self._agenda, self._ports, scenario.delays, self._tell)
        self._market = Market(scenario.prices)
        self._dispatch = Dispatch(self._send)
        self._doings = Doings(self._ended, self._let_go, self._arrived, self._emptied)
        self._replicas: dict[str, SimulatedReplica] = {}
        """Those that gateways know of."""
        self._placed: dict[str, tuple[ReplicaPlan, Mapping[Slot, DeviceId]]] = {}
        self._starting: dict[str, Appointment] = {}
        self._registered: dict[str, None] = {}
        """Machines that run, in the order in which they came."""
        self._inbox: deque[Event] = deque()
        self._is_telling = False
        self._tick: Appointment | None = None
        self._beat: Appointment | None = None
        self._told_drained: set[str] = set()
        self._gaps = Gaps()
        self._outcomes = Outcomes()
        self._events: list[record.FleetEvent] = []
        self._start_s = 0.0
        """When the traces begin, on the agenda's clock."""
        self._outstanding = 0
        self._seen_event = -1
        self._seen_epoch = 0
        self._seen_serving = (0, 0)
        self._unsettled_s: float | None = None
        self._kv_bytes = 0
        self._arrived_calls = 0
        self._served: deque[Served] = deque(maxlen=SERVED_KEPT)
        self._num_machines = 0

    # ------------------------------------------------------------------ the whole

    def play(self) -> Replayed:
        """From the first machine to the last answer."""
        scenario, agenda = self._scenario, self._agenda
        self._warm_up(scenario.timeline.initial)
        start_s = self._start_s = agenda.now_s
        if scenario.workload is None:
            agenda.at(start_s + WINDOW_S, self._report)
        for number, action in enumerate(scenario.timeline.actions):
            agenda.run_until(start_s + action.at_s)
            self._carry_out(action)
            if number % SHOW_EVERY == 0:
                self._show(action.at_s, len(self._outcomes), self._market.num_rented)
        end_s = start_s + scenario.timeline.duration_s
        agenda.run_until(end_s)
        while self._outstanding and agenda.now_s < end_s + PATIENCE_S and not self._is_hopeless():
            agenda.step()
        self._give_up()
        self._market.end_all(agenda.now_s)
        return self._replayed(end_s)

    def _warm_up(self, initial: Mapping[str, str]) -> None:
        """The fleet of the start is up and serves when the traces begin, if it can."""
        for name, zone in initial.items():
            self._market.offer(name, zone)
        if not self._rents:
            for _ in initial:
                self._rent_spot(at_once=True)
        self._plan_tick()
        calm_s = 0.0
        while self._agenda.now_s < WARM_UP_S and self._agenda.now_s < calm_s + CALM_S:
            if self._agenda.next_s > WARM_UP_S:
                break
            self._agenda.step()
            if self._starting or not self._is_settled():
                calm_s = self._agenda.now_s
        self._unsettled_s = None

    def _carry_out(self, action: timeline.Action) -> None:
        match action:
            case timeline.Arrive():
                self._arrive(action)
            case timeline.Launch():
                self._market.offer(action.instance, action.zone)
                if not self._rents:
                    self._rent_spot()
            case timeline.GiveNotice():
                deadline_s = self._start_s + action.deadline_s
                instance_id = self._market.announce(action.instance, deadline_s)
                if instance_id is not None:
                    notice = Notice(instance_id=instance_id, deadline_s=deadline_s, source="replay")
                    self._tell(NoticeReceived(notice=notice))
            case timeline.Take():
                instance_id = self._market.withdraw(action.instance)
                if instance_id is not None:
                    self._take(instance_id, was_noticed=action.noticed)

    def _is_settled(self) -> bool:
        plan, serving = self.state.plan, self.state.replicas
        return (
            plan is not None
            and bool(plan.replicas)
            and all(each.replica_id in serving and serving[each.replica_id].state is ReplicaState.SERVING for each in plan.replicas)
        )

    def _is_hopeless(self) -> bool:
        """Whether nobody is there to answer what is left, and nobody will come."""
        return not self._rents and not self._registered and not self._starting

    def _give_up(self) -> None:
        """What has no whole answer by now is lost."""
        now_s = self._agenda.now_s
        left = [call for replica in self._replicas.values() for call in replica.leave()]
        for call in [*left, *self._dispatch.give_up()]:
            self._record(call, now_s)

    def _replayed(self, end_s: float) -> Replayed:
        start_s = self._start_s
        leases = [lease.within(start_s, end_s) for lease in self._market.leases]
        return Replayed(
            policy=self._policy,
            seed=self._scenario.seed,
            duration_s=self._scenario.timeline.duration_s,
            ended_s=self._agenda.now_s - start_s,
            outcomes=self._outcomes,
            gaps=self._gaps,
            fleet_events=tuple(_after(event, start_s) for event in self._events),
            leases=tuple(lease for lease in leases if lease.hours > 0),
            on_demand_usd_per_hour=self._scenario.prices.on_demand_usd_per_hour,
            weights_moved_bytes=self._loader.sent_bytes,
            weights_read_bytes=self._loader.read_bytes,
            kv_moved_bytes=self._kv_bytes,
        )

    # ------------------------------------------------------------------ machines

    def _rent_spot(self, zone: str | None = None, *, at_once: bool = False) -> bool:
        rented = self._market.rent_spot(self._agenda.now_s, zone)
        if rented is None:
            return False
        self._launch(*rented, spot=True, at_once=at_once)
        return True

    def _launch(self, instance_id: str, zone: str, *, spot: bool, at_once: bool = False) -> None:
        """A machine starts; its worker registers later."""
        prices = self._scenario.prices
        price = prices.spot_usd_per_hour if spot else prices.on_demand_usd_per_hour
        self._tell(InstanceLaunched(instance_id=instance_id, spot=spot, zone=zone, usd_per_hour=price))
        start_up_s = 0.0 if at_once else self._scenario.delays.start_up_s
        self._starting[instance_id] = self._agenda.at(
            self._agenda.now_s + start_up_s, lambda: self._register(instance_id, zone, spot=spot)
        )

    def _register(self, instance_id: str, zone: str, *, spot: bool) -> None:
        del self._starting[instance_id]
        self._registered[instance_id] = None
        self._num_machines += 1
        machine = self._scenario.machine
        ranks = tuple(Address(instance_id, index + 1) for index in range(machine.num_devices))
        self._tell(
            Registered(
                instance_id=instance_id,
                address=Address(instance_id, 0),
                pid=self._num_machines,
                ranks=ranks,
                spot=spot,
                zone=zone,
                model=self._scenario.model,
                hardware=machine,
            )
        )

    def _take(self, instance_id: str, *, was_noticed: bool) -> None:
        """The cloud takes a machine."""
        heard_s = self._scenario.delays.loss_heard_s
        is_heard = was_noticed or instance_id in self._starting
        self._end(instance_id)
        lost = InstanceLost(instance_id=instance_id, reason="taken")
        if is_heard:
            self._tell(lost)
        elif heard_s is not None:
            self._agenda.at(self._agenda.now_s + heard_s, lambda: self._tell(lost))

    def _end(self, instance_id: str) -> None:
        """A machine is no more: what it had is gone; who should know may not know yet."""
        now_s = self._agenda.now_s
        self._market.end(instance_id, now_s)
        starting = self._starting.pop(instance_id, None)
        if starting is not None:
            starting.call_off()
        if self._registered.pop(instance_id, self) is self:
            return
        for replica in self._replicas.values():
            if any(device.instance_id == instance_id for device in replica.devices.values()):
                replica.die()
        self._loader.lose(instance_id)

    # ------------------------------------------------------------------ the controller

    def _tell(self, event: Event) -> None:
        """The controller hears of something, and what it commands is carried out, before it hears of the next."""
        self._inbox.append(event)
        if self._is_telling:
            return
        self._is_telling = True
        while self._inbox:
            now_s = self._agenda.now_s
            event = self._inbox.popleft()
            if not isinstance(event, _SELDOM):
                self._beat_all(in_full=True)
            commands = self.state.handle(event, now_s)
            self._note()
            if commands:
                self._obey(commands)
        self._is_telling = False
        self._plan_tick()

    def _obey(self, commands: Sequence[Command]) -> None:
        activations = [command for command in commands if isinstance(command, Activate)]
        for command in commands:
            match command:
                case Publish():
                    self._publish(command.table)
                case Drain():
                    replica = self._replicas.get(command.replica_id)
                    if replica is not None:
                        replica.drain(command, self._replicas, self._scenario.model, self._ports)
                case Undrain():
                    if (replica := self._replicas.get(command.replica_id)) is not None:
                        replica.undrain()
                case Deactivate():
                    self._loader.leave(DeviceId(command.instance_id, command.device_index), command.slot)
                case Terminate():
                    self._end(command.instance_id)
                    self._inbox.append(InstanceLost(instance_id=command.instance_id, reason=TERMINATED))
                case Launch():
                    self._rent(command)
                case _:
                    pass
        for command in activations:
            self._placed[command.replica.replica_id] = (
                command.replica,
                {member.slot: member.device for member in command.members},
            )
        there = [each for each in activations if each.instance_id in self._registered]
        unfit = [each for each in there if isinstance(self._speed_or_not(each.replica), str)]
        for command in unfit:
            self._agenda.at(self._agenda.now_s + self._scenario.delays.bring_up_s, partial(self._fail, command))
        if activations:
            self._loader.bring_up([each for each in there if each not in unfit])

    def _fail(self, command: Activate) -> None:
        """A device finds out that its slot does not fit."""
        self._tell(
            SlotFailed(
                instance_id=command.instance_id,
                device_index=command.device_index,
                slot=command.slot,
                plan_epoch=command.plan_epoch,
                reason=str(self._speed_or_not(command.replica)),
                is_permanent=True,
            )
        )

    def _rent(self, command: Launch) -> None:
        missing = 0
        for _ in range(command.count):
            if not command.spot:
                instance_id = self._market.rent_on_demand(self._agenda.now_s)
                self._launch(instance_id, command.zone or "", spot=False)
            elif not self._rents or not self._rent_spot(command.zone):
                missing += 1
        if missing:
            refused = LaunchRefused(count=missing, spot=command.spot, zone=command.zone, reason="the trace has no more")
            self._inbox.append(refused)

    def _publish(self, table: RoutingTable) -> None:
        """Gateways know from now on who serves; the calls of who does not any more go on elsewhere."""
        known = {route.replica_id for route in table.replicas}
        gone = [replica for replica in self._replicas.values() if replica.replica_id not in known]
        for route in table.replicas:
            if route.replica_id not in self._replicas:
                self._replicas[route.replica_id] = self._new_replica(*self._placed.pop(route.replica_id))
        left = []
        for replica in gone:
            del self._replicas[replica.replica_id]
            left += replica.leave()
        self._dispatch.publish(table.replicas)
        for call in left:
            self._let_go(call, None)
        for replica in gone:
            self._dispatch.load.pop(replica.replica_id, None)
        self._note_serving(sum(route.state is ReplicaState.SERVING for route in table.replicas))

    def _new_replica(self, plan: ReplicaPlan, devices: Mapping[Slot, DeviceId]) -> SimulatedReplica:
        speed = self._speed_or_not(plan)
        assert not isinstance(speed, str), "what does not fit is not brought up"
        batch = Batch(
            token_times(speed),
            self._gaps,
            now_s=self._agenda.now_s,
            step_tokens=self._engine.step_tokens,
            prefix_block_tokens=self._scenario.timeline.prefix_block_tokens,
        )
        return SimulatedReplica(plan, devices, batch, self._agenda, self._doings)

    def _speed_or_not(self, plan: ReplicaPlan) -> ReplicaSpeed | str:
        """How fast a replica is, or why there can be none: who is told a shape may have to make do with one that does not fit."""
        return engine_speed(self._scenario.model, plan.parallel, self._scenario.machine, self._engine)

    # ------------------------------------------------------------------ time and heartbeats

    def _plan_tick(self) -> None:
        """To be there when time alone changes something for the controller."""
        due_s = self.state.next_deadline_s
        if self._tick is not None:
            if self._tick.time_s == due_s and self._tick.act is not None:
                return
            self._tick.call_off()
        self._tick = None if due_s is None else self._agenda.at(due_s, self._tick_now)
        if self._beat is None and self._waits_for_news():
            self._beat = self._agenda.at(self._agenda.now_s + BEAT_S, self._beat_now)

    def _tick_now(self) -> None:
        """Machines that have been quiet say that they are there; if something else is due, it is time for it."""
        self._tick = None
        now_s = self._agenda.now_s
        self._is_telling = True
        self._beat_all(in_full=False)
        self._is_telling = False
        due_s = self.state.next_deadline_s
        if due_s is not None and due_s <= now_s:
            self._tell(Tick())
        else:
            self._plan_tick()

    def _waits_for_news(self) -> bool:
        return any(each.leaving is not None and not each.leaving.is_told for each in self.state.replicas.values())

    def _beat_now(self) -> None:
        self._beat = None
        self._beat_all(in_full=True)
        self._plan_tick()

    def _beat_all(self, *, in_full: bool) -> None:
        """Every machine says how it is; `in_full` with all that runs there."""
        now_s = self._agenda.now_s
        led: dict[str, list[SimulatedReplica]] = {}
        for replica in self._replicas.values():
            if not replica.is_dead:
                led.setdefault(replica.leader_id, []).append(replica)
        for instance_id in self._registered:
            if in_full and instance_id not in led:
                continue
            heartbeat = self._heartbeat(instance_id, led.get(instance_id, ()), in_full=in_full)
            commands = self.state.handle(heartbeat, now_s)
            if commands:
                self._note()
                self._obey(commands)

    def _heartbeat(self, instance_id: str, led: Sequence[SimulatedReplica], *, in_full: bool) -> Heartbeat:
        sequences = tuple(report for replica in led for report in replica.reports()) if in_full else ()
        step_s = prefill_tokens_per_s = 0.0
        for replica in led:
            step_s = max(step_s, replica.batch.step_s)
            prefill_tokens_per_s = _PROBE_TOKENS / replica.batch.prompt_s(_PROBE_TOKENS)
        return Heartbeat(
            instance_id=instance_id,
            running=sum(replica.batch.num_running for replica in led),
            waiting=sum(replica.batch.num_waiting for replica in led),
            kv_tokens_used=sum(replica.batch.held_tokens for replica in led),
            kv_tokens_total=sum(replica.batch.kv_tokens for replica in led),
            step_s=step_s,
            prefill_tokens_per_s=prefill_tokens_per_s,
            store_healthy=True,
            sequences=sequences,
        )

    def _report(self) -> None:
        """The gateway tells what came and went."""
        arrived, self._arrived_calls = self._arrived_calls, 0
        served = tuple(self._served)
        self._served.clear()
        waiting = self._dispatch.num_waiting
        self._tell(
            GatewayReport(
                gateway_id="replay",
                queued=waiting,
                running=self._outstanding - waiting,
                suspended=0,
                finished=len(self._outcomes),
                lost=0,
                arrived=arrived,
                served=served,
            )
        )
        self._agenda.at(self._agenda.now_s + WINDOW_S, self._report)

    # ------------------------------------------------------------------ calls

    def _arrive(self, action: timeline.Arrive) -> None:
        self._outstanding += 1
        self._arrived_calls += 1
        self._dispatch.dispatch(
            Call(action.index, self._agenda.now_s, action.prompt_tokens, action.output_tokens, prefix=action.prefix)
        )

    def _send(self, call: Call, replica_id: str) -> None:
        self._replicas[replica_id].take(call)

    def _ended(self, call: Call) -> None:
        self._dispatch.left(call)
        self._served.append(Served(call.prompt_tokens, call.output_tokens))
        self._record(call, call.last_token_s)
        if self._dispatch.num_waiting:
            self._dispatch.fill()

    def _record(self, call: Call, end_s: float) -> None:
        self._outstanding -= 1
        self._outcomes.append(call.outcome(end_s, start_s=self._start_s))

    def _let_go(self, call: Call, prefer: str | None) -> None:
        """A call goes on elsewhere from its tokens."""
        self._dispatch.left(call)
        if call.known_tokens and self._resumes:
            call.resumed += 1
            self._event("resumed", None, request=call.index)
        elif call.known_tokens:
            call.begin_anew()
            self._event("restarted", None, request=call.index)
        call.prefer = prefer
        self._dispatch.dispatch(call)

    def _arrived(self, call: Call, source: SimulatedReplica, destination: SimulatedReplica, num_bytes: int, seconds: float) -> bool:
        self._dispatch.left(call)
        if destination.replica_id not in self._replicas or not destination.adopt(call):
            return False
        call.moved += 1
        self._dispatch.taken(call, destination.replica_id)
        self._kv_bytes += num_bytes
        self._event("moved", source.leader_id, request=call.index)
        self._tell(
            SequenceMoved(
                instance_id=source.leader_id,
                request_id=str(call.index),
                destination_replica_id=destination.replica_id,
                kv_bytes=num_bytes,
                seconds=seconds,
            )
        )
        return True

    def _emptied(self, replica: SimulatedReplica) -> None:
        if replica.replica_id not in self._told_drained:
            self._told_drained.add(replica.replica_id)
            self._tell(Drained(instance_id=replica.leader_id, replica_id=replica.replica_id))

    # ------------------------------------------------------------------ what is told

    def _event(self, kind: str, instance: str | None, **details: Any) -> None:
        self._events.append(record.FleetEvent(self._agenda.now_s, kind, instance, details))

    def _note(self) -> None:
        """What the controller has noted of its fleet, and what it wants now."""
        fresh = []
        for event in reversed(self.state.events):
            if event.seq <= self._seen_event:
                break
            fresh.append(event)
        for event in reversed(fresh):
            self._seen_event = event.seq
            if event.kind in _TOLD:
                self._event(event.kind, event.instance or None, **event.detail)
        plan = self.state.plan
        if plan is not None and plan.epoch != self._seen_epoch:
            self._seen_epoch = plan.epoch
            self._event("plan", None, shape=shapes_text(plan.replicas), replicas=len(plan.replicas), reason=plan.reason)
            self._note_serving(self._seen_serving[0])

    def _note_serving(self, serving: int) -> None:
        planned = len(self.state.plan.replicas) if self.state.plan is not None else 0
        if (serving, planned) != self._seen_serving:
            self._seen_serving = (serving, planned)
            self._event("serving", None, replicas=serving, planned=planned)
        if self._is_settled():
            if self._unsettled_s is not None:
                self._event("settled", None, since_s=self._unsettled_s)
                self._unsettled_s = None
        elif self._unsettled_s is None:
            self._unsettled_s = self._agenda.now_s


_TOLD = frozenset({"launched", "registered", "notice", "lost", "terminated", "undrained", "refused"})
"""Kinds of events of the controller that go into the record as they are."""


def _after(event: record.FleetEvent, start_s: float) -> record.FleetEvent:
    """An event on a clock that begins at `start_s`; what was before is the beginning."""
    details = {
        name: value - start_s if isinstance(value, float) and name.endswith("_s") else value
        for name, value in event.details.items()
    }
    return record.FleetEvent(max(0.0, event.time_s - start_s), event.kind, event.instance, details)
