"""What tokens are worth before a deadline."""

from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.deadline import HOPELESS, IN_TIME, URGENT, worths_before


def test_drafts_go_where_they_decide() -> None:
    worths = worths_before([10, 100, 101, 500, 899, 900, 901, 10**6], step_s=0.01, left_s=1.0, max_depth=8)
    assert worths == [IN_TIME, IN_TIME, URGENT, URGENT, URGENT, URGENT, HOPELESS, HOPELESS]
    assert URGENT > IN_TIME > HOPELESS > 0, "nobody is left out where there is room"


@given(
    remaining=st.lists(st.integers(0, 10**6), max_size=20),
    step_s=st.floats(1e-4, 1.0),
    left_s=st.floats(-10, 1000),
    max_depth=st.integers(1, 16),
)
def test_worths_are_by_whether_plain_or_best_pace_is_in_time(
    remaining: list[int], step_s: float, left_s: float, max_depth: int
) -> None:
    worths = worths_before(remaining, step_s=step_s, left_s=left_s, max_depth=max_depth)
    assert len(worths) == len(remaining)
    for tokens, worth in zip(remaining, worths, strict=True):
        if tokens * step_s <= left_s:
            assert worth == IN_TIME
        elif tokens * step_s <= left_s * (1 + max_depth):
            assert worth == URGENT
        else:
            assert worth == HOPELESS


def test_after_the_deadline_nothing_is_urgent() -> None:
    assert set(worths_before([1, 5, 50], step_s=0.01, left_s=-1.0, max_depth=8)) == {HOPELESS}
    assert worths_before([0], step_s=0.01, left_s=0.0, max_depth=8) == [IN_TIME]
