"""The fleets of SpotServe's paper in a replay: what they run, and what they do when machines come and go.

Three ways to react, after the artifact of Miao et al., ASPLOS'24 (github.com/Hsword/SpotServe, branch artifact, 832b29f):

- *migrate* (SpotServe): acts the grace period ahead of every event, since machines are known two minutes before they are up. The
  rule chooses a shape, all pipelines stop when the arranger says so (none, if only their number grows), weights and KV move for as
  long as the artifact estimates, and batches go on where they stood.
- *reroute*: one shape for ever. A pipeline that loses a machine ends and its requests are computed anew by others; machines that
  are free become pipelines once an engine has started and read its weights.
- *restart* (Reparallelization): the rule chooses as in SpotServe when an event has happened; every engine is started anew and reads
  its weights, and what ran is computed anew.
Both of these wait once more for as long as an engine took to start, as the artifact has them do.

What differs: requests of dropped batches are queued again (the artifact loses them), and a fleet too small for any pipeline waits
(the artifact ends). Losses without a notice are heard of as early as others: the artifact
knows no other. All machines of the trace are held. Cost grows with batches and events.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import floor

from spotserve.core.cluster import DeviceId
from spotserve.migration.spotserve_2024 import Batch, Grid, Layout, first_layout, grows, inherit, remap
from spotserve.migration.spotserve_2024_moves import SWITCH_S, Measure, Move, estimate_s, moves, num_bytes, traffic
from spotserve.planner.spotserve_2024 import PublishedChoice, choose
from spotserve.replay.agenda import Agenda
from spotserve.replay.call import Call, seniority
from spotserve.replay.outcome import Gaps, Lease, Outcomes, Replayed
from spotserve.replay.record import FleetEvent
from spotserve.replay.scenario import PublishedCase, Scenario, Show
from spotserve.replay.static_batches import BatchTimes, Pipeline, StaticBatch
from spotserve.replay.timeline import GiveNotice, Launch, Take

ENGINE_START_S = 10.0
"""Starting engines with `mpirun` and NCCL, and reading weights, which lie on every machine's disk. Nobody has published it: of 5,
10, 15 and 20 s the one with which both baselines come nearest to the paper (benchmarks/paper.py)."""

SLOWER = 1.1
"""By which the arranger takes steps to be slower before a loss, and quicker before machines come."""

PATIENCE_S = 7200.0


class Reaction(Enum):
    """What is done when machines come and go."""

    MIGRATE = "migrate"
    REROUTE = "reroute"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Change:
    """Machines that come and go together."""

    at_s: float
    leaving: frozenset[str]
    joining: frozenset[str]


class StaticFleet:
    """One fleet under one of the three reactions. Plays once."""

    def __init__(self, scenario: Scenario, case: PublishedCase, reaction: Reaction, *, policy: str, show: Show) -> None:
        self._scenario, self._case, self._reaction, self._policy, self._show = scenario, case, reaction, policy, show
        self._agenda = Agenda()
        self._gaps, self._outcomes = Gaps(), Outcomes()
        self._queue: list[Call] = []
        self._machines: frozenset[str] = frozenset(scenario.timeline.initial)
        self._noticed = {action.instance for action in scenario.timeline.losses if action.noticed}
        self._pipelines: list[Pipeline] = []
        self._layout: Layout | None = None
        self._fixed: tuple[int, int] | None = None
        self._target: Callable[[], None] | None = None
        """What follows when all pipelines have stopped."""
        self._last_change = 0
        self._events: list[FleetEvent] = []
        self._outstanding = 0
        self._unsettled_s: float | None = None
        self._members: dict[int, tuple[str, ...]] = {}
        """Machines of each pipeline of one shape for ever."""
        self._starting: frozenset[str] = frozenset()
        """Machines whose pipeline is not up yet."""
        self._kv_bytes = self._weight_bytes = self._read_bytes = 0.0

    # ------------------------------------------------------------------ the whole

    def play(self) -> Replayed:
        """From the first machine to the last answer."""
        timeline, agenda = self._scenario.timeline, self._agenda
        changes = list(self._changes())
        if self._reaction is Reaction.REROUTE:
            self._fixed = self._shape_for_ever(changes)
        for name in timeline.initial:
            self._event("launched", name, spot=True)
            self._event("registered", name)
        self._start(self._machines)
        self._settle()
        for change in changes:
            ahead_s = self._scenario.grace_s if self._reaction is Reaction.MIGRATE else 0.0
            agenda.at(max(0.0, change.at_s - ahead_s), partial(self._hear, change))
            agenda.at(change.at_s, partial(self._happen, change))
        self._tell_fleet()
        for number, arrival in enumerate(timeline.arrivals):
            agenda.run_until(arrival.at_s)
            self._outstanding += 1
            self._dispatch(Call(arrival.index, arrival.at_s, arrival.prompt_tokens, arrival.output_tokens))
            if number % 256 == 0:
                self._show(arrival.at_s, len(self._outcomes), len(self._machines))
        agenda.run_until(timeline.duration_s)
        while self._outstanding and agenda.next_s < timeline.duration_s + PATIENCE_S:
            agenda.step()
        for call in self._all_calls():
            self._outcomes.append(call.outcome(agenda.now_s))
        return Replayed(
            policy=self._policy,
            seed=self._scenario.seed,
            duration_s=timeline.duration_s,
            ended_s=agenda.now_s,
            outcomes=self._outcomes,
            gaps=self._gaps,
            fleet_events=tuple(sorted(self._events, key=lambda event: event.time_s)),
            leases=tuple(self._leases()),
            on_demand_usd_per_hour=self._scenario.prices.on_demand_usd_per_hour,
            weights_moved_bytes=round(self._weight_bytes),
            weights_read_bytes=round(self._read_bytes),
            kv_moved_bytes=round(self._kv_bytes),
        )

    def _changes(self) -> Iterator[Change]:
        """Moments at which machines leave or are up; one that comes and one that goes within the grace period are one moment."""
        up_s: dict[str, float] = {}
        moments: defaultdict[float, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
        start_up_s = self._scenario.delays.start_up_s
        for action in self._scenario.timeline.actions:
            if isinstance(action, Launch):
                up_s[action.instance] = action.at_s + start_up_s
                moments[action.at_s + start_up_s][1].add(action.instance)
            elif isinstance(action, Take):
                if up_s.get(action.instance, 0.0) > action.at_s:  # it never came up
                    moments[up_s[action.instance]][1].discard(action.instance)
                else:
                    moments[action.at_s][0].add(action.instance)
        merged: list[Change] = []
        for at_s, (leaving, joining) in sorted(moments.items()):
            if not leaving and not joining:
                continue
            last = merged[-1] if merged else None
            if last and last.joining and not last.leaving and leaving and at_s - last.at_s < self._scenario.grace_s:
                merged[-1] = Change(at_s, frozenset(leaving), last.joining | joining)
            else:
                merged.append(Change(at_s, frozenset(leaving), frozenset(joining)))
        yield from merged

    def _leases(self) -> Iterator[Lease]:
        """Every machine of the trace, from its launch."""
        since_s = dict.fromkeys(self._scenario.timeline.initial, 0.0)
        price, end_s = self._scenario.prices.spot_usd_per_hour, self._scenario.timeline.duration_s
        for action in self._scenario.timeline.actions:
            if isinstance(action, Launch):
                since_s[action.instance] = action.at_s
            elif isinstance(action, Take):
                yield Lease(action.instance, True, since_s.pop(action.instance), action.at_s, price)
        yield from (Lease(name, True, at_s, end_s, price) for name, at_s in since_s.items())

    # ------------------------------------------------------------------ requests

    def _dispatch(self, call: Call) -> None:
        insort(self._queue, call, key=seniority)
        self._fill()

    def _fill(self) -> None:
        """Requests go to the pipeline that has fewest, while any has room."""
        while self._queue:
            free = [pipeline for pipeline in self._pipelines if pipeline.has_room]
            if not free:
                return
            min(free, key=lambda pipeline: pipeline.num_held).take(self._queue.pop(0))

    def _ended(self, call: Call) -> None:
        self._outstanding -= 1
        self._outcomes.append(call.outcome(call.last_token_s))

    def _again(self, calls: Sequence[Call]) -> None:
        """Requests are computed anew."""
        for call in calls:
            if call.emitted >= call.output_tokens:
                continue
            if call.known_tokens:
                call.recomputed_tokens += call.known_tokens
                call.known_tokens = 0
                call.begin_anew()
                self._event("restarted", None, request=call.index)
            insort(self._queue, call, key=seniority)

    def _all_calls(self) -> Iterator[Call]:
        for pipeline in self._pipelines:
            if pipeline.running is not None:
                yield from (call for call in pipeline.running.calls if call.emitted < call.output_tokens)
            if pipeline.resumed is not None:
                yield from (call for call in pipeline.resumed.calls if call.emitted < call.output_tokens)
            yield from pipeline.pool
        yield from self._queue

    # ------------------------------------------------------------------ machines

    def _hear(self, change: Change) -> None:
        """The fleet knows of a change and begins to react."""
        if self._reaction is Reaction.REROUTE:
            self._reroute(change)
            return
        self._machines = (self._machines | change.joining) - change.leaving
        if self._reaction is Reaction.RESTART:
            self._restart()
        else:
            self._migrate(change)

    def _happen(self, change: Change) -> None:
        """What the world sees of it."""
        for name in sorted(change.joining):
            self._event("registered", name)
        for name in sorted(change.leaving):
            self._event("lost", name, notice=name in self._noticed)

    def _tell_fleet(self) -> None:
        for action in self._scenario.timeline.actions:
            if isinstance(action, Launch):
                self._events.append(FleetEvent(action.at_s, "launched", action.instance, {"spot": True}))
            elif isinstance(action, GiveNotice):
                self._events.append(FleetEvent(action.at_s, "notice", action.instance, {"deadline_s": action.deadline_s}))

    def _devices(self, machines: frozenset[str]) -> list[DeviceId]:
        return [DeviceId(name, index) for name in sorted(machines) for index in range(self._scenario.machine.num_devices)]

    def _choose(self, machines: frozenset[str]) -> PublishedChoice | None:
        case = self._case
        lengths = [arrival.output_tokens for arrival in self._scenario.timeline.arrivals]
        return choose(
            case.profile,
            num_instances=len(machines),
            devices_per_instance=self._scenario.machine.num_devices,
            required_rps=case.required_rps,
            min_devices=case.min_devices,
            max_tensor=case.max_tensor,
            max_batch=case.max_batch,
            output_tokens=round(sum(lengths) / max(1, len(lengths))),
            divide_prefill=case.divide_prefill,
        )

    def _pipeline(self, pipeline: int, tensor: int) -> Pipeline:
        case = self._case
        held = case.max_batch if self._reaction is Reaction.MIGRATE else 2 * case.max_batch
        times = BatchTimes(case.profile, pipeline, tensor, case.run_as_published)
        return Pipeline(times, case.max_batch, held, self._agenda, self._gaps, self._ended, self._is_idle)

    def _start(self, machines: frozenset[str]) -> None:
        """A fleet that is up."""
        if self._fixed is not None:
            self._layout = None
            for group in self._groups(machines):
                self._begin_group(group)
            return
        choice = self._choose(machines)
        self._layout = None
        if choice is not None:
            grid = Grid(choice.data, choice.pipeline, choice.tensor)
            self._layout = first_layout(self._devices(machines), grid)
            self._pipelines = [self._pipeline(choice.pipeline, choice.tensor) for _ in range(choice.data)]
        self._plan_told(choice)
        self._fill()

    def _plan_told(self, choice: PublishedChoice | None) -> None:
        shape = "nothing" if choice is None else f"{choice.data} x (P={choice.pipeline}, M={choice.tensor})"
        replicas = 0 if choice is None else choice.data
        self._event("plan", None, shape=shape, replicas=replicas, reason=f"on {len(self._machines)} machines")

    def _settle(self) -> None:
        """Everything serves."""
        serving = sum(not pipeline.is_stopped for pipeline in self._pipelines)
        self._event("serving", None, replicas=serving, planned=len(self._pipelines))
        if self._unsettled_s is not None:
            self._event("settled", None, since_s=self._unsettled_s)
            self._unsettled_s = None

    def _unsettle(self) -> None:
        serving = sum(not pipeline.is_stopped for pipeline in self._pipelines)
        self._event("serving", None, replicas=serving, planned=max(1, len(self._pipelines)))
        if self._unsettled_s is None:
            self._unsettled_s = self._agenda.now_s

    # ------------------------------------------------------------------ migrate

    def _migrate(self, change: Change) -> None:
        """The sequence of section 1.4 of the account of the artifact: stop, move, start."""
        self._last_change += 1
        number, now_s = self._last_change, self._agenda.now_s
        choice, machines = self._choose(self._machines), self._machines
        devices = self._devices(machines)
        if choice is None or self._layout is None or not self._pipelines:
            for pipeline in self._pipelines:
                pipeline.cut()
            self._collect()
            self._agenda.at(change.at_s + ENGINE_START_S, lambda: self._begin_anew(number, choice))
            self._unsettle()
            return
        old, grid = self._layout, Grid(choice.data, choice.pipeline, choice.tensor)
        if old.grid == grid and not set(old.positions) - set(devices):
            return  # spares have come or gone
        full = [Batch(self._case.max_batch, self._case.shape.positions, self._case.shape.positions)] * old.grid.data
        first = range(grid.data)
        dry = remap(self._case.shape, old, devices, grid, batches=full, inherits=first)
        counted = traffic(self._case.shape, moves(self._case.shape, old, dry, batches=full, inherits=first), Measure.COUNTED)
        moving_s = estimate_s(counted) + SWITCH_S
        is_growth = bool(change.joining) and not change.leaving
        self._plan_told(choice)
        if grows(old, devices, grid):
            self._agenda.at(max(change.at_s, now_s) + moving_s, lambda: self._grow(number, grid, devices))
            return

        def limit(pipeline: Pipeline, batch: int) -> int:
            return self._steps_left(pipeline, batch, moving_s=moving_s, noticed_s=now_s, is_growth=is_growth)

        def follow() -> None:
            began_s = max(self._agenda.now_s, change.at_s if change.joining else 0.0)
            self._agenda.at(began_s, lambda: self._move(number, grid, devices))

        self._target = follow
        for pipeline in self._pipelines:
            pipeline.limit = limit
        for pipeline in self._pipelines:
            pipeline.proceed()
        self._unsettle()

    def _steps_left(self, pipeline: Pipeline, batch: int, *, moving_s: float, noticed_s: float, is_growth: bool) -> int:
        """How far a batch may still run (section 4.2 of the account): to just before the deadline, or until machines come."""
        slot_s = self._scenario.grace_s - (0.0 if is_growth else moving_s) - (self._agenda.now_s - noticed_s)
        if slot_s <= pipeline.times.prompt_s(1):
            return 0
        factor = 1 / SLOWER if is_growth else SLOWER
        first_s, step_s = pipeline.times.prompt_s(batch) * factor, pipeline.times.token_s(batch) * factor
        return max(0, floor((slot_s - first_s) / step_s) + (1 if is_growth else -1))

    def _is_idle(self) -> None:
        """A pipeline has nothing to do, or has stopped."""
        if self._target is None:
            self._fill()
            return
        if all(each.is_stopped for each in self._pipelines):
            follow, self._target = self._target, None
            follow()

    def _move(self, number: int, grid: Grid, devices: Sequence[DeviceId]) -> None:
        """All have stopped: everything is moved, and goes on after the time that the artifact estimates."""
        if number != self._last_change or self._layout is None:
            return
        old, case = self._layout, self._case
        stopped = [self._interrupted(pipeline) for pipeline in self._pipelines]
        inherits = inherit(stopped, grid.data)
        new = remap(case.shape, old, devices, grid, batches=stopped, inherits=inherits)
        found = moves(case.shape, old, new, batches=stopped, inherits=inherits)
        counted = traffic(case.shape, found, Measure.COUNTED)
        self._count(found)
        batches: list[StaticBatch | None] = []
        waiting: list[Call] = []
        for pipeline in self._pipelines:
            batch, calls = pipeline.leave()
            batches.append(batch)
            waiting += calls
        for replica, batch in enumerate(batches):
            if batch is not None and replica not in inherits:
                self._again(batch.calls)
        for call in waiting:
            insort(self._queue, call, key=seniority)
        heirs = [batches[replica] if replica < len(batches) else None for replica in inherits]
        self._layout, self._pipelines = new, [self._pipeline(grid.pipeline, grid.tensor) for _ in range(grid.data)]
        for pipeline in self._pipelines:
            pipeline.is_stopped = True
        done_s = self._agenda.now_s + estimate_s(counted) + SWITCH_S
        self._agenda.at(done_s, lambda: self._go_on(heirs))

    def _go_on(self, heirs: Sequence[StaticBatch | None]) -> None:
        for pipeline, batch in zip(self._pipelines, heirs, strict=True):
            pipeline.is_stopped = False
            if batch is not None:
                pipeline.resumed = batch
                for call in batch.calls:
                    call.moved += 1
                    self._event("moved", None, request=call.index)
        for pipeline in self._pipelines:
            pipeline.proceed()
        self._fill()
        self._settle()

    def _grow(self, number: int, grid: Grid, devices: Sequence[DeviceId]) -> None:
        """More pipelines of the same shape, while the others go on."""
        if number != self._last_change or self._layout is None:
            return
        old = self._layout
        none: list[Batch | None] = [None] * old.grid.data
        new = remap(self._case.shape, old, devices, grid, batches=none, inherits=inherit(none, grid.data))
        self._count(moves(self._case.shape, old, new, batches=none, inherits=inherit(none, grid.data)))
        self._layout = new
        self._pipelines += [self._pipeline(grid.pipeline, grid.tensor) for _ in range(grid.data - len(self._pipelines))]
        self._fill()
        self._settle()

    def _interrupted(self, pipeline: Pipeline) -> Batch | None:
        batch = pipeline.resumed
        if batch is None or not batch.steps:
            return None
        prompt = max(call.prompt_tokens for call in batch.calls)
        return Batch(len(batch.calls), self._case.shape.positions, prompt + batch.steps)

    def _count(self, found: Sequence[Move]) -> None:
        """What crosses the network."""
        for move in found:
            if move.source.instance_id == move.destination.instance_id:
                continue
            size = num_bytes(self._case.shape, move, Measure.SENT)
            if move.batch is not None:
                self._kv_bytes += size
            else:
                self._weight_bytes += size

    # ------------------------------------------------------------------ restart

    def _restart(self) -> None:
        """Everything ends and begins anew."""
        choice = self._choose(self._machines)
        self._last_change += 1
        number = self._last_change
        if choice is not None and self._layout is not None:
            grid = Grid(choice.data, choice.pipeline, choice.tensor)
            if self._layout.grid == grid and not set(self._layout.positions) - set(self._devices(self._machines)):
                return
        for pipeline in self._pipelines:
            pipeline.cut()
        self._collect()
        self._unsettle()
        if choice is not None:
            self._agenda.at(self._agenda.now_s + 2 * ENGINE_START_S, lambda: self._begin_anew(number, choice))

    def _collect(self) -> None:
        """Pipelines end; their requests wait again."""
        for pipeline in self._pipelines:
            batch, waiting = pipeline.leave()
            self._again([*(batch.calls if batch is not None else ()), *waiting])
        self._pipelines, self._layout, self._target = [], None, None

    def _begin_anew(self, number: int, choice: PublishedChoice | None) -> None:
        if number != self._last_change or choice is None:
            return
        self._read_bytes += 4.0 * self._values() * choice.data
        self._start(self._machines)
        self._settle()

    def _values(self) -> float:
        """Numbers of the model."""
        shape = self._case.shape
        layer = 12 * shape.hidden_size**2 + 13 * shape.hidden_size
        return shape.padded_layers * layer + (2 * shape.vocabulary_size + shape.positions) * shape.hidden_size

    # ------------------------------------------------------------------ reroute

    def _shape_for_ever(self, changes: Sequence[Change]) -> tuple[int, int] | None:
        """What the rule chooses for as many machines as there ever are."""
        machines = most = self._machines
        for change in changes:
            machines = (machines | change.joining) - change.leaving
            most = max(most, machines, key=len)
        choice = self._choose(most)
        return None if choice is None else (choice.pipeline, choice.tensor)

    def _groups(self, machines: frozenset[str]) -> list[tuple[str, ...]]:
        """Machines for one pipeline each; what is left over is idle."""
        assert self._fixed is not None
        size = -(-self._fixed[0] * self._fixed[1] // self._scenario.machine.num_devices)
        names = sorted(machines)
        return [tuple(names[start : start + size]) for start in range(0, len(names) - size + 1, size)]

    def _begin_group(self, group: tuple[str, ...]) -> None:
        assert self._fixed is not None
        pipeline = self._pipeline(*self._fixed)
        self._members[id(pipeline)] = group
        self._pipelines.append(pipeline)
        self._fill()

    def _reroute(self, change: Change) -> None:
        """Pipelines without a machine end; free machines become pipelines."""
        self._machines = (self._machines | change.joining) - change.leaving
        for pipeline in [each for each in self._pipelines if not change.leaving.isdisjoint(self._members[id(each)])]:
            pipeline.cut()
            batch, waiting = pipeline.leave()
            self._pipelines.remove(pipeline)
            self._again([*(batch.calls if batch is not None else ()), *waiting])
            self._unsettle()
        self._fill()
        if self._fixed is None:
            return
        busy = {name for pipeline in self._pipelines for name in self._members[id(pipeline)]}
        free = self._machines - busy - self._starting
        for group in self._groups(free):
            self._starting |= frozenset(group)
            self._agenda.at(self._agenda.now_s + 2 * ENGINE_START_S, partial(self._group_up, group))

    def _group_up(self, group: tuple[str, ...]) -> None:
        self._starting -= frozenset(group)
        if self._machines.issuperset(group):
            self._read_bytes += 4.0 * self._values()
            self._begin_group(group)
            self._settle()

    def _event(self, kind: str, instance: str | None, **details: object) -> None:
        self._events.append(FleetEvent(self._agenda.now_s, kind, instance, details))
