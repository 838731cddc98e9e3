"""What a change moves, turn by turn: machines that answer only when everything of a turn is there begin the next one together.

A turn may plan several times, as when two machines are lost at once; what an earlier plan of the turn had begun and a later one
gave up is not counted, and what it would have taken from a machine that goes, too, is read from files. What is left is sent at
once, so it is scheduled together; where one plan made all of it, that is the very schedule that the controller made.

Pure. Does not know why anything moves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from spotserve.controller.bringup import Arrangement
from spotserve.core.cluster import DeviceId
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Slot
from spotserve.migration.flows import InstanceLinks
from spotserve.migration.matching import place_freely
from spotserve.migration.schedule import Schedule, schedule
from spotserve.planner.memory import stage_weight_bytes


@dataclass(frozen=True, slots=True)
class Phase:
    """What one turn brings up."""

    start_s: float
    """On the clock of the schedule."""
    schedule: Schedule
    lower_bound_bytes: int
    """What goes from device to device at least, wherever the slots are placed: less only if more were read from files."""
    from_files_bytes: Mapping[str, int]
    """By machine, weights that nobody has or that would come too late."""


def phase_of(
    model: ModelSpec,
    arrangements: Sequence[Arrangement],
    shapes: Mapping[str, Parallel],
    *,
    links: Mapping[str, InstanceLinks],
    made_s: float,
    start_s: float,
    deadlines_s: Mapping[str, float],
) -> Phase:
    """One turn.

    Args:
        model: that is served.
        arrangements: that were made in it, in order.
        shapes: by name, the replicas that are left of them.
        links: of every machine.
        made_s: for when the arrangements were made.
        start_s: when the turn begins; later where turns before it had something to send.
        deadlines_s: by instance, when it is taken; one without an entry stays.
    """
    left = [{slot: at for slot, at in each.placement.devices.items() if slot.replica_id in shapes} for each in arrangements]
    is_one = len(arrangements) == 1 and len(left[0]) == len(arrangements[0].placement.devices)
    is_told = is_one and all(
        each.end_s <= deadlines_s.get(each.flow.source.instance_id, inf) for each in arrangements[0].schedule.timed
    )
    if is_told and start_s == made_s:
        timed = arrangements[0].schedule
    else:
        flows = [
            sent.flow
            for each, placed in zip(arrangements, left, strict=True)
            for sent in each.schedule.timed
            if sent.flow.destination in placed.values()
        ]
        timed = schedule(flows, links=links, now_s=start_s, deadlines_s=deadlines_s)
    arrived: Counter[DeviceId] = Counter()
    for sent in timed.timed:
        arrived[sent.flow.destination] += sent.flow.num_bytes
    missing = _missing_bytes(model, arrangements, left, shapes)
    from_files: Counter[str] = Counter()
    for device, num_bytes in missing.items():
        if num_bytes > arrived[device]:
            from_files[device.instance_id] += num_bytes - arrived[device]
    bound = max(0, arrived.total() - _spared_bytes(arrangements[0])) if is_one else 0
    return Phase(start_s, timed, bound, dict(from_files))


def _missing_bytes(
    model: ModelSpec,
    arrangements: Sequence[Arrangement],
    left: Sequence[Mapping[Slot, DeviceId]],
    shapes: Mapping[str, Parallel],
) -> dict[DeviceId, int]:
    """Weights that each device lacks of its new slot."""
    missing: dict[DeviceId, int] = {}
    for each, placed in zip(arrangements, left, strict=True):
        found = _found_bytes(each, placed)
        for slot, device in placed.items():
            missing[device] = stage_weight_bytes(model, shapes[slot.replica_id], slot.stage) - found[slot]
    return missing


def _found_bytes(arrangement: Arrangement, devices: Mapping[Slot, DeviceId]) -> dict[Slot, int]:
    """What stays where it is under a placement."""
    scores = arrangement.scores
    rows = dict(zip(scores.slots, scores.kinds, strict=True))
    columns = {device: index for index, device in enumerate(scores.devices)}
    return {slot: int(scores.found_bytes[rows[slot], columns[device]]) for slot, device in devices.items()}


def _spared_bytes(arrangement: Arrangement) -> int:
    """What another placement would keep where it is beyond what this one does: Kuhn-Munkres without regard to times."""
    if not arrangement.placement.devices:
        return 0
    most = _found_bytes(arrangement, place_freely(arrangement.scores).devices)
    return sum(most.values()) - sum(_found_bytes(arrangement, arrangement.placement.devices).values())
