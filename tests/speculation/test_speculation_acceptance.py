"""What confidences are worth: learned, forgotten, and different from sequence to sequence."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.acceptance import Acceptance, Label, SequenceAcceptance, cells_of
from spotserve.speculation.tree import ROOT

ONE_CELL = cells_of((1,), (0.6,))[0]


def teach(acceptance: Acceptance, steps: int, chance: random.Random, *, rate: float, each: int = 1, cell: int = ONE_CELL) -> None:
    """Steps in which so many sequences get a label each."""
    for _ in range(steps):
        for sequence in range(each):
            acceptance.observe(f"s{sequence}", [Label(cell, chance.random() < rate)])
        acceptance.end_step()


def estimate(acceptance: Acceptance, confidence: float = 0.6, depth: int = 1) -> float:
    """Of an ordinary sequence."""
    return acceptance.of_node(depth, confidence)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("each", [1, 64])
def test_estimates_converge(rate: float, each: int) -> None:
    found = []
    for seed in range(12):
        acceptance = Acceptance()
        teach(acceptance, 80, random.Random(seed), rate=rate, each=each)
        found.append(estimate(acceptance))
        assert acceptance.at_depth(1) == pytest.approx(found[-1], abs=0.12)
    assert sum(found) / len(found) == pytest.approx(rate, abs=0.06)
    assert max(abs(one - rate) for one in found) < (0.3 if each == 1 else 0.06)


@pytest.mark.parametrize("each", [1, 64])
def test_old_observations_fade(each: int) -> None:
    acceptance, chance = Acceptance(), random.Random(1)
    teach(acceptance, 500, chance, rate=1.0, each=each)
    teach(acceptance, 50, chance, rate=0.0, each=each)
    assert estimate(acceptance) < 0.2
    assert acceptance.at_depth(1) < 0.2


def test_a_single_sequence_is_soon_believed_after_many() -> None:
    """Counts of 64 sequences must not outvote for 64 steps the one that is left."""
    acceptance, chance = Acceptance(), random.Random(1)
    teach(acceptance, 200, chance, rate=0.9, each=64)
    teach(acceptance, 40, chance, rate=0.1, each=1)
    assert estimate(acceptance) < 0.4


def test_many_labels_are_soon_believed_after_a_pause() -> None:
    acceptance, chance = Acceptance(), random.Random(1)
    teach(acceptance, 200, chance, rate=0.1, each=64)
    for _ in range(200):
        acceptance.end_step()
    teach(acceptance, 1, chance, rate=0.9, each=64)
    assert estimate(acceptance) > 0.55


def test_a_pause_alone_changes_no_estimate() -> None:
    acceptance, chance = Acceptance(), random.Random(1)
    teach(acceptance, 50, chance, rate=0.3)
    before = estimate(acceptance), acceptance.at_depth(1), acceptance.factor("s0")
    for _ in range(10_000):
        acceptance.end_step()
    assert (estimate(acceptance), acceptance.at_depth(1), acceptance.factor("s0")) == before
    teach(acceptance, 1, chance, rate=1.0)
    assert estimate(acceptance) < 0.5, "one label after a pause says little"


def test_confidences_are_told_apart_and_by_depth() -> None:
    acceptance, chance = Acceptance(), random.Random(2)
    for _ in range(300):
        for depth, confidence, rate in ((1, 0.3, 0.1), (1, 0.95, 0.9), (4, 0.95, 0.5)):
            acceptance.observe("s", [Label(cells_of((depth,), (confidence,))[0], chance.random() < rate)])
        acceptance.end_step()
    assert estimate(acceptance, 0.3) < 0.35
    assert estimate(acceptance, 0.95) > 0.75
    assert 0.25 < estimate(acceptance, 0.95, depth=4) < 0.75
    assert acceptance.at_depth(1) != acceptance.at_depth(4)


def test_what_was_never_seen_follows_what_the_drafter_says() -> None:
    acceptance = Acceptance()
    estimates = [estimate(acceptance, confidence) for confidence in (0.01, 0.3, 0.6, 0.99)]
    assert estimates == sorted(estimates)
    assert estimates[0] < 0.35 < 0.65 < estimates[-1]


@given(
    labels=st.lists(
        st.tuples(st.integers(1, 12), st.floats(0, 1), st.booleans(), st.sampled_from(["a", "b"]), st.booleans()), max_size=60
    ),
    depth=st.integers(1, 20),
    confidence=st.floats(0, 1),
)
def test_estimates_are_chances(labels: list[tuple[int, float, bool, str, bool]], depth: int, confidence: float) -> None:
    acceptance = Acceptance()
    for at, stated, accepted, sequence_id, ends in labels:
        acceptance.observe(sequence_id, [Label(cells_of((at,), (stated,))[0], accepted)])
        if ends:
            acceptance.end_step()
    assert 0 < acceptance.of_node(depth, confidence) < 1
    assert 0 < acceptance.at_depth(depth) < 1
    for sequence_id in ("a", "b", "unknown"):
        assert 0.2 <= acceptance.factor(sequence_id) <= 1.6
    assert acceptance.factor("unknown") == 1.0


@given(
    nodes=st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1)), max_size=20),
    labels=st.lists(st.tuples(st.integers(0, 54), st.booleans()), max_size=60),
)
def test_no_node_survives_its_parent(nodes: list[tuple[int, float]], labels: list[tuple[int, bool]]) -> None:
    acceptance = Acceptance()
    for cell, accepted in labels:
        acceptance.observe("s", [Label(cell, accepted)])
    acceptance.end_step()
    parents = [ROOT if seed % (node + 1) == node else seed % (node + 1) for node, (seed, _) in enumerate(nodes)]
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    cells = cells_of(tuple(depths), tuple(confidence for _, confidence in nodes))
    survivals = acceptance.survivals("s", parents, cells)
    assert len(survivals) == len(nodes)
    for node, parent in enumerate(parents):
        assert 0 < survivals[node] < (1.0 if parent == ROOT else survivals[parent])


def test_survival_is_the_product_along_the_path() -> None:
    acceptance, chance = Acceptance(), random.Random(4)
    teach(acceptance, 50, chance, rate=0.7)
    chances = [acceptance.of_node(depth, 0.6) for depth in (1, 2, 3)]
    survivals = acceptance.survivals("new", (ROOT, 0, 1), cells_of((1, 2, 3), (0.6,) * 3))
    assert survivals == pytest.approx([chances[0], chances[0] * chances[1], chances[0] * chances[1] * chances[2]])


def test_a_sequence_that_is_easier_than_others_has_a_factor_of_its_own() -> None:
    acceptance, chance = Acceptance(), random.Random(5)
    for _ in range(60):
        acceptance.observe("easy", [Label(ONE_CELL, chance.random() < 0.9)])
        acceptance.observe("hard", [Label(ONE_CELL, chance.random() < 0.1)])
        acceptance.observe("ordinary", [Label(ONE_CELL, chance.random() < 0.5)])
        acceptance.end_step()
    assert acceptance.factor("easy") > 1.25
    assert acceptance.factor("hard") < 0.6
    assert 0.7 < acceptance.factor("ordinary") < 1.3
    (easy,), (hard,) = (acceptance.survivals(name, (ROOT,), (ONE_CELL,)) for name in ("easy", "hard"))
    assert hard < 0.4 < 0.6 < easy


def test_what_was_learned_of_a_sequence_goes_with_it() -> None:
    here, there, chance = Acceptance(), Acceptance(), random.Random(6)
    for _ in range(40):
        here.observe("mine", [Label(ONE_CELL, True)])
        here.observe("other", [Label(ONE_CELL, chance.random() < 0.3)])
        here.end_step()
    there.adopt("mine", here.state("mine"))
    assert there.factor("mine") == here.factor("mine") > 1.2
    assert there.state("mine") == here.state("mine")
    there.forget("mine")
    assert there.factor("mine") == 1.0
    assert there.state("mine") == SequenceAcceptance()
    there.forget("mine")


def naive_cells(depths: Sequence[int], confidences: Sequence[float]) -> list[tuple[int, int]]:
    """By counting edges."""
    edges = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
    groups = (1, 2, 3, 5, 9)
    return [
        (sum(depth >= group for group in groups) - 1, sum(confidence >= edge for edge in edges))
        for depth, confidence in zip(depths, confidences, strict=True)
    ]


@given(nodes=st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1)), max_size=10))
def test_cells_are_found_alike_with_and_without_the_cache(nodes: list[tuple[int, float]]) -> None:
    depths, confidences = tuple(depth for depth, _ in nodes), tuple(confidence for _, confidence in nodes)
    cached = cells_of(depths, confidences)
    assert cells_of(depths, confidences) == cached == cells_of.__wrapped__(depths, confidences)
    assert [divmod(cell, 11) for cell in cached] == naive_cells(depths, confidences)
