"""Where to cut a model into stages whose devices, or whose first and last layers, are not alike.

Exact, by dynamic programming over (stages used, layers placed), as Alpa and Galvatron cut. In steady state a pipeline hands on
one step per time of its slowest stage, so that comes first; the sum over the stages, a token's latency, decides among cuts of
equal slowest stage. No weight between the two: among like devices every cut has the same sum, so a weight would only trade
throughput that is there for latency that is not. Of what is still equal the cut with more layers in front wins.

Embedding and head are layers to the cutter but cannot be stages: `welded` puts them onto the first and the last layer.
Knows seconds and bytes; no models, no devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of a pipeline computes with."""

    layer_s: tuple[float, ...]
    """What every layer of the model would take here."""
    constant_s: float
    """What the stage takes besides: handing over to the next one."""
    budget_bytes: int
    """What its layers may take."""

    def __post_init__(self) -> None:
        assert min(self.layer_s) >= 0 and self.constant_s >= 0


@dataclass(frozen=True, slots=True)
class Cut:
    """How many layers each stage has, and what that takes."""

    sizes: tuple[int, ...]
    slowest_s: float
    total_s: float


def welded(each: float, num_layers: int, *, embedding: float, head: float) -> tuple[float, ...]:
    """One number per decoder layer (seconds or bytes), embedding and head added to the layers that they cannot leave."""
    inner = [each] * num_layers
    inner[0] += embedding
    inner[-1] += head
    return tuple(inner)


def best_cut(stages: Sequence[Stage], layer_bytes: Sequence[float]) -> Cut | None:
    """The cut whose slowest stage is fastest, and of those the one with the smallest sum; None when none fits the budgets.

    Layers stay in order, every stage has one at least. O(P L^2), vectorised over pairs of layers.
    """
    assert stages and all(len(stage.layer_s) == len(layer_bytes) for stage in stages)
    if len(stages) > len(layer_bytes):
        return None
    costs = _range_costs(stages, layer_bytes)
    slowest_s = _fastest_bottleneck(costs)
    if slowest_s == inf:
        return None
    total_s, sizes = _smallest_sum(np.where(costs <= slowest_s, costs, inf))
    return Cut(sizes, slowest_s, total_s)


def best_order(stages: Sequence[Stage], layer_bytes: Sequence[float]) -> tuple[tuple[int, ...], Cut] | None:
    """The best order of `stages` along the pipeline, as indices into them, and its cut; None when no order fits.

    All layers but the first and the last must be alike to every stage. Then what lies between the first and the last stage may
    stand in any order, so that trying every kind of stage at both ends is trying every order.
    """
    assert all(len(set(stage.layer_s[1:-1])) <= 1 for stage in stages) and len(set(layer_bytes[1:-1])) <= 1
    best: tuple[tuple[int, ...], Cut] | None = None
    for order in _orders(stages):
        cut = best_cut([stages[index] for index in order], layer_bytes)
        if cut is not None and (best is None or _key(cut) < _key(best[1])):
            best = order, cut
    return best


def _key(cut: Cut) -> tuple[float, float]:
    return cut.slowest_s, cut.total_s


def _orders(stages: Sequence[Stage]) -> list[tuple[int, ...]]:
    """One order per distinct pair of kinds at the ends; the others stay in order between them."""
    if len(stages) == 1:
        return [(0,)]
    ends = {(stages[first], stages[last]): (first, last) for first, last in reversed(list(permutations(range(len(stages)), 2)))}
    return [
        (first, *(index for index in range(len(stages)) if index not in (first, last)), last)
        for first, last in sorted(ends.values())
    ]


def _range_costs(stages: Sequence[Stage], layer_bytes: Sequence[float]) -> Floats:
    """costs[stage, begin, end]: seconds of layers begin .. end - 1 on the stage; infinite where they do not fit or are none."""
    sums = np.zeros((len(stages), len(layer_bytes) + 1))
    np.cumsum([stage.layer_s for stage in stages], axis=1, out=sums[:, 1:])
    held = np.concatenate(([0.0], np.cumsum(layer_bytes, dtype=np.float64)))
    constants = np.array([stage.constant_s for stage in stages])
    budgets = np.array([float(stage.budget_bytes) for stage in stages])
    costs = sums[:, None, :] - sums[:, :, None] + constants[:, None, None]
    ends = np.arange(len(layer_bytes) + 1)
    fits = (held[None, :] - held[:, None] <= budgets[:, None, None]) & (ends[:, None] < ends[None, :])
    return np.where(fits, costs, inf)


def _fastest_bottleneck(costs: Floats) -> float:
    """The smallest possible time of the slowest stage; infinite when nothing fits."""
    reached = costs[0, 0]
    for stage in costs[1:]:
        reached = np.maximum(reached[:, None], stage).min(axis=0)
    return float(reached[-1])


def _smallest_sum(costs: Floats) -> tuple[float, tuple[int, ...]]:
    """The smallest sum of stage times, and the sizes that give it; of equal ones that with later stages shorter."""
    last = costs.shape[1] - 1
    sums, begins = costs[0, 0], []
    for stage in costs[1:]:
        through = sums[:, None] + stage
        begins.append(last - through[::-1].argmin(axis=0))
        sums = through.min(axis=0)
    ends = [last]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    ends.append(0)
    return float(sums[-1]), tuple(end - begin for begin, end in zip(ends[1:], ends, strict=False))[::-1]
