"""Suffix decoding against a scan of all text that it may know."""

from collections.abc import Iterable, Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.suffixes import NO_CONTINUATION, AnswerWindow, Continuation, GrowingText, WalkLimits

MAX_CONTEXT = 4
"""Short, so that short texts meet it."""
tokens = st.integers(0, 2)
texts = st.lists(tokens, max_size=40)
limits = st.builds(
    WalkLimits,
    max_context=st.just(MAX_CONTEXT),
    tokens_per_match=st.sampled_from([0.5, 1.0, 2.0]),
    min_probability=st.sampled_from([0.01, 0.1, 0.6]),
)


def occurrences(corpus: Sequence[Sequence[int]], context: Sequence[int]) -> list[int | None]:
    """What followed each occurrence of the context, in order; None where its text ended."""
    size = len(context)
    return [
        text[at + size] if at + size < len(text) else None
        for text in corpus
        for at in range(len(text) - size + 1)
        if list(text[at : at + size]) == list(context)
    ]


def longest_followed(corpus: Sequence[Sequence[int]], text: Sequence[int], at_most: int) -> int:
    sizes = (size for size in range(min(len(text), at_most), 0, -1) if set(occurrences(corpus, text[-size:])) - {None})
    return next(sizes, 0)


def scan(
    corpus: Sequence[Sequence[int]], text: Sequence[int], max_tokens: int, limits: WalkLimits, *, growing: bool
) -> Continuation:
    """The definition. A growing text's end is no occurrence that ended, and contexts may get shorter there."""
    size = matched = longest_followed(corpus, text, limits.max_context)
    if not matched:
        return NO_CONTINUATION
    walked, confidences, probability, score = list(text), [], 1.0, 0.0
    for _ in range(min(max_tokens, max(1, int(limits.tokens_per_match * matched)))):
        if growing:
            size = longest_followed(corpus, walked, size)
            if not size:
                break
        followers = occurrences(corpus, walked[-size:])
        seen = [token for token in followers if token is not None]
        if not seen:
            break
        token = max(seen, key=lambda token: (seen.count(token), len(seen) - seen[::-1].index(token)))
        confidence = seen.count(token) / (len(seen if growing else followers) + 1 / size)
        probability *= confidence
        if probability < limits.min_probability:
            break
        walked.append(token)
        confidences.append(confidence)
        score += probability
        size = min(size + 1, limits.max_context)
    return Continuation(walked[len(text) :], confidences, matched, score)


def approximately(found: Continuation, expected: Continuation) -> bool:
    """The same tokens and match; numbers up to rounding."""
    return (
        (list(found.token_ids), found.matched) == (list(expected.token_ids), expected.matched)
        and list(found.confidences) == pytest.approx(expected.confidences)
        and found.score == pytest.approx(expected.score)
    )


def window_of(answers: Iterable[Sequence[int]]) -> AnswerWindow:
    window = AnswerWindow(MAX_CONTEXT)
    for answer in answers:
        window.add(answer)
    window.read(10**9)
    return window


@settings(max_examples=300)
@given(text=texts, portions=st.lists(st.integers(1, 12), max_size=6), max_tokens=st.integers(1, 9), limits=limits)
def test_a_growing_text_goes_on_as_a_scan_of_it(text: list[int], portions: list[int], max_tokens: int, limits: WalkLimits) -> None:
    growing = GrowingText(MAX_CONTEXT)
    for portion in [*portions, len(text)]:
        growing.extend(text[growing.num_tokens : growing.num_tokens + portion])
        so_far = text[: growing.num_tokens]
        expected = scan([so_far], so_far, max_tokens, limits, growing=True)
        assert approximately(growing.follow(max_tokens, limits), expected)


@settings(max_examples=300)
@given(answers=st.lists(texts, max_size=5), context=texts, max_tokens=st.integers(1, 9), limits=limits)
def test_answers_go_on_as_a_scan_of_them(answers: list[list[int]], context: list[int], max_tokens: int, limits: WalkLimits) -> None:
    found = window_of(answers).follow(context, len(context), max_tokens, limits)
    assert approximately(found, scan(answers, context, max_tokens, limits, growing=False))


@settings(max_examples=300)
@given(data=st.data(), limits=limits)
def test_what_has_left_leaves_no_trace(data: st.DataObject, limits: WalkLimits) -> None:
    window, kept = AnswerWindow(MAX_CONTEXT), list[list[int]]()
    for _ in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["add", "add", "read", "read some", "drop"])):
            case "add":
                kept.append(data.draw(texts))
                window.add(kept[-1])
            case "read":
                window.read(10**9)
            case "read some":
                window.read(data.draw(st.integers(0, 20)))
            case "drop" if kept:
                kept.pop(0)
                window.drop_oldest()
    window.read(10**9)
    fresh = window_of(kept)
    assert (len(window), window.num_nodes, window.num_unread) == (len(fresh), fresh.num_nodes, 0)
    for _ in range(4):
        context = data.draw(texts)
        assert window.follow(context, len(context), 9, limits) == fresh.follow(context, len(context), 9, limits)


@given(answers=st.lists(texts, max_size=4))
def test_nodes_are_at_most_twice_the_tokens(answers: list[list[int]]) -> None:
    window = window_of(answers)
    assert window.num_nodes <= 2 * len(window) + 1
    for _ in answers:
        window.drop_oldest()
    assert (len(window), window.num_nodes) == (0, 1)


def propose(drafter: SuffixDrafter, token_ids: Sequence[int], *, of: str = "s", max_depth: int = 8, partition: str = "") -> Draft:
    (draft,) = drafter.propose([DraftTask(of, token_ids, max_depth, partition=partition)])
    return draft


fresh_ids = count()


def learn(drafter: SuffixDrafter, answer: Sequence[int], *, partition: str = "", prompt: Sequence[int] = (900,)) -> None:
    """A whole request of which the drafter sees prompt and end."""
    sequence_id = f"learnt {next(fresh_ids)}"
    drafter.propose([DraftTask(sequence_id, [*prompt], 1, len(prompt), partition=partition)])
    drafter.forget(sequence_id, [*prompt, *answer])


ANSWER = (10, 11, 12, 13, 14, 15, 16)


def test_an_answer_is_said_again() -> None:
    drafter = SuffixDrafter()
    assert propose(drafter, [1, 10, 11]) == EMPTY_DRAFT
    learn(drafter, ANSWER)
    draft = propose(drafter, [1, 10, 11, 12])
    assert draft.tree.token_ids == (13, 14, 15, 16)
    assert list(draft.confidences) == sorted(draft.confidences), "longer contexts are surer"


def test_the_sequence_itself_is_preferred_where_it_knows_more() -> None:
    drafter = SuffixDrafter()
    learn(drafter, (10, 11, 12))
    assert propose(drafter, [10, 11, 12, 20, 10, 11, 12]).tree.token_ids[0] == 20
    assert propose(drafter, [10, 11, 77], of="other").tree.token_ids == ()
    assert propose(drafter, [9, 10, 11], of="third").tree.token_ids == (12,)


def test_what_was_said_more_often_is_proposed() -> None:
    drafter = SuffixDrafter()
    for answer in ((5, 6, 7), (5, 6, 8), (5, 6, 8), (5, 6, 7), (5, 6, 8)):
        learn(drafter, answer)
    draft = propose(drafter, [5, 6])
    assert draft.tree.token_ids[0] == 8
    assert draft.confidences[0] == pytest.approx(3 / (5 + 1 / 2))


def test_prompts_are_not_answers() -> None:
    drafter = SuffixDrafter()
    learn(drafter, (1, 2, 3), prompt=ANSWER)
    assert propose(drafter, ANSWER[:4]) == EMPTY_DRAFT
    assert propose(drafter, [7, 1, 2], of="other").tree.token_ids == (3,)


def test_an_unknown_sequence_teaches_nothing() -> None:
    drafter = SuffixDrafter()
    drafter.forget("never seen", ANSWER)
    assert drafter.num_answer_tokens == 0
    propose(drafter, [1, 2, 3, 1, 2])
    drafter.forget("s", [1, 2, 3, 1, 2])
    drafter.forget("s", [1, 2, 3, 1, 2])
    assert drafter.num_answer_tokens == 4 + 1, "all but the one prompt token, and the end"
    learn(drafter, ())
    assert drafter.num_answer_tokens == 4 + 1


@given(secret=st.lists(st.integers(100, 102), min_size=1, max_size=30), probe=st.lists(st.integers(100, 102), max_size=20))
def test_nothing_crosses_partitions(secret: list[int], probe: list[int]) -> None:
    taught, untaught = SuffixDrafter(), SuffixDrafter()
    learn(taught, secret, partition="theirs")
    for length in range(len(probe)):
        ours = propose(taught, probe[: length + 1], partition="ours")
        assert ours == propose(untaught, probe[: length + 1], partition="ours")
        assert set(ours.tree.token_ids) <= set(probe[: length + 1]), "a token that only they have said"


def test_sequences_share_only_answers() -> None:
    drafter = SuffixDrafter()
    propose(drafter, [900, *ANSWER], of="running")
    assert propose(drafter, ANSWER[:3], of="other") == EMPTY_DRAFT
    drafter.forget("running", [900, *ANSWER])
    assert propose(drafter, ANSWER[:3], of="other").tree.token_ids == ANSWER[3:]


@settings(max_examples=150)
@given(
    answers=st.lists(texts, max_size=4),
    text=st.lists(tokens, min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 40), max_size=6),
    max_depth=st.integers(1, 9),
)
def test_drafts_are_the_better_of_both_scans(answers: list[list[int]], text: list[int], cuts: list[int], max_depth: int) -> None:
    drafter = SuffixDrafter(max_match=MAX_CONTEXT)
    limits = WalkLimits(MAX_CONTEXT, 2.0, 0.1)
    for answer in answers:
        learn(drafter, answer)
    growing: list[int] = []
    for end in sorted({min(cut, len(text)) for cut in cuts} | {len(text)}):
        growing += text[len(growing) : end]
        draft = propose(drafter, growing, max_depth=max_depth)
        own = scan([growing], growing, max_depth, limits, growing=True)
        theirs = scan(answers, growing, max_depth, limits, growing=False)
        expected = own if own.score >= theirs.score - 1e-9 else theirs
        assert list(draft.confidences) == pytest.approx(expected.confidences)
        assert draft.tree.token_ids == tuple(expected.token_ids)
        assert draft.tree.is_chain and len(draft.tree) <= max_depth
        assert all(0 <= confidence <= 1 for confidence in draft.confidences)


@given(answers=st.lists(st.lists(tokens, min_size=1, max_size=20), max_size=10), probes=st.lists(texts.filter(len), max_size=4))
def test_eviction_is_as_if_the_oldest_had_never_been(answers: list[list[int]], probes: list[list[int]]) -> None:
    limit = 30
    small, fresh = SuffixDrafter(max_partition_tokens=limit), SuffixDrafter()
    for answer in answers:
        learn(small, answer)
    kept: list[list[int]] = []
    for answer in reversed(answers):
        if sum(len(each) + 1 for each in [*kept, answer]) > limit:
            break
        kept.append(answer)
    for answer in reversed(kept):
        learn(fresh, answer)
    assert small.num_answer_tokens == fresh.num_answer_tokens
    for probe in probes:
        assert propose(small, probe, of=str(probe)) == propose(fresh, probe, of=str(probe))
    assert small.num_answer_nodes == fresh.num_answer_nodes


def pseudo_random(length: int, vocabulary: int, seed: int) -> list[int]:
    state, stream = seed, []
    for _ in range(length):
        state = (state * 1103515245 + 12345) % 2**31
        stream.append((state >> 16) % vocabulary)
    return stream


def test_memory_stays_flat_under_a_long_stream() -> None:
    drafter = SuffixDrafter(max_partition_tokens=500, max_tokens=1200, max_partitions=5)
    for request in range(400):
        partition = f"tenant {request * request % 7}"
        learn(drafter, pseudo_random(1 + request * 37 % 90, 5 + request % 40, request), partition=partition)
        assert drafter.num_answer_tokens <= 1200
        assert drafter.num_answer_nodes <= 2 * 1200 + 5
        assert len(drafter._windows) <= 5
        assert all(len(window) <= 500 and len(window._children) <= 2 * 500 + 1 for window in drafter._windows.values())
        assert drafter.num_answer_tokens == sum(map(len, drafter._windows.values()))
    assert not drafter._sequences
    assert set(drafter._unread) <= set(drafter._windows)


def test_the_least_recently_used_partition_goes_first() -> None:
    drafter = SuffixDrafter(max_partitions=2)
    learn(drafter, ANSWER, partition="a")
    learn(drafter, ANSWER, partition="b")
    assert propose(drafter, ANSWER[:3], of="used", partition="a") != EMPTY_DRAFT
    learn(drafter, ANSWER, partition="c")
    known = {each: propose(drafter, ANSWER[:3], of=each, partition=each) != EMPTY_DRAFT for each in "abc"}
    assert known == {"a": True, "b": False, "c": True}


def test_a_running_sequence_hears_of_new_answers() -> None:
    drafter = SuffixDrafter()
    learn(drafter, (50, 51, 52))
    assert propose(drafter, ANSWER[:3]) == EMPTY_DRAFT
    learn(drafter, ANSWER)
    assert propose(drafter, ANSWER[:4]).tree.token_ids == ANSWER[4:]


def test_a_partition_that_has_gone_is_not_read_any_more() -> None:
    drafter = SuffixDrafter(max_partitions=1)
    for partition in "ab":
        propose(drafter, [900], of=partition, partition=partition)
    for partition in "ab":
        drafter.forget(partition, [900, *ANSWER])
    assert list(drafter._unread) == list(drafter._windows) == ["b"]
    propose(drafter, [900], of="next")
    assert not drafter._unread


def test_of_an_answer_too_long_the_end_is_kept() -> None:
    drafter = SuffixDrafter(max_partition_tokens=5)
    learn(drafter, ANSWER)
    assert drafter.num_answer_tokens == 5
    assert propose(drafter, ANSWER[:2]) == EMPTY_DRAFT
    assert propose(drafter, ANSWER[:4], of="other").tree.token_ids == ANSWER[4:6], "two tokens for the one matched"


def test_long_prompts_and_answers_are_read_in_portions() -> None:
    drafter = SuffixDrafter(portion_tokens=20)
    prompt = [*range(50), 3, 4]
    calls = [propose(drafter, prompt) for _ in range(4)]
    assert [bool(len(draft.tree)) for draft in calls] == [False, False, True, True]
    learn(drafter, [*range(100, 150)])
    calls = [propose(drafter, [1, 140, 141], of=str(call)) for call in range(4)]
    assert [bool(len(draft.tree)) for draft in calls] == [False, False, True, True]


def test_short_texts_get_no_draft() -> None:
    drafter = SuffixDrafter()
    assert drafter.propose([]) == []
    assert propose(drafter, [1]) == EMPTY_DRAFT
    assert propose(drafter, [1, 2]) == EMPTY_DRAFT
    assert propose(drafter, [1, 2, 1]).tree.token_ids == (2, 1)


def test_a_loop_is_proposed_as_a_loop() -> None:
    assert propose(SuffixDrafter(), [5, 9, 8, 9, 8, 9, 8], max_depth=7).tree.token_ids == (9, 8, 9, 8, 9, 8, 9)
    assert set(propose(SuffixDrafter(), [3] * 60, max_depth=12).tree.token_ids) == {3}
