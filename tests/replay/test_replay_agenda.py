"""Simulated time: order, what is called off, and what is planned while something happens."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from spotserve.replay.agenda import Agenda


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_what_is_due_happens_by_time_and_then_in_the_order_of_planning(planned: list[tuple[int, bool]]) -> None:
    agenda, seen = Agenda(), list[int]()
    appointments = [agenda.at(float(at_s), lambda number=number: seen.append(number)) for number, (at_s, _) in enumerate(planned)]
    for appointment, (_, is_off) in zip(appointments, planned, strict=True):
        if is_off:
            appointment.call_off()
    kept = [number for number, (_, is_off) in enumerate(planned) if not is_off]
    assert agenda.next_s == min((planned[number][0] for number in kept), default=inf)
    agenda.run_until(3.0)
    assert seen == sorted((number for number in kept if planned[number][0] <= 3), key=lambda number: planned[number][0])
    assert agenda.now_s == 3.0
    agenda.run_until(9.0)
    assert sorted(seen) == kept and agenda.next_s == inf and agenda.now_s == 9.0


def test_what_an_event_plans_for_the_same_time_still_happens_and_the_past_is_now() -> None:
    agenda, seen = Agenda(), list[tuple[str, float]]()

    def first() -> None:
        agenda.at(1.0, lambda: seen.append(("late", agenda.now_s)))
        agenda.at(2.0, lambda: seen.append(("same", agenda.now_s)))

    agenda.at(2.0, first)
    agenda.step()
    assert seen == [("late", 2.0), ("same", 2.0)]


def test_an_event_may_call_off_a_later_one() -> None:
    agenda, seen = Agenda(), list[str]()
    later = agenda.at(2.0, lambda: seen.append("later"))
    agenda.at(1.0, later.call_off)
    agenda.run_until(5.0)
    later.call_off()
    assert seen == []
