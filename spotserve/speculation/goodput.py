"""Which of all drafted tokens of a batch are verified: those that bring the most committed tokens per second together.

Nodes of all sequences stand in line by their chance of survival; since a child never survives its parent, any beginning of the line
is a set of whole paths. The cut is where expected tokens over the time of the step peaks (SmartSpec's goodput, Liu et al., arXiv
2406.14066; ranked across the batch like the confidence-scheduled verification of DSpark, arXiv 2607.05147). Pure arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.speculation.cost import StepCost


@dataclass(frozen=True, slots=True)
class Base:
    """The step without drafts."""

    sequences: int
    rows: int
    """Prompts included."""
    kv_tokens: int
    worth: float
    """What its tokens are worth together: one each, unless some are wanted more."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The outcome."""

    nodes: tuple[int, ...]
    """Those to verify, in line."""
    worth: float
    """Expected tokens of the step, by their worth."""
    step_s: float
    """Expected time of the step, drafting included."""

    @property
    def goodput(self) -> float:
        """Worth per second."""
        return self.worth / self.step_s


def best_cut(worths: Sequence[float], kv_tokens: Sequence[int], base: Base, cost: StepCost, *, max_nodes: int) -> Cut:
    """The best beginning of the line.

    Sorting apart, it costs as much as the beginning is long: it ends where a row that is not padding brings less than the step
    without it, since those behind bring less still.

    Args:
        worths: per node its chance of survival, times what a token of its sequence is worth; a parent stands before its children.
        kv_tokens: per node the tokens of context that its row reads.
        base: the step without them.
        cost: of steps.
        max_nodes: rows that the step has left.
    """
    order = sorted(range(len(worths)), key=worths.__getitem__, reverse=True)  # stable: of equals the parent stays first
    row_s, kv_s = cost.per_row_s, cost.per_draft_kv_token_s
    worth, computed = base.worth, cost.computed_rows(base.rows)
    seconds = max(1e-9, cost.at(sequences=base.sequences, rows=base.rows, kv_tokens=base.kv_tokens))
    best, best_worth, best_s = 0, worth, seconds
    for count, node in enumerate(order[:max_nodes], start=1):
        if base.rows + count > computed:
            if worths[node] * best_s < best_worth * row_s:  # nor would all the rows up to the next padding bring more
                break
            before, computed = computed, cost.computed_rows(base.rows + count)
            seconds += (computed - before) * row_s
        seconds += kv_tokens[node] * kv_s
        worth += worths[node]
        if worth * best_s > best_worth * seconds:
            best, best_worth, best_s = count, worth, seconds
    return Cut(tuple(order[:best]), best_worth, best_s)
