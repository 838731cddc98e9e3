"""The published policies in small: batches by hand, the arranger's rule, what is inherited."""

from dataclasses import replace

import msgspec
import pytest

from spotserve.migration.spotserve_2024 import PublishedShape
from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model
from spotserve.planner.profiles import LayerTime, Profile
from spotserve.replay.agenda import Agenda
from spotserve.replay.call import Call
from spotserve.replay.outcome import Gaps
from spotserve.replay.policies import POLICIES
from spotserve.replay.published_case import published_case
from spotserve.replay.scenario import Delays, Prices, PublishedCase, Scenario, show_nothing
from spotserve.replay.static_batches import BatchTimes, Pipeline
from spotserve.replay.timeline import Action, Arrive, GiveNotice, Take, Timeline
from spotserve.replay.timeline import Launch as TraceLaunch

PROFILE = Profile(
    name="p",
    num_layers=4,
    padded_layers=4,
    hidden_size=256,
    max_tensor=4,
    fix_factor=1.0,
    init_hop_ms=0.0,
    incr_hop_ms=0.0,
    embed_ms=(0.0, 0.0, 0.0),
    layer_ms={(tensor, batch): LayerTime(250.0 * batch / tensor, 25.0 / tensor) for tensor in (1, 2, 4) for batch in (1, 2, 4)},
)
"""On one device a prompt of 512 tokens takes a second, a step a tenth, whatever the batch."""


def pipeline(agenda: Agenda, ended: list[Call], **given: int) -> Pipeline:
    times = BatchTimes(PROFILE, 1, 1, divide_prefill=False)
    return Pipeline(times, 4, given.get("max_pool", 4), agenda, Gaps(), ended.append, lambda: None)


def test_batches_are_powers_of_two_that_run_to_their_end() -> None:
    agenda, ended = Agenda(), []
    one = pipeline(agenda, ended)
    for index in range(4):
        one.take(Call(index, 0.0, 512, 10))
    assert not one.times.prompt_s(1) - 1.0 and one.times.token_s(4) == pytest.approx(0.1)
    agenda.run_until(2.0)  # the first alone: a second of prompt, ten steps
    assert [call.index for call in ended] == [0] and ended[0].first_token_s == pytest.approx(1.1)
    agenda.run_until(2.0 + 2.0 + 1.0 + 1e-6)  # two of the three that wait
    assert [call.index for call in ended] == [0, 1, 2]
    agenda.run_until(9.0)
    assert [call.index for call in ended] == [0, 1, 2, 3]


def test_a_pipeline_that_is_to_stop_runs_as_many_steps_as_it_may() -> None:
    agenda, ended = Agenda(), []
    one = pipeline(agenda, ended)
    one.limit = lambda pipeline, batch: 4
    one.take(Call(0, 0.0, 512, 10))
    agenda.run_until(5.0)
    assert one.is_stopped and not ended and one.resumed is not None and one.resumed.steps == 4
    batch, waiting = one.leave()
    other = pipeline(agenda, ended)
    other.resumed = batch
    other.proceed()
    agenda.run_until(6.0)
    assert not waiting and [call.index for call in ended] == [0]
    assert ended[0].last_token_s == pytest.approx(5.6) and ended[0].longest_gap_s == pytest.approx(5.0 + 0.1 - 1.4)


def test_what_is_cut_has_the_steps_that_were_done() -> None:
    agenda, ended = Agenda(), []
    one = pipeline(agenda, ended)
    one.take(Call(0, 0.0, 512, 10))
    agenda.run_until(1.55)
    one.cut()
    batch, _ = one.leave()
    assert batch is not None and batch.steps == 5 and batch.calls[0].emitted == 5


def scenario(fleet: list[Action], machines: int, **given: object) -> Scenario:
    arrivals: list[Action] = [Arrive(2.0 * index + 0.5, index, 512, 40, 0.0, index) for index in range(100)]
    timeline = Timeline(
        {f"m{index}": "" for index in range(machines)}, tuple(sorted([*fleet, *arrivals], key=lambda a: a.at_s)), 230.0
    )
    machine = msgspec.structs.replace(instance_type("g4dn.12xlarge"), num_devices=2)
    case = PublishedCase(
        profile=PROFILE, shape=PublishedShape(4, 4, 256, 1000, positions=552), required_rps=0.5, min_devices=2, max_tensor=4
    )
    prices = Prices(spot_usd_per_hour=1.0, on_demand_usd_per_hour=3.0)
    values: dict[str, object] = {"delays": Delays(start_up_s=0.0), "published": case, **given}
    return Scenario(timeline=timeline, model=named_model("llama-3-8b"), machine=machine, prices=prices, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["spotserve-2024", "rerouting", "reparallelization"])
def test_losses_lose_nothing_and_only_the_baselines_compute_again(policy: str) -> None:
    fleet: list[Action] = [GiveNotice(70.0, "m1", 100.0), Take(100.0, "m1", noticed=True), TraceLaunch(150.0, "n0", "")]
    played = POLICIES[policy].play(scenario(fleet, 3), show_nothing)
    assert len(played.outcomes) == 100 and all(each.is_whole and each.tokens == 40 for each in played.outcomes)
    assert (sum(each.restarted for each in played.outcomes) == 0) or policy != "spotserve-2024"
    assert sum(lease.hours for lease in played.leases) * 3600 == pytest.approx(230 + 100 + 230 + 80)


def test_an_add_and_a_remove_within_the_grace_period_are_one_change() -> None:
    fleet: list[Action] = [TraceLaunch(100.0, "n0", ""), Take(110.0, "m0", noticed=True)]
    played = POLICIES["spotserve-2024"].play(scenario(fleet, 2), show_nothing)
    assert sum(event.kind == "plan" for event in played.fleet_events) == 2


def test_a_case_from_the_cost_model_can_be_played() -> None:
    given = replace(scenario([], 2), published=None)
    case = published_case(given)
    assert case.required_rps == pytest.approx(1.15 * 100 / 230) and case.min_devices >= 1
    played = POLICIES["spotserve-2024"].play(given, show_nothing)
    assert all(each.is_whole for each in played.outcomes)
