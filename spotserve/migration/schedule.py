"""When each flow of a migration is sent, so that the busiest port is done soon and nothing comes too late.

Port-exclusive list scheduling: whenever both ports of a flow are free it may begin, the most important first. Importance: what
only instances that will be taken have, KV of the most advanced sequences, weights of the front stages; among equals the flow
whose busier port has the most left to do, then the longest. So ports that others wait for never wait themselves, and the end is
near the bound that no schedule can pass: the load of the busiest port (a bipartite multigraph needs as many rounds as its largest
degree, König 1916; sizes that differ cost a little).

Memory: a flow waits until there is room for it (`room`), and less important ones for the same device wait behind it. When nothing
can go on, they may pass it; then weights that files have too are evicted; then the most important is given up.

Deadlines: no flow ends after the deadline of either of its instances. What would is not sent at all. When that hits a last copy,
all orders of the last copies are tried (`rescue`), if they are few.

Independent parts (`groups`) are scheduled each by itself, so cost does not grow with the whole.

Pure. Does not know how bytes are sent, or what becomes of what is not.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from spotserve.core.cluster import DeviceId
from spotserve.migration.flows import Flow, InstanceLinks, Port
from spotserve.migration.groups import groups
from spotserve.migration.rescue import Job, rescue
from spotserve.migration.room import Leaving, Memory
from spotserve.migration.timing import Evicted, Run, Timed


@dataclass(frozen=True, slots=True)
class Schedule:
    """A migration in time."""

    timed: tuple[Timed, ...]
    """What is sent, by when it starts."""
    late: tuple[Flow, ...]
    """Would end after a deadline: sequences resume from tokens, weights are read from files."""
    from_files: tuple[Flow, ...]
    """Weights whose source was evicted: their devices read them from files."""
    without_room: tuple[Flow, ...]
    """There is no memory for them."""
    evicted: tuple[Evicted, ...]
    makespan_s: float
    """From now until the last flow has ended."""
    lower_bound_s: float
    """For which the busiest port has to work, whatever the order of `timed`."""


def schedule(
    flows: Sequence[Flow],
    *,
    links: Mapping[str, InstanceLinks],
    now_s: float,
    deadlines_s: Mapping[str, float] | None = None,
    memory: Memory | None = None,
) -> Schedule:
    """Times for `flows`, all different.

    Args:
        flows: in any order; it does not matter.
        links: of every instance that is an end of a flow.
        now_s: nothing starts before.
        deadlines_s: by instance, when it is taken; one without an entry stays.
        memory: the bound on what arrives; None: there is none.
    """
    assert len(set(flows)) == len(flows), "the same bytes twice"
    memory, deadlines_s = memory or Memory(), deadlines_s or {}
    ordered = sorted(flows, key=lambda flow: (flow.source, flow.destination, flow.what, flow.num_bytes))
    seconds = {flow: flow.seconds(links) for flow in ordered}
    ends = {flow: min(deadlines_s.get(end.instance_id, inf) for end in (flow.source, flow.destination)) for flow in ordered}
    there: dict[DeviceId, list[Leaving]] = {}
    for leaving in memory.leaving:
        there.setdefault(leaving.device, []).append(leaving)
    runs = []
    for part in _parts(ordered, memory):
        devices = {flow.destination for flow in part}
        bound = Memory(
            {device: memory.free_bytes[device] for device in devices if device in memory.free_bytes},
            tuple(each for device in sorted(devices) for each in there.get(device, ())),
        )
        runs.append(_best_run(part, seconds, ends, now_s, bound))
    return _joined(runs, seconds, now_s)


def _parts(flows: Sequence[Flow], memory: Memory) -> list[list[Flow]]:
    """Flows in groups that share no port and no bounded memory."""
    keys: dict[Flow, list[Hashable]] = {flow: [*flow.ports] for flow in flows}
    for flow in flows:
        if flow.destination in memory.free_bytes:
            keys[flow].append(flow.destination)
    for leaving in memory.leaving:
        if leaving.device in memory.free_bytes:
            for flow in leaving.readers & keys.keys():
                keys[flow].append(leaving.device)
    return [[flows[index] for index in part] for part in groups([keys[flow] for flow in flows])]


def _best_run(
    flows: Sequence[Flow], seconds: Mapping[Flow, float], ends: Mapping[Flow, float], now_s: float, memory: Memory
) -> Run:
    """One independent part, with all its last copies in time if any order can do it."""
    run = Run(flows, seconds, ends, now_s, memory, {})
    if not any(flow.is_last_copy for flow in run.late):
        return run
    last = [flow for flow in flows if flow.is_last_copy and now_s + seconds[flow] <= ends[flow]]
    arriving: Counter[DeviceId] = Counter()
    for flow in last:
        arriving[flow.destination] += flow.num_bytes
    if any(num_bytes > memory.free_bytes.get(device, num_bytes) for device, num_bytes in arriving.items()):
        return run
    starts = rescue([Job(flow.ports, seconds[flow], ends[flow]) for flow in last], now_s)
    return run if starts is None else Run(flows, seconds, ends, now_s, memory, dict(zip(last, starts, strict=True)))


def _joined(runs: Sequence[Run], seconds: Mapping[Flow, float], now_s: float) -> Schedule:
    timed = sorted((each for run in runs for each in run.timed), key=lambda each: (each.start_s, each.flow.what, each.flow.ports))
    load_s: dict[Port, float] = {}
    for each in timed:
        for port in each.flow.ports:
            load_s[port] = load_s.get(port, 0.0) + seconds[each.flow]
    return Schedule(
        timed=tuple(timed),
        late=tuple(flow for run in runs for flow in run.late),
        from_files=tuple(flow for run in runs for flow in run.from_files),
        without_room=tuple(flow for run in runs for flow in run.without_room),
        evicted=tuple(each for run in runs for each in run.evicted),
        makespan_s=max((each.end_s for each in timed), default=now_s) - now_s,
        lower_bound_s=max(load_s.values(), default=0.0),
    )
