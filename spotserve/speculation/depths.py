"""How deep a draft model should draft, and for whom: decided before it does, because its passes are what costs.

Every pass costs something whoever takes part, every row of it and every row that the target then verifies a little more; a token
at depth d is worth its chance of survival. For each depth the sequences take part for which that pays at the present goodput, and
of all depths the one of the greatest goodput is taken, 0 included: the model of "Decoding Speculative Decoding" (Yan et al., arXiv
2402.01528) for batches in which every sequence has an acceptance of its own. Pure arithmetic.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spotserve.speculation.cost import PassCost, StepCost
from spotserve.speculation.goodput import Base

_MOST_ROUNDS: Final = 4
_WORTH_A_ROUND: Final = 1.01
"""Times the goodput of the last round; with less of a gain the next one would change little."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sequences that a draft model could draft for."""

    survivals: NDArray[np.float64]
    """[sequences, depths] the chance of a token at each depth, times what a token of the sequence is worth."""
    contexts: NDArray[np.float64]
    """[sequences] tokens."""
    lags: NDArray[np.float64]
    """[sequences] rows to compute before anything can be drafted, as far as they are charged to this step."""
    other_worths: NDArray[np.float64]
    """[sequences] expected tokens of the draft that the sequence has by other means."""
    other_nodes: NDArray[np.float64]
    """[sequences] its nodes."""

    def goodput_of_others(self, base: Base, cost: StepCost) -> float:
        """Worth per second with the drafts that there are by other means."""
        nodes = self.other_nodes
        read = base.kv_tokens + cost.kv_reread * float((nodes * self.contexts).sum())
        step_s = cost.at(sequences=base.sequences, rows=base.rows + float(nodes.sum()), kv_tokens=read)
        return (base.worth + float(self.other_worths.sum())) / step_s


@dataclass(frozen=True, slots=True)
class Depths:
    """The outcome."""

    depths: tuple[int, ...]
    """Per sequence; 0: it takes no part."""
    goodput: float
    """Expected worth per second."""


def best_depths(candidates: Candidates, base: Base, cost: StepCost, draft_cost: PassCost, *, goodput: float) -> Depths:
    """Depths for every sequence; `goodput` is what is to be beaten, tokens (by worth) per second."""
    best = Depths((0,) * len(candidates.contexts), goodput)
    row_s = cost.per_row_s + candidates.contexts * cost.per_draft_kv_token_s  # [sequences]
    # Rows that fill up the padding of a small step cost nothing: then depths are tried at that price, too.
    may_be_free = cost.has_padding(base.rows) or 1 < cost.row_multiple >= base.rows / 2
    for price_s in (row_s, np.zeros_like(row_s)) if may_be_free else (row_s,):
        for _ in range(_MOST_ROUNDS):  # who takes part is judged by the goodput that is reached: a better one asks for more
            known = best.goodput
            best = _best_at_price(candidates, base, cost, draft_cost, price_s, best)
            if best.goodput < _WORTH_A_ROUND * known:
                break
    return best


def _best_at_price(
    candidates: Candidates, base: Base, cost: StepCost, draft_cost: PassCost, row_s: NDArray[np.float64], best: Depths
) -> Depths:
    """The better of `best` and what is found if a row of each sequence costs `row_s` for choosing who takes part."""
    survivals, goodput = candidates.survivals, best.goodput
    marginal_s = survivals / goodput - (row_s + draft_cost.per_row_s)[:, None]
    pays = np.logical_and.accumulate(marginal_s > 0, axis=1)
    net_s = np.cumsum(np.where(pays, marginal_s, 0.0), axis=1) - (candidates.lags * draft_cost.per_row_s)[:, None]
    worths = np.cumsum(np.where(pays, survivals, 0.0), axis=1)
    lengths = np.cumsum(pays, axis=1)
    other_net_s = candidates.other_worths / goodput - candidates.other_nodes * row_s
    # All depths at once, by column: with one of them as the deepest, who drafts how much and what the step takes.
    drafted = (net_s > other_net_s[:, None]) & (lengths > 0)
    own = np.where(drafted, lengths, 0)
    nodes = np.where(drafted, own, candidates.other_nodes[:, None])
    worth = base.worth + np.where(drafted, worths, candidates.other_worths[:, None]).sum(axis=0)
    passes, draft_rows = own.max(axis=0), own.sum(axis=0) + candidates.lags @ drafted
    rows, read = base.rows + nodes.sum(axis=0), base.kv_tokens + cost.kv_reread * (candidates.contexts @ nodes)
    step_s = np.array(
        [
            cost.at(sequences=base.sequences, rows=of_rows, kv_tokens=of_read) + draft_cost.at(passes=of_passes, rows=of_draft)
            for of_rows, of_read, of_passes, of_draft in zip(
                rows.tolist(), read.tolist(), passes.tolist(), draft_rows.tolist(), strict=True
            )
        ]
    )
    goodputs = np.where(passes > 0, worth / step_s, 0.0)
    deepest = int(goodputs.argmax())
    if goodputs[deepest] <= best.goodput:
        return best
    return Depths(tuple(own[:, deepest].tolist()), float(goodputs[deepest]))
