"""How likely the target is to say what a drafter drafted: learned per depth and confidence, and per sequence.

A drafter says how sure it is of a token; how often the target then agrees is counted, by depth and by confidence, older counts
fading. Every count leans on a coarser one (its confidence at any depth, then the drafter as a whole, then what the drafter says
itself), which is worth a few observations: a Bayesian estimate whose prior is the next coarser count. A sequence that is easier
or harder than others has a factor of its own: what was accepted of it over what was expected.

Estimates are of a node given that its parent was accepted; along a path they multiply to its chance of survival. Knows no tokens.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

_CONFIDENCE_EDGES: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Confidences between two of them are counted together."""
_STATED: Final = tuple((low + high) / 2 for low, high in pairwise((0.0, *_CONFIDENCE_EDGES, 1.0)))
"""What a drafter says, by column."""
_DEPTH_GROUPS: Final = (1, 2, 3, 5, 9)
"""Least depth of each group."""
_COLUMNS: Final = len(_STATED)
_CELLS: Final = len(_DEPTH_GROUPS) * _COLUMNS

_PRIOR_WORTH: Final = 3.0
"""Observations that an estimate's prior is worth."""
_SEQUENCE_WORTH: Final = 6.0
"""Expected acceptances that the assumption of an ordinary sequence is worth."""
_MEMORY_STEPS: Final = 28.0
"""Steps with observations that a count remembers, about."""
_KEPT_PER_STEP: Final = 1.0 - 1.0 / _MEMORY_STEPS
_LEAST_MEMORY: Final = 24.0
"""Observations that are not forgotten while nothing is observed."""
_SEQUENCE_KEPT: Final = 1.0 - 1.0 / 24.0
"""What a sequence's counts keep with each observation."""
_FACTORS: Final = (0.2, 1.6)
"""A sequence's factor stays between these."""
_MOST: Final = 0.995
"""Nothing is more certain."""


class Label(NamedTuple):
    """A drafted token whose parent the target said, and whether the target said it, too."""

    cell: int
    accepted: bool


class SequenceAcceptance(NamedTuple):
    """What was learned of one sequence; goes with it to another machine."""

    accepted: float = 0.0
    expected: float = 0.0


@lru_cache(maxsize=4096)
def cells_of(depths: tuple[int, ...], confidences: tuple[float, ...]) -> tuple[int, ...]:
    """Per node what it is counted under."""
    return tuple(
        (bisect_right(_DEPTH_GROUPS, depth) - 1) * _COLUMNS + bisect_right(_CONFIDENCE_EDGES, confidence)
        for depth, confidence in zip(depths, confidences, strict=True)
    )


@dataclass(slots=True)
class _Count:
    """Observations that fade with the steps in which something was observed.

    What is remembered is worth `_MEMORY_STEPS` steps of as many observations as there were lately: where thirty sequences were
    seen at every step and now one is, the one is soon believed.
    """

    tried: float = 0.0
    accepted: float = 0.0
    step: int = 0
    quiet: int = 0
    per_step: float = 0.0

    def add(self, tried: int, accepted: int, step: int, quiet: int) -> None:
        """What a step brought; `step` counts those with observations, `quiet` those without."""
        self.per_step = 0.5 * (self.per_step * 0.5 ** min(quiet - self.quiet, 100) + tried) if self.per_step else float(tried)
        worth = _MEMORY_STEPS * max(1.0, self.per_step)
        kept = _KEPT_PER_STEP ** (step - self.step) * min(1.0, worth / self.tried if self.tried else 1.0)
        if quiet > self.quiet and self.tried > _LEAST_MEMORY:
            kept *= max(_KEPT_PER_STEP ** (quiet - self.quiet), _LEAST_MEMORY / self.tried)
        self.tried = self.tried * kept + tried
        self.accepted = self.accepted * kept + accepted
        self.step, self.quiet = step, quiet

    def estimate(self, prior: float) -> float:
        """Share that is accepted."""
        return (self.accepted + _PRIOR_WORTH * prior) / (self.tried + _PRIOR_WORTH)


class Acceptance:
    """Of one drafter on one replica."""

    def __init__(self) -> None:
        self._cells = [_Count() for _ in range(_CELLS)]
        self._by_confidence = [_Count() for _ in range(_COLUMNS)]
        self._by_depth = [_Count() for _ in _DEPTH_GROUPS]
        self._all = _Count()
        self._sequences: dict[str, SequenceAcceptance] = {}
        self._steps = self._quiet_steps = 0
        self._tried = [0] * _CELLS
        """In this step, by cell; below, of them those accepted."""
        self._accepted = [0] * _CELLS
        self._touched: set[int] = set()
        self._estimates: dict[int, float] = {}

    def of_node(self, depth: int, confidence: float) -> float:
        """Chance of a node of an ordinary sequence, given its parent."""
        return self._estimate(cells_of((depth,), (confidence,))[0])

    def at_depth(self, depth: int) -> float:
        """The same before anything is drafted, when confidence is not known."""
        return self._by_depth[bisect_right(_DEPTH_GROUPS, depth) - 1].estimate(self._all.estimate(0.5))

    def factor(self, sequence_id: str) -> float:
        """How much easier this sequence is than an ordinary one."""
        known = self._sequences.get(sequence_id)
        if known is None:
            return 1.0
        low, high = _FACTORS
        return min(high, max(low, (known.accepted + _SEQUENCE_WORTH) / (known.expected + _SEQUENCE_WORTH)))

    def survivals(self, sequence_id: str, parents: Sequence[int], cells: Sequence[int]) -> list[float]:
        """Per node of a tree the chance that its whole path is accepted; never more than its parent's."""
        factor = self.factor(sequence_id)
        estimates, estimate = self._estimates, self._estimate
        found: list[float] = []
        for parent, cell in zip(parents, cells, strict=True):
            known = estimates.get(cell)
            chance = factor * (estimate(cell) if known is None else known)
            if chance > _MOST:
                chance = _MOST
            found.append(chance if parent < 0 else chance * found[parent])
        return found

    def observe(self, sequence_id: str, labels: Iterable[Label]) -> None:
        """What came of the nodes of one sequence."""
        accepted, expected = self._sequences.get(sequence_id, SequenceAcceptance())
        for cell, is_accepted in labels:
            accepted = accepted * _SEQUENCE_KEPT + is_accepted
            expected = expected * _SEQUENCE_KEPT + self._estimate(cell)
            self._tried[cell] += 1
            self._accepted[cell] += is_accepted
            self._touched.add(cell)
        self._sequences[sequence_id] = SequenceAcceptance(accepted, expected)

    def end_step(self) -> None:
        """Observations that follow belong to a later step."""
        if not self._touched:
            self._quiet_steps += 1
            return
        self._steps += 1
        coarser: dict[int, tuple[_Count, int, int]] = {}
        for cell in self._touched:
            tried, accepted = self._tried[cell], self._accepted[cell]
            self._tried[cell] = self._accepted[cell] = 0
            self._cells[cell].add(tried, accepted, self._steps, self._quiet_steps)
            group, column = divmod(cell, _COLUMNS)
            for count in (self._by_confidence[column], self._by_depth[group], self._all):
                _, before, right = coarser.get(id(count), (count, 0, 0))
                coarser[id(count)] = (count, before + tried, right + accepted)
        for count, tried, accepted in coarser.values():
            count.add(tried, accepted, self._steps, self._quiet_steps)
        self._touched.clear()
        self._estimates.clear()

    def state(self, sequence_id: str) -> SequenceAcceptance:
        """What was learned of a sequence."""
        return self._sequences.get(sequence_id, SequenceAcceptance())

    def adopt(self, sequence_id: str, state: SequenceAcceptance) -> None:
        """A sequence comes with what another replica has learned of it."""
        self._sequences[sequence_id] = state

    def forget(self, sequence_id: str) -> None:
        """The sequence is over. No-op when unknown."""
        self._sequences.pop(sequence_id, None)

    def _estimate(self, cell: int) -> float:
        known = self._estimates.get(cell)
        if known is None:
            column = cell % _COLUMNS
            # What the drafter says itself tells confidences apart until counts do.
            stated = 0.5 * (self._all.estimate(_STATED[column]) + _STATED[column])
            known = self._estimates[cell] = self._cells[cell].estimate(self._by_confidence[column].estimate(stated))
        return known
