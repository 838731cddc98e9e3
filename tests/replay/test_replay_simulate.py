"""The whole simulation on small fleets: nothing is lost that can be kept, whatever is taken, and the same comes out each time."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model
from spotserve.planner.workload import Lengths, Workload
from spotserve.replay.measures import measure
from spotserve.replay.ours import play_production
from spotserve.replay.outcome import Replayed
from spotserve.replay.policies import POLICIES
from spotserve.replay.scenario import Delays, Prices, Scenario, show_nothing
from spotserve.replay.summary import Objectives
from spotserve.replay.timeline import Action, Arrive, GiveNotice, Launch, Take, Timeline

MODEL, MACHINE = named_model("llama-3-8b"), instance_type("g5.12xlarge")
PRICES = Prices(spot_usd_per_hour=2.0, on_demand_usd_per_hour=5.0)


def scenario(
    fleet: list[Action], *, count: int = 60, gap_s: float = 1.0, output: int = 400, initial: int = 3, **given: object
) -> Scenario:
    """Requests at equal distances; machines `m0`, `m1`, .. are there at the start."""
    arrivals: list[Action] = [Arrive(0.1 + index * gap_s, index, 200, output, 0.0, index) for index in range(count)]
    actions = sorted([*fleet, *arrivals], key=lambda action: action.at_s)
    timeline = Timeline({f"m{index}": "" for index in range(initial)}, tuple(actions), count * gap_s + 30.0)
    workload = Workload(1 / gap_s, Lengths.fixed(200), Lengths.fixed(output))
    return Scenario(timeline=timeline, model=MODEL, machine=MACHINE, prices=PRICES, workload=workload, max_batch=32, **given)  # type: ignore[arg-type]


def play(given: Scenario, policy: str = "spotserve") -> Replayed:
    return POLICIES[policy].play(given, show_nothing)


def check(replayed: Replayed, count: int) -> None:
    """What holds of every replay."""
    assert sorted(each.index for each in replayed.outcomes) == list(range(count))
    for each in replayed.outcomes:
        assert each.tokens <= each.output_tokens
        assert each.is_whole is (each.tokens == each.output_tokens)
        if each.first_token_s is not None:
            assert each.arrival_s <= each.first_token_s <= each.end_s + 1e-9
        assert each.longest_gap_s <= each.end_s - each.arrival_s + 1e-9
    times_s = [event.time_s for event in replayed.fleet_events]
    assert times_s == sorted(times_s)


def test_losses_with_notice_lose_and_recompute_nothing() -> None:
    given = scenario([GiveNotice(20.0, "m0", 50.0), Take(50.0, "m0", noticed=True)])
    replayed = play(given)
    check(replayed, 60)
    assert all(each.is_whole for each in replayed.outcomes)
    assert sum(each.resumed + each.restarted for each in replayed.outcomes) == 0
    kinds = [event.kind for event in replayed.fleet_events]
    assert kinds.index("notice") < kinds.index("lost")


def test_losses_without_notice_go_on_from_their_tokens() -> None:
    """Until its silence is noticed, what it had stands still; then it is computed again, and no token comes twice."""
    replayed = play(scenario([Take(20.0, "m0", noticed=False), Take(20.0, "m1", noticed=False)], gap_s=0.2, output=900))
    check(replayed, 60)
    assert all(each.is_whole for each in replayed.outcomes)
    resumed = [each for each in replayed.outcomes if each.resumed]
    assert resumed and all(each.recomputed_tokens >= each.prompt_tokens for each in resumed)
    assert max(each.longest_gap_s for each in resumed) >= 0.5
    heard = play(
        scenario(
            [Take(20.0, "m0", noticed=False), Take(20.0, "m1", noticed=False)],
            gap_s=0.2,
            output=900,
            delays=Delays(loss_heard_s=0.0),
        )
    )
    assert max(e.longest_gap_s for e in heard.outcomes if e.resumed) < max(e.longest_gap_s for e in resumed)


def test_a_fleet_that_goes_and_comes_back_answers_everything() -> None:
    fleet: list[Action] = [Take(10.0, f"m{index}", noticed=False) for index in range(3)] + [Launch(30.0, "n0", "")]
    replayed = play(scenario(fleet, delays=Delays(start_up_s=20.0)))
    check(replayed, 60)
    assert all(each.is_whole for each in replayed.outcomes)
    assert max(each.ttft_s or 0.0 for each in replayed.outcomes) > 30.0
    assert measure(replayed, Objectives())["available_share"] < 0.9  # type: ignore[operator]


def test_a_fleet_that_goes_for_ever_loses_what_it_had() -> None:
    replayed = play(scenario([Take(10.0, f"m{index}", noticed=False) for index in range(3)]))
    check(replayed, 60)
    lost = [each for each in replayed.outcomes if not each.is_whole]
    assert lost and all(each.end_s == replayed.ended_s for each in lost)


def test_what_is_paid_for_is_what_was_there() -> None:
    replayed = play(scenario([Take(36.0, "m0", noticed=False), Launch(54.0, "n0", "")], count=60))
    hours = sum(lease.hours for lease in replayed.leases)
    assert hours * 3600 == pytest.approx(36 + 90 + 90 + 36)
    assert sum(lease.usd for lease in replayed.leases) == pytest.approx(hours * 2.0)


def test_who_rents_pays_for_fewer_machines_and_serves_all() -> None:
    everything = play(scenario([], initial=8, count=120, gap_s=4.0))
    rented = play(scenario([], initial=8, count=120, gap_s=4.0, rents=True, falls_back=False))
    check(rented, 120)
    assert all(each.is_whole for each in rented.outcomes)
    assert sum(lease.hours for lease in rented.leases) < sum(lease.hours for lease in everything.leases) / 1.5


def test_prompts_in_smaller_steps_keep_others_waiting_for_less_and_take_longer() -> None:
    whole, cut = play(scenario([], initial=1)), play(scenario([], initial=1, step_tokens=20))
    check(cut, 60)
    longest_s = [max(each.longest_gap_s for each in replayed.outcomes) for replayed in (whole, cut)]
    assert longest_s[1] < 0.9 * longest_s[0]
    ttft_s = [sum(each.ttft_s or 0.0 for each in replayed.outcomes) for replayed in (whole, cut)]
    assert ttft_s[1] > ttft_s[0]


def test_on_demand_machines_are_never_lost_and_cost_more_an_hour() -> None:
    replayed = play(scenario([Take(10.0, "m0", noticed=False)]), "on-demand")
    check(replayed, 60)
    assert not any(lease.spot for lease in replayed.leases)
    assert not any(event.kind == "lost" for event in replayed.fleet_events)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_answers_everything_and_always_the_same(policy: str) -> None:
    fleet: list[Action] = [GiveNotice(10.0, "m1", 40.0), Launch(25.0, "n0", "a"), Take(40.0, "m1", noticed=True)]
    given = scenario(fleet, delays=Delays(start_up_s=15.0))
    first, again = play(given, policy), play(given, policy)
    check(first, 60)
    assert all(each.is_whole for each in first.outcomes)
    assert list(first.outcomes) == list(again.outcomes)
    assert repr(first.fleet_events) == repr(again.fleet_events)


def test_an_oracle_is_never_surprised() -> None:
    fleet: list[Action] = [Take(20.0, "m0", noticed=False), Take(25.0, "m1", noticed=False)]
    given = scenario(fleet, gap_s=0.2, output=900)
    known, sudden = (measure(play(given, name), Objectives()) for name in ("oracle", "spotserve"))
    assert known["losses_without_notice"] == 0 and sudden["losses_without_notice"] == 2
    assert known["longest_gap_max_s"] < sudden["longest_gap_max_s"]  # type: ignore[operator]


@st.composite
def fleets(draw: st.DrawFn) -> list[Action]:
    """Whatever a cloud can do in two minutes."""
    alive, actions, now_s = ["m0", "m1", "m2"], [], 0.0
    for number in range(draw(st.integers(0, 8))):
        now_s += draw(st.floats(0.0, 25.0))
        if alive and draw(st.booleans()):
            name = alive.pop(draw(st.integers(0, len(alive) - 1)))
            grace_s = draw(st.sampled_from([0.0, 0.4, 5.0, 30.0]))
            if grace_s:
                actions.append(GiveNotice(now_s, name, now_s + grace_s))
            actions.append(Take(now_s + grace_s, name, noticed=grace_s > 0))
        else:
            alive.append(f"n{number}")
            actions.append(Launch(now_s, alive[-1], ""))
    return actions


@settings(max_examples=15, deadline=None)
@given(fleets(), st.sampled_from([0.0, 5.0]), st.booleans())
def test_every_request_gets_exactly_one_end(fleet: list[Action], start_up_s: float, rents: bool) -> None:
    given = scenario(fleet, count=40, gap_s=0.7, output=600, delays=Delays(start_up_s=start_up_s), rents=rents, falls_back=rents)
    replayed = play(replace(given, workload=None))
    check(replayed, 40)


def test_simulating_loads_no_tensors() -> None:
    heavy = ["torch", "transformers", "redis", "boto3", "fastapi", "uvicorn", "httpx"]
    program = f"import sys, spotserve.replay.study, spotserve.replay.page; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_shape_that_does_not_fit_is_found_out_as_in_a_running_system() -> None:
    """Told one shape, and with too few machines for it, the controller makes do with less, which does not fit either."""
    large, four = named_model("gpt-20b"), instance_type("g4dn.12xlarge")
    given = replace(scenario([Launch(5.0, "n0", ""), Launch(6.0, "n1", "")], initial=1, count=20), model=large, machine=four)
    settings = {"planning": "shape", "pipeline": 3, "tensor": 4}
    played = play_production(replace(given, delays=Delays(start_up_s=1.0)), show_nothing, policy="fixed", settings=settings)
    check(played, 20)
    assert all(each.is_whole for each in played.outcomes)
