"""Which shapes one replica can have on machines of one type: the decision tree's branches P, M and B, cut where they end.

After Galvatron (VLDB'23, arXiv 2211.13878), without what only training needs. A branch ends
- at depth: beyond twice the shallowest pipeline that fits, only depths at which the longest stage gets shorter;
- at divisibility: the model cannot be cut so, or M shards fit neither into a machine nor onto whole ones;
- at memory, and whatever else the speed model refuses;
- at the objective: even one request alone is too slow;
- at dominance: two shallower pipelines of as many shards serve no less on the same devices, and a long request alone on one of
  them takes no longer (2 % apart).
Where a branch ends its reason is kept. B is the largest power of two for which the KV cache has room; `calmer` makes it as small
as limits want it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import TypeAlias

import msgspec

from spotserve.core.cut import misfit
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.planner.knapsack import CLOSE
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.unhindered import Unhindered
from spotserve.planner.workload import Objective, Workload

SpeedOf: TypeAlias = Callable[[Parallel, InstanceType], ReplicaSpeed | str]
"""How fast a shape is on machines of a type, or why it cannot be."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One replica as it could be."""

    parallel: Parallel
    instance_type: InstanceType
    speed: ReplicaSpeed
    unhindered: Unhindered
    capacity_rps: float
    """What it serves unhindered without limits."""

    @classmethod
    def of(cls, parallel: Parallel, instance_type: InstanceType, speed: ReplicaSpeed, workload: Workload) -> "Shape":
        """With the capacity for this workload."""
        unhindered = Unhindered.of(speed, workload)
        return cls(parallel, instance_type, speed, unhindered, unhindered.rps(Objective()))

    @property
    def size(self) -> int:
        """Devices that it takes."""
        return self.parallel.num_slots


@dataclass(frozen=True, slots=True)
class Loser:
    """What is not in the answer, and why."""

    what: str
    why: str


@dataclass(slots=True)
class Tree:
    """What became of every branch for one type of machine. Filled once, by `grow`."""

    shapes: list[Shape] = field(default_factory=list)
    """What is left, by size and then by P."""
    dominated: list[Shape] = field(default_factory=list)
    """What was left out for other shapes."""
    losers: list[Loser] = field(default_factory=list)


def grow(
    model: ModelSpec | None,
    instance_type: InstanceType,
    num_devices: int,
    workload: Workload,
    objective: Objective,
    *,
    speed_of: SpeedOf,
    max_batch: int,
) -> Tree:
    """The whole tree for up to `num_devices` devices. Without `model` every cut is believed to be possible."""
    tree = Tree()
    for tensor in _tensors(instance_type, num_devices, model):
        depths = _Depths(objective)
        refusals: list[tuple[int, str]] = []
        deepest = num_devices // tensor if model is None else min(num_devices // tensor, model.num_layers)
        for pipeline in range(1, deepest + 1):
            if not depths.is_worth_a_look(pipeline, model):
                continue
            shape = _shape(model, pipeline, tensor, instance_type, workload, objective, speed_of, max_batch)
            if isinstance(shape, str):
                refusals.append((pipeline, shape))
            elif depths.is_best(shape):
                tree.shapes.append(shape)
            else:
                tree.dominated.append(shape)
        tree.losers += _told(refusals, tensor, instance_type)
    tree.shapes.sort(key=lambda shape: (shape.size, shape.parallel.pipeline))
    return tree


class _Depths:
    """What pipelines of 1, 2, 3 .. stages serve, all of as many shards: alone, or as shallower ones side by side."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._best: dict[int, tuple[float, float]] = {}
        """By depth: requests per second, and the time of a long request alone."""

    def is_worth_a_look(self, pipeline: int, model: ModelSpec | None) -> bool:
        """Whether a deeper pipeline than all so far may be of use: not when its longest stage is as long as one stage less."""
        if model is None or pipeline == 1 or pipeline <= 2 * min(self._best, default=pipeline):
            return True
        return -(-model.num_layers // pipeline) < -(-model.num_layers // (pipeline - 1))

    def is_best(self, shape: Shape) -> bool:
        """Whether a deeper pipeline than all so far is better than every two shallower ones in its place."""
        alone_s, depth = self._alone_s(shape), shape.parallel.pipeline
        divided = [
            (mine[0] + self._best[depth - other][0], max(mine[1], self._best[depth - other][1]))
            for other, mine in self._best.items()
            if depth - other in self._best
        ]
        rival = max((pair for pair in divided if pair[1] <= 1.02 * alone_s), default=(0.0, inf))
        is_best = shape.capacity_rps > rival[0] * (1 + CLOSE)
        self._best[depth] = (shape.capacity_rps, alone_s) if is_best else rival
        return is_best

    def _alone_s(self, shape: Shape) -> float:
        alone = shape.unhindered.met(1.0)
        return alone.e2e_s if self._objective.ttft_s is None else alone.ttft_s


def _tensors(instance_type: InstanceType, num_devices: int, model: ModelSpec | None) -> Iterator[int]:
    """Numbers of shards that fit into one machine without a rest, then those that take 2 or 4 whole ones.

    Every layer waits twice for the network between machines; beyond four of them nothing is gained. A model with fewer attention
    heads than shards would leave shards without work.
    """
    each = instance_type.num_devices
    most = num_devices if model is None else min(num_devices, model.num_heads)
    yield from (tensor for tensor in range(1, min(each, most) + 1) if each % tensor == 0)
    yield from (across * each for across in (2, 4) if across * each <= most)


def _shape(
    model: ModelSpec | None,
    pipeline: int,
    tensor: int,
    instance_type: InstanceType,
    workload: Workload,
    objective: Objective,
    speed_of: SpeedOf,
    max_batch: int,
) -> Shape | str:
    """One node of the tree with the largest B, or why there is none."""
    problem = None if model is None else misfit(model, pipeline, tensor)
    if problem is not None:
        return problem
    refusal, batch = "", 1 << (max_batch.bit_length() - 1)
    while batch >= 1:
        parallel = Parallel(pipeline=pipeline, tensor=tensor, max_batch=batch)
        speed = speed_of(parallel, instance_type)
        room = batch if isinstance(speed, str) else room_for(speed, workload)
        if isinstance(speed, str):
            refusal = speed
        elif room < 1:
            return f"its KV cache holds {speed.kv_tokens} tokens: not one request"
        elif room >= batch or batch == 1:
            shape = Shape.of(parallel, instance_type, speed, workload)
            missed = shape.unhindered.met(1.0).missed(objective)
            return f"even alone on it, {missed}" if missed else shape
        batch = min(batch // 2, 1 << (max(1, room).bit_length() - 1))
    return refusal


def room_for(speed: ReplicaSpeed, workload: Workload) -> int:
    """Whole requests of mean length that its KV cache holds at once."""
    return int(speed.kv_tokens / (workload.prompt.mean + workload.output.mean))


def calmer(shape: Shape, workload: Workload, limits: Objective, speed_of: SpeedOf) -> Shape:
    """The shape with B no larger than can run within the limits: a burst then holds up the first token, not every token."""
    batch = 1 << max(0, ceil(shape.unhindered.most_running(limits)) - 1).bit_length()
    if batch >= shape.parallel.max_batch:
        return shape
    parallel = msgspec.structs.replace(shape.parallel, max_batch=batch)
    speed = speed_of(parallel, shape.instance_type)
    return shape if isinstance(speed, str) else Shape.of(parallel, shape.instance_type, speed, workload)


def _told(refusals: Sequence[tuple[int, str]], tensor: int, instance_type: InstanceType) -> list[Loser]:
    """One line for the shallowest pipelines that were refused and one for the deepest, not one for each."""
    if not refusals:
        return []
    first, last = refusals[0], refusals[-1]
    depths = f"P={first[0]}" if first[0] == last[0] else f"P={first[0]}..{last[0]}"
    return [Loser(f"{depths}, M={tensor} on {instance_type.name}", last[1])]
