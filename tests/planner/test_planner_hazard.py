"""Hazards: what events teach, what is told twice, what is taken back, and that estimates find the truth."""

from math import inf

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner.cell_book import HazardPrior
from spotserve.planner.hazard import HazardBook
from spotserve.planner.risk import mean_size

PRIOR = HazardPrior()
T, Z = "g4dn.12xlarge", "us-east-1a"
HOUR = 3600.0


def book_of(count: int, prior: HazardPrior = PRIOR) -> HazardBook:
    book = HazardBook(prior)
    for index in range(count):
        book.note_joined(f"i{index}", T, Z, 0.0)
    return book


def test_before_anything_is_seen_the_prior_holds() -> None:
    prior_per_hour = PRIOR.instants_per_hour * mean_size(PRIOR.sizes, 9)
    assert HazardBook().rate_per_hour(T, Z, 0.0) == pytest.approx(prior_per_hour)
    assert prior_per_hour == pytest.approx(0.49, abs=0.01)
    assert book_of(8).rate_per_hour(T, Z, 0.0) == pytest.approx(prior_per_hour)
    assert HazardBook().group_sizes(T, Z, 0.0) == PRIOR.sizes


def test_hours_without_a_loss_lower_the_rate_and_losses_raise_it_there_alone() -> None:
    book = book_of(10)
    book.note_joined("other", T, "us-east-1b", 0.0)
    calm = book.rate_per_hour(T, Z, 2 * HOUR)
    assert calm < 0.2 * book.rate_per_hour(T, Z, 0.0)
    elsewhere = book.rate_per_hour(T, "us-east-1b", 2 * HOUR)
    book.note_loss("i0", 2 * HOUR)
    assert book.rate_per_hour(T, Z, 2 * HOUR) > 2 * calm
    assert book.rate_per_hour(T, "us-east-1b", 2 * HOUR) == elsewhere


def test_a_loss_stirs_its_zone_for_minutes() -> None:
    book = book_of(10)
    book.note_loss("i0", HOUR)
    rates = [book.rate_per_hour(T, Z, HOUR + after) for after in (0, 60, 300, 1800)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] - rates[3] > 3 * (rates[2] - rates[3]) > 0
    assert rates[3] < book.rate_per_hour(T, Z, HOUR, over_s=600.0) < rates[0]


def test_losses_close_together_are_one_instant() -> None:
    book = book_of(10)
    for index, at_s in enumerate((100.0, 130.0, 159.0, 160.0)):
        book.note_loss(f"i{index}", at_s)
    shares = dict(book.group_sizes(T, Z, 160.0))
    weight = PRIOR.sizes_weight
    assert shares[3] == pytest.approx((0.04 * weight + 1) / (weight + 2), rel=1e-3)
    assert shares[1] == pytest.approx((0.65 * weight + 1) / (weight + 2), rel=1e-3)


def test_a_notice_and_its_loss_are_one_event_and_duplicates_collapse() -> None:
    once, often = book_of(5), book_of(5)
    once.note_notice("i1", 100.0)
    for at_s in (100.0, 101.0):
        often.note_joined("i1", T, Z, at_s)
        often.note_notice("i1", at_s)
    assert once.instance_rate_per_hour("i1", 110.0) == inf
    for at_s in (220.0, 221.0):
        often.note_loss("i1", at_s)
        often.note_notice("i1", at_s)
        often.note_soft("i1", at_s)
        often.note_left("i1", at_s)
    once.note_loss("i1", 220.0)
    assert often.summary(400.0) == once.summary(400.0)
    assert often.risk(400.0) == once.risk(400.0)
    assert once.instance_rate_per_hour("i1", 400.0) == 0.0


def test_a_notice_that_does_not_come_true_is_taken_back() -> None:
    book, calm = book_of(5), book_of(5)
    book.note_notice("i1", 100.0)
    assert "i1" not in book.risk(101.0).rates_per_hour
    raised = book.rate_per_hour(T, Z, 101.0)
    book.note_spared("i1", 131.0)
    book.note_spared("i1", 131.0)
    assert raised > 1.5 * book.rate_per_hour(T, Z, 131.0)
    assert book.rate_per_hour(T, Z, 131.0) == pytest.approx(calm.rate_per_hour(T, Z, 131.0), rel=0.01)
    assert book.group_sizes(T, Z, 131.0) == calm.group_sizes(T, Z, 131.0)
    assert sorted(book.risk(131.0).rates_per_hour) == [f"i{index}" for index in range(5)]


def test_of_a_group_only_those_that_stay_are_taken_back() -> None:
    book, two = book_of(5), book_of(5)
    for each in ("i1", "i2", "i3"):
        book.note_notice(each, 100.0)
    book.note_spared("i2", 110.0)
    two.note_notice("i1", 100.0)
    two.note_notice("i3", 100.0)
    assert book.group_sizes(T, Z, 1000.0) == two.group_sizes(T, Z, 1000.0)


def test_what_is_returned_is_not_lost() -> None:
    book = book_of(5)
    before = book.rate_per_hour(T, Z, 0.0)
    book.note_left("i1", 0.0)
    assert book.rate_per_hour(T, Z, 0.0) <= before
    assert book.last_instant_s(T, Z) is None
    assert len(book.risk(0.0).rates_per_hour) == 4


def test_a_soft_signal_raises_the_risk_of_its_instance_for_a_while() -> None:
    book = book_of(4)
    book.note_soft("i2", 100.0)
    rates = book.risk(101.0).rates_per_hour
    assert rates["i2"] > 2 * rates["i1"]
    assert rates["i2"] == pytest.approx(book.instance_rate_per_hour("i2", 101.0))
    assert rates["i1"] == pytest.approx(book.instance_rate_per_hour("i1", 101.0), rel=0.2)
    lapsed = book.risk(100.0 + PRIOR.signal_s)
    assert len(lapsed.cells) == 1 and len(lapsed.cells[0].instance_ids) == 4


def test_signals_that_prove_wrong_are_believed_less() -> None:
    wrong, right = book_of(9), book_of(9)
    for index in range(5):
        for book in (wrong, right):
            book.note_soft(f"i{index}", 2000.0 * index)
        right.note_loss(f"i{index}", 2000.0 * index + 60)
        right.note_joined(f"j{index}", T, Z, 2000.0 * index + 90)
    for book in (wrong, right):
        book.note_soft("i7", 12_000.0)
    excess = [book.instance_rate_per_hour("i7", 12_000.0) - book.rate_per_hour(T, Z, 12_000.0) for book in (wrong, right)]
    assert 4 * excess[0] < excess[1]


@pytest.mark.parametrize(("per_hour", "group"), [(0.1, 1), (0.6, 3), (3.0, 1)])
def test_the_estimate_finds_the_truth_and_forgets_it(per_hour: float, group: int) -> None:
    random = np.random.default_rng(7)
    book, now_s, number, found = book_of(20), 0.0, 20, []
    alive = [f"i{index}" for index in range(20)]
    while now_s < 60 * HOUR:
        now_s += random.exponential(HOUR / (per_hour / group * 20))
        found += [book.rate_per_hour(T, Z, now_s, over_s=HOUR)] if now_s > 20 * HOUR else []
        for _ in range(group):
            book.note_loss(alive.pop(0), now_s)
            alive.append(f"i{number}")
            book.note_joined(alive[-1], T, Z, now_s)
            number += 1
    assert np.median(found) == pytest.approx(per_hour, rel=0.2)
    assert max(book.group_sizes(T, Z, now_s), key=lambda each: each[1])[0] == group
    for each in alive:
        book.note_left(each, now_s)
    prior_per_hour = PRIOR.instants_per_hour * mean_size(PRIOR.sizes, 9)
    assert book.rate_per_hour(T, Z, now_s + 50 * PRIOR.memory_s) == pytest.approx(prior_per_hour, rel=1e-3)


def test_zones_where_losses_follow_each_other_are_learned_to_be_so() -> None:
    random = np.random.default_rng(3)
    paired, even = book_of(10), book_of(10)
    for hour in range(1, 40):
        at_s = HOUR * hour
        for book, times in ((paired, (at_s, at_s + 90)), (even, (at_s, at_s + 1200 + 600 * random.random()))):
            for second in times:
                book.note_loss(f"x{second}", second)  # unknown: harmless
                book.note_joined(f"x{second}", T, Z, second)
                book.note_loss(f"x{second}", second)
    rows = [book.summary(40 * HOUR)[0]["stirred_instants_per_instance_hour"] for book in (paired, even)]
    assert rows[0] > 4 * rows[1]  # type: ignore[operator]


events = st.lists(
    st.tuples(
        st.sampled_from(["joined", "left", "notice", "spared", "loss", "soft"]),
        st.sampled_from(["a", "b", "c", "d"]),
        st.floats(0, 400),
    ),
    max_size=40,
)


@settings(max_examples=80)
@given(events)
def test_any_history_keeps_the_book_sound(history: list[tuple[str, str, float]]) -> None:
    book, twice, now_s = HazardBook(), HazardBook(), 0.0
    for event, instance_id, wait_s in history:
        now_s += wait_s
        for each, times in ((book, 1), (twice, 2)):
            for _ in range(times):
                if event == "joined":
                    each.note_joined(instance_id, T, Z + instance_id[:1], now_s)
                else:
                    getattr(each, f"note_{event}")(instance_id, now_s)
    assert twice.summary(now_s) == book.summary(now_s)
    risk = book.risk(now_s, over_s=60.0)
    assert risk == twice.risk(now_s, over_s=60.0)
    assert all(0 < rate < 500 for rate in risk.rates_per_hour.values())
    for row in book.summary(now_s):
        assert all(value >= 0 for value in row.values() if isinstance(value, float))
    assert msgspec.json.decode(msgspec.json.encode(book.summary(now_s))) is not None
    assert book.risk(now_s + 1) == book.risk(now_s + 1)
