"""Generated traces: their statistics are the stated ones, and the seed decides everything else."""

from collections import Counter
from itertools import pairwise
from statistics import fmean, median, pvariance

import pytest
from typer.testing import CliRunner

from spotserve.cli.app import app
from spotserve.core.errors import ConfigError
from spotserve.replay.formats import parse_capacity, parse_requests
from spotserve.replay.generate import FleetModel, LoadModel, fleet_events, lives_s, load_requests, loss_sizes, variation
from spotserve.replay.trace import CapacityEvent, capacity_csv

BIG_FLEET = FleetModel(instances=40, duration_s=400_000, mean_life_s=3600, mean_restock_s=60, zones=3, seed=5)
BIG_LOAD = LoadModel(duration_s=20_000, rate_per_s=1.0, seed=5)


def test_lives_have_the_stated_mean_and_a_variation_of_about_1() -> None:
    lives = lives_s(fleet_events(BIG_FLEET))
    assert len(lives) > 3000
    assert fmean(lives) == pytest.approx(3600, rel=0.08)
    assert variation(lives) == pytest.approx(1.0, abs=0.08)


def test_a_third_of_the_loss_moments_take_several() -> None:
    sizes = loss_sizes(fleet_events(BIG_FLEET))
    assert sum(size > 1 for size in sizes) / len(sizes) == pytest.approx(0.35, abs=0.03)
    assert fmean(sizes) == pytest.approx(BIG_FLEET.mean_loss_size, rel=0.05)
    assert set(loss_sizes(fleet_events(FleetModel(instances=40, duration_s=50_000, bulk_share=0.0)))) == {1}


def bulk_in_one_zone(events: tuple[CapacityEvent, ...]) -> float:
    """Share of the bulk losses that stay within a zone."""
    zones: dict[float, list[str]] = {}
    for event in events:
        if event.change == "remove":
            zones.setdefault(event.time_s, []).append(event.zone)
    bulk = [set(seen) for seen in zones.values() if len(seen) > 1]
    return sum(len(seen) == 1 for seen in bulk) / len(bulk)


def test_bulk_losses_keep_to_a_zone_unless_zones_correlate() -> None:
    shares = [
        bulk_in_one_zone(fleet_events(FleetModel(instances=40, duration_s=200_000, zones=4, zone_correlation=correlation)))
        for correlation in (0.0, 1.0)
    ]
    assert shares[0] > 0.95 and shares[1] < 0.4


def test_some_instances_can_be_kept() -> None:
    size, smallest = 0, 99
    for event in fleet_events(FleetModel(instances=6, keep=2, mean_life_s=100, mean_restock_s=500, duration_s=20_000)):
        size += 1 if event.change == "add" else -1
        if event.time_s > 0:
            smallest = min(smallest, size)
    assert smallest == 2


def test_a_generated_fleet_is_a_valid_history() -> None:
    events = fleet_events(BIG_FLEET)
    assert parse_capacity(capacity_csv(events), "f").events == events


def gaps(model: LoadModel) -> list[float]:
    return [after.arrival_s - before.arrival_s for before, after in pairwise(load_requests(model))]


def test_poisson_gaps() -> None:
    found = gaps(BIG_LOAD)
    assert fmean(found) == pytest.approx(1.0, rel=0.03) and variation(found) == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("cv", [0.3, 2.5])
def test_gamma_gaps_have_the_stated_variation(cv: float) -> None:
    found = gaps(LoadModel(duration_s=20_000, arrivals="gamma", gap_cv=cv))
    assert fmean(found) == pytest.approx(1.0, rel=0.08) and variation(found) == pytest.approx(cv, rel=0.1)


def test_a_day_swings_around_its_mean() -> None:
    model = LoadModel(duration_s=8000, arrivals="diurnal", swing=0.8, period_s=2000, rate_per_s=2.0)
    quarter = Counter(int(request.arrival_s % 2000 // 500) for request in load_requests(model))
    assert sum(quarter.values()) == pytest.approx(16_000, rel=0.03)
    # mean of 1 - 0.8 cos over the first and the second quarter of the period: 1 ∓ 1.6 / pi
    assert quarter[0] == pytest.approx(4000 * (1 - 1.6 / 3.14159), rel=0.08)
    assert quarter[1] == pytest.approx(4000 * (1 + 1.6 / 3.14159), rel=0.05)


def test_poisson_counts_are_not_overdispersed() -> None:
    counts = Counter(int(request.arrival_s // 60) for request in load_requests(BIG_LOAD))
    values = [counts[window] for window in range(20_000 // 60)]
    assert pvariance(values) / fmean(values) == pytest.approx(1.0, abs=0.25)


def test_lengths_and_temperatures_are_the_stated_ones() -> None:
    found = load_requests(BIG_LOAD)
    prompts, outputs = [r.prompt_tokens for r in found], [r.output_tokens for r in found]
    assert median(prompts) == pytest.approx(128, rel=0.04) and median(outputs) == pytest.approx(96, rel=0.04)
    assert min(prompts) >= 16 and max(prompts) == 512 and min(outputs) >= 16 and max(outputs) == 256
    assert sum(r.temperature == 0 for r in found) / len(found) == pytest.approx(0.5, abs=0.02)
    assert len({r.seed for r in found}) == len(found)


def test_the_seed_decides() -> None:
    assert fleet_events(FleetModel(seed=1)) == fleet_events(FleetModel(seed=1)) != fleet_events(FleetModel(seed=2))
    assert load_requests(LoadModel(seed=1)) == load_requests(LoadModel(seed=1)) != load_requests(LoadModel(seed=2))


@pytest.mark.parametrize(
    "flags",
    [{"instances": 0}, {"keep": 5}, {"bulk_share": 1.5}, {"mean_life_s": 0.0}, {"bulk_extra": -1.0}],
)
def test_a_fleet_that_makes_no_sense(flags: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        FleetModel(**flags)


@pytest.mark.parametrize("flags", [{"rate_per_s": 0.0}, {"arrivals": "never"}, {"prompt_low": 600}, {"swing": 2.0}])
def test_a_load_that_makes_no_sense(flags: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LoadModel(**flags)


def test_the_commands_write_what_is_read() -> None:
    fleet = CliRunner().invoke(app, ["traces", "make", "capacity", "--instances", "3", "--duration-s", "9000", "--seed", "8"])
    assert fleet.exit_code == 0
    assert parse_capacity(fleet.stdout, "f").events == fleet_events(FleetModel(instances=3, duration_s=9000.0, seed=8))
    load = CliRunner().invoke(app, ["traces", "make", "requests", "--rate-per-s", "0.05"])
    assert load.exit_code == 0
    assert parse_requests(load.stdout, "f").requests == load_requests(LoadModel(rate_per_s=0.05))
    refused = CliRunner().invoke(app, ["traces", "make", "requests", "--rate-per-s", "-1"])
    assert isinstance(refused.exception, ConfigError)
