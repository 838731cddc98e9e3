"""Labels against a twin that walks the whole text at once."""

import random

from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.acceptance import Label
from spotserve.speculation.labels import DraftLabeller
from spotserve.speculation.tree import ROOT, DraftTree


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(0, 12))
    if draw(st.booleans()):
        return DraftTree.chain([draw(st.integers(0, 1)) for _ in range(size)])
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(size))
    return DraftTree(tuple(draw(st.integers(0, 2)) for _ in range(size)), parents)


def twin(tree: DraftTree, text: list[int]) -> list[Label]:
    """Depth after depth: the children of the node that the text has come to, each held against the next token."""
    labels: list[Label] = []
    at = ROOT
    for token_id in text:
        children = [node for node, parent in enumerate(tree.parents) if parent == at]
        labels += [Label(100 + node, tree.token_ids[node] == token_id) for node in children]
        right = [node for node in children if tree.token_ids[node] == token_id]
        if not right:
            break
        at = right[-1]
    return labels


def portions(text: list[int], chance: random.Random) -> list[list[int]]:
    """The text as steps bring it."""
    found, at = [], 0
    while at < len(text):
        size = chance.randint(1, 4)
        found.append(text[at : at + size])
        at += size
    return found


@given(tree=trees(), text=st.lists(st.integers(0, 2), max_size=14), seed=st.integers(0, 1000))
def test_labels_are_those_of_the_whole_text_however_it_comes(tree: DraftTree, text: list[int], seed: int) -> None:
    labeller = DraftLabeller(tree, [100 + node for node in range(len(tree))])
    assert labeller.is_new
    assert labeller.is_over == (len(tree) == 0)
    found = [label for portion in portions(text, random.Random(seed)) for label in labeller.follow(portion)]
    assert found == twin(tree, text)
    assert labeller.is_new == (not text)


@given(tree=trees(), text=st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_it_is_over_exactly_when_nothing_that_comes_can_teach(tree: DraftTree, text: list[int]) -> None:
    labeller = DraftLabeller(tree, [100 + node for node in range(len(tree))])
    known: list[int] = []
    for token_id in text:
        labeller.follow([token_id])
        known.append(token_id)
        teaches = any(len(twin(tree, [*known, more])) > len(twin(tree, known)) for more in range(3))
        assert labeller.is_over == (not teaches)


def test_a_draft_that_was_not_verified_teaches_over_several_steps() -> None:
    labeller = DraftLabeller(DraftTree.chain([5, 6, 7]), [1, 2, 3])
    assert labeller.follow([5]) == [Label(1, True)]
    assert not labeller.is_over
    assert labeller.follow([9]) == [Label(2, False)]
    assert labeller.is_over
    assert labeller.follow([7]) == []


def test_alternatives_are_labelled_beside_each_other() -> None:
    labeller = DraftLabeller(DraftTree((1, 2, 3), (ROOT, ROOT, 1)), [10, 11, 12])
    assert labeller.follow([2, 3, 4]) == [Label(10, False), Label(11, True), Label(12, True)]
    assert labeller.is_over
