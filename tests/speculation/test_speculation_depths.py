"""How deep to draft, against every choice of depths."""

import itertools
import random

import numpy as np
import pytest

from spotserve.speculation.cost import PassCost, StepCost
from spotserve.speculation.depths import Candidates, best_depths
from spotserve.speculation.goodput import Base

FLAT = StepCost(5e-3, 1e-5, 1e-4, 0.0)
PADDED = StepCost(1.1e-3, 70e-6, 130e-6, 0.0, row_multiple=4)
WITH_KV = StepCost(2e-3, 1e-5, 1e-4, 3e-7, kv_reread=0.5)
DEPTHS = 4


def scene(
    chance: random.Random, sequences: int, cost: StepCost, *, alike: bool, others: bool = False, lags: bool = False
) -> tuple[Candidates, Base]:
    """Sequences of which each depth is accepted with a chance of its own; drafts by other means have nodes that pay only."""
    first = chance.uniform(0.05, 0.98)
    rates = [first] * sequences if alike else [chance.uniform(0.05, 0.98) for _ in range(sequences)]
    contexts = [100.0 if alike else chance.choice((10.0, 100.0, 2000.0)) for _ in range(sequences)]
    base = Base(sequences, sequences, int(sum(contexts)), float(sequences))
    plain = base.worth / cost.at(sequences=sequences, rows=sequences, kv_tokens=base.kv_tokens)
    drafts: list[list[float]] = []
    for context in contexts:
        rate, length = chance.uniform(0.05, 0.98), chance.randint(0, 3) if others else 0
        least = (cost.per_row_s + context * cost.per_draft_kv_token_s) * plain
        drafts.append([rate**depth for depth in range(1, length + 1) if rate**depth > least])
    candidates = Candidates(
        survivals=np.array([[rate**depth for depth in range(1, DEPTHS + 1)] for rate in rates]),
        contexts=np.array(contexts),
        lags=np.array([chance.uniform(0, 10) if lags else 0.0 for _ in range(sequences)]),
        other_worths=np.array([sum(draft) for draft in drafts]),
        other_nodes=np.array([float(len(draft)) for draft in drafts]),
    )
    return candidates, base


def goodput_of(depths: tuple[int, ...], candidates: Candidates, base: Base, cost: StepCost, draft: PassCost) -> float:
    """From first principles: who takes part has its own draft, the others what they had."""
    worth, nodes, read, rows = base.worth, 0.0, 0.0, 0.0
    for index, depth in enumerate(depths):
        count = float(depth) if depth else float(candidates.other_nodes[index])
        worth += float(candidates.survivals[index, :depth].sum()) if depth else float(candidates.other_worths[index])
        nodes += count
        read += count * float(candidates.contexts[index])
        rows += depth + float(candidates.lags[index]) if depth else 0.0
    seconds = cost.at(sequences=base.sequences, rows=base.rows + nodes, kv_tokens=base.kv_tokens + cost.kv_reread * read)
    return worth / (seconds + (draft.at(passes=max(depths), rows=rows) if any(depths) else 0.0))


def exhaustive(candidates: Candidates, base: Base, cost: StepCost, draft: PassCost) -> float:
    """The best of all choices, no drafts at all among them."""
    choices = itertools.product(range(DEPTHS + 1), repeat=len(candidates.contexts))
    plain = base.worth / cost.at(sequences=base.sequences, rows=base.rows, kv_tokens=base.kv_tokens)
    return max(plain, *(goodput_of(choice, candidates, base, cost, draft) for choice in choices))


def found(candidates: Candidates, base: Base, cost: StepCost, draft: PassCost) -> float:
    """What the rule reaches, checked against its own figure."""
    nothing = (0,) * len(candidates.contexts)
    plain = base.worth / cost.at(sequences=base.sequences, rows=base.rows, kv_tokens=base.kv_tokens)
    others = candidates.goodput_of_others(base, cost)
    assert others == pytest.approx(goodput_of(nothing, candidates, base, cost, draft), rel=1e-9)
    chosen = best_depths(candidates, base, cost, draft, goodput=max(plain, others))
    if not any(chosen.depths):
        return max(plain, others)
    real = goodput_of(chosen.depths, candidates, base, cost, draft)
    assert chosen.goodput == pytest.approx(real, rel=1e-9)
    return real


@pytest.mark.parametrize("draft", [PassCost(1e-5, 2e-4, 5e-6), PassCost(0.0, 1e-3, 2e-5)], ids=["cheap", "dear"])
@pytest.mark.parametrize("cost", [FLAT, PADDED, WITH_KV], ids=["flat", "padded", "context"])
@pytest.mark.parametrize(("others", "lags"), [(False, False), (True, False), (True, True)])
def test_close_to_the_best_of_all_choices(cost: StepCost, draft: PassCost, others: bool, lags: bool) -> None:
    shares = []
    for seed in range(25):
        chance = random.Random(seed)
        sequences = chance.randint(1, 4)
        candidates, base = scene(chance, sequences, cost, alike=False, others=others, lags=lags)
        shares.append(found(candidates, base, cost, draft) / exhaustive(candidates, base, cost, draft))
    # Only padding makes it a matter of who fills up which row together; batches so small are the worst of it.
    least = 0.92 if cost.row_multiple > 1 else 0.97
    assert min(shares) >= least, f"worst {min(shares):.3f}"
    assert sum(shares) / len(shares) >= 0.99


def test_a_deep_draft_may_beat_another_drafter_that_its_first_tokens_do_not() -> None:
    none = np.zeros(1)
    survivals = np.array([[0.9, 0.8, 0.7, 0.65]])
    candidates = Candidates(survivals, none + 100.0, none, none + 1.2, none + 2.0)
    base = Base(1, 1, 100, 1.0)
    goodput = candidates.goodput_of_others(base, FLAT)
    assert best_depths(candidates, base, FLAT, PassCost(0.0, 2e-4, 5e-6), goodput=goodput).depths == (4,)


@pytest.mark.parametrize("draft", [PassCost(1e-5, 2e-4, 5e-6), PassCost(0.0, 1e-3, 2e-5)], ids=["cheap", "dear"])
@pytest.mark.parametrize("cost", [FLAT, WITH_KV], ids=["flat", "context"])
def test_the_best_of_all_choices_where_sequences_are_alike(cost: StepCost, draft: PassCost) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        sequences = chance.randint(1, 4)
        candidates, base = scene(chance, sequences, cost, alike=True)
        assert found(candidates, base, cost, draft) == pytest.approx(exhaustive(candidates, base, cost, draft), rel=1e-9)


def test_nobody_drafts_where_it_does_not_pay() -> None:
    candidates, base = scene(random.Random(1), 4, FLAT, alike=True)
    plain = base.worth / FLAT.at(sequences=4, rows=4, kv_tokens=400)
    chosen = best_depths(candidates, base, FLAT, PassCost(0.0, 1.0, 1e-3), goodput=plain)
    assert chosen.depths == (0, 0, 0, 0)
    assert chosen.goodput == plain


def test_a_long_lag_is_a_reason_to_leave_a_sequence_out() -> None:
    survivals = np.array([[0.8**depth for depth in range(1, DEPTHS + 1)]] * 2)
    none = np.zeros(2)
    candidates = Candidates(survivals, np.array([100.0, 100.0]), np.array([0.0, 500.0]), none, none)
    base = Base(2, 2, 200, 2.0)
    plain = base.worth / FLAT.at(sequences=2, rows=2, kv_tokens=200)
    chosen = best_depths(candidates, base, FLAT, PassCost(0.0, 2e-4, 2e-4), goodput=plain)
    assert chosen.depths[0] > 0
    assert chosen.depths[1] == 0
