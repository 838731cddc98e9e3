"""The controller's mind: events in, commands out. No await, no clock, no I/O.

`handle` is the only way in. Every turn that commands something, or that decides to leave things as they are after the fleet
changed, is kept as a `Decision` with its cause and its reason. A new controller starts with an empty state and learns the
fleet from what workers say when they register; nothing that matters is lost with the old one.
"""

from collections import deque
from collections.abc import Iterable

from spotserve.config import ControllerSettings
from spotserve.controller.fleet import Decision, FleetEvent, Instance, Replica
from spotserve.core.cluster import DeviceId, InstanceState, Notice, NoticeKind, ReplicaState
from spotserve.core.messages import (
    TERMINATED,
    Activate,
    Command,
    Drain,
    Drained,
    Event,
    Heartbeat,
    InstanceLaunched,
    InstanceLost,
    Launch,
    NoticeReceived,
    Publish,
    Registered,
    ReplicaFailed,
    ReplicaReady,
    RoutingTable,
    SequenceMoved,
    SequenceOrder,
    SequenceResumed,
    Terminate,
    Tick,
    Undrain,
)
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Plan, ReplicaPlan, Slot
from spotserve.migration.matching import place, reusable_bytes
from spotserve.migration.schedule import Destination, InstanceSpeed, decide, fallback
from spotserve.planner.planner import number_after, plan

SILENCE_S = 3.0
"""An instance that has not been heard of for so long hangs: it is ended, so that its sequences get another owner."""

REVERT_AFTER_S = 1.0
"""A notice whose deadline has passed by this much, with the instance still there, did not come true."""

LINK_BYTES_PER_S = 200e6
"""What one worker moves to another until it has been measured: half of what one loopback stream of small frames gives."""

DECISIONS_KEPT = 1000
EVENTS_KEPT = 10_000


class ControllerState:
    """The fleet as the controller knows it, and what it wants of it."""

    def __init__(self, settings: ControllerSettings, *, max_batch: int) -> None:
        self._settings = settings
        self._max_batch = max_batch
        self.instances: dict[str, Instance] = {}
        self.replicas: dict[str, Replica] = {}
        self.plan: Plan | None = None
        self.model: ModelSpec | None = None
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self.events: deque[FleetEvent] = deque(maxlen=EVENTS_KEPT)
        self._known_notices: set[str] = set()
        self._next_replica_number = 1
        self._next_event_number = 1
        self._next_decision_number = 1
        self._published: RoutingTable | None = None

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """What to do about `event`, in order. Handling an event twice is harmless."""
        match event:
            case InstanceLaunched():
                commands, reason = self._launched(event, now_s)
            case Registered():
                commands, reason = self._registered(event, now_s)
            case Heartbeat():
                commands, reason = self._heard(event, now_s)
            case ReplicaReady():
                commands, reason = self._ready(event, now_s)
            case ReplicaFailed():
                commands, reason = self._failed(event, now_s)
            case NoticeReceived():
                commands, reason = self._noticed(event.notice, now_s)
            case InstanceLost():
                commands, reason = self._lost(event, now_s)
            case SequenceMoved():
                commands, reason = self._moved(event, now_s)
            case Drained():
                commands, reason = [], f"{event.replica_id} is empty"
            case SequenceResumed():
                self._note_event("resumed", "", now_s, request_id=event.request_id, reason=event.reason)
                commands, reason = [], ""
            case Tick():
                commands, reason = self._tick(now_s)
        commands += self._publish()
        if commands or reason:
            self._note_decision(event, commands, reason, now_s)
        return commands

    @property
    def next_deadline_s(self) -> float | None:
        """When time alone will change something: send a `Tick` then. None: never."""
        due = [instance.last_heard_s + SILENCE_S for instance in self._alive() if instance.address is not None]
        due += [instance.notice.deadline_s + REVERT_AFTER_S for instance in self._alive() if instance.notice is not None]
        return min(due, default=None)

    # ------------------------------------------------------------------ instances come

    def _launched(self, event: InstanceLaunched, now_s: float) -> tuple[list[Command], str]:
        if event.instance_id not in self.instances:
            self.instances[event.instance_id] = Instance(
                event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=event.usd_per_hour
            )
            self._note_event("launched", event.instance_id, now_s, spot=event.spot, usd_per_hour=event.usd_per_hour)
        return [], ""

    def _registered(self, event: Registered, now_s: float) -> tuple[list[Command], str]:
        known = self.instances.get(event.instance_id)
        if known is None or known.state is InstanceState.GONE:
            known = Instance(event.instance_id, spot=event.spot, zone=event.zone, usd_per_hour=0.0)
            self.instances[event.instance_id] = known
        known.pid, known.address, known.num_devices = event.pid, event.address, event.num_devices
        known.held, known.last_heard_s = event.held, now_s
        if known.state is InstanceState.PENDING:
            known.move_to(InstanceState.READY)
        self._note_event("registered", event.instance_id, now_s)
        self.model = event.model or self.model
        self._adopt_replicas(event)
        return self._replan(f"{event.instance_id} has joined")

    def _adopt_replicas(self, event: Registered) -> None:
        """Replicas that a worker serves already (for an earlier controller, or before its connection broke)."""
        self._put_into_plan(event.replicas, f"{event.instance_id} serves already")
        for replica in event.replicas:
            held = {slot.slot: DeviceId(event.instance_id, slot.device_index) for slot in event.held}
            known = self.replicas.setdefault(replica.replica_id, Replica(replica, {}))
            known.devices.update(held)
            known.ready_slots.update(held)
            if known.state is ReplicaState.LOADING and known.ready_slots.issuperset(replica.slots):
                known.move_to(ReplicaState.SERVING)

    def _put_into_plan(self, replicas: Iterable[ReplicaPlan], reason: str) -> None:
        """Replicas that serve although the plan does not name them become part of it."""
        planned = self.plan.replicas if self.plan is not None else ()
        added = tuple(replica for replica in replicas if replica not in planned)
        if added:
            epoch = self.plan.epoch if self.plan is not None else 0
            self.plan = Plan(epoch=epoch + 1, replicas=(*planned, *added), reason=reason)
            self._next_replica_number = number_after(self.plan, self._next_replica_number)

    def _heard(self, event: Heartbeat, now_s: float) -> tuple[list[Command], str]:
        instance = self.instances.get(event.instance_id)
        if instance is not None:
            instance.heartbeat, instance.last_heard_s = event, now_s
        return [], ""

    def _ready(self, event: ReplicaReady, now_s: float) -> tuple[list[Command], str]:
        self.model = event.model
        replica, instance = self.replicas.get(event.replica_id), self.instances.get(event.instance_id)
        if replica is None or instance is None or replica.state is not ReplicaState.LOADING:
            return [], ""
        replica.ready_slots.update(slot for slot, device in replica.devices.items() if device.instance_id == event.instance_id)
        if not replica.ready_slots.issuperset(replica.plan.slots):
            return [], f"{event.replica_id} waits for its other slots"
        replica.move_to(ReplicaState.SERVING)
        self._note_event("ready", event.instance_id, now_s, replica=event.replica_id)
        return [], f"{event.replica_id} holds its weights and serves"

    def _failed(self, event: ReplicaFailed, now_s: float) -> tuple[list[Command], str]:
        replica = self.replicas.get(event.replica_id)
        if replica is not None:
            self._drop_replica(replica)
        self._note_event("failed", event.instance_id, now_s, replica=event.replica_id, reason=event.reason)
        return [], f"{event.replica_id} could not be brought up: {event.reason}"

    # ------------------------------------------------------------------ instances go

    def _noticed(self, notice: Notice, now_s: float) -> tuple[list[Command], str]:
        instance = self.instances.get(notice.instance_id)
        if notice.notice_id in self._known_notices or instance is None or instance.state is InstanceState.GONE:
            return [], ""
        self._known_notices.add(notice.notice_id)
        if notice.kind is NoticeKind.SOFT:
            return [], f"{notice.instance_id} is at risk; nothing is drained for a soft signal"
        instance.notice = notice
        if instance.state is not InstanceState.DRAINING:
            instance.move_to(InstanceState.DRAINING)
        self._note_event("notice", notice.instance_id, now_s, deadline_s=notice.deadline_s)
        affected = self._replicas_on(notice.instance_id)
        for replica in affected:
            if replica.state in (ReplicaState.LOADING, ReplicaState.SERVING):
                replica.move_to(ReplicaState.DRAINING)
        published = self._publish()  # nobody is sent to the dying replica from here on, before anything else is done
        drains, taken = self._drain(instance, affected, notice.deadline_s, now_s)
        replans, reason = self._replan(f"{notice.instance_id} will be taken in {notice.deadline_s - now_s:.1f} s")
        return published + drains + replans, f"{reason}; {taken}" if taken else reason

    def _drain(self, instance: Instance, replicas: Iterable[Replica], deadline_s: float, now_s: float) -> tuple[list[Command], str]:
        """Orders for what runs on a dying instance, and the verdicts in a sentence."""
        heartbeat = instance.heartbeat
        sequences = heartbeat.sequences if heartbeat is not None else ()
        destinations = self._destinations()
        orders: tuple[SequenceOrder, ...] = ()
        if self.model is not None:
            orders = decide(
                sequences, now_s=now_s, deadline_s=deadline_s, source=_speed(instance), destinations=destinations, model=self.model
            )
        verdict_on_unknown = fallback(destinations)
        commands: list[Command] = [
            Drain(
                instance_id=instance.instance_id,
                replica_id=replica.replica_id,
                deadline_s=deadline_s,
                orders=orders,
                fallback=verdict_on_unknown,
            )
            for replica in replicas
        ]
        return commands, "; ".join(f"{order.request_id}: {order.reason}" for order in orders)

    def _destinations(self) -> list[Destination]:
        destinations = []
        for replica in self.replicas.values():
            instance = self.instances.get(replica.instance_ids[0]) if replica.devices else None
            if replica.state is not ReplicaState.SERVING or instance is None or instance.address is None:
                continue
            load = instance.heartbeat.running + instance.heartbeat.waiting if instance.heartbeat is not None else 0
            destinations.append(
                Destination(
                    replica_id=replica.replica_id,
                    instance_id=instance.instance_id,
                    address=instance.address,
                    free_sequences=max(0, replica.plan.parallel.max_batch - load),
                    speed=_speed(instance),
                )
            )
        return destinations

    def _lost(self, event: InstanceLost, now_s: float) -> tuple[list[Command], str]:
        instance = self.instances.get(event.instance_id)
        if instance is None or instance.state is InstanceState.GONE:
            return [], ""
        had_notice = instance.notice is not None
        instance.move_to(InstanceState.GONE)
        instance.address = None
        kind = "terminated" if event.reason == TERMINATED else "lost"
        self._note_event(kind, event.instance_id, now_s, reason=event.reason, notice=had_notice)
        for replica in self._replicas_on(event.instance_id):
            self._drop_replica(replica)
        return self._replan(f"{event.instance_id} is gone ({event.reason})")

    def _moved(self, event: SequenceMoved, now_s: float) -> tuple[list[Command], str]:
        self._note_event(
            "moved",
            event.instance_id,
            now_s,
            request_id=event.request_id,
            replica=event.destination_replica_id,
            kv_bytes=event.kv_bytes,
            seconds=event.seconds,
        )
        return [], f"{event.request_id} moved {event.kv_bytes} bytes to {event.destination_replica_id}"

    def _tick(self, now_s: float) -> tuple[list[Command], str]:
        commands: list[Command] = []
        reasons = []
        for instance in self._alive():
            if instance.address is not None and now_s >= instance.last_heard_s + SILENCE_S:
                lost, reason = self._lost(InstanceLost(instance_id=instance.instance_id, reason="silent"), now_s)
                commands += [Terminate(instance_id=instance.instance_id), Launch(count=1, spot=instance.spot), *lost]
                reasons.append(reason)
            elif instance.notice is not None and now_s >= instance.notice.deadline_s + REVERT_AFTER_S:
                commands += self._revert(instance, now_s)
                reasons.append(f"the notice for {instance.instance_id} did not come true")
        return commands, "; ".join(reasons)

    def _revert(self, instance: Instance, now_s: float) -> list[Command]:
        instance.notice = None
        instance.move_to(InstanceState.READY)
        self._note_event("undrained", instance.instance_id, now_s)
        commands: list[Command] = []
        for replica in self._replicas_on(instance.instance_id):
            if replica.ready_slots.issuperset(replica.plan.slots):
                replica.move_to(ReplicaState.SERVING)
                self._put_into_plan([replica.plan], f"{instance.instance_id} stays")
                commands.append(Undrain(instance_id=instance.instance_id, replica_id=replica.replica_id))
            else:
                self._drop_replica(replica)
        replans, _ = self._replan(f"{instance.instance_id} stays")
        return commands + replans

    # ------------------------------------------------------------------ planning

    def _replan(self, cause: str) -> tuple[list[Command], str]:
        """Plans for the devices that are there to stay, places what is new, and commands the difference."""
        devices = [device for instance in self._alive() if instance.state is InstanceState.READY for device in instance.devices]
        staying = (ReplicaState.LOADING, ReplicaState.SERVING)
        surviving = {replica.replica_id for replica in self.replicas.values() if replica.state in staying}
        target = plan(
            devices,
            current=self.plan,
            surviving=surviving,
            next_replica_number=self._next_replica_number,
            settings=self._settings,
            max_batch=self._max_batch,
        )
        self.plan = target
        self._next_replica_number = number_after(target, self._next_replica_number)
        wanted = {replica.replica_id for replica in target.replicas}
        commands: list[Command] = []
        for replica in [known for known in self.replicas.values() if known.replica_id not in wanted]:
            if replica.state is not ReplicaState.DRAINING:
                self._drop_replica(replica)
        commands += self._activate_missing(target, devices)
        return commands, f"{cause}; {target.reason}"

    def _activate_missing(self, target: Plan, devices: list[DeviceId]) -> list[Command]:
        """Places the slots of new replicas on devices that have none, by the bytes that are there already."""
        missing = [replica for replica in target.replicas if replica.replica_id not in self.replicas]
        taken = {device for replica in self.replicas.values() for device in replica.devices.values()}
        free = [device for device in devices if device not in taken]
        slots = [slot for replica in missing for slot in replica.slots]
        placement = place(slots, free, self._bytes_on_device)
        commands: list[Command] = []
        for replica in missing:
            placed = {slot: placement.devices[slot] for slot in replica.slots}
            self.replicas[replica.replica_id] = Replica(replica, placed)
            commands += [
                Activate(
                    instance_id=device.instance_id,
                    device_index=device.index,
                    replica=replica,
                    slot=slot,
                    plan_epoch=target.epoch,
                )
                for slot, device in placed.items()
            ]
        return commands

    def _bytes_on_device(self, slot: Slot, device: DeviceId) -> int:
        """Weight of the edge slot-device: bytes of weights and KV that need not be fetched (SpotServe, section 3.3)."""
        instance = self.instances[device.instance_id]
        held = next((held for held in instance.held if held.device_index == device.index), None)
        if self.model is None or self.plan is None or held is None:
            return 0
        parallel = next(replica.parallel for replica in self.plan.replicas if replica.replica_id == slot.replica_id)
        kv_tokens = instance.heartbeat.kv_tokens_used if instance.heartbeat is not None else 0
        kv_bytes = kv_tokens * self.model.kv_bytes_per_token // (held.pipeline * held.tensor)
        return reusable_bytes(self.model, held, slot, parallel, kv_bytes=kv_bytes)

    def _drop_replica(self, replica: Replica) -> None:
        replica.move_to(ReplicaState.STOPPED)
        del self.replicas[replica.replica_id]

    def _replicas_on(self, instance_id: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if instance_id in replica.instance_ids]

    def _alive(self) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.state is not InstanceState.GONE]

    # ------------------------------------------------------------------ telling

    def routing_table(self) -> RoutingTable:
        """Replicas that gateways may talk to; those that drain are kept in it, so that their last tokens arrive."""
        routes = []
        for replica in self.replicas.values():
            leader = self.instances.get(replica.instance_ids[0]) if replica.devices else None
            if replica.state is not ReplicaState.LOADING and leader is not None and leader.address is not None:
                routes.append(replica.route(leader.address))
        version = self._published.version if self._published is not None else 0
        return RoutingTable(version=version, replicas=tuple(routes), model=self.model)

    def _publish(self) -> list[Command]:
        """The routing table, when it has changed."""
        table = self.routing_table()
        if self._published is not None and table == self._published:
            return []
        self._published = RoutingTable(version=table.version + 1, replicas=table.replicas, model=table.model)
        return [Publish(table=self._published)]

    def _note_event(self, kind: str, instance_id: str, now_s: float, **detail: object) -> None:
        self.events.append(FleetEvent(self._next_event_number, now_s, kind, instance_id, detail))
        self._next_event_number += 1

    def _note_decision(self, event: Event, commands: list[Command], reason: str, now_s: float) -> None:
        about = getattr(event, "instance_id", "") or (event.notice.instance_id if isinstance(event, NoticeReceived) else "")
        cause = f"{type(event).__name__} {about}".strip()
        self.decisions.append(
            Decision(self._next_decision_number, now_s, cause, tuple(describe(command) for command in commands), reason)
        )
        self._next_decision_number += 1


def _speed(instance: Instance) -> InstanceSpeed:
    """What heartbeats say of an instance's speed; 0 where nothing is known yet."""
    heartbeat = instance.heartbeat
    return InstanceSpeed(
        step_s=heartbeat.step_s if heartbeat is not None else 0.0,
        prefill_tokens_per_s=heartbeat.prefill_tokens_per_s if heartbeat is not None else 0.0,
        link_bytes_per_s=LINK_BYTES_PER_S,
    )


def describe(command: Command) -> str:
    """One command in a few words, for people."""
    match command:
        case Publish():
            serving = [route.replica_id for route in command.table.replicas if route.state is ReplicaState.SERVING]
            return f"publish table {command.table.version}: serving {', '.join(serving) or 'nobody'}"
        case Activate():
            return f"activate {command.replica.replica_id} on {command.instance_id}"
        case Drain():
            return f"drain {command.replica_id} on {command.instance_id}: {len(command.orders)} orders"
        case _:
            return f"{type(command).__name__.lower()} {getattr(command, 'instance_id', '')}".strip()
