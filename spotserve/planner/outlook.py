"""Whether to change what runs: expected goodput under preemption, minus the cost of changing now.

The *liveput* of an option is what it is expected to serve, min(demand, capacity), over the sets of instances that may be lost
within the time a broken replica takes to come back (Parcae, NSDI'24, defines it for training: expected throughput over sampled
preemptions; here victims come in groups, and only replicas that were hit stop). A change pays back while what it makes lives:

    worth = meanwhile + exp(-change / life) * (liveput - meanwhile) - price

`meanwhile` is what is served until the option serves, never more than its own liveput, so that a longer change is never worth
more. `life` is the expected time until the replicas that the option adds are hit, weighted by capacity, and capped. For a fleet
that is one replica this is the time to the next event, and it does not shrink as a fleet grows by replicas that have nothing to
do with the change. `price` are the option's dollars, in requests.

Stay put unless it pays: a change has to matter (serve more, or save, by `margin`) and to pay clearly (gain `margin` of what it
trades at least). SpotServe (ASPLOS'24) changes at every event and weighs neither.

Pure. Knows no search, no migration, no shapes: only who serves on which instances, how much, and from when.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import exp
from typing import TypeAlias

import numpy as np

from spotserve.planner.risk import Cell, Risk
from spotserve.planner.victims import Exposure, Victims

_Replica: TypeAlias = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Footprint:
    """One replica of an option. It serves while it has all of its instances."""

    instance_ids: tuple[str, ...]
    rate_rps: float
    """Requests per second that it serves within the objective."""

    def __post_init__(self) -> None:
        assert self.instance_ids and len(set(self.instance_ids)) == len(self.instance_ids) and self.rate_rps >= 0


@dataclass(frozen=True, slots=True)
class Option:
    """Something that could run, or that does."""

    name: str
    replicas: tuple[Footprint, ...]
    usd_per_hour: float
    change_s: float
    """Until it serves; 0 for what runs."""
    lost_rps: float
    """Capacity of what runs now that is missing until then; 0 when all of it goes on beside the change."""
    moved_bytes: int
    """Breaks ties."""

    def __post_init__(self) -> None:
        assert min(self.usd_per_hour, self.change_s, self.lost_rps, self.moved_bytes) >= 0


@dataclass(frozen=True, slots=True)
class Worth:
    """What an option is worth, in requests per second."""

    name: str
    worth_rps: float
    """Expected requests per second over its life, its price taken off."""
    liveput_rps: float
    """Expected requests per second once it serves."""
    meanwhile_rps: float
    """Until then."""
    life_s: float
    """Over which the change has to pay."""
    price_rps: float
    """Its dollars, in requests."""

    @property
    def served_rps(self) -> float:
        """Expected requests per second over its life, the change included."""
        return self.worth_rps + self.price_rps


@dataclass(frozen=True, slots=True)
class Choice:
    """What to run, and why."""

    option: Option
    reason: str
    worths: tuple[Worth, ...]
    """Of every option, in their order."""


def weigh(
    options: Sequence[Option],
    *,
    stay: str,
    demand_rps: float,
    risk: Risk,
    recover_s: float,
    request_usd: float,
    horizon_s: float | None = None,
    longest_horizon_s: float = 3600.0,
    margin: float = 0.02,
) -> Choice:
    """The option to run from now on.

    Args:
        options: among them what runs, under the name `stay`. Their names differ. None of them should count on an instance that
            is under notice: `risk` does not have those, and whoever is not in `risk` is never lost.
        stay: name of what runs now, with the replicas that are left of it.
        demand_rps: requests per second that want to be served.
        risk: who may be lost, with whom.
        recover_s: how long the replicas of a victim are away.
        request_usd: what serving a request is worth. A hundred times what it costs makes dollars decide only between options
            that serve nearly the same.
        horizon_s: over which a change has to pay; None: the life of what it makes, `longest_horizon_s` at most.
        margin: share of the demand, of the dollars, and of what is traded; see the module.
    """
    current = next(option for option in options if option.name == stay)
    assert len({option.name for option in options}) == len(options) and current.change_s == 0
    assert horizon_s is None or horizon_s > 0
    assert demand_rps >= 0 and recover_s >= 0 and min(request_usd, longest_horizon_s) > 0 and margin >= 0
    victims = Victims(_touched(options, risk), recover_s)
    kept = set(_replicas(current))
    exposures = [Exposure(_replicas(option), victims) for option in options]
    running = exposures[options.index(current)]
    running_rps = {missing: running.served(demand_rps, missing) for missing in {0.0, *(option.lost_rps for option in options)}}
    worths = []
    for option, exposure in zip(options, exposures, strict=True):
        liveput = running_rps[0.0] if exposure is running else exposure.served(demand_rps)
        meanwhile = min(liveput, running_rps[option.lost_rps]) if option.change_s > 0 else liveput
        life_s = _life_s(option, exposure, kept, longest_horizon_s) if horizon_s is None else horizon_s
        served = meanwhile + exp(-option.change_s / life_s) * (liveput - meanwhile)
        price = option.usd_per_hour / 3600 / request_usd
        worths.append(Worth(option.name, served - price, liveput, meanwhile, life_s, price))
    return _choose(options, tuple(worths), current, demand_rps, margin)


def _replicas(option: Option) -> list[_Replica]:
    return [(replica.instance_ids, replica.rate_rps) for replica in option.replicas]


def _touched(options: Sequence[Option], risk: Risk) -> list[Cell]:
    """The cells that matter: those that have an instance of some option."""
    used = {instance_id for option in options for replica in option.replicas for instance_id in replica.instance_ids}
    return [cell for cell in risk.cells if not used.isdisjoint(cell.instance_ids)]


def _life_s(option: Option, exposure: Exposure, kept: Set[_Replica], longest_s: float) -> float:
    """Expected time until what `option` adds to those `kept` is hit, weighted by capacity, at most `longest_s`."""
    added_rps = np.array([0.0 if each in kept else each[1] for each in _replicas(option)])
    if not added_rps.any():
        return longest_s
    hits = float(added_rps @ exposure.hits_per_hour())
    return min(longest_s, 3600 * float(added_rps.sum()) / hits) if hits > 0 else longest_s


def _choose(options: Sequence[Option], worths: tuple[Worth, ...], current: Option, demand_rps: float, margin: float) -> Choice:
    told = dict(zip((option.name for option in options), worths, strict=True))
    here = told[current.name]
    others = [option for option in options if option is not current]
    paying = [option for option in others if _pays(option, told[option.name], current, here, demand_rps, margin)]
    ranked = sorted(paying or others, key=lambda each: (-told[each.name].worth_rps, each.moved_bytes, each.name))
    if not ranked:
        return Choice(current, f"stay with {current.name}: there is nothing else", worths)
    best = ranked[0]
    there = told[best.name]
    compared = (
        f"{there.served_rps:.3g} of {demand_rps:.3g} requests/s over {there.life_s / 60:.3g} min, {best.change_s:.3g} s of change"
        f" at {there.meanwhile_rps:.3g} included, for {best.usd_per_hour:.4g} USD/h; {current.name} serves {here.served_rps:.3g}"
        f" for {current.usd_per_hour:.4g} USD/h"
    )
    if paying:
        return Choice(best, f"change to {best.name}: {compared}", worths)
    gain = there.worth_rps - here.worth_rps
    refused = (
        f"stay with {current.name}: {best.name} serves {compared}; a gain of {gain:.3g} does not pay at a margin of {margin:g}"
    )
    return Choice(current, refused, worths)


def _pays(option: Option, there: Worth, current: Option, here: Worth, demand_rps: float, margin: float) -> bool:
    """Whether a change matters and pays clearly."""
    more_rps = there.served_rps - here.served_rps
    saved_rps = here.price_rps - there.price_rps
    saved_usd = current.usd_per_hour - option.usd_per_hour
    matters = 0 < more_rps >= margin * demand_rps or 0 < saved_usd >= margin * current.usd_per_hour
    gain = more_rps + saved_rps
    return matters and gain > 0 and gain >= margin * (abs(more_rps) + abs(saved_rps))
