"""Breakers: each loss is judged once, and a zone is proven good by living there."""

from math import inf

import pytest

from spotserve.planner.breaker import Breaker, BreakerRule, BreakerState, renew

RULE = BreakerRule(losses_per_hour=2.0, open_s=600.0, trial_s=300.0)
OPEN = Breaker(BreakerState.OPEN, until_s=700.0, judged_s=100.0)
HALF = Breaker(BreakerState.HALF_OPEN, until_s=700.0, judged_s=100.0)
CLOSED_AGAIN = Breaker(BreakerState.CLOSED, until_s=700.0, judged_s=100.0)


@pytest.mark.parametrize(
    ("before", "rate", "last_loss_s", "lived_since_s", "now_s", "after"),
    [
        (Breaker(), 9.0, None, None, 100.0, Breaker()),
        (Breaker(), 1.0, 100.0, None, 100.0, Breaker()),
        (Breaker(), 9.0, 100.0, None, 100.0, OPEN),
        (OPEN, 9.0, 650.0, 0.0, 699.0, OPEN),
        (OPEN, 9.0, 100.0, None, 700.0, HALF),
        (OPEN, 9.0, 650.0, None, 700.0, Breaker(BreakerState.HALF_OPEN, 700.0, 650.0)),
        (HALF, 9.0, 100.0, None, 5000.0, HALF),
        (HALF, 9.0, 100.0, 900.0, 1199.0, HALF),
        (HALF, 9.0, 100.0, 900.0, 1200.0, CLOSED_AGAIN),
        (HALF, 9.0, 100.0, 50.0, 999.0, HALF),  # what lived there before proves nothing
        (HALF, 9.0, 100.0, 50.0, 1000.0, CLOSED_AGAIN),
        (HALF, 0.1, 800.0, 0.0, 1000.0, Breaker(BreakerState.OPEN, 1600.0, 800.0)),
        (CLOSED_AGAIN, 9.0, 100.0, None, 1300.0, CLOSED_AGAIN),  # the rate falls slowly
        (CLOSED_AGAIN, 9.0, 1300.0, None, 1300.0, Breaker(BreakerState.OPEN, 1900.0, 1300.0)),
    ],
)
def test_transitions(
    before: Breaker, rate: float, last_loss_s: float | None, lived_since_s: float | None, now_s: float, after: Breaker
) -> None:
    arguments = {"losses_per_hour": rate, "last_loss_s": last_loss_s, "lived_since_s": lived_since_s, "now_s": now_s}
    found = renew(before, RULE, **arguments)  # type: ignore[arg-type]
    assert found == after
    assert renew(found, RULE, **arguments) == found  # type: ignore[arg-type]


def test_a_new_breaker_is_closed() -> None:
    assert Breaker() == Breaker(BreakerState.CLOSED, -inf, -inf)
