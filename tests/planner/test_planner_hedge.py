"""Hedging: what is rented and returned in each situation, properties of every wish, and a day on a public trace."""

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.errors import ConfigError
from spotserve.planner.breaker import Breaker, BreakerState
from spotserve.planner.fleet_view import HedgeMemory, HedgePolicy, Held, Surplus, Wish, Zone
from spotserve.planner.hedge import hedge, num_spares

NOW = 10_000.0
ONE: tuple[tuple[int, float], ...] = ((1, 1.0),)
CALM = HedgePolicy(max_spares=0)


def zone(name: str, *, price: float = 1.3, dear: float = 3.9, rate: float = 0.3, **more: float) -> Zone:
    return Zone(name, price, dear, rate, ONE, **more)  # type: ignore[arg-type]


A, B, C = zone("a"), zone("b", price=1.4, dear=3.8), zone("c", price=1.2, rate=0.5)


def held(*told: str) -> list[Held]:
    """Instances told as `[2x]zone[!][-pending|-leaving|-idle|-late]`; `!`: on demand."""
    found: list[Held] = []
    for each in told:
        count, _, rest = each.rpartition("x")
        place, _, state = rest.partition("-")
        for _ in range(int(count or 1)):
            ready_s = None if state in ("pending", "late") else NOW - 4000
            asked_s = NOW - (50 if state == "pending" else 5000)
            serving = state in ("", "leaving")
            is_spot = not place.endswith("!")
            found.append(Held(f"i{len(found)}", place.rstrip("!"), is_spot, asked_s, ready_s, state == "leaving", serving))
    return found


def wish_for(
    wanted: int,
    fleet: Sequence[Held],
    zones: Sequence[Zone] = (A, B, C),
    policy: HedgePolicy = CALM,
    memory: HedgeMemory | None = None,
    now_s: float = NOW,
) -> Wish:
    return hedge(wanted, fleet, zones, HedgeMemory() if memory is None else memory, policy, exposed_s=150.0, now_s=now_s)


def launched(wish: Wish) -> dict[str, int]:
    """Counts by zone; `!`: on demand."""
    found: Counter[str] = Counter()
    for each in wish.launches:
        found[each.zone + ("" if each.is_spot else "!")] += each.count
    return dict(found)


def returned(wish: Wish) -> list[str]:
    return sorted(each.instance_id for each in wish.terminations)


def broken(name: str, state: BreakerState = BreakerState.OPEN) -> tuple[str, Breaker]:
    return name, Breaker(state, NOW + 500 if state is BreakerState.OPEN else NOW - 100, NOW - 1)


REFUSED = {"spot_refused_s": NOW - 10}


@pytest.mark.parametrize(
    ("title", "wanted", "fleet", "zones", "policy", "launches"),
    [
        ("all that is wanted is there", 3, held("a", "b", "c"), (A, B, C), CALM, {}),
        ("what is on its way counts", 3, held("a", "b", "c-pending"), (A, B, C), CALM, {}),
        ("a replacement is asked for at the notice", 3, held("a", "b", "c-leaving"), (A, B, C), CALM, {"c": 1}),
        ("spread first", 4, held("2xa"), (A, B, C), CALM, {"c": 1, "b": 1}),
        ("then where fewest are taken, then the price", 2, [], (A, B, C), CALM, {"a": 1, "b": 1}),
        ("then the cheapest", 1, [], (replace(A, spot_usd_per_hour=1.5), B), CALM, {"b": 1}),
        (
            "the floor is on demand where that is cheapest",
            3,
            [],
            (A, B),
            replace(CALM, on_demand_floor=1),
            {"b!": 1, "a": 1, "b": 1},
        ),
        ("the floor holds without demand", 0, [], (A, B), replace(CALM, on_demand_floor=2), {"b!": 2}),
        ("a zone that refused is left out", 2, [], (zone("a", **REFUSED), B), CALM, {"b": 2}),
        ("all refused: on demand", 2, [], (zone("a", **REFUSED), zone("b", dear=3.8, **REFUSED)), CALM, {"b!": 2}),
        ("stand-ins that are there are enough", 2, held("2xa!"), (zone("a", **REFUSED),), CALM, {}),
        ("spot is asked again while they stand in", 2, held("2xa!"), (zone("a", spot_refused_s=NOW - 300),), CALM, {"a": 2}),
        ("no stand-ins unless wanted", 2, [], (zone("a", **REFUSED),), replace(CALM, fall_back=False), {}),
        ("refused on demand as well", 2, [], (zone("a", on_demand_refused_s=NOW, **REFUSED),), CALM, {}),
        ("what did not come is asked for elsewhere", 1, held("a-late"), (A, zone("b", rate=2.0)), CALM, {"b": 1}),
        ("and on demand where there is nowhere else", 1, held("a-late"), (A,), CALM, {"a!": 1}),
        ("never more than the maximum", 9, held("3xa"), (A,), replace(CALM, max_instances=5), {"a": 2}),
        ("what is needed comes before spares", 5, held("4xa"), (A,), HedgePolicy(max_instances=6), {"a": 2}),
    ],
)
def test_launches(
    title: str, wanted: int, fleet: list[Held], zones: Sequence[Zone], policy: HedgePolicy, launches: dict[str, int]
) -> None:
    wish = wish_for(wanted, fleet, zones, policy)
    assert launched(wish) == launches, wish.reason
    assert returned(wish) == [each.instance_id for each in fleet if each.ready_s is None and each.asked_s < NOW - 1000]


def test_spares_follow_hazard_groups_and_exposure() -> None:
    policy = HedgePolicy(shortage_share=0.02, max_spares=6)
    calm, wild = (zone("a", rate=rate) for rate in (0.05, 3.0))
    groups = Zone("a", 1.3, 3.9, 0.05, ((4, 1.0),))
    counts = [num_spares(8, [each], policy, 150.0)[0] for each in (calm, wild, groups)]
    assert counts[0] == 0 and counts[1] >= 3 and counts[2] == 0
    assert num_spares(8, [replace(groups, instants_per_hour=0.3)], policy, 150.0)[0] == 4
    assert num_spares(8, [wild], policy, 0.0) == (0, 0.0)
    assert num_spares(0, [wild], policy, 150.0) == (0, 0.0)
    few, chance = num_spares(8, [wild], replace(policy, max_spares=1), 150.0)
    assert few == 1 and chance > 0.02
    exact, chance = num_spares(8, [wild], policy, 150.0)
    assert chance <= 0.02 < num_spares(8, [wild], replace(policy, max_spares=exact - 1), 150.0)[1]


def test_spares_are_asked_for_and_counted() -> None:
    wild = (zone("a", rate=2.0), zone("b", rate=2.0))
    wish = wish_for(4, held("2xa", "2xb"), wild, HedgePolicy())
    assert wish.num_spares > 0 and sum(launched(wish).values()) == wish.num_spares
    assert wish.num_spot == 4 + wish.num_spares and "spare" in wish.launches[0].reason


def test_no_zone_gives_spares_no_stand_ins() -> None:
    refusing = (zone("a", rate=2.0, **REFUSED),)
    wish = wish_for(4, held("4xa"), refusing, HedgePolicy())
    assert wish.num_spares > 0 and launched(wish) == {}


def test_spot_takes_over_again_and_stand_ins_go_when_it_has_served_for_a_while() -> None:
    fleet = [*held("2xa!"), Held("s0", "a", True, NOW - 10), Held("s1", "a", True, NOW - 10)]
    waiting = wish_for(2, fleet)
    assert not waiting.terminations and waiting.memory.on_demand_surplus is None
    fleet[2:] = [replace(each, ready_s=NOW + 100, is_serving=True) for each in fleet[2:]]
    ready = wish_for(2, fleet, memory=waiting.memory, now_s=NOW + 100)
    assert not ready.terminations and ready.memory.on_demand_surplus == Surplus(2, NOW + 100)
    assert ready.wake_s == NOW + 400
    back = wish_for(2, fleet, memory=ready.memory, now_s=NOW + 400)
    assert returned(back) == ["i0", "i1"] and "300 s" in back.terminations[0].reason


def test_scaling_down_waits_and_takes_what_nobody_uses_first() -> None:
    fleet = held("2xa", "c", "b-idle", "a-pending")
    first = wish_for(3, fleet)
    assert not first.terminations and first.memory.spot_surplus == Surplus(2, NOW)
    fleet = [replace(each, ready_s=each.ready_s or NOW + 50) for each in fleet]
    later = wish_for(3, fleet, memory=first.memory, now_s=NOW + 1200)
    assert returned(later) == ["i3", "i4"]
    again = wish_for(3, fleet, memory=wish_for(4, fleet, memory=first.memory, now_s=NOW + 600).memory, now_s=NOW + 1200)
    assert returned(again) == ["i4"]  # of two that are too many, one was so all the time: the younger of the idle ones
    needed = wish_for(5, fleet, memory=first.memory, now_s=NOW + 600)
    assert needed.memory.spot_surplus is None


def test_what_was_only_asked_for_is_not_called_off_and_costs_nobody_else_its_place() -> None:
    there = held("4xa")
    asked = Held("asked-1", "b", True, NOW - 50, is_only_asked=True)
    memory = HedgeMemory(spot_surplus=Surplus(2, NOW - 2000))
    first = wish_for(2, [*there, asked], memory=memory)
    assert len(returned(first)) == 1 and not first.launches
    left = [each for each in there if each.instance_id not in returned(first)]
    again = wish_for(2, [*left, asked], memory=first.memory)
    assert returned(again) == [] and not again.launches  # the other one of the two is the one to come
    came = replace(asked, is_only_asked=False)
    assert returned(wish_for(2, [*left, came], memory=again.memory)) == ["asked-1"]


def test_of_those_that_serve_the_riskiest_goes_and_no_other() -> None:
    fleet = held("a", "b", "c")
    memory = HedgeMemory(spot_surplus=Surplus(1, NOW - 5000))
    assert returned(wish_for(2, fleet, memory=memory)) == ["i2"]
    assert returned(wish_for(3, fleet, memory=memory)) == []


def test_a_breaker_opens_at_a_loss_above_the_limit_and_lets_one_through_later() -> None:
    wild = zone("a", rate=5.0, last_loss_s=NOW)
    opened = wish_for(2, [], (wild, B))
    assert launched(opened) == {"b": 2}
    assert dict(opened.memory.breakers)["a"].state is BreakerState.OPEN and opened.wake_s == NOW + 1800
    later = wish_for(5, held("b"), (wild, B), memory=opened.memory, now_s=NOW + 1800)
    assert launched(later) == {"a": 1, "b": 3}
    on_trial = [*held("b"), Held("t", "a", True, NOW + 1800, NOW + 1900)]
    still = wish_for(5, on_trial, (wild, B), memory=later.memory, now_s=NOW + 2000)
    assert launched(still) == {"b": 3}
    proven = wish_for(4, on_trial, (wild, B), memory=still.memory, now_s=NOW + 2500)
    assert dict(proven.memory.breakers)["a"].state is BreakerState.CLOSED and launched(proven) == {"a": 1, "b": 1}


def test_all_breakers_open_means_on_demand_or_the_first_to_close() -> None:
    memory = HedgeMemory((("a", Breaker(BreakerState.OPEN, NOW + 900, NOW)), broken("b")))
    assert launched(wish_for(2, [], (A, B), memory=memory)) == {"b!": 2}
    assert launched(wish_for(2, [], (A, B), replace(CALM, fall_back=False), memory)) == {"b": 2}


def test_policies_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="on_demand_floor=3"):
        HedgePolicy(on_demand_floor=3, max_instances=2)
    with pytest.raises(ConfigError, match="share"):
        HedgePolicy(shortage_share=0.0)


# ---------------------------------------------------------------------- every situation

states = ["", "-pending", "-leaving", "-idle", "-late"]
told = st.tuples(st.sampled_from("abc"), st.sampled_from(["", "", "!"]), st.sampled_from(states)).map("".join)
times = st.one_of(st.none(), st.floats(NOW - 700, NOW))
zones_of = st.lists(
    st.builds(Zone, st.just("?"), st.sampled_from([1.2, 1.3]), st.just(3.9), st.floats(0, 6), st.just(ONE), times, times, times),
    min_size=1,
    max_size=3,
).map(lambda found: [replace(each, name="abc"[index]) for index, each in enumerate(found)])
breakers_of = st.sampled_from(list(BreakerState)).flatmap(
    lambda state: st.sampled_from("abc").map(lambda name: broken(name, state))
)
memories = st.builds(
    HedgeMemory,
    st.lists(breakers_of, max_size=3, unique_by=lambda each: each[0]).map(tuple),
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(NOW - 600, NOW)), max_size=2).map(tuple),
    st.one_of(st.none(), st.builds(Surplus, st.integers(1, 3), st.floats(NOW - 3000, NOW))),
    st.one_of(st.none(), st.builds(Surplus, st.integers(1, 3), st.floats(NOW - 3000, NOW))),
)
policies = st.builds(
    lambda floor, most, fall_back, spares: HedgePolicy(floor, floor + most, fall_back, max_spares=spares),
    st.integers(0, 3),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 3),
)


def carried_out(fleet: Sequence[Held], wish: Wish) -> list[Held]:
    gone = {each.instance_id for each in wish.terminations}
    new = [(each.zone, each.is_spot) for each in wish.launches for _ in range(each.count)]
    return [
        *(each for each in fleet if each.instance_id not in gone),
        *(Held(f"n{index}", name, is_spot, NOW) for index, (name, is_spot) in enumerate(new)),
    ]


@settings(max_examples=150)
@given(st.integers(0, 12), st.lists(told, max_size=10).map(lambda all_told: held(*all_told)), zones_of, memories, policies)
def test_every_wish_keeps_the_bounds_and_is_final(
    wanted: int, fleet: list[Held], zones: list[Zone], memory: HedgeMemory, policy: HedgePolicy
) -> None:
    wish = wish_for(wanted, fleet, zones, policy, memory)
    after = carried_out(fleet, wish)
    again = wish_for(wanted, after, zones, policy, wish.memory)
    assert not again.launches and not again.terminations
    assert wish.wake_s is None or wish.wake_s > NOW

    staying = [each for each in after if not each.is_leaving]
    before = [each for each in fleet if not each.is_leaving]
    assert len(staying) <= max(policy.max_instances, len(before))
    on_demand = sum(not each.is_spot for each in staying)
    room = policy.max_instances - sum(each.ready_s is not None or each.asked_s > NOW - 300 for each in before)
    if room >= policy.on_demand_floor and not any(each.on_demand_refused_s for each in zones) and not memory.in_vain:
        lost = [each for each in before if not each.is_spot and each.ready_s is None and each.asked_s < NOW - 300]
        assert lost or on_demand >= policy.on_demand_floor

    states_now = {name: breaker.state for name, breaker in wish.memory.breakers}
    asked = {states_now[each.zone] for each in wish.launches if each.is_spot}
    assert BreakerState.OPEN not in asked or (BreakerState.CLOSED not in asked and not policy.fall_back)
    known = {each.instance_id: each for each in fleet}
    unused = [each for each in before if each.is_spot and each.ready_s is not None and not each.is_serving]
    returned_serving = [known[each] for each in returned(wish) if known[each].is_serving and known[each].is_spot]
    assert not returned_serving or all(each.instance_id in returned(wish) for each in unused)


@settings(max_examples=60)
@given(st.integers(0, 8), st.lists(told, max_size=8).map(lambda all_told: held(*all_told)), zones_of)
def test_the_order_of_what_is_held_does_not_matter(wanted: int, fleet: list[Held], zones: list[Zone]) -> None:
    wish, turned = wish_for(wanted, fleet, zones), wish_for(wanted, fleet[::-1], zones[::-1])
    assert launched(wish) == launched(turned) and returned(wish) == returned(turned)


# ---------------------------------------------------------------------- a public trace


def test_a_day_on_the_public_g4dn_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    benchmark, series = importlib.import_module("hedge"), importlib.import_module("spot_series")
    folder = series.data_folder()
    if folder is None:
        pytest.skip("no public traces: SPOTSERVE_DATA names no folder with traces/spot/bamboo")
    g4dn = next(each for each in series.public_series(folder) if each.name == "AWS G4dn")
    policy = HedgePolicy(max_instances=32)
    steps = {
        "hedge": benchmark.hedging(8, policy, 153.0),
        "spot only": benchmark.hedging(8, replace(policy, fall_back=False, max_spares=0, retry_s=30.0), 153.0),
        "on demand only": benchmark.hedging(8, replace(policy, on_demand_floor=8), 153.0),
    }
    found = {
        name: benchmark.run("g4dn", benchmark.Market([g4dn], start_up_s=183.0, grace_s=30.0), 8, name, step)
        for name, step in steps.items()
    }
    assert found["on demand only"].available == 1.0 and found["on demand only"].cost == pytest.approx(1.0, abs=0.01)
    assert found["hedge"].available > found["spot only"].available + 0.02
    assert found["hedge"].cost < 0.5 * found["on demand only"].cost
