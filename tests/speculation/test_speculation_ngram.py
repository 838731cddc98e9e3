"""Prompt lookup against a rescan of the whole sequence."""

from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask
from spotserve.speculation.drafters.ngram import NgramDrafter


def propose(drafter: NgramDrafter, sequence_id: str, token_ids: list[int], max_depth: int) -> Draft:
    (draft,) = drafter.propose([DraftTask(sequence_id, token_ids, max_depth)])
    return draft


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
    max_depth=st.integers(1, 9),
)
def test_incremental_index_equals_rescan(token_ids: list[int], cuts: list[int], max_depth: int) -> None:
    drafter = NgramDrafter()
    growing: list[int] = []
    for end in sorted({min(cut, len(token_ids)) for cut in cuts} | {len(token_ids)}):
        growing += token_ids[len(growing) : end]
        draft = propose(drafter, "s", growing, max_depth)
        assert draft.tree.is_chain
        assert list(draft.tree.token_ids) == rescan(growing, max_depth)
        assert all(0 < confidence < 1 for confidence in draft.confidences)


@given(
    token_ids=st.lists(st.integers(0, 3), min_size=2, max_size=40),
    drafted=st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=12),
    max_depth=st.integers(1, 9),
)
def test_what_is_only_drafted_is_gone_on_with_and_never_taken_in(
    token_ids: list[int], drafted: list[list[int]], max_depth: int
) -> None:
    """As if the drafted tokens had been said and taken back: what others drafted before leaves no trace."""
    drafter = NgramDrafter()
    for place, tokens in enumerate(drafted):
        known = token_ids[: 2 + place * (len(token_ids) - 2) // len(drafted)]
        task = DraftTask("s", known, max_depth)
        guess = drafter.guess(task, tokens, max_depth)
        assert guess == NgramDrafter().guess(task, tokens, max_depth)
        assert all(token_id in {*known, *tokens} for token_id in guess)
        assert len(guess) in (0, max_depth)
    assert propose(drafter, "s", token_ids, max_depth) == propose(NgramDrafter(), "s", token_ids, max_depth)


def test_a_drafted_end_is_looked_up_like_a_known_one() -> None:
    assert list(NgramDrafter().guess(DraftTask("s", [1, 2, 3, 9], 2), [1, 2], 2)) == [3, 9]
    assert list(NgramDrafter().guess(DraftTask("s", [1, 2, 3], 4), [1, 2], 4)) == [3, 1, 2, 3], "it goes on into what was drafted"


def test_a_batch_is_answered_in_its_order() -> None:
    tasks = [DraftTask("a", (1, 2, 3, 1, 2), 2), DraftTask("b", (1, 2), 2), DraftTask("c", (7, 7, 7), 1)]
    drafts = NgramDrafter().propose(tasks)
    assert [draft.tree.token_ids for draft in drafts] == [(3, 1), (), (7,)]
    assert NgramDrafter().propose([]) == []


def test_sequences_are_separate_and_forgotten() -> None:
    drafter = NgramDrafter()
    assert propose(drafter, "a", [1, 2, 3, 1, 2], 2).tree.token_ids == (3, 1)
    assert propose(drafter, "b", [1, 2], 2) == EMPTY_DRAFT
    drafter.forget("a", [1, 2, 3, 1, 2])
    drafter.forget("a", [1, 2, 3, 1, 2])
    assert propose(drafter, "a", [1, 2], 2) == EMPTY_DRAFT


def test_a_loop_is_proposed_as_a_loop() -> None:
    assert propose(NgramDrafter(), "a", [5, 9, 9, 9], 3).tree.token_ids == (9, 9, 9)


def test_the_first_token_is_no_pair_with_nothing() -> None:
    assert propose(NgramDrafter(), "a", [7, 3, 0, 7], 2) == EMPTY_DRAFT
    assert propose(NgramDrafter(), "a", [0], 2) == EMPTY_DRAFT


def test_large_token_ids_are_kept_apart() -> None:
    huge = 2**32 - 1
    assert propose(NgramDrafter(), "a", [huge, 0, 5, 0, huge, 6, huge, 0], 1).tree.token_ids == (5,)


def test_longer_matches_and_later_tokens_are_surer() -> None:
    texts = {2: [1, 2, 5, 0, 1, 2], 3: [8, 1, 2, 5, 0, 8, 1, 2], 4: [9, 8, 1, 2, 5, 0, 9, 8, 1, 2]}
    confidences = {size: propose(NgramDrafter(), "a", text, 50).confidences for size, text in texts.items()}
    assert confidences[2][0] < confidences[3][0] < confidences[4][0]
    assert all(list(each) == sorted(each) for each in confidences.values())
    assert len({confidence for each in confidences.values() for confidence in each}) == 150, "two sizes share a confidence"
