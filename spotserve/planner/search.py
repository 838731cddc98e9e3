"""What should run on the machines that there are: the cheapest fleet that keeps the objective, or the one that comes nearest.

SpotServe (Miao et al., ASPLOS'24, section 3.2) takes the shortest execution among configurations that carry the rate, or else the
most throughput, gives all replicas one shape, leaves devices over, and knows neither waiting nor dollars. Here replicas need not
be alike, every device has a price, and fleets are judged by the queueing model:
- limits are set and can be kept: the least dollars per hour at which they are, then the fewest machines;
- they cannot be kept at this rate: the most requests per second within them;
- there are none: the shortest end-to-end time at the 99th percentile of those that carry the rate; within 2 % of it the least
  dollars, then the fewest machines. When nothing carries the rate: the most throughput.
The tree of `shapes` says what a replica can be, the programs of `knapsack` which numbers of which replicas, `queueing` has the
last word. Where there are few fleets every one is judged. Otherwise a handful is, for each of several menus (all shapes, one type
of machine, one shape alone) what the programs find, from much to little: exact by the values that shapes have alone, and near the
optimum by the word of the queueing model. What loses is kept with its reason.

Pure: same arguments, same answer. Knows no device by name and no current placement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import msgspec

from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.planner.fleets import Choice, Pool, Program, Yard, alike, all_fleets
from spotserve.planner.judge import Judge, Verdict
from spotserve.planner.ranking import NEAR, Ranking
from spotserve.planner.shapes import Loser, Shape, SpeedOf, Tree, calmer, grow, room_for
from spotserve.planner.unhindered import Unhindered
from spotserve.planner.workload import Latency, Objective, Workload


@dataclass(frozen=True, slots=True)
class Candidate:
    """One fleet, the replicas that stay included."""

    choices: tuple[Choice, ...]
    """Those that stay first, in their order."""
    latency: Latency
    throughput_rps: float
    """What it serves for ever."""
    goodput_rps: float
    """What it serves within the limits, to 1 %; without limits the throughput."""
    usd_per_hour: float
    num_instances: int
    num_idle: int
    """Free devices of all pools that nothing runs on."""
    meets: bool
    """Whether it serves the workload within the limits."""
    why: str
    """Why it is the best, or why it lost."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What could run."""

    candidates: tuple[Candidate, ...]
    """The best first; empty when no replica fits anywhere and none stays."""
    losers: tuple[Loser, ...]
    """What ended before it became a candidate."""


def search(
    model: ModelSpec | None,
    pools: Sequence[Pool],
    workload: Workload,
    objective: Objective,
    *,
    speed_of: SpeedOf,
    fixed: Sequence[Choice] = (),
    max_candidates: int = 8,
    max_batch: int = 256,
    most_judged: int = 128,
    refine: Callable[[Parallel, InstanceType], Parallel] | None = None,
) -> SearchResult:
    """Fleets for the free devices of `pools`, the best first.

    Args:
        model: None: every cut is believed to be possible.
        pools: of different kinds each; the order does not matter to what is best.
        workload: at `rate_rps`, all of it for this fleet.
        objective: limits, or none.
        speed_of: how fast a shape is on machines of a type, or why it cannot be. Equal arguments must give equal speeds.
        fixed: replicas that run already and stay; their devices are not in the pools, their machines are paid for.
        max_candidates: how many to return.
        max_batch: the largest B to think of.
        most_judged: if there are no more fleets than this every one is judged.
        refine: a better cut of a shape's stages on machines of a type, for the best candidate; kept if it serves no less.
    """
    assert max_candidates >= 1 and max_batch >= 1
    tried = _Tried(model, pools, workload, objective, speed_of, fixed, max_batch)
    groups = tried.everything(most_judged) or tried.menus(max_candidates)
    order = tried.ranking.ranked([verdict for group in groups for verdict in group])
    place = {verdict.fleet: index for index, verdict in enumerate(order)}
    firsts = sorted({min(place[verdict.fleet] for verdict in group) for group in groups if group})
    candidates = tried.candidates(tried.different([order[index] for index in firsts])[:max_candidates], refine)
    return SearchResult(candidates, tuple(loser for tree in tried.trees for loser in tree.losers))


class _Tried:
    """One search: the shapes that fleets are made of, and the fleets that are judged."""

    def __init__(
        self,
        model: ModelSpec | None,
        pools: Sequence[Pool],
        workload: Workload,
        objective: Objective,
        speed_of: SpeedOf,
        fixed: Sequence[Choice],
        max_batch: int,
    ) -> None:
        self._pools = sorted(pools, key=lambda pool: pool.kind)
        self._workload, self._limits, self._speed_of, self._fixed = workload, objective, speed_of, fixed
        self._yard, self._max_batch = Yard(self._pools, fixed), max_batch
        self.trees = self._grown(model, max_batch)
        if objective.is_set and not any(tree.shapes for tree in self.trees):
            self._limits = Objective()  # nothing keeps them at any rate: the shortest time is what is left to want
            self.trees += self._grown(model, max_batch)
        tops = [shape for tree in self.trees for shape in tree.shapes]
        calm = [calmer(shape, workload, self._limits, speed_of) for shape in tops] if self._limits.is_set else tops
        self._tops, self._calm = list(range(len(tops))), []
        self._shapes = tops
        for index, (shape, top) in enumerate(zip(calm, list(tops), strict=True)):
            self._calm.append(index if shape is top else len(self._shapes))
            self._shapes += [] if shape is top else [shape]
        self._shapes += [shape for tree in self.trees for shape in tree.dominated]
        self._kept_rps = sum(Unhindered.of(speed, workload).rps(self._limits) * count for speed, count in alike(fixed))
        self._objective = objective
        self._judge = Judge(self._yard, self._shapes, fixed, workload, objective)
        self.ranking = Ranking(self._judge, objective, self._limits)

    def _grown(self, model: ModelSpec | None, max_batch: int) -> list[Tree]:
        types = {pool.instance_type.name: pool.instance_type for pool in self._pools}
        most = {name: max(pool.num_devices for pool in self._pools if pool.instance_type.name == name) for name in types}
        return [
            grow(model, types[name], most[name], self._workload, self._limits, speed_of=self._speed_of, max_batch=max_batch)
            for name in sorted(types)
        ]

    def everything(self, limit: int) -> list[list[Verdict]] | None:
        """Every fleet, those of the same shapes together; None when there are more than `limit`."""
        fleets = all_fleets(self._yard, self._shapes, limit)
        if fleets is None:
            return None
        groups: dict[frozenset[int], list[Verdict]] = {}
        for fleet in fleets:
            if fleet or self._fixed:
                groups.setdefault(frozenset(shape for _, shape, _ in fleet), []).append(self._judge.verdict(fleet))
        return list(groups.values())

    def menus(self, num_alone: int) -> list[list[Verdict]]:
        """What the programs find with all shapes, with those of one type, with the most promising alone; and the rest in full."""
        types = sorted({shape.instance_type.name for shape in self._shapes})
        of_types = ([i for i in self._tops if self._shapes[i].instance_type.name == name] for name in types)
        menus = [self._tops, self._calm, *of_types]
        found = [self._solved(list(menu)) for menu in dict.fromkeys(map(tuple, menus)) if menu]
        full = {index: self._in_full([index]) for index in range(len(self._shapes))}
        place = {verdict.fleet: rank for rank, verdict in enumerate(self.ranking.ranked(list(full.values())))}
        promising = sorted(full, key=lambda index: place[full[index].fleet])[:num_alone]
        found += [self._solved([index]) for index in promising]
        found += [[full[index]] for index in full if index not in promising]
        return [*found, *self._with_other_batches([verdict for group in found for verdict in group])]

    def _with_other_batches(self, verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
        """The best fleet, and the best of several shapes, with other B, since the share of the load goes with it."""
        order = self.ranking.ranked(verdicts)
        mixed = [verdict for verdict in order if len({shape for _, shape, _ in verdict.fleet}) > 1]
        found = []
        for verdict in dict.fromkeys(verdict for verdict in (*order[:1], *mixed[:1]) if verdict.fleet):
            tuned = self._tuned(verdict)
            found.append([*tuned, *self._solved(sorted({shape for _, shape, _ in tuned[-1].fleet}))])
        return found

    def _tuned(self, verdict: Verdict) -> list[Verdict]:
        """Every fleet that is better than the one before it, `verdict` first: B of one shape after the other, up or down."""
        better = [verdict]
        for _ in range(3):
            before = better[-1]
            for shape in sorted({shape for _, shape, _ in before.fleet}):
                for other in self._other_batches(shape):
                    fleet = tuple(sorted((pool, other if each == shape else each, n) for pool, each, n in better[-1].fleet))
                    if self.ranking.is_better(self._judge.verdict(fleet), better[-1]):
                        better.append(self._judge.verdict(fleet))
            if better[-1] is before:
                break
        return better

    def _other_batches(self, index: int) -> list[int]:
        """The same shape with half of B and with twice as much, where they are possible."""
        shape, found = self._shapes[index], []
        half, twice = max(1, shape.parallel.max_batch // 2), shape.parallel.max_batch * 2
        for batch in (half, twice) if twice <= self._max_batch else (half,):
            parallel = msgspec.structs.replace(shape.parallel, max_batch=batch)
            known = [
                i for i, each in enumerate(self._shapes) if (each.parallel, each.instance_type) == (parallel, shape.instance_type)
            ]
            speed = shape.speed if known else self._speed_of(parallel, shape.instance_type)
            if not known and not isinstance(speed, str) and room_for(speed, self._workload) >= batch:
                self._shapes.append(Shape.of(parallel, shape.instance_type, speed, self._workload))
                known = [len(self._shapes) - 1]
            found += known[:1]
        return [other for other in found if other != index]

    def _in_full(self, menu: Sequence[int]) -> Verdict:
        """As many replicas as there can be, of these shapes."""
        return self._judge.verdict(self._program(menu, Objective()).most())

    def _program(self, menu: Sequence[int], limits: Objective) -> Program:
        chosen = set(menu)
        values = [shape.unhindered.rps(limits) if index in chosen else 0.0 for index, shape in enumerate(self._shapes)]
        return Program(self._yard, self._shapes, values)

    def _solved(self, menu: Sequence[int]) -> list[Verdict]:
        """The fleets that the programs come by on the way to the best of these shapes."""
        is_enough: Callable[[Verdict], bool]
        programs = [self._program(menu, limits) for limits in self._ladder(menu)]
        full = [(self._judge.verdict(fleet), program) for program in programs if (fleet := program.most()) or self._fixed]
        found = [verdict for verdict, _ in full]
        if self._limits.is_set:
            ends, is_enough = [program for verdict, program in full if verdict.meets], _meets
        else:
            best_s = min((verdict.latency.e2e_p99_s for verdict in found), default=inf)
            ends = [program for verdict, program in full if verdict.latency.e2e_p99_s == best_s < inf][:1]
            is_enough = partial(_within, best_s * NEAR)
        for program in ends:
            found += self._shrunk(program, is_enough)
        return found

    def _ladder(self, menu: Sequence[int]) -> list[Objective]:
        """Limits by which to value shapes: the tighter, the more do fast ones count."""
        if len(menu) == 1:
            return [self._limits]
        if self._limits.is_set:
            return [self._limits, *(_tighter(self._limits, factor) for factor in (0.7, 0.5))]
        alone_s = [self._shapes[index].unhindered.met(1.0).e2e_s for index in menu]
        steps = [1.02, 1.1, 1.2, 1.35, 1.6, 2.0, 3.0]
        return [Objective(), *(Objective(e2e_s=min(alone_s) * step) for step in steps)]

    def _shrunk(self, program: Program, is_enough: Callable[[Verdict], bool]) -> list[Verdict]:
        """From too little to as little as is enough, in value; the whole program is enough."""
        found: list[Verdict] = []

        def enough(value: float) -> bool:
            fleet = program.cheapest(value)
            assert fleet is not None, "more than there is"
            if not fleet and not self._fixed:
                return False
            found.append(self._judge.verdict(fleet))
            return is_enough(found[-1])

        low, high = 0.0, program.most_value
        if enough(low):
            return found
        step = min(high, max(self._workload.rate_rps - self._kept_rps, high / 64))
        while step < high and not enough(step):
            low, step = step, step * 1.25
        high = min(high, step)
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return found

    def different(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The first of each that differ in more than B."""
        found: dict[tuple[tuple[int, int, int, int], ...], Verdict] = {}
        for verdict in verdicts:
            cuts = ((pool, self._shapes[shape].parallel, count) for pool, shape, count in verdict.fleet)
            found.setdefault(tuple(sorted((pool, cut.pipeline, cut.tensor, count) for pool, cut, count in cuts)), verdict)
        return list(found.values())

    def candidates(
        self, verdicts: Sequence[Verdict], refine: Callable[[Parallel, InstanceType], Parallel] | None
    ) -> tuple[Candidate, ...]:
        """What is told of these, the best of which comes first."""
        if not verdicts:
            return ()
        best, shapes = (verdicts[0], self._shapes) if refine is None else self._refined(verdicts[0], refine)
        first = self._candidate(best, shapes, self.ranking.why_best(best))
        others = [self._candidate(each, self._shapes, self.ranking.why_not(each, best)) for each in verdicts[1:]]
        if self._limits.is_set and not best.meets:
            others.sort(key=lambda candidate: -candidate.goodput_rps)  # only the best one's was known until now
        return first, *others

    def _candidate(self, verdict: Verdict, shapes: Sequence[Shape], why: str) -> Candidate:
        new = [(self._pools[pool], shapes[shape], count) for pool, shape, count in verdict.fleet]
        choices = [Choice(shape.parallel, pool, shape.speed) for pool, shape, count in new for _ in range(count)]
        return Candidate(
            choices=(*self._fixed, *choices),
            latency=verdict.latency,
            throughput_rps=verdict.throughput_rps,
            goodput_rps=self._judge.goodput_rps(verdict.fleet),
            usd_per_hour=verdict.usd_per_hour,
            num_instances=verdict.num_instances,
            num_idle=sum(pool.num_devices for pool in self._pools) - sum(shape.size * count for _, shape, count in new),
            meets=verdict.meets,
            why=why,
        )

    def _refined(self, verdict: Verdict, refine: Callable[[Parallel, InstanceType], Parallel]) -> tuple[Verdict, list[Shape]]:
        """The fleet with stages cut as `refine` says, if it is no worse for it."""
        shapes = list(self._shapes)
        for index in sorted({shape for _, shape, _ in verdict.fleet}):
            parallel = refine(shapes[index].parallel, shapes[index].instance_type)
            speed = self._speed_of(parallel, shapes[index].instance_type)
            if not isinstance(speed, str):
                shapes[index] = Shape.of(parallel, shapes[index].instance_type, speed, self._workload)
        judged = Judge(self._yard, shapes, self._fixed, self._workload, self._objective).verdict(verdict.fleet)
        is_better = judged.meets >= verdict.meets and judged.throughput_rps >= verdict.throughput_rps
        return (judged, shapes) if is_better else (verdict, self._shapes)


def _meets(verdict: Verdict) -> bool:
    return verdict.meets


def _within(limit_s: float, verdict: Verdict) -> bool:
    return verdict.latency.e2e_p99_s <= limit_s


def _tighter(limits: Objective, factor: float) -> Objective:
    """The same limits on TTFT, tighter ones on what depends on how many run."""
    tpot_s, e2e_s = (None if limit is None else limit * factor for limit in (limits.tpot_s, limits.e2e_s))
    return Objective(limits.ttft_s, tpot_s, e2e_s)
