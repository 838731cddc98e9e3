"""Outlook: expectations against listing every set of victims, and changes that are made only when they pay."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from math import comb, exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner import victims as victims_module
from spotserve.planner.hazard import HazardBook
from spotserve.planner.outlook import Choice, Footprint, Option, Worth, weigh
from spotserve.planner.risk import Cell, Risk, Sizes, taken
from spotserve.planner.victims import Exposure, Victims

SIZES: Sizes = ((1, 0.65), (2, 0.25), (3, 0.04), (4, 0.04), (5, 0.02))
Replicas = list[tuple[tuple[str, ...], float]]


def cells_of(*counts: int, per_hour: float = 0.5, sizes: Sizes = SIZES) -> list[Cell]:
    """Cells a, b, .. of so many instances a0, a1, .., with so many instants per instance-hour."""
    return [Cell(name, names(name, count), per_hour * count, sizes) for name, count in zip("abcdef", counts, strict=False) if count]


def names(cell: str, count: int) -> tuple[str, ...]:
    return tuple(f"{cell}{index}" for index in range(count))


def served_naively(replicas: Replicas, cells: Sequence[Cell], seconds: float, demand: float, missing: float) -> float:
    """Sum over every set of victims of each cell."""
    choices = []
    for cell in cells:
        size = len(cell.instance_ids)
        shares = taken(cell.instants_per_hour * seconds / 3600, cell.sizes, size)
        sets = [(frozenset(some), k) for k in range(size + 1) for some in combinations(cell.instance_ids, k)]
        choices.append([(some, shares[k] / comb(size, k)) for some, k in sets])
    total = 0.0
    for chosen in product(*choices):
        lost = frozenset[str]().union(*(some for some, _ in chosen))
        capacity = sum(rate for ids, rate in replicas if lost.isdisjoint(ids)) - missing
        total += float(np.prod([share for _, share in chosen])) * min(demand, max(0.0, capacity))
    return total


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Cell], Replicas]:
    """Few instances in up to three cells, and replicas on some of them that may share machines."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda found: sum(found) <= 8))
    cells = cells_of(*counts, per_hour=draw(st.floats(0.0, 30.0)))
    ids = [each for cell in cells for each in cell.instance_ids] + ["on-demand"]
    members = st.lists(st.sampled_from(ids), min_size=1, max_size=4, unique=True).map(tuple)
    replicas = draw(st.lists(st.tuples(members, st.sampled_from([0.5, 1.0, 1.0, 2.5])), max_size=5))
    return cells, replicas


@settings(max_examples=60)
@given(fleets(), st.floats(0, 6), st.floats(0, 2))
def test_few_instances_are_exact(fleet: tuple[list[Cell], Replicas], demand: float, missing: float) -> None:
    cells, replicas = fleet
    found = Exposure(replicas, Victims(cells, 300.0)).served(demand, missing)
    assert found == pytest.approx(served_naively(replicas, cells, 300.0, demand, missing), abs=1e-9)


@settings(max_examples=40)
@given(fleets(), st.floats(0, 6))
def test_many_instances_are_exact_up_to_two_victims_and_sampled_beyond(fleet: tuple[list[Cell], Replicas], demand: float) -> None:
    cells, replicas = fleet
    exact = served_naively(replicas, cells, 300.0, demand, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(victims_module, "_ENUMERATED", -1)
        shared = Victims(cells, 300.0)
        few = shared.none + sum(
            shared.single[cell] * len(each.instance_ids) + shared.pair[cell, cell] * comb(len(each.instance_ids), 2)
            for cell, each in enumerate(cells)
        )
        few += sum(
            shared.pair[one, other] * len(cells[one].instance_ids) * len(cells[other].instance_ids)
            for one, other in combinations(range(len(cells)), 2)
        )
        many = float(shared.scenarios.weights.sum())
        assert few + many == pytest.approx(1.0)
        found = Exposure(replicas, shared).served(demand)
    spread = min(demand, sum(rate for _, rate in replicas))
    assert abs(found - exact) <= 0.15 * many * spread + 1e-9  # what is listed exactly adds no error


def test_sampled_victims_are_drawn_evenly() -> None:
    cells = cells_of(100, 37, per_hour=20.0)
    shared = Victims(cells, 300.0)
    masks = np.unpackbits(shared.scenarios.packed, axis=1, count=len(shared.scenarios.weights))
    for cell, each in enumerate(cells):
        mine = masks[shared.cell_of == cell]
        expected = taken(each.instants_per_hour / 12, SIZES, len(each.instance_ids)) @ np.arange(len(each.instance_ids) + 1)
        assert mine.sum(axis=0).mean() == pytest.approx(expected, rel=0.05)
        assert mine.mean(axis=1).std() < 0.04


def test_a_large_fleet_is_expected_to_lose_what_independent_hits_say() -> None:
    cells = cells_of(400, 400, per_hour=0.3, sizes=((1, 1.0),))
    replicas: Replicas = [((f"a{index}", f"b{index}"), 1.0) for index in range(400)]
    liveput = Exposure(replicas, Victims(cells, 600.0)).served(400.0)
    assert liveput == pytest.approx(400 * exp(-2 * 0.3 / 6), rel=0.005)


@settings(max_examples=30)
@given(fleets())
def test_hits_add_up_over_cells(fleet: tuple[list[Cell], Replicas]) -> None:
    cells, replicas = fleet
    expected = [sum(cell.hits_per_hour(len(set(ids) & set(cell.instance_ids))) for cell in cells) for ids, _ in replicas]
    assert list(Exposure(replicas, Victims(cells, 300.0)).hits_per_hour()) == pytest.approx(expected)


def test_certain_losses_do_not_upset_the_sums() -> None:
    doomed = [Cell(f"d{at}", (f"d{at}",), 1e6, ((1, 1.0),)) for at in range(12)]
    replicas: Replicas = [((f"d{at}",), 1.0) for at in range(12)] + [(("a0",), 1.0)]
    assert Exposure(replicas, Victims([*doomed, *cells_of(3, per_hour=1e-9)], 3600.0)).served(20.0) == pytest.approx(1.0, abs=1e-6)


def test_nothing_is_at_risk() -> None:
    assert Exposure([(("i",), 2.0)], Victims([], 60.0)).served(5.0, 0.5) == 1.5
    assert Exposure([], Victims(cells_of(3), 60.0)).served(5.0) == 0.0
    assert Exposure([], Victims(cells_of(30), 60.0)).served(5.0) == 0.0


# ---------------------------------------------------------------------- weighing


def option(name: str, replicas: Sequence[tuple[tuple[str, ...], float]], **changes: float) -> Option:
    fields = {"usd_per_hour": 10.0, "change_s": 0.0 if name == "now" else 30.0, "lost_rps": 0.0, "moved_bytes": 0} | changes
    return Option(name, tuple(Footprint(ids, rate) for ids, rate in replicas), **fields)  # type: ignore[arg-type]


def choose(options: Sequence[Option], cells: Sequence[Cell] = (), **changes: float) -> Choice:
    arguments = {"demand_rps": 10.0, "recover_s": 120.0, "request_usd": 0.05} | changes
    return weigh(options, stay="now", risk=Risk(tuple(cells)), **arguments)  # type: ignore[arg-type]


def worth(choice: Choice, name: str) -> Worth:
    return next(each for each in choice.worths if each.name == name)


def test_without_hazard_the_most_capacity_that_is_asked_for_wins() -> None:
    now = option("now", [(("i1",), 4.0)])
    two = option("two", [(("i1",), 4.0), (("i2",), 4.0)])
    three = option("three", [(("i1",), 4.0), (("i2",), 4.0), (("i3",), 4.0)], usd_per_hour=12.0)
    four = option("four", [(("i1",), 4.0), (("i2",), 4.0), (("i3",), 9.0)], usd_per_hour=14.0)
    chosen = choose([now, two, three, four])
    assert chosen.option is three
    assert [each.liveput_rps for each in chosen.worths] == [4.0, 8.0, 10.0, 10.0]
    assert worth(chosen, "three").served_rps == pytest.approx(4 + 6 * exp(-30 / 3600))


def test_at_equal_service_the_cheaper_and_then_the_lighter_wins() -> None:
    now = option("now", [(("i1",), 12.0)])
    dear, cheap = option("dear", [(("i2",), 12.0)], usd_per_hour=9.0), option("cheap", [(("i3",), 12.0)], usd_per_hour=8.0)
    assert choose([now, dear, cheap]).option is cheap
    light = replace(cheap, name="light")
    assert choose([now, replace(cheap, moved_bytes=5), light]).option is light


def test_spread_over_cells_loses_less_at_once() -> None:
    both_at_once: Sizes = ((2, 1.0),)
    cells = cells_of(2, 2, sizes=both_at_once)
    together = option("together", [(("a0", "a1"), 5.0), (("b0", "b1"), 5.0)])
    apart = option("apart", [(("a0", "b0"), 5.0), (("a1", "b1"), 5.0)])
    chosen = choose([option("now", []), together, apart], cells)
    assert worth(chosen, "together").liveput_rps > worth(chosen, "apart").liveput_rps  # a replica on two cells is hit by both
    one = option("one", [(("a0",), 5.0), (("a1",), 5.0)])
    two = option("two", [(("a0",), 5.0), (("b0",), 5.0)])
    covered = choose([option("now", []), one, two], cells, demand_rps=5.0)
    assert worth(covered, "two").liveput_rps > worth(covered, "one").liveput_rps
    assert covered.option is two


def test_dearer_capacity_that_cannot_be_taken_pays_where_hazard_is_high() -> None:
    now = option("now", [(("a0",), 10.0)])
    safe = option("safe", [(("on-demand",), 10.0)], usd_per_hour=14.0)
    assert choose([now, safe], cells_of(1, per_hour=0.1), recover_s=120.0).option is now
    assert choose([now, safe], cells_of(1, per_hour=6.0), recover_s=120.0).option is safe


def test_a_soft_signal_makes_leaving_its_instance_pay() -> None:
    book = HazardBook()
    for each in ("a0", "a1", "a2"):
        book.note_joined(each, "t", "a", 0.0)
    now, away = option("now", [(("a0",), 10.0)]), option("away", [(("a1",), 10.0)])
    assert choose([now, away], book.risk(60.0).cells).option is now
    book.note_soft("a0", 60.0)
    assert choose([now, away], book.risk(60.0).cells).option is away
    assert choose([now, away], book.risk(960.0).cells).option is now


def test_a_change_must_pay_while_what_it_makes_lives() -> None:
    now = option("now", [(("i1",), 8.0)])
    more = option("more", [(("i1",), 8.0), (("a0",), 2.0)], change_s=600.0, lost_rps=1.0)
    assert choose([now, more], cells_of(1, per_hour=0.2)).option is more
    assert choose([now, more], cells_of(1, per_hour=20.0)).option is now
    assert worth(choose([now, more], cells_of(1, per_hour=20.0, sizes=((1, 1.0),))), "more").life_s == pytest.approx(180)


def test_whoever_serves_nothing_takes_what_there_is() -> None:
    now, any_at_all = option("now", []), option("any", [(("a0",), 10.0)], change_s=600.0)
    assert choose([now, any_at_all], cells_of(1, per_hour=12.0)).option is any_at_all


@settings(max_examples=60)
@given(fleets(), st.floats(0, 900), st.floats(0, 900), st.floats(0, 3), st.floats(0, 3))
def test_a_dearer_change_is_never_more_attractive(
    fleet: tuple[list[Cell], Replicas], change_s: float, more_s: float, lost_rps: float, more_rps: float
) -> None:
    cells, replicas = fleet
    now = option("now", replicas[:2])
    easy = option("easy", replicas[1:], change_s=change_s, lost_rps=lost_rps)
    hard = replace(easy, name="hard", change_s=change_s + more_s, lost_rps=lost_rps + more_rps)
    chosen = choose([now, easy, hard], cells, demand_rps=4.0)
    assert worth(chosen, "hard").worth_rps <= worth(chosen, "easy").worth_rps + 1e-9
    if choose([now, hard], cells, demand_rps=4.0).option is hard:
        assert choose([now, easy], cells, demand_rps=4.0).option is easy


@settings(max_examples=30)
@given(fleets(), st.floats(0, 6))
def test_the_order_of_options_does_not_matter_and_chosen_ones_are_kept(fleet: tuple[list[Cell], Replicas], demand: float) -> None:
    cells, replicas = fleet
    options = [option("now", replicas[:1]), option("b", replicas[:3]), option("c", replicas[2:], usd_per_hour=7.0)]
    chosen = choose(options, cells, demand_rps=demand)
    assert choose(options[::-1], cells, demand_rps=demand).option == chosen.option
    if chosen.option.name != "now":
        there = replace(chosen.option, name="now", change_s=0.0)
        back = replace(options[0], name="back", change_s=chosen.option.change_s)
        assert choose([there, back], cells, demand_rps=demand).option.name == "now"


def changes_in_an_hour(margin: float) -> int:
    """A machine that adds little joins and leaves every other minute, while demand sways: how often what runs is changed."""
    book = HazardBook()
    book.note_joined("a0", "t", "a", 0.0)
    book.note_joined("a1", "t", "a", 0.0)
    shapes = {"narrow": [(("a0",), 5.0), (("a1",), 5.0)], "wide": [(("a0",), 5.0), (("a1",), 5.0), (("a2",), 0.15)]}
    running, changes = "narrow", 0
    for minute in range(60):
        if minute % 2:
            book.note_joined("a2", "t", "a", 60.0 * minute)
        else:
            book.note_left("a2", 60.0 * minute)
        possible = [name for name in shapes if minute % 2 or name == "narrow"]
        running = running if running in possible else "narrow"
        options = [option("now", shapes[running]), *(option(name, shapes[name]) for name in possible if name != running)]
        demand = 10.2 + 0.1 * (minute % 3)
        chosen = choose(options, book.risk(60.0 * minute).cells, demand_rps=demand, margin=margin).option.name
        running, changes = (running, changes) if chosen == "now" else (chosen, changes + 1)
    return changes


def test_what_comes_and_goes_does_not_make_plans_flap() -> None:
    assert changes_in_an_hour(margin=0.0) >= 20
    assert changes_in_an_hour(margin=0.02) == 0


def test_the_reason_names_the_numbers() -> None:
    now = option("now", [(("i1",), 4.0)])
    more = option("more", [(("i1",), 4.0), (("i2",), 4.0)], usd_per_hour=12.5, lost_rps=1.0)
    taken_up = choose([now, more]).reason
    for told in (
        "change to more",
        "7.96 of 10 requests/s",
        "60 min",
        "30 s of change at 3",
        "12.5 USD/h",
        "now serves 4 for 10 USD/h",
    ):
        assert told in taken_up
    refused = choose([now, replace(more, change_s=1e6)]).reason
    assert "stay with now" in refused and "a gain of -1" in refused and "margin of 0.02" in refused
    assert choose([now]).reason == "stay with now: there is nothing else"
