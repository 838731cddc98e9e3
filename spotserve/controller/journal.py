"""What the controller remembers of its turns: decisions with their reasons, and what happened to the fleet."""

from collections import deque
from collections.abc import Sequence

from spotserve.controller.records import Decision, FleetEvent
from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import (
    Activate,
    Command,
    Deactivate,
    Drain,
    Event,
    Launch,
    LaunchRefused,
    NoticeReceived,
    Publish,
    Reshape,
    SlotFailed,
    SlotReady,
)
from spotserve.planner.planner import listed

DECISIONS_KEPT = 1000
EVENTS_KEPT = 10_000


class Journal:
    """The newest decisions and events, numbered from 1."""

    def __init__(self) -> None:
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self.events: deque[FleetEvent] = deque(maxlen=EVENTS_KEPT)
        self._next_decision_number = 1
        self._next_event_number = 1

    def note_event(self, kind: str, instance_id: str, now_s: float, **detail: object) -> None:
        """Something happened to the fleet."""
        self.events.append(FleetEvent(self._next_event_number, now_s, kind, instance_id, detail))
        self._next_event_number += 1

    def note_decision(self, event: Event, commands: Sequence[Command], reason: str, now_s: float) -> None:
        """Something was decided."""
        told = tuple(describe(command) for command in commands)
        self.decisions.append(Decision(self._next_decision_number, now_s, _cause(event), told, reason))
        self._next_decision_number += 1


def _cause(event: Event) -> str:
    match event:
        case NoticeReceived():
            about = event.notice.instance_id
        case Reshape():
            about = shape_text(event.data, event.pipeline, event.tensor)
        case SlotReady() | SlotFailed():
            about = f"{slot_text(event.slot.replica_id, event.slot.stage, event.slot.shard)} on {event.instance_id}"
        case LaunchRefused():
            about = machines_text(event.count, event.zone, spot=event.spot)
        case _:
            about = getattr(event, "instance_id", "")
    return f"{type(event).__name__} {about}".strip()


def shape_text(data: int | None, pipeline: int | None, tensor: int | None) -> str:
    """A shape as users write it."""
    if pipeline is None:
        return "auto"
    return f"{'auto' if data is None else data},{pipeline},{tensor}"


def slot_text(replica_id: str, stage: int, shard: int) -> str:
    """A slot in a few letters."""
    return f"{replica_id}.{stage}.{shard}"


def machines_text(count: int, zone: str | None, *, spot: bool) -> str:
    """So many machines of a kind in a place."""
    return f"{count} {'spot' if spot else 'on demand'}{f' in {zone}' if zone is not None else ''}"


def describe(command: Command) -> str:
    """One command in a few words, for people."""
    match command:
        case Publish():
            serving = [route.replica_id for route in command.table.replicas if route.state is ReplicaState.SERVING]
            return f"publish table {command.table.version}: serving {listed(serving) or 'nobody'}"
        case Activate():
            slot = slot_text(command.slot.replica_id, command.slot.stage, command.slot.shard)
            num_bytes = sum(transfer.num_bytes for transfer in command.transfers)
            taken = f", taking {num_bytes} bytes from others" if num_bytes else ""
            return f"activate {slot} on {command.instance_id}/{command.device_index}{taken}"
        case Deactivate():
            slot = slot_text(command.slot.replica_id, command.slot.stage, command.slot.shard)
            return f"deactivate {slot} on {command.instance_id}/{command.device_index}"
        case Drain():
            return f"drain {command.replica_id} on {command.instance_id}: {len(command.orders)} orders"
        case Launch():
            why = f" ({command.reason})" if command.reason else ""
            return f"launch {machines_text(command.count, command.zone, spot=command.spot)}{why}"
        case _:
            return f"{type(command).__name__.lower()} {getattr(command, 'instance_id', '')}".strip()
