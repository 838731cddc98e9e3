"""Traces made from statistics, for when nobody's data may be shipped or the wanted situation is in no recording.

Fleets: each instance's life is exponential (coefficient of variation 1, as public traces of GPU instances show), a share of
the moments of loss takes several instances at once (about 35 % there), and a large loss may reach into another zone.
Requests: Poisson arrivals, Gamma gaps (burstier), or a rate that swings like a day. Lengths are log-normal, cut at both ends.

Every function is pure: the same values give the same trace. Knows nothing of replaying.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from math import cos, exp, pi
from random import Random
from statistics import fmean, median, pstdev
from typing import Literal

from spotserve.core.errors import ConfigError
from spotserve.replay.trace import CapacityEvent, TraceRequest

MILLISECONDS = 3
"""Decimals of written times."""


@dataclass(frozen=True, slots=True)
class FleetModel:
    """How a fleet comes and goes. Times in seconds of the trace."""

    instances: int = 4
    """The fleet that is wanted, and there at the start."""
    duration_s: float = 3600.0
    mean_life_s: float = 3600.0
    """Mean life of an instance."""
    mean_restock_s: float = 120.0
    """Mean time until a lost instance's place is filled again."""
    bulk_share: float = 0.35
    """Share of the moments of loss that take two instances or more."""
    bulk_extra: float = 1.0
    """Mean number of instances that such a moment takes beyond the second."""
    zones: int = 2
    zone_correlation: float = 0.3
    """How often a bulk loss takes from every zone and not from one."""
    keep: int = 0
    """Instances that are never taken."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.instances >= 1 and self.zones >= 1 and 0 <= self.keep <= self.instances and self.bulk_extra >= 0):
            raise ConfigError(f"{self}: expected instances >= 1, zones >= 1, 0 <= keep <= instances, bulk_extra >= 0")
        if not (0 <= self.bulk_share <= 1 and 0 <= self.zone_correlation <= 1):
            raise ConfigError(f"{self}: expected bulk_share and zone_correlation from 0 to 1")
        if not min(self.duration_s, self.mean_life_s, self.mean_restock_s) > 0:
            raise ConfigError(f"{self}: expected times above 0")

    @property
    def mean_loss_size(self) -> float:
        """Instances per moment of loss."""
        return 1 + self.bulk_share * (1 + self.bulk_extra)


@dataclass(frozen=True, slots=True)
class LoadModel:
    """How requests arrive, and how long they are."""

    duration_s: float = 3600.0
    rate_per_s: float = 1.0
    arrivals: Literal["poisson", "gamma", "diurnal"] = "poisson"
    gap_cv: float = 1.0
    """Coefficient of variation of the gaps, for `gamma`."""
    swing: float = 0.6
    """How far the rate leaves its mean, as a share of it, for `diurnal`."""
    period_s: float = 86_400.0
    """Length of the day, for `diurnal`."""
    prompt_median: int = 128
    prompt_low: int = 16
    prompt_high: int = 512
    output_median: int = 96
    output_low: int = 16
    output_high: int = 256
    length_sigma: float = 0.5
    """Standard deviation of the logarithm of both lengths, before they are cut."""
    greedy_share: float = 0.5
    """Share of requests with temperature 0; the others have `temperature`."""
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if not min(self.duration_s, self.rate_per_s, self.gap_cv, self.period_s) > 0:
            raise ConfigError(f"{self}: expected duration, rate, gap_cv and period above 0")
        if not (0 <= self.swing <= 1 and 0 <= self.greedy_share <= 1 and self.length_sigma >= 0 and self.temperature >= 0):
            raise ConfigError(f"{self}: expected shares from 0 to 1, and no negative sigma or temperature")
        if not (1 <= self.prompt_low <= self.prompt_high and 1 <= self.output_low <= self.output_high):
            raise ConfigError(f"{self}: expected 1 <= low <= high for both lengths")
        if self.arrivals not in ARRIVALS:
            raise ConfigError(f"arrivals={self.arrivals!r}: expected one of {', '.join(ARRIVALS)}")


def fleet_events(model: FleetModel) -> tuple[CapacityEvent, ...]:
    """A fleet's history by the model.

    Gillespie's method: with n instances that can be taken, moments of loss come at rate n / (mean life × mean loss size), and
    with m empty places, additions at rate m / mean restock. Victims are uniform, so that single lives are exponential.
    """
    random = Random(model.seed)
    present: dict[str, str] = {}
    events: list[CapacityEvent] = []
    launched = 0

    def add(at_s: float) -> None:
        nonlocal launched
        name, zone = f"i{launched:04d}", f"zone-{'abcdefghijklmnopqrstuvwxyz'[launched % model.zones % 26]}"
        launched += 1
        present[name] = zone
        events.append(CapacityEvent(at_s, "add", name, zone))

    for _ in range(model.instances):
        add(0.0)
    now_s = 0.0
    while True:
        loss_rate = max(0, len(present) - model.keep) / (model.mean_life_s * model.mean_loss_size)
        add_rate = (model.instances - len(present)) / model.mean_restock_s
        now_s += random.expovariate(loss_rate + add_rate) if loss_rate + add_rate else float("inf")
        if now_s >= model.duration_s:
            return tuple(events)
        at_s = round(now_s, MILLISECONDS)
        if random.random() * (loss_rate + add_rate) < add_rate:
            add(at_s)
            continue
        events.extend(CapacityEvent(at_s, "remove", victim, present.pop(victim)) for victim in _victims(random, present, model))


def _victims(random: Random, present: Mapping[str, str], model: FleetModel) -> list[str]:
    """Who goes: the first victim is uniform; further ones are from its zone first, or from everywhere."""
    wanted = 1
    if random.random() < model.bulk_share:
        wanted = 2
        while random.random() < model.bulk_extra / (1 + model.bulk_extra):
            wanted += 1
    order = random.sample(sorted(present), len(present))
    if random.random() >= model.zone_correlation:
        first_zone = present[order[0]]
        order.sort(key=lambda name: present[name] != first_zone)
    return order[: min(wanted, len(present) - model.keep)]


def _poisson(random: Random, model: LoadModel) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += random.expovariate(model.rate_per_s)
        yield now_s


def _gamma(random: Random, model: LoadModel) -> Iterator[float]:
    """Gamma gaps of shape 1 / CV²: mean 1 / rate, coefficient of variation `gap_cv`."""
    shape = 1 / model.gap_cv**2
    now_s = 0.0
    while True:
        now_s += random.gammavariate(shape, 1 / (model.rate_per_s * shape))
        yield now_s


def _diurnal(random: Random, model: LoadModel) -> Iterator[float]:
    """A Poisson process whose rate follows a cosine, lowest at the start; by thinning one at the peak rate."""
    peak = model.rate_per_s * (1 + model.swing)
    now_s = 0.0
    while True:
        now_s += random.expovariate(peak)
        if random.random() * peak < model.rate_per_s * (1 - model.swing * cos(2 * pi * now_s / model.period_s)):
            yield now_s


ARRIVALS: dict[str, Callable[[Random, LoadModel], Iterator[float]]] = {"poisson": _poisson, "gamma": _gamma, "diurnal": _diurnal}


def load_requests(model: LoadModel) -> tuple[TraceRequest, ...]:
    """Requests by the model."""
    arrivals_random, lengths_random = Random(f"{model.seed} arrivals"), Random(f"{model.seed} lengths")

    def length(middle: int, low: int, high: int) -> int:
        return min(high, max(low, round(middle * exp(lengths_random.gauss(0.0, model.length_sigma)))))

    requests: list[TraceRequest] = []
    for arrival_s in ARRIVALS[model.arrivals](arrivals_random, model):
        if arrival_s >= model.duration_s:
            break
        requests.append(
            TraceRequest(
                round(arrival_s, MILLISECONDS),
                length(model.prompt_median, model.prompt_low, model.prompt_high),
                length(model.output_median, model.output_low, model.output_high),
                0.0 if lengths_random.random() < model.greedy_share else model.temperature,
                lengths_random.getrandbits(31),
            )
        )
    return tuple(requests)


# --------------------------------------------------------------------------- statistics


def lives_s(events: tuple[CapacityEvent, ...]) -> list[float]:
    """How long the instances lived that were lost."""
    since_s: dict[str, float] = {}
    lives: list[float] = []
    for event in events:
        if event.change == "add":
            since_s[event.instance] = event.time_s
        else:
            lives.append(event.time_s - since_s.pop(event.instance))
    return lives


def loss_sizes(events: tuple[CapacityEvent, ...]) -> list[int]:
    """Instances taken at each moment of loss."""
    sizes: dict[float, int] = {}
    for event in events:
        if event.change == "remove":
            sizes[event.time_s] = sizes.get(event.time_s, 0) + 1
    return list(sizes.values())


def variation(values: list[float]) -> float:
    """Coefficient of variation: standard deviation over mean; 0 for fewer than two values."""
    return pstdev(values) / fmean(values) if len(values) > 1 and fmean(values) else 0.0


def fleet_comments(model: FleetModel, events: tuple[CapacityEvent, ...]) -> list[str]:
    """What a capacity trace says about itself."""
    lives, sizes = lives_s(events), loss_sizes(events)
    facts = f"losses {sum(sizes)} in {len(sizes)} moments, {sum(size > 1 for size in sizes)} of them bulk"
    if lives:
        facts += f"; life of lost instances: mean {fmean(lives):.1f} s, CV {variation(lives):.2f}"
    return [f"generated by the fleet model {_values(model)}", facts]


def load_comments(model: LoadModel, requests: tuple[TraceRequest, ...]) -> list[str]:
    """What a request trace says about itself."""
    gaps = [after.arrival_s - before.arrival_s for before, after in pairwise(requests)]
    prompts, outputs = [r.prompt_tokens for r in requests], [r.output_tokens for r in requests]
    facts = f"{len(requests)} requests, {len(requests) / model.duration_s:.2f} per second, gap CV {variation(gaps):.2f}"
    if requests:
        facts += f"; prompt tokens {min(prompts)}-{max(prompts)}, median {median(prompts):g}"
        facts += f"; output tokens {min(outputs)}-{max(outputs)}, median {median(outputs):g}, sum {sum(outputs)}"
    return [f"generated by the load model {_values(model)}", facts]


def _values(model: FleetModel | LoadModel) -> str:
    return " ".join(f"{field.name}={getattr(model, field.name)}" for field in fields(model))
