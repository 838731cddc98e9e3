"""Policy `spotserve-2024`: which device takes which position, as SpotServe's artifact maps them.

A baseline, not what this project does: `migration.matching` is. Miao et al., ASPLOS'24, section 3.3; what the paper leaves to an
appendix that does not exist is as in `global_server/Switch.py` of the artifact (github.com/Hsword/SpotServe, branch artifact,
832b29f). Positions are those of a grid of D replicas x P stages x M shards, all alike.

Kuhn-Munkres in two steps. Devices in order of their machines form clusters of c = min(M, devices of a machine); each cluster is
matched with the c shards of every target, then clusters are matched with targets. What is left of the targets goes to fresh
devices in order. An edge weighs the elements that the device has and the position needs, over the width h:

    common layers * (6 + (12 h + 7 + B * S) * common share of the shards) + V + positions + state + (V + 2 if both are last)

V words; B sequences of S tokens of KV (the whole buffer, keys only) and the state count when the position goes on with that
replica's batch. Layers are the padded ones. When the grid only gains replicas and no device goes, nothing is mapped anew.

Invariant: every position of the new grid has one device. Where the artifact's order is that of a hash table, devices are taken in
order. Pure: same arguments, same layout.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd

import numpy as np

from spotserve.core.cluster import DeviceId
from spotserve.migration.spotserve_2024_matching import heaviest


@dataclass(frozen=True, slots=True)
class PublishedShape:
    """A model as the artifact keeps it: float32, with empty layers."""

    num_layers: int
    padded_layers: int
    hidden_size: int
    vocabulary_size: int
    positions: int
    """Learnt positions: the longest prompt and output together, tokens."""


@dataclass(frozen=True, slots=True)
class Grid:
    """D replicas x P stages x M shards."""

    data: int
    pipeline: int
    tensor: int

    @property
    def num_devices(self) -> int:
        """Devices that it takes."""
        return self.data * self.pipeline * self.tensor


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """One place in a grid, by number."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Which device has which position; others are idle."""

    grid: Grid
    positions: Mapping[DeviceId, Position]

    def __post_init__(self) -> None:
        assert len(set(self.positions.values())) == len(self.positions) == self.grid.num_devices


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that a replica was interrupted in; all have come equally far."""

    sequences: int
    buffer_tokens: int
    """Room for KV of each, taken when the batch began."""
    filled_tokens: int
    """Tokens of each that have KV."""


def first_layout(devices: Collection[DeviceId], grid: Grid) -> Layout:
    """Where nothing ran before: positions in order to devices in order."""
    return Layout(grid, dict(zip(sorted(devices), _positions(grid), strict=False)))


def grows(old: Layout, devices: Collection[DeviceId], grid: Grid) -> bool:
    """Whether what runs goes on: no device that works goes, and at most there are more replicas of the same kind."""
    same = (old.grid.pipeline, old.grid.tensor) == (grid.pipeline, grid.tensor)
    return same and old.grid.data <= grid.data and set(old.positions) <= set(devices)


def inherit(batches: Sequence[Batch | None], data: int) -> tuple[int, ...]:
    """Which old replica each of `data` new ones goes on with, in increasing order; numbers from `len(batches)` on are new.

    All that were interrupted, filled up with the first others; when there are too many, those that have come furthest.
    """
    interrupted = [replica for replica, batch in enumerate(batches) if batch is not None]
    if len(interrupted) > data:
        interrupted.sort(key=lambda replica: -_filled(batches[replica]))
        return tuple(sorted(interrupted[:data]))
    others = [replica for replica in range(data) if replica not in interrupted]
    return tuple(sorted([*interrupted, *others[: data - len(interrupted)]]))


def remap(
    shape: PublishedShape,
    old: Layout,
    devices: Collection[DeviceId],
    grid: Grid,
    *,
    batches: Sequence[Batch | None],
    inherits: Sequence[int],
) -> Layout:
    """The new layout.

    Args:
        shape: of the model.
        old: what runs.
        devices: all that stay or have come; at least as many as `grid` takes.
        grid: the new one.
        batches: what each old replica was interrupted in.
        inherits: the old replica of each new one (see `inherit`).
    """
    assert len(devices) >= grid.num_devices and len(batches) == old.grid.data and len(inherits) == grid.data
    if grows(old, devices, grid):
        return _filled_up(dict(old.positions), devices, grid, _positions(grid))
    surviving = sorted(device for device in devices if device in old.positions)
    if not surviving:
        return first_layout(devices, grid)
    size = _cluster_size(devices, surviving, grid)
    clusters = [surviving[start : start + size] for start in range(0, len(surviving), size)]
    targets = _targets(grid, size)

    def weight(device: DeviceId, position: Position) -> float:
        had, replica = old.positions[device], inherits[position.replica]
        batch = batches[replica] if had.replica == replica else None
        return reused(shape, had, old.grid, position, grid, batch=batch)

    matched = _two_steps(clusters, targets, weight)
    return _filled_up(matched, devices, grid, [position for target in targets for position in target])


def reused(shape: PublishedShape, old: Position, old_grid: Grid, new: Position, new_grid: Grid, *, batch: Batch | None) -> float:
    """The weight of an edge: elements in common, over the hidden size. `batch` is what the position would inherit there."""
    cells, state = 0, 0.0
    if batch is not None:
        cells = batch.sequences * batch.buffer_tokens
        state = (batch.buffer_tokens + 3 * shape.hidden_size + 4) * batch.sequences / shape.hidden_size
    layers = _common(shape.padded_layers, old.stage, old_grid.pipeline, new.stage, new_grid.pipeline)
    share = _common(1, old.shard, old_grid.tensor, new.shard, new_grid.tensor)
    everywhere = shape.vocabulary_size + shape.positions + state
    if old.stage == old_grid.pipeline - 1 and new.stage == new_grid.pipeline - 1:
        everywhere += shape.vocabulary_size + 2
    return layers * (6 + (12 * shape.hidden_size + 7 + cells) * share) + everywhere


def _two_steps(
    clusters: Sequence[Sequence[DeviceId]], targets: Sequence[Sequence[Position]], weight: Callable[[DeviceId, Position], float]
) -> dict[DeviceId, Position]:
    """Matches the devices of each cluster with the shards of each target, then clusters with targets."""
    inside = {
        (row, column): np.array([[weight(device, position) for position in target] for device in cluster])
        for row, cluster in enumerate(clusters)
        for column, target in enumerate(targets)
    }
    pairs = {place: heaviest(weights) for place, weights in inside.items()}
    sums = [
        [sum(inside[row, column][pair] for pair in pairs[row, column]) for column in range(len(targets))]
        for row in range(len(clusters))
    ]
    return {
        clusters[row][device]: targets[column][shard]
        for row, column in heaviest(np.array(sums))
        for device, shard in pairs[row, column]
    }


def _filled_up(
    kept: Mapping[DeviceId, Position], devices: Collection[DeviceId], grid: Grid, positions: Sequence[Position]
) -> Layout:
    """`kept`, and what is left of `positions` in order to idle devices in order."""
    taken = set(kept.values())
    idle = (device for device in sorted(devices) if device not in kept)
    free = (position for position in positions if position not in taken)
    return Layout(grid, {**kept, **dict(zip(idle, free, strict=False))})


def _cluster_size(devices: Collection[DeviceId], surviving: Sequence[DeviceId], grid: Grid) -> int:
    """min(M, devices of a machine). Where machines are not alike, which the artifact refuses, as many as divide them all."""
    there = Counter(device.instance_id for device in devices)
    working = Counter(device.instance_id for device in surviving)
    return gcd(grid.tensor, *there.values(), *working.values())


def _targets(grid: Grid, size: int) -> list[list[Position]]:
    """Positions in groups of `size` shards of one stage; groups in the order in which the artifact numbers them."""
    return [
        [Position(replica, stage, group * size + shard) for shard in range(size)]
        for replica, group, stage in product(range(grid.data), range(grid.tensor // size), range(grid.pipeline))
    ]


def _positions(grid: Grid) -> list[Position]:
    return [Position(*place) for place in product(range(grid.data), range(grid.pipeline), range(grid.tensor))]


def _common(whole: int, old: int, of_old: int, new: int, of_new: int) -> float:
    """What part `old` of `of_old` equal parts of a whole and part `new` of `of_new` have in common."""
    units = min((old + 1) * of_new, (new + 1) * of_old) - max(old * of_new, new * of_old)
    return whole * max(0, units) / (of_old * of_new)


def _filled(batch: Batch | None) -> int:
    return 0 if batch is None else batch.filled_tokens
