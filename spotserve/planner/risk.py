"""Which instances may be taken, and together with which others: the value that planning under preemption reads.

Instances of one type in one zone form a *cell*. Losses come in groups: what arrives (as a Poisson process) are loss *instants*,
and an instant takes several instances of its cell at once, drawn evenly. A model of independent single losses is wrong: 35 % of
the loss instants of the public G4dn trace take two instances or more, 61 % of those of GCP's A100 trace (Bamboo, NSDI'23, its
`traces/`).

Every instance is in one cell at most; one that is in none (on demand) is never taken. Knows no plans, no clock, no cloud.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Sizes = tuple[tuple[int, float], ...]
"""Distribution of the instances that one loss instant takes: (size, share of the instants), by size; shares sum to 1."""

_MOST_INSTANTS = 500.0
"""exp(-x) is a normal number up to here."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Instances that one loss instant may take together."""

    name: str
    instance_ids: tuple[str, ...]
    instants_per_hour: float
    """Of the whole cell."""
    sizes: Sizes

    def __post_init__(self) -> None:
        assert self.instance_ids and len(set(self.instance_ids)) == len(self.instance_ids)
        assert self.instants_per_hour >= 0 and abs(sum(share for _, share in self.sizes) - 1) < 1e-9
        assert all(size >= 1 and share >= 0 for size, share in self.sizes)

    @property
    def instance_rate_per_hour(self) -> float:
        """Expected losses of one of its instances in an hour."""
        return self.instants_per_hour * mean_size(self.sizes, len(self.instance_ids)) / len(self.instance_ids)

    def hits_per_hour(self, num_instances: int) -> float:
        """Expected instants in an hour that take at least one of `num_instances` given ones."""
        total = len(self.instance_ids)
        missed = sum(share * _share_missed(total, num_instances, min(size, total)) for size, share in self.sizes)
        return self.instants_per_hour * (1.0 - missed)


@dataclass(frozen=True, slots=True)
class Risk:
    """What may be taken, as believed at one moment."""

    cells: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        ids = [instance_id for cell in self.cells for instance_id in cell.instance_ids]
        assert len(ids) == len(set(ids)), "an instance is in two cells"

    @property
    def rates_per_hour(self) -> Mapping[str, float]:
        """Expected losses in an hour, by instance."""
        return {instance_id: cell.instance_rate_per_hour for cell in self.cells for instance_id in cell.instance_ids}


def mean_size(sizes: Sizes, most: int) -> float:
    """Expected instances that an instant takes where there are `most`."""
    return sum(min(size, most) * share for size, share in sizes)


def taken(expected_instants: float, sizes: Sizes, most: int) -> Floats:
    """Distribution of the number of instances that are taken while `expected_instants` are expected: Panjer's recursion.

    Args:
        expected_instants: mean of the Poisson number of instants.
        sizes: of each.
        most: how many there are to take.

    Returns:
        Probabilities of 0 .. `most`; the last one is that of `most` or more. [most + 1]

    Source: Panjer, ASTIN Bulletin 12 (1981): p(k) = (m / k) * sum over j of j * f(j) * p(k - j), p(0) = exp(-m).
    """
    assert expected_instants >= 0 and most >= 0
    if expected_instants > _MOST_INSTANTS:
        half = taken(expected_instants / 2, sizes, most)
        whole: Floats = np.convolve(half[:-1], half[:-1])[:most]
        return np.append(whole, max(0.0, 1.0 - whole.sum()))
    below = np.zeros(most + 1)
    below[0] = np.exp(-expected_instants)
    steps = [(size, expected_instants * size * share) for size, share in sizes if size < most and share > 0]
    left = 1.0 - below[0]
    for k in range(1, most):
        below[k] = sum(step * below[k - size] for size, step in steps if size <= k) / k
        left -= below[k]
        if left < 1e-13 and k > expected_instants:
            break
    if most > 0:
        below[most] = max(0.0, 1.0 - below[:most].sum())
    else:
        below[0] = 1.0
    return below


def mixed(parts: Sequence[tuple[float, Sizes]]) -> tuple[float, Sizes]:
    """Several independent streams of instants as one: their rates added, their sizes mixed by rate.

    Args:
        parts: (instants in some unit of time, their sizes); not empty.
    """
    total = sum(rate for rate, _ in parts)
    if total <= 0:
        return 0.0, parts[0][1]
    shares: dict[int, float] = {}
    for rate, sizes in parts:
        for size, share in sizes:
            shares[size] = shares.get(size, 0.0) + share * rate / total
    return total, tuple(sorted(shares.items()))


@lru_cache(maxsize=4096)
def _share_missed(total: int, given: int, size: int) -> float:
    """The share of the subsets of `size` out of `total` that hold none of `given`."""
    return comb(total - given, size) / comb(total, size)
