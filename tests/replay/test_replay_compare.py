"""What counts as equal, as a tie flip, as altered, as lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.ties import near_tie_gap
from spotserve.replay.compare import Comparison, Verdict, compare_runs, first_difference
from spotserve.replay.record import RequestRecord
from spotserve.replay.timeline import Arrive


def record(
    tokens: tuple[int, ...], gaps: tuple[float, ...] = (), *, index: int = 0, finish: str | None = "length"
) -> RequestRecord:
    return RequestRecord(
        arrival=Arrive(0.0, index, 1, max(1, len(tokens)), 0.0, 1),
        scheduled_s=0.0,
        sent_s=0.0,
        ended_s=1.0,
        token_ids=tokens,
        gaps=gaps,
        event_times_s=(0.5,) * len(tokens),
        event_tokens=(1,) * len(tokens),
        finish_reason=finish,
        error=None if finish else "gone",
    )


def compare(run: RequestRecord, reference: RequestRecord | None, dtype: str = "float32") -> Comparison:
    (found,) = compare_runs([run], [reference] if reference else [], dtype=dtype)
    return found


def test_equal() -> None:
    assert compare(record((1, 2, 3)), record((1, 2, 3))) == Comparison(0, Verdict.EQUAL)


@pytest.mark.parametrize(
    ("gaps", "reference_gaps", "verdict"),
    [
        ((1.0, 1e-6, 1.0), (1.0, 1.0, 1.0), Verdict.TIE_FLIP),
        ((1.0, 1.0, 1.0), (1.0, 1e-6, 1.0), Verdict.TIE_FLIP),
        ((1e-6, 1.0, 1e-6), (1e-6, 1.0, 1e-6), Verdict.ALTERED),
        ((), (), Verdict.ALTERED),
    ],
)
def test_the_gap_at_the_first_difference_decides(gaps, reference_gaps, verdict: Verdict) -> None:
    found = compare(record((1, 2, 3), gaps), record((1, 9, 8), reference_gaps))
    assert found.verdict is verdict and found.position == 1
    assert found.tokens_altered == (2 if verdict is Verdict.ALTERED else 0)


def test_the_edge_of_a_tie_belongs_to_it_and_depends_on_the_dtype() -> None:
    edge = near_tie_gap("float32")
    assert compare(record((1,), (edge,)), record((2,), (edge,))).verdict is Verdict.TIE_FLIP
    assert compare(record((1,), (edge * 1.01,)), record((2,), (1.0,))).verdict is Verdict.ALTERED
    assert compare(record((1,), (edge,)), record((2,), (edge,)), "float64").verdict is Verdict.ALTERED


def test_a_shorter_answer_is_altered_where_it_ends() -> None:
    found = compare(record((1, 2)), record((1, 2, 3, 4)))
    assert (found.verdict, found.position, found.tokens_altered) == (Verdict.ALTERED, 2, 2)


def test_a_lost_answer_is_judged_by_what_came() -> None:
    assert compare(record((1, 2), finish=None), record((1, 2, 3))) == Comparison(0, Verdict.LOST)
    wrong = compare(record((1, 9), finish=None), record((1, 2, 3)))
    assert (wrong.verdict, wrong.position, wrong.tokens_altered) == (Verdict.LOST, 1, 1)


def test_nothing_to_compare_with() -> None:
    assert compare(record((1,)), None).verdict is Verdict.UNKNOWN
    assert compare(record((1,)), record((1,), finish=None)).verdict is Verdict.UNKNOWN
    assert compare(record((1,), finish=None), None).verdict is Verdict.LOST


def test_requests_are_matched_by_index_not_by_place() -> None:
    run = [record((1,), index=0), record((2,), index=1)]
    found = compare_runs(run, list(reversed([record((1,), index=0), record((2,), index=1)])), dtype="float32")
    assert [comparison.verdict for comparison in found] == [Verdict.EQUAL] * 2


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_first_difference_against_its_definition(one: list[int], other: list[int]) -> None:
    found = first_difference(one, other)
    if found is None:
        assert one == other
    else:
        assert one[:found] == other[:found] and one[found : found + 1] != other[found : found + 1]
