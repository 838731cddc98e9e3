"""Plans that could be, for the machines that a fleet has: what the search finds, with names, machines, and what it would serve.

A replica that runs and is in a plan keeps its name and its devices; devices that would idle get something to do, since machines
that are there are paid for. Where new replicas go exactly is decided when a plan is carried out.
"""

from collections import Counter, deque
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TypeAlias

from spotserve.controller.fleet import Fleet
from spotserve.controller.offer import Kind, kind_of
from spotserve.controller.records import Instance, Replica
from spotserve.core.cluster import DeviceId
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan
from spotserve.planner.cost import replica_cost
from spotserve.planner.cutting import cut_by_time
from spotserve.planner.drafting import Draft, DraftingSpeed
from spotserve.planner.fleets import Choice, Pool, alike
from spotserve.planner.memory import STEP_TOKENS
from spotserve.planner.outlook import Footprint
from spotserve.planner.queueing import latency, max_rate_rps
from spotserve.planner.ranking import NEAR
from spotserve.planner.search import search
from spotserve.planner.shapes import SpeedOf
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Latency, Objective, Workload

NEVER = Latency(inf, inf, inf, inf, inf, inf, inf)
"""What requests meet where nothing runs."""

SEARCHES_KEPT = 128

ENDLESS_RPS = 1e9
"""More than any fleet serves: the best is then what serves most."""


_Like: TypeAlias = tuple[Parallel, Kind, float]
"""Replicas that are one choice to the search: their shape, the kind of their machines, and its price."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """One plan that could be."""

    replicas: tuple[ReplicaPlan, ...] = ()
    footprints: tuple[Footprint, ...] = ()
    """By replica, the machines that it is on, or would be on, and what it serves within the limits."""
    latency: Latency = NEVER
    throughput_rps: float = 0.0
    """What all of them serve within the limits."""
    usd_per_hour: float = 0.0
    """Of the machines that it uses."""
    why: str = "nothing runs"
    change_s: float = 0.0
    """Until it would serve; 0: nothing that runs is replaced."""
    moved_bytes: int = 0

    @property
    def name(self) -> str:
        """Its replicas in a few letters."""
        return shapes_text(self.replicas)


def shapes_text(replicas: Sequence[ReplicaPlan]) -> str:
    """Replicas in a few letters, such as `2 x (P=2, M=8)`."""
    cuts = Counter((each.parallel.pipeline, each.parallel.tensor) for each in replicas)
    return " + ".join(f"{number} x (P={pipeline}, M={tensor})" for (pipeline, tensor), number in sorted(cuts.items())) or "nothing"


@dataclass(frozen=True, slots=True)
class EngineTerms:
    """What replicas are started with."""

    max_batch: int
    """Sequences that a replica runs at once at most."""
    kv_tokens: int | None = None
    """What every replica's KV cache has to hold; None: as much as there is room for."""
    step_tokens: int = STEP_TOKENS
    """Tokens of the largest step, whose activations take memory."""
    speed_of: SpeedOf | None = None
    """How fast a shape is; None: as the cost model says."""
    draft: Draft | None = None
    """What every replica drafts with, beside what the cost model says; None: nothing."""


def engine_speed(model: ModelSpec, parallel: Parallel, hardware: InstanceType, engine: EngineTerms) -> ReplicaSpeed | str:
    """How fast a replica of this shape is when it is started so; or why there can be none."""
    if engine.speed_of is not None:
        return engine.speed_of(parallel, hardware)
    speed = replica_cost(model, parallel, hardware, engine.step_tokens)
    if isinstance(speed, str):
        return speed
    kv_tokens = speed.kv_tokens if engine.kv_tokens is None else engine.kv_tokens
    if speed.kv_tokens < kv_tokens:
        return f"there is room for {speed.kv_tokens} tokens of KV, {kv_tokens} are wanted"
    speed = replace(speed, kv_tokens=kv_tokens)
    return speed if engine.draft is None else DraftingSpeed(speed, engine.draft, kv_tokens)


@dataclass(frozen=True, slots=True)
class Terms:
    """What plans are made for."""

    workload: Workload
    objective: Objective
    engine: EngineTerms
    use_idle: bool = True
    """Whether devices beside the best plan get something to do."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a search came to."""

    fleets: tuple[tuple[tuple[Choice, ...], str], ...]
    """The best first: replicas, and why."""
    losers: tuple[str, ...]


class Proposer:
    """Makes proposals for one fleet; remembers shapes that could not be brought up."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._refused: dict[tuple[int, int], str] = {}
        self._searches: dict[Hashable, _Found] = {}
        """What was searched lately, the newest last."""
        self.losers: tuple[str, ...] = ()
        """What never became a plan when the last search found little, and why."""

    def refuse(self, shape: Parallel, reason: str) -> None:
        """A shape cannot be brought up: it is not proposed again."""
        self._refused[shape.pipeline, shape.tensor] = reason
        self._searches.clear()

    def keepable(self, staying: Sequence[Replica], terms: Terms) -> list[tuple[Replica, Choice]]:
        """Replicas that run and that the planner would have as they are."""
        known: dict[_Like, Choice | None] = {}
        kept = []
        for replica in staying:
            first = self._fleet.instances[replica.instance_ids[0]]
            like = replica.plan.parallel, kind_of(first), first.usd_per_hour
            if like not in known:
                known[like] = self._choice_of(replica.plan.parallel, first, terms)
            if (choice := known[like]) is not None:
                kept.append((replica, choice))
        return kept

    def propose(
        self,
        pools: Sequence[Pool],
        staying: Sequence[Replica],
        terms: Terms,
        *,
        fixed: Sequence[Choice] = (),
        most: int,
        next_replica_number: int,
    ) -> list[Proposal]:
        """The best plans, best first.

        Args:
            pools: devices to plan with.
            staying: replicas that run, whose names and devices a plan goes on with when it has the like of them.
            terms: what the plans are for.
            fixed: the first of `staying`, as they are: every plan has them, and their devices are not in `pools`.
            most: how many plans.
            next_replica_number: names of new replicas count from here.
        """
        found = self._found(tuple(pools), tuple(fixed), terms, most)
        self.losers = found.losers
        return [self._named(choices, staying, terms, why, next_replica_number) for choices, why in found.fleets if choices]

    def prospect(self, pool: Pool, terms: Terms) -> Latency:
        """What requests meet on the best fleet for these devices alone."""
        found = self._found((pool,), (), replace(terms, use_idle=False), 1)
        if not found.fleets:
            return NEVER
        return latency([choice.speed for choice in found.fleets[0][0]], terms.workload)

    # ------------------------------------------------------------------ finding

    def _found(self, pools: tuple[Pool, ...], fixed: tuple[Choice, ...], terms: Terms, most: int) -> _Found:
        """The best fleets, and what became of the rest. Fleets shrink and grow again: what was searched lately is known."""
        key = (self._fleet.model, pools, fixed, terms, most)
        found = self._searches.pop(key, None)
        if found is None:
            result = search(
                self._fleet.model,
                pools,
                terms.workload,
                terms.objective,
                speed_of=lambda parallel, hardware: self._speed_of(parallel, hardware, terms),
                fixed=fixed,
                max_candidates=most,
                max_batch=terms.engine.max_batch,
                refine=partial(self._cut, terms=terms),
            )
            found = _Found(
                tuple((self._filled(pools, len(fixed), each.choices, terms), each.why) for each in result.candidates),
                () if result.candidates else tuple(f"{loser.what}: {loser.why}" for loser in result.losers),
            )
            if len(self._searches) >= SEARCHES_KEPT:
                del self._searches[next(iter(self._searches))]
        self._searches[key] = found
        return found

    def _filled(self, pools: Sequence[Pool], num_fixed: int, choices: tuple[Choice, ...], terms: Terms) -> tuple[Choice, ...]:
        """The same with something to do for devices that would idle: as much as they can serve, or else more of the same; nothing
        where requests are better off without."""
        used = dict.fromkeys((pool.kind for pool in pools), 0)
        for choice in choices[num_fixed:]:
            used[choice.pool.kind] += choice.parallel.num_slots
        rest = (replace(pool, num_devices=pool.num_devices - used[pool.kind]) for pool in pools)
        idle = [pool for pool in rest if pool.num_devices > 0]
        if not idle or not terms.use_idle:
            return choices
        before_s = latency([each.speed for each in choices], terms.workload).e2e_p99_s if choices else inf
        for further in (self._most(idle, terms), _alike(idle, choices)):
            filled = (*choices, *further)
            if further and latency([each.speed for each in filled], terms.workload).e2e_p99_s <= NEAR * before_s:
                return filled
        return choices

    def _most(self, pools: Sequence[Pool], terms: Terms) -> tuple[Choice, ...]:
        """What serves most on these devices."""
        found = search(
            self._fleet.model,
            pools,
            replace(terms.workload, rate_rps=ENDLESS_RPS),
            Objective(),
            speed_of=lambda parallel, hardware: self._speed_of(parallel, hardware, terms),
            max_candidates=1,
            max_batch=terms.engine.max_batch,
        ).candidates
        return found[0].choices if found else ()

    def _speed_of(self, parallel: Parallel, hardware: InstanceType, terms: Terms) -> ReplicaSpeed | str:
        """How fast a shape is, or why it cannot be: too little memory, or it was tried and failed."""
        assert self._fleet.model is not None
        if (reason := self._refused.get((parallel.pipeline, parallel.tensor))) is not None:
            return f"could not be brought up: {reason}"
        return engine_speed(self._fleet.model, parallel, hardware, terms.engine)

    def _cut(self, parallel: Parallel, hardware: InstanceType, terms: Terms) -> Parallel:
        """The same shape, its stages cut by time."""
        assert self._fleet.model is not None
        if terms.engine.speed_of is not None:
            return parallel
        workload = terms.workload
        context_tokens = workload.prompt.mean + workload.output.mean / 2
        return cut_by_time(
            self._fleet.model, parallel, hardware, context_tokens=context_tokens, step_tokens=terms.engine.step_tokens
        )

    def _choice_of(self, parallel: Parallel, first: Instance, terms: Terms) -> Choice | None:
        """A replica that runs, on such machines as its first one, as the search knows them; None when the planner would not have
        it so."""
        hardware = self._fleet.hardware.get(first.instance_type)
        speed = "not known" if hardware is None else self._speed_of(parallel, hardware, terms)
        if hardware is None or isinstance(speed, str):
            return None
        return Choice(parallel, Pool(hardware, 0, first.usd_per_hour, spot=first.spot), speed)

    # ------------------------------------------------------------------ naming

    def _named(
        self, choices: Sequence[Choice], staying: Sequence[Replica], terms: Terms, why: str, next_replica_number: int
    ) -> Proposal:
        """Gives every replica its name and machines: the like of one that runs is that one."""
        left = self._by_shape(staying)
        taken: set[DeviceId] = set()
        replicas: list[ReplicaPlan] = []
        instance_ids: dict[str, tuple[str, ...]] = {}
        missing: list[ReplicaPlan] = []
        for choice in choices:
            shape = choice.parallel.pipeline, choice.parallel.tensor
            namesakes = left.get((*shape, choice.pool.instance_type.name, choice.pool.spot))
            if namesakes:
                running = namesakes.popleft()
                instance_ids[running.replica_id] = running.instance_ids
                taken.update(running.devices.values())
                replicas.append(running.plan)
                continue
            name = f"r-{next_replica_number + len(missing)}"
            hardware = choice.pool.instance_type.name
            missing.append(ReplicaPlan(replica_id=name, parallel=choice.parallel, instance_type=hardware))
            replicas.append(missing[-1])
        if missing:
            machines = _Free(self._fleet, taken)
            instance_ids |= {each.replica_id: machines.some_for(each) for each in missing}
        rates: dict[tuple[Parallel, str], float] = {}
        footprints = []
        for choice, replica in zip(choices, replicas, strict=True):
            kind = choice.parallel, choice.pool.instance_type.name
            if kind not in rates:
                rates[kind] = max_rate_rps(choice.speed, terms.workload, terms.objective)
            footprints.append(Footprint(instance_ids[replica.replica_id], rates[kind]))
        speeds: Counter[ReplicaSpeed] = Counter()
        for speed, number in alike(choices):
            speeds[speed] += number
        used = {instance_id for each in footprints for instance_id in each.instance_ids}
        return Proposal(
            replicas=tuple(replicas),
            footprints=tuple(footprints),
            latency=latency(speeds, terms.workload),
            throughput_rps=sum(each.rate_rps for each in footprints),
            usd_per_hour=sum(self._fleet.instances[instance_id].usd_per_hour for instance_id in sorted(used)),
            why=why,
        )

    def _by_shape(self, running: Sequence[Replica]) -> dict[tuple[int, int, str, bool], deque[Replica]]:
        """Replicas that a choice may be, in order: those of as many stages and shards on the same kind of machine."""
        found: dict[tuple[int, int, str, bool], deque[Replica]] = {}
        for replica in running:
            mine = replica.plan.parallel
            first = self._fleet.instances[replica.instance_ids[0]]
            found.setdefault((mine.pipeline, mine.tensor, *kind_of(first)), deque()).append(replica)
        return found


def _alike(pools: Sequence[Pool], choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """More of what there is on machines of the same kind, the largest that fits first."""
    found: list[Choice] = []
    for pool in pools:
        free = pool.num_devices
        known = {each.parallel: each for each in choices if each.pool.kind == pool.kind}
        for parallel in sorted(known, key=lambda each: -each.num_slots):
            count, free = divmod(free, parallel.num_slots)
            found += [known[parallel]] * count
    return tuple(found)


class _Free:
    """Devices that new replicas could have: roughly, since where they go exactly is a matter of placement."""

    def __init__(self, fleet: Fleet, taken: Container[DeviceId]) -> None:
        self._devices: dict[str, list[DeviceId]] = {}
        """By type of machine, the next one last."""
        for device in fleet.ready_devices():
            if device not in taken:
                self._devices.setdefault(fleet.instances[device.instance_id].instance_type, []).append(device)

    def some_for(self, planned: ReplicaPlan) -> tuple[str, ...]:
        """Machines with as many free devices of its kind as it takes."""
        free = self._devices.get(planned.instance_type, [])
        mine = [free.pop() for _ in range(min(len(free), planned.parallel.num_slots))]
        return tuple(dict.fromkeys(device.instance_id for device in mine))
