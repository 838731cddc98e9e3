"""Pauses between attempts: none at first, then doubling, each cause for itself."""

from spotserve.controller.retries import FIRST_PAUSE_S, FORGET_AFTER_S, LONGEST_PAUSE_S, Retries


def test_pauses_double_up_to_the_longest() -> None:
    retries = Retries()
    pauses = [retries.failed("cause", 0.0) for _ in range(12)]
    assert pauses[:4] == [0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert retries.failed("another", 0.0) == 0.0


def test_it_is_time_once() -> None:
    retries = Retries()
    retries.failed("cause", 10.0)
    assert retries.due_s is None and not retries.take_due(1e9)
    retries.failed("cause", 10.0)
    assert not retries.take_due(10.0 + FIRST_PAUSE_S - 0.01)
    assert retries.take_due(10.0 + FIRST_PAUSE_S)
    assert not retries.take_due(1e9)


def test_what_has_not_failed_for_long_begins_anew() -> None:
    retries = Retries()
    retries.failed("cause", 0.0)
    assert retries.failed("cause", FORGET_AFTER_S + 1.0) == 0.0
