"""Prompt lookup against a rescan of the whole sequence."""

from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.tree import EMPTY_TREE


def rescan(token_ids: list[int], max_tokens: int) -> list[int]:
    for size in (4, 3, 2):
        for start in range(len(token_ids) - size - 1, -1, -1):
            if token_ids[start : start + size] == token_ids[-size:]:
                text = list(token_ids)
                for offset in range(max_tokens):
                    text.append(text[start + size + offset])
                return text[len(token_ids) :]
    return []


@given(
    token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=8),
    max_tokens=st.integers(1, 9),
)
def test_incremental_index_equals_rescan(token_ids: list[int], cuts: list[int], max_tokens: int) -> None:
    drafter = NgramDrafter()
    for end in sorted({min(cut, len(token_ids)) for cut in cuts} | {len(token_ids)}):
        draft = drafter.propose("s", token_ids[:end], max_tokens=max_tokens)
        assert draft.is_chain
        assert list(draft.token_ids) == rescan(token_ids[:end], max_tokens)


def test_sequences_are_separate_and_forgotten() -> None:
    drafter = NgramDrafter()
    assert drafter.propose("a", [1, 2, 3, 1, 2], max_tokens=2).token_ids == (3, 1)
    assert drafter.propose("b", [1, 2], max_tokens=2) == EMPTY_TREE
    drafter.forget("a")
    drafter.forget("a")
    assert drafter.propose("a", [1, 2], max_tokens=2) == EMPTY_TREE


def test_a_loop_is_proposed_as_a_loop() -> None:
    assert NgramDrafter().propose("a", [5, 9, 9, 9], max_tokens=3).token_ids == (9, 9, 9)
