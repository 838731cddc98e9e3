"""Carries a timeline out against a running system: the wall-clock end of a replay.

Open loop: a request is sent when its time has come, however the system is doing. Capacity actions go to the admin API; the
trace's instances are mapped on the cluster's, the fleet's size at the start first. Decides nothing: what happens and when is
in the timeline, what it meant is in the record.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from spotserve.core.clock import Clock
from spotserve.core.errors import CloudError
from spotserve.replay.admin import Admin, Status
from spotserve.replay.client import StreamClient
from spotserve.replay.record import Deed, FleetEvent, RequestRecord, RunRecord
from spotserve.replay.timeline import Arrive, CapacityAction, GiveNotice, Launch, Take, Timeline

WATCH_S = 0.5
"""How often the fleet is asked what happened."""
STEADY_LOOKS = 3
"""Looks in a row that must find the fleet ready before it counts as ready."""
RECOMPUTED_METRIC = "spotserve_tokens_recomputed_total"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass is, for whoever shows it."""

    label: str
    requests_total: int
    requests_sent: int
    requests_ended: int
    requests_lost: int
    tokens: int
    instances: int
    losses: int


@dataclass(frozen=True, slots=True)
class System:
    """A running system and how to reach it."""

    admin: Admin
    client: StreamClient
    clock: Clock
    build_prompt: Callable[[Arrive, int], str]
    """Text of a request; the number is the tokens of a block of its prefix."""
    show: Callable[[Progress], None]


class TraceFleet:
    """The trace's instances, played by the cluster's."""

    def __init__(self, admin: Admin, clock: Clock, initial: dict[str, str]) -> None:
        """`initial`: the trace's instance -> the cluster's, for the fleet at the start."""
        self._admin = admin
        self._clock = clock
        loop = asyncio.get_running_loop()
        self._players: dict[str, asyncio.Future[str | None]] = {}
        for trace_instance, instance in initial.items():
            self._players[trace_instance] = loop.create_future()
            self._players[trace_instance].set_result(instance)
        self.deeds: list[Deed] = []

    async def carry_out(self, action: CapacityAction) -> None:
        """One action; what the cloud refuses is a deed with a problem, not an error."""
        if isinstance(action, Take) and action.noticed:
            return  # the notice carried the deadline; taking the instance then is the cluster's part
        now_s, instance, problem = self._clock.now_s(), None, None
        try:
            match action:
                case Launch():
                    instance = await self._launch(action.instance)
                case GiveNotice():
                    instance = await self._preempt(action.instance, grace_s=action.deadline_s - action.at_s)
                case Take():
                    instance = await self._preempt(action.instance, grace_s=0.0)
        except CloudError as error:
            problem = str(error)
        self.deeds.append(Deed(now_s, type(action).__name__, action.instance, instance, problem))

    async def _launch(self, trace_instance: str) -> str:
        player = self._players[trace_instance] = asyncio.get_running_loop().create_future()
        try:
            (instance,) = await self._admin.launch(1)
        except CloudError:
            player.set_result(None)
            raise
        player.set_result(instance)
        return instance

    async def _preempt(self, trace_instance: str, *, grace_s: float) -> str:
        """Waits for the instance's launch to be answered, if it still is under way."""
        player = self._players.get(trace_instance)
        instance = None if player is None else await player
        if instance is None:
            raise CloudError(f"{trace_instance}: no instance of the cluster stands for it")
        await self._admin.preempt(instance, grace_s=grace_s)
        return instance


class _Pass:
    """One pass under way: what was sent, what came back, what the fleet said."""

    def __init__(
        self, label: str, arrivals: Sequence[Arrive], system: System, instances: Sequence[str], prefix_block_tokens: int = 0
    ) -> None:
        self.prefix_block_tokens = prefix_block_tokens
        self.label = label
        self.system = system
        self.initial = tuple(instances)
        self.present = set(instances)
        self.total = len(arrivals)
        self.sent = 0
        self.records: list[RequestRecord] = []
        self.events: list[FleetEvent] = []

    async def send(self, arrival: Arrive, scheduled_s: float) -> None:
        """One request from sending to its last token."""
        prompt = self.system.build_prompt(arrival, self.prefix_block_tokens)
        self.sent += 1
        self.records.append(await self.system.client.complete(arrival, prompt, scheduled_s=scheduled_s))

    async def look(self) -> None:
        """Takes in what the fleet reported, and shows how far the pass is."""
        for event in await self.system.admin.new_events():
            self.events.append(event)
            if event.instance is not None and event.kind == "launched":
                self.present.add(event.instance)
            elif event.instance is not None and event.kind in ("lost", "terminated"):
                self.present.discard(event.instance)
        self.system.show(
            Progress(
                self.label,
                self.total,
                self.sent,
                len(self.records),
                sum(not record.complete for record in self.records),
                sum(len(record.token_ids) for record in self.records),
                len(self.present),
                sum(event.kind == "lost" for event in self.events),
            )
        )

    async def watch(self) -> None:
        """Looks until it is cancelled. The events stay on the server, so a look that fails only comes later."""
        while True:
            with suppress(CloudError):
                await self.look()
            await asyncio.sleep(WATCH_S)


async def prepare_fleet(system: System, wanted: int | None, *, patience_s: float) -> tuple[str, ...]:
    """Brings the fleet to `wanted` instances (None: leaves it), waits until it serves; the ids of its instances.

    Raises:
        CloudError: the system is out of reach, or the fleet is not ready within `patience_s`.
    """
    status = await system.admin.status()
    active = [instance.id for instance in status.instances if instance.state in ("pending", "ready")]
    if wanted is not None:
        for surplus in active[wanted:]:
            await system.admin.terminate(surplus)
        if len(active) < wanted:
            await system.admin.launch(wanted - len(active))
    looks = 0
    try:
        async with asyncio.timeout(patience_s):
            while looks < STEADY_LOOKS:
                status = await system.admin.status()
                looks = looks + 1 if _is_ready(status, wanted) else 0
                await asyncio.sleep(WATCH_S)
    except TimeoutError:
        states = ", ".join(f"{instance.id} {instance.state}" for instance in status.instances)
        raise CloudError(f"the fleet is not ready after {patience_s:g} s: wanted {wanted}, instances: {states or 'none'}") from None
    return tuple(instance.id for instance in status.instances if instance.state == "ready")


def _is_ready(status: Status, wanted: int | None) -> bool:
    states = [instance.state for instance in status.instances if instance.state != "gone"]
    replicas = [replica.state for replica in status.replicas if replica.state != "stopped"]
    settled = set(states) == {"ready"} and set(replicas) == {"serving"}
    return settled and (wanted is None or len(states) == wanted)


async def carry_out(timeline: Timeline, system: System, *, label: str, patience_s: float) -> RunRecord:
    """The whole timeline, open loop, until every request has ended.

    Raises:
        CloudError: the fleet could not be made ready, or does not answer at the end.
    """
    instances = await prepare_fleet(system, len(timeline.initial) or None, patience_s=patience_s)
    await system.admin.new_events()  # what came before is not this pass's
    under_way = _Pass(label, timeline.arrivals, system, instances, timeline.prefix_block_tokens)
    fleet = TraceFleet(system.admin, system.clock, dict(zip(timeline.initial, instances, strict=False)))
    recomputed_before = await system.admin.metric(RECOMPUTED_METRIC)
    started_s = system.clock.now_s()
    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(under_way.watch(), name="watch the fleet")
        async with asyncio.TaskGroup() as tasks:
            for action in timeline.actions:
                due_s = started_s + action.at_s
                await asyncio.sleep(max(0.0, due_s - system.clock.now_s()))
                if isinstance(action, Arrive):
                    tasks.create_task(under_way.send(action, due_s), name=f"request {action.index}")
                else:
                    tasks.create_task(fleet.carry_out(action), name=f"{type(action).__name__} {action.instance}")
        watcher.cancel()
    return await _finish(under_way, started_s, recomputed_before, fleet.deeds)


async def answer_all(
    arrivals: Sequence[Arrive], system: System, *, label: str, concurrency: int, prefix_block_tokens: int = 0
) -> RunRecord:
    """The same requests on an undisturbed fleet, at most `concurrency` at a time: what the answers should be.

    Raises:
        CloudError: the system does not answer at the end.
    """
    status = await system.admin.status()
    await system.admin.new_events()
    ready = [instance.id for instance in status.instances if instance.state == "ready"]
    under_way = _Pass(label, arrivals, system, ready, prefix_block_tokens)
    recomputed_before = await system.admin.metric(RECOMPUTED_METRIC)
    started_s = system.clock.now_s()
    waiting = iter(arrivals)

    async def send_in_turn() -> None:
        for arrival in waiting:
            await under_way.send(arrival, system.clock.now_s())

    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(under_way.watch(), name="watch the fleet")
        async with asyncio.TaskGroup() as lanes:
            for lane in range(concurrency):
                lanes.create_task(send_in_turn(), name=f"lane {lane}")
        watcher.cancel()
    return await _finish(under_way, started_s, recomputed_before, [])


async def _finish(under_way: _Pass, started_s: float, recomputed_before: float | None, deeds: Sequence[Deed]) -> RunRecord:
    ended_s = under_way.system.clock.now_s()
    await under_way.look()
    recomputed = await under_way.system.admin.metric(RECOMPUTED_METRIC)
    return RunRecord(
        label=under_way.label,
        started_s=started_s,
        ended_s=ended_s,
        initial_instances=under_way.initial,
        requests=tuple(sorted(under_way.records, key=lambda record: record.arrival.index)),
        fleet_events=tuple(under_way.events),
        deeds=tuple(deeds),
        tokens_recomputed=None if recomputed is None else round(recomputed - (recomputed_before or 0.0)),
    )
