"""The controller's mind: events in, commands out. No await, no clock, no I/O.

`handle` is the only way in. Every turn that commands something, or that decides to leave things as they are after the fleet
changed, is kept as a `Decision` with its cause and its reason. A new controller starts with an empty state and learns the
fleet from what workers say when they register; nothing that matters is lost with the old one.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from spotserve.config import ControllerSettings
from spotserve.controller.adoption import adopt, adopt_slot, incomplete
from spotserve.controller.bringup import Arrangement
from spotserve.controller.choosing import Alternative, Chooser
from spotserve.controller.demand import Demand
from spotserve.controller.fleet import Fleet
from spotserve.controller.hedging import Hedging, Place
from spotserve.controller.journal import Journal, machines_text, shape_text
from spotserve.controller.leaving import deadline_of, tell
from spotserve.controller.methods import PRODUCTION, Methods
from spotserve.controller.notices import REVERT_AFTER_S, announce, revert
from spotserve.controller.proposals import EngineTerms, Terms
from spotserve.controller.records import Change, Decision, FleetEvent, Instance, Replica
from spotserve.controller.recut import Recut
from spotserve.controller.refitting import Refits
from spotserve.controller.retries import Retries
from spotserve.controller.returning import give_back, send_back
from spotserve.controller.routing import Routing
from spotserve.core.cluster import DeviceId, InstanceState, Notice, NoticeKind, ReplicaState
from spotserve.core.hardware import InstanceType
from spotserve.core.messages import (
    TERMINATED,
    Activate,
    Calibrated,
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
    ModelRead,
    NoticeReceived,
    Publish,
    Registered,
    Reshape,
    RoutingTable,
    SequenceMoved,
    SequenceResumed,
    SlotFailed,
    SlotReady,
    Terminate,
    Tick,
    Undrain,
)
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Plan
from spotserve.planner.hazard import HazardBook
from spotserve.planner.planner import Shape, refusal
from spotserve.planner.workload import Lengths, Workload

SILENCE_S = 3.0
"""An instance that has not been heard of for so long hangs: it is ended, so that its sequences get another owner."""

FEW_REPLICAS = 64
ROOM_S = 0.1
"""Of more replicas than a few it is looked so often whether heartbeats have told of room for the sequences of those that drain."""

_ORDER = (Undrain, Publish, Drain, Deactivate, Activate, Terminate, Launch)
"""Of the commands of one turn. Who was told to drain takes requests again before anybody is sent there; nobody is sent to who
drains before anything else is done about it; and a device leaves a slot before it is given another."""

_NO_MATTER_OF_SIZE = (Heartbeat, GatewayReport, SequenceMoved, SequenceResumed)
"""Events that come often and change nothing about how many machines there should be."""


class ControllerState:
    """The fleet as the controller knows it, and what it wants of it."""

    def __init__(
        self,
        settings: ControllerSettings,
        engine: EngineTerms,
        places: Sequence[Place] = (),
        methods: Methods = PRODUCTION,
    ) -> None:
        """`places`: where machines can be rented; needed where the settings say that machines are rented."""
        self._fleet = Fleet(methods)
        self._refits = Refits(self._fleet)
        self._demand = Demand(_expected(settings))
        self._chooser = Chooser(self._fleet, self._demand, settings, engine)
        wanted = None if settings.planning == "auto" else Shape(settings.data, settings.pipeline, settings.tensor)
        self._recut = Recut(self._fleet, wanted, self._chooser, max_batch=engine.max_batch)
        self._hedging = None if settings.instances is None else Hedging(self._fleet, self._chooser, places, settings)
        self._routing = Routing(self._fleet)
        self._journal = Journal()
        self._retries = Retries()
        self._known_notices: set[str] = set()
        self._told_s = -inf
        self.invariant: str | None = None
        """What the arithmetic of the engines keeps bit-equal, once one has said so."""

    # ------------------------------------------------------------------ reading

    @property
    def instances(self) -> dict[str, Instance]:
        """All instances, those that are gone included."""
        return self._fleet.instances

    @property
    def replicas(self) -> dict[str, Replica]:
        """All replicas that have not ended."""
        return self._fleet.replicas

    @property
    def model(self) -> ModelSpec | None:
        """The model that is served, once a worker has told."""
        return self._fleet.model

    @property
    def plan(self) -> Plan | None:
        """What should run."""
        return self._recut.plan

    @property
    def wanted(self) -> Shape | None:
        """The shape that the user wants; None: the planner chooses."""
        return self._recut.wanted

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """Plans that the planner weighed last, the chosen one first."""
        return self._chooser.alternatives

    @property
    def hardware(self) -> Mapping[str, InstanceType]:
        """Kinds of machines by name, as they are seen to be."""
        return self._fleet.hardware

    @property
    def losers(self) -> tuple[str, ...]:
        """What never became a plan when the planner found little, and why."""
        return self._chooser.losers

    @property
    def terms(self) -> Terms | None:
        """What the planner planned for last."""
        return self._chooser.terms

    @property
    def arrangement(self) -> Arrangement | None:
        """Devices and transfers of the last plan that had something to bring up."""
        return self._recut.arrangement

    @property
    def hazards(self) -> HazardBook:
        """What is believed of the risk of every machine."""
        return self._chooser.hazards

    @property
    def hedging(self) -> Hedging | None:
        """What is held, and why; None: the fleet's size is the provider's."""
        return self._hedging

    @property
    def changes(self) -> deque[Change]:
        """The newest changes of what runs where, newest last."""
        return self._recut.changes.kept

    @property
    def decisions(self) -> deque[Decision]:
        """The newest decisions, newest last."""
        return self._journal.decisions

    @property
    def events(self) -> deque[FleetEvent]:
        """What happened to the fleet, newest last."""
        return self._journal.events

    def routing_table(self) -> RoutingTable:
        """Replicas that gateways may talk to."""
        return self._routing.table()

    def refusal(self, reshape: Reshape) -> str | None:
        """Why this shape cannot be had now; None when it can."""
        shape = wanted_shape(reshape)
        if shape is None:
            return self._chooser.blindness()
        return refusal(shape, len(self._fleet.ready_devices()), self._fleet.model)

    @property
    def next_deadline_s(self) -> float | None:
        """When time alone will change something: send a `Tick` then. None: never."""
        alive, replicas = self._fleet.alive(), self.replicas.values()
        due = [instance.last_heard_s + SILENCE_S for instance in alive if instance.address is not None]
        due += [_notice_ends_s(instance, instance.notice) for instance in alive if instance.notice is not None]
        waits = [deadline_of(replica.leaving) for replica in replicas if replica.leaving is not None]
        waits += [replica.complete_by_s for replica in replicas]
        waits.append(self._chooser.look_s if self.wanted is None else None)
        waits.append(self._hedging.due_s if self._hedging is not None else None)
        return min([*due, *(each for each in (*waits, self._retries.due_s, self._recut.retry_s) if each is not None)], default=None)

    # ------------------------------------------------------------------ one turn

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about `event`, in order. Handling an event twice is harmless."""
        commands, reason = self._react(event, now_s)
        resized, resize_reason = ([], "") if isinstance(event, _NO_MATTER_OF_SIZE) else self._resize(now_s)
        if isinstance(event, Heartbeat) and not self._is_news(now_s):
            return []
        retried, retry_reason = ([], "") if isinstance(event, Heartbeat) else self._recut.retry(now_s)
        settled = self._recut.settle(now_s)
        drains, verdicts = tell(self._fleet, now_s)
        self._told_s = now_s
        self._recut.note_ends(now_s)
        commands = [
            each for each in (*commands, *resized, *retried, *drains, *self._routing.publish()) if self._is_still_meant(each)
        ]
        commands.sort(key=lambda command: _ORDER.index(type(command)))
        reason = "; ".join(each for each in (reason, resize_reason, retry_reason, settled, *verdicts) if each)
        if commands or reason:
            self._journal.note_decision(event, commands, reason, now_s)
        return commands

    def _is_news(self, now_s: float) -> bool:
        """Whether what a worker has to do now may change what is to be done: only while replicas wait to be told to drain. There
        are thousands of heartbeats per second in a large fleet."""
        if len(self.replicas) > FEW_REPLICAS and now_s < self._told_s + ROOM_S:
            return False
        return any(each.leaving is not None and not each.leaving.is_told for each in self.replicas.values())

    def _is_still_meant(self, command: Command) -> bool:
        """What a turn begins, a later part of it may have given up: that is not begun."""
        return not isinstance(command, Activate) or command.replica.replica_id in self.replicas

    def _react(self, event: Event, now_s: float) -> tuple[list[Command], str]:
        match event:
            case InstanceLaunched():
                return self._launched(event, now_s)
            case Registered():
                return self._registered(event, now_s)
            case Heartbeat():
                return self._heard(event, now_s)
            case Calibrated() | ModelRead():
                return self._told(event, now_s)
            case GatewayReport():
                self._demand.note(event, now_s)
                return [], ""
            case SlotReady():
                return self._ready(event, now_s)
            case SlotFailed():
                return self._failed(event, now_s)
            case NoticeReceived():
                return self._noticed(event.notice, now_s)
            case LaunchRefused():
                return self._refused(event, now_s)
            case InstanceLost():
                return self._lost(event, now_s)
            case SequenceMoved():
                return self._moved(event, now_s)
            case Drained():
                return self._drained(event)
            case SequenceResumed():
                self._journal.note_event("resumed", "", now_s, request_id=event.request_id, reason=event.reason)
                return [], ""
            case Reshape():
                return self._reshape(event, now_s)
            case Tick():
                return self._tick(now_s)

    # ------------------------------------------------------------------ instances come

    def _launched(self, event: InstanceLaunched, now_s: float) -> tuple[list[Command], str]:
        if event.instance_id not in self.instances:
            self._add(
                Instance(event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=event.usd_per_hour, launched_s=now_s)
            )
            self._journal.note_event("launched", event.instance_id, now_s, spot=event.spot, usd_per_hour=event.usd_per_hour)
        return [], ""

    def _add(self, instance: Instance) -> None:
        """A machine that nobody has heard of before."""
        self.instances[instance.instance_id] = instance
        if self._hedging is not None:
            self._hedging.note_new(instance)

    def _refused(self, event: LaunchRefused, now_s: float) -> tuple[list[Command], str]:
        if self._hedging is not None:
            self._hedging.note_refused(event, now_s)
        self._journal.note_event("refused", "", now_s, spot=event.spot, zone=event.zone, count=event.count, reason=event.reason)
        return [], f"{machines_text(event.count, event.zone, spot=event.spot)} cannot be had: {event.reason}"

    def _registered(self, event: Registered, now_s: float) -> tuple[list[Command], str]:
        known = self.instances.get(event.instance_id)
        if known is None:
            known = Instance(event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=0.0)
            self._add(known)
        elif known.state is InstanceState.GONE:
            known = Instance(event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=known.usd_per_hour)
            self.instances[event.instance_id] = known
        known.pid, known.address, known.ranks = event.pid, event.address, event.ranks
        if event.hardware is not None:
            known.instance_type = event.hardware.name
            self._refits.measured(event.hardware)
        known.held = {index: tuple(each for each in event.held if each.device_index == index) for index in range(len(event.ranks))}
        known.last_heard_s = now_s
        known.ready_s = now_s if known.ready_s is None else known.ready_s
        if known.state is InstanceState.PENDING:
            known.move_to(InstanceState.READY)
        if known.spot:
            self._chooser.hazards.note_joined(known.instance_id, known.instance_type, known.zone, now_s)
        self._journal.note_event("registered", event.instance_id, now_s)
        self._fleet.model = event.model or self._fleet.model
        names = {replica.replica_id for replica in event.replicas} | {each.slot.replica_id for each in event.held}
        self._recut.use_numbers_after(names)
        commands: list[Command] = [*adopt(self._fleet, event, now_s)]
        replans, reason = self._recut.replan(f"{event.instance_id} has joined", now_s)
        return commands + replans, reason

    def _heard(self, event: Heartbeat, now_s: float) -> tuple[list[Command], str]:
        instance = self.instances.get(event.instance_id)
        if instance is not None:
            instance.heartbeat, instance.last_heard_s = event, now_s
            self._refits.note_step(event, now_s)
        return [], ""

    def _told(self, event: Calibrated | ModelRead, now_s: float) -> tuple[list[Command], str]:
        """A worker has found out what the planner needs to know."""
        if isinstance(event, Calibrated):
            self._refits.measured(event.hardware)
            return self._recut.replan(f"{event.instance_id} has measured its devices", now_s) if self.wanted is None else ([], "")
        if event.model is None:
            self._journal.note_event("failed", event.instance_id, now_s, reason=event.reason)
            return [], f"{event.instance_id} cannot serve the model: {event.reason}"
        known, self._fleet.model = self._fleet.model, event.model
        if known == event.model or self.wanted is not None:
            return [], ""
        return self._recut.replan(f"{event.instance_id} has read the model", now_s)

    # ------------------------------------------------------------------ slots

    def _ready(self, event: SlotReady, now_s: float) -> tuple[list[Command], str]:
        replica = self.replicas.get(event.slot.replica_id)
        device = DeviceId(event.instance_id, event.device_index)
        if event.slot.replica_id in self._fleet.dropped:
            return [], ""
        self._fleet.model, self.invariant = event.model, event.invariant
        if replica is None or event.slot not in replica.devices:
            self._recut.use_numbers_after({event.slot.replica_id})
            return [*adopt_slot(self._fleet, event, now_s)], f"{event.instance_id} was asked for it by an earlier controller"
        if replica.devices[event.slot] != device or event.slot in replica.ready_slots:
            return [], ""
        self._fleet.note_ready(replica, event.slot)
        self._recut.changes.pulled(replica.replica_id, event.pulled_bytes)
        if not replica.is_complete:
            return [], f"{replica.replica_id} waits for its other slots"
        self._journal.note_event("ready", event.instance_id, now_s, replica=replica.replica_id)
        return [], f"{replica.replica_id} holds its weights"

    def _failed(self, event: SlotFailed, now_s: float) -> tuple[list[Command], str]:
        replica = self.replicas.get(event.slot.replica_id)
        if replica is None or replica.devices.get(event.slot) != DeviceId(event.instance_id, event.device_index):
            return [], ""
        kind = "failed" if event.is_permanent else "broken"
        self._journal.note_event(kind, event.instance_id, now_s, replica=replica.replica_id, reason=event.reason)
        commands: list[Command] = [*self._fleet.drop(replica, but=event.slot)]
        if event.is_permanent:
            told = f"{replica.replica_id} could not be brought up: {event.reason}"
            given_up = self._recut.give_up_shape(replica.plan.parallel, event.reason)
            replans, reason = self._recut.replan(given_up, now_s) if given_up is not None else ([], "")
            return commands + replans, f"{told}; {reason}" if reason else told
        told = f"{replica.replica_id} broke: {event.reason}"
        pause_s = self._retries.failed(frozenset(replica.devices.values()), now_s)
        if pause_s > 0:
            return commands, f"{told}; trying again in {pause_s:g} s"
        replans, reason = self._recut.replan(told, now_s)
        return commands + replans, reason

    def _reshape(self, event: Reshape, now_s: float) -> tuple[list[Command], str]:
        shape = shape_text(event.data, event.pipeline, event.tensor)
        why_not = self.refusal(event)
        if why_not is not None:
            return [], f"{shape} is refused: {why_not}"
        self._recut.wanted = wanted_shape(event)
        self._journal.note_event("reshape", "", now_s, shape=shape)
        return self._recut.replan(f"{shape} is wanted", now_s)

    # ------------------------------------------------------------------ instances go

    def _noticed(self, notice: Notice, now_s: float) -> tuple[list[Command], str]:
        instance = self.instances.get(notice.instance_id)
        if notice.notice_id in self._known_notices or instance is None or instance.state is InstanceState.GONE:
            return [], ""
        self._known_notices.add(notice.notice_id)
        if notice.kind is NoticeKind.SOFT:
            self._chooser.hazards.note_soft(notice.instance_id, now_s)
            return [], f"{notice.instance_id} is at risk; nothing is drained for a soft signal"
        self._chooser.hazards.note_notice(notice.instance_id, now_s)
        if self._hedging is not None and instance.spot and instance.notice is None:
            self._hedging.note_warning(notice.deadline_s - now_s)
        self._journal.note_event("notice", notice.instance_id, now_s, deadline_s=notice.deadline_s)
        commands: list[Command] = [*announce(self._fleet, instance, notice, now_s)]
        replans, reason = self._recut.replan(f"{notice.instance_id} will be taken in {notice.deadline_s - now_s:.1f} s", now_s)
        return commands + replans, reason

    def _lost(self, event: InstanceLost, now_s: float) -> tuple[list[Command], str]:
        instance = self.instances.get(event.instance_id)
        if instance is None or instance.state is InstanceState.GONE:
            return [], ""
        had_notice = instance.notice is not None
        instance.move_to(InstanceState.GONE)
        instance.address = None
        kind = "terminated" if event.reason == TERMINATED else "lost"
        note_end = self._chooser.hazards.note_left if event.reason == TERMINATED else self._chooser.hazards.note_loss
        note_end(event.instance_id, now_s)
        if self._hedging is not None and instance.spot and kind == "lost" and not had_notice:
            self._hedging.note_warning(0.0)
        self._journal.note_event(kind, event.instance_id, now_s, reason=event.reason, notice=had_notice)
        commands = self._drop_all(self._fleet.replicas_on(event.instance_id))
        replans, reason = self._recut.replan(f"{event.instance_id} is gone ({event.reason})", now_s)
        return commands + replans, reason

    def _moved(self, event: SequenceMoved, now_s: float) -> tuple[list[Command], str]:
        self._journal.note_event(
            "moved",
            event.instance_id,
            now_s,
            request_id=event.request_id,
            replica=event.destination_replica_id,
            kv_bytes=event.kv_bytes,
            seconds=event.seconds,
        )
        self._recut.changes.moved(event.destination_replica_id, event.kv_bytes)
        self._refits.note_move(event)
        return [], f"{event.request_id} moved {event.kv_bytes} bytes to {event.destination_replica_id}"

    def _drained(self, event: Drained) -> tuple[list[Command], str]:
        """An empty replica ends, unless nobody needs its devices: then it can serve again should its machines stay."""
        replica = self.replicas.get(event.replica_id)
        told = f"{event.replica_id} is empty"
        if replica is None or replica.state is not ReplicaState.DRAINING or replica.leader_id != event.instance_id:
            return [], told
        machines = [self.instances[instance_id] for instance_id in replica.instance_ids]
        may_stay = all(each.state is InstanceState.DRAINING and not each.is_returned for each in machines)
        return ([] if may_stay else [*self._fleet.drop(replica)]), told

    # ------------------------------------------------------------------ the fleet's size

    def _resize(self, now_s: float) -> tuple[list[Command], str]:
        """Rents what is missing, and returns what is too much."""
        if self._hedging is None:
            return [], ""
        resizing = self._hedging.turn(now_s)
        commands: list[Command] = [*resizing.launches]
        for each in resizing.returns:
            commands += send_back(self._fleet, self.instances[each.instance_id], now_s)
        if resizing.returns:
            replans, reason = self._recut.replan(resizing.reason, now_s)
            commands += replans
        else:
            reason = resizing.reason
        return [*commands, *give_back(self._fleet, now_s)], reason

    # ------------------------------------------------------------------ time

    def _tick(self, now_s: float) -> tuple[list[Command], str]:
        commands: list[Command] = []
        reasons: list[str] = []
        spared: list[str] = []
        for instance in self._fleet.alive():
            if instance.address is not None and now_s >= instance.last_heard_s + SILENCE_S:
                lost, reason = self._lost(InstanceLost(instance_id=instance.instance_id, reason="silent"), now_s)
                commands += [Terminate(instance_id=instance.instance_id), *lost]
                commands += [Launch(count=1, spot=instance.spot)] if self._hedging is None else []
                reasons.append(reason)
            elif instance.notice is not None and not instance.is_returned and now_s >= instance.notice.deadline_s + REVERT_AFTER_S:
                self._chooser.hazards.note_spared(instance.instance_id, now_s)
                self._journal.note_event("undrained", instance.instance_id, now_s)
                commands += revert(self._fleet, instance, now_s)
                spared.append(instance.instance_id)
        if spared:
            replans, _ = self._recut.replan(f"{', '.join(spared)} stay{'' if len(spared) > 1 else 's'}", now_s)
            commands += replans
            reasons += [f"the notice for {instance_id} did not come true" for instance_id in spared]
        overdue = [each for each in self.replicas.values() if _is_overdue(each, now_s)]
        if overdue:
            commands += self._drop_all(overdue)
            reasons.append(f"{', '.join(each.replica_id for each in overdue)} did not become empty in time")
        parts = [each for each in incomplete(self._fleet) if each.complete_by_s is not None and now_s >= each.complete_by_s]
        if parts:
            commands += self._drop_all(parts)
            replans, reason = self._recut.replan(f"{', '.join(each.replica_id for each in parts)} is not whole", now_s)
            commands += replans
            reasons.append(reason)
        if self._retries.take_due(now_s):
            replans, reason = self._recut.replan("trying again", now_s)
            commands += replans
            reasons.append(reason)
        if self.wanted is None and self._chooser.look_s is not None and now_s >= self._chooser.look_s:
            replans, reason = self._recut.replan("a look at the whole fleet", now_s)
            self._chooser.put_off(now_s)
            commands += replans
            reasons += [reason] if replans else []
        return commands, "; ".join(reasons)

    def _drop_all(self, replicas: Iterable[Replica]) -> list[Command]:
        return [command for replica in replicas for command in self._fleet.drop(replica)]


def _expected(settings: ControllerSettings) -> Workload | None:
    """The load that the user expects; None: it is to be measured."""
    if settings.rate_rps is None:
        return None
    return Workload(
        rate_rps=settings.rate_rps,
        prompt=Lengths.fixed(settings.prompt_tokens),
        output=Lengths.fixed(settings.output_tokens),
        gap_cv=settings.gap_cv,
    )


def wanted_shape(reshape: Reshape) -> Shape | None:
    """What the user asks for; None: what the planner chooses."""
    if reshape.pipeline is None or reshape.tensor is None:
        return None
    return Shape(reshape.data, reshape.pipeline, reshape.tensor)


def _notice_ends_s(instance: Instance, notice: Notice) -> float:
    """When a notice did not come true; or, when it is ours, when the machine is given back whatever runs on it. Then nothing is
    left to do but to hear that it has ended."""
    if instance.is_given_back:
        return inf
    return notice.deadline_s + (0.0 if instance.is_returned else REVERT_AFTER_S)


def _is_overdue(replica: Replica, now_s: float) -> bool:
    leaving = replica.leaving
    due_s = deadline_of(leaving) if leaving is not None and leaving.is_told else None
    return due_s is not None and now_s >= due_s
