"""What hedging makes of public spot traces: availability and cost, against spot only, on demand only, and SkyServe's rules.

    python benchmarks/hedge.py [--start-up 183] [--grace 30] [--json]

The number of instances in a trace is what its zone gives at that time: a launch beyond it is refused, and when it falls below
what is held, the oldest are taken (which ones a file of counts does not say). Every policy sees the same zones, in steps of 30 s.
An instance is ready `--start-up` seconds after it was asked for (183 s: SkyServe, EuroSys'25, for an instance and Llama-2-7B) and
is paid for from when it was asked for until it is gone. Nobody knows the trace; the hazards of `hedge` are learned on the way.

* available: share of the time with as many ready instances as are wanted, after the first 20 minutes
* served: min(ready, wanted) / wanted, mean over the same time
* cost: of what on-demand instances for the wanted number would have cost

Policies: `hedge` as it comes; `spot only` is `hedge` without spares and stand-ins that asks again at every step; `on demand only`;
`SkyServe` is the rules of its paper as we read them, not its code: a fixed number of spares (1 and 2), an on-demand instance for
every spot one of the wanted number that is not ready, zones without a preemption or refusal in the last 5 min first, asked at
every step.

Limits: three of the traces were recorded on different days and are laid side by side as zones of one type, so that nothing happens
in two of them at once. That flatters spreading. Counts are also bounded by what their collectors asked for, and lag behind what
the zone would have given. 11 to 27 hours are weak evidence.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count

from spot_series import Series, data_folder, public_series

from spotserve.planner.fleet_view import HedgeMemory, HedgePolicy, Held, LaunchWish, TerminationWish, Zone
from spotserve.planner.hazard import HazardBook
from spotserve.planner.hedge import hedge

STEP_S = 30.0
WARM_UP_S = 1200.0
SPOT_USD_PER_HOUR, ON_DEMAND_USD_PER_HOUR = 1.35, 3.912
"""g4dn.12xlarge in us-east-1 by the SkyPilot catalogue of 2025-26: spot 1.288 to 1.413 by zone."""
TYPE = "type"


@dataclass(frozen=True, slots=True)
class Result:
    """One policy on one market."""

    market: str
    wanted: int
    policy: str
    available: float
    served: float
    cost: float
    losses: int


class Market:
    """Zones that give as many spot instances as their traces had, and on-demand ones without limit."""

    def __init__(self, zones: Sequence[Series], *, start_up_s: float, grace_s: float) -> None:
        self.names = [zone.name for zone in zones]
        self._counts = {zone.name: [(at_s - zone.changes[0].at_s, number) for at_s, number in zone.counts()] for zone in zones}
        self.end_s = min(zone.end_s - zone.changes[0].at_s for zone in zones)
        self._start_up_s, self._grace_s = start_up_s, grace_s
        self._numbers = count(1)
        self._taken_s: dict[str, float] = {}
        self.held: dict[str, Held] = {}
        self.refused_s: dict[str, float] = {}
        self.book = HazardBook()
        self.losses = 0
        self.usd = 0.0

    def zones(self, now_s: float, over_s: float) -> list[Zone]:
        """As a policy sees them."""
        return [
            Zone(
                name,
                SPOT_USD_PER_HOUR,
                ON_DEMAND_USD_PER_HOUR,
                self.book.instants_per_hour(TYPE, name, now_s, over_s),
                self.book.group_sizes(TYPE, name, now_s),
                self.book.last_instant_s(TYPE, name),
                self.refused_s.get(name),
            )
            for name in self.names
        ]

    def advance(self, now_s: float) -> None:
        """Brings instances up, gives notice, takes and bills."""
        for each in list(self.held.values()):
            self.usd += (SPOT_USD_PER_HOUR if each.is_spot else ON_DEMAND_USD_PER_HOUR) * STEP_S / 3600
            if self._taken_s.get(each.instance_id, now_s + 1) <= now_s:
                self.book.note_loss(each.instance_id, now_s)
                del self.held[each.instance_id]
            elif each.ready_s is None and now_s - each.asked_s >= self._start_up_s:
                self.held[each.instance_id] = replace(each, ready_s=now_s, is_serving=True)
                if each.is_spot:
                    self.book.note_joined(each.instance_id, TYPE, each.zone, now_s)
        for name in self.names:
            mine = [each for each in self.held.values() if each.is_spot and each.zone == name and not each.is_leaving]
            for each in mine[: max(0, len(mine) - self._capacity(name, now_s))]:
                self.losses += 1
                self._taken_s[each.instance_id] = now_s + self._grace_s
                self.held[each.instance_id] = replace(each, is_leaving=True)
                self.book.note_joined(each.instance_id, TYPE, name, now_s)
                self.book.note_notice(each.instance_id, now_s)

    def carry_out(self, launches: Sequence[LaunchWish], terminations: Sequence[TerminationWish], now_s: float) -> None:
        """Gives what there is, refuses the rest, takes back."""
        for wish in terminations:
            self.book.note_left(wish.instance_id, now_s)
            self.held.pop(wish.instance_id, None)
        for wish in launches:
            for _ in range(wish.count):
                mine = sum(each.is_spot and each.zone == wish.zone and not each.is_leaving for each in self.held.values())
                if wish.is_spot and mine >= self._capacity(wish.zone, now_s):
                    self.refused_s[wish.zone] = now_s
                    break
                instance_id = f"i-{next(self._numbers)}"
                self.held[instance_id] = Held(instance_id, wish.zone, wish.is_spot, now_s)

    def _capacity(self, name: str, now_s: float) -> int:
        return next((number for at_s, number in reversed(self._counts[name]) if at_s <= now_s), 0)


Step = Callable[[Market, float], tuple[Sequence[LaunchWish], Sequence[TerminationWish]]]
"""(market, now) -> what to rent and what to return."""


def hedging(wanted: int, policy: HedgePolicy, exposed_s: float) -> Step:
    """The planner's own."""
    memory = HedgeMemory()

    def step(market: Market, now_s: float) -> tuple[Sequence[LaunchWish], Sequence[TerminationWish]]:
        nonlocal memory
        zones = market.zones(now_s, exposed_s)
        wish = hedge(wanted, list(market.held.values()), zones, memory, policy, exposed_s=exposed_s, now_s=now_s)
        memory = wish.memory
        return wish.launches, wish.terminations

    return step


def skyserve(wanted: int, spares: int) -> Step:
    """SkyServe's rules as its paper tells them; see the module."""

    def step(market: Market, now_s: float) -> tuple[Sequence[LaunchWish], Sequence[TerminationWish]]:
        staying = [each for each in market.held.values() if not each.is_leaving]
        spot = [each for each in staying if each.is_spot]
        on_demand = [each for each in staying if not each.is_spot]
        hit_s = {}
        for name in market.names:
            lost_s = market.book.last_instant_s(TYPE, name)
            hit_s[name] = max(-1e9 if lost_s is None else lost_s, market.refused_s.get(name, -1e9))
        ours = {name: sum(each.zone == name for each in spot) for name in market.names}
        launches = []
        for _ in range(wanted + spares - len(spot)):
            zone = min(market.names, key=lambda name: (now_s - hit_s[name] < 300, ours[name], name))
            ours[zone] += 1
            launches.append(LaunchWish(1, True, zone, ""))
        stand_ins = max(0, wanted - sum(each.ready_s is not None for each in spot))
        launches += [LaunchWish(1, False, market.names[0], "")] * (stand_ins - len(on_demand))
        needless = on_demand[: max(0, len(on_demand) - stand_ins)]
        return launches, [TerminationWish(each.instance_id, "") for each in needless]

    return step


def run(market_name: str, market: Market, wanted: int, policy: str, step: Step) -> Result:
    """One policy through one market."""
    now_s, steps, full, served = 0.0, 0, 0, 0.0
    while now_s < market.end_s:
        market.advance(now_s)
        market.carry_out(*step(market, now_s), now_s)
        if now_s >= WARM_UP_S:
            ready = sum(each.ready_s is not None for each in market.held.values())
            steps, full, served = steps + 1, full + (ready >= wanted), served + min(ready, wanted) / wanted
        now_s += STEP_S
    cost = market.usd / (wanted * ON_DEMAND_USD_PER_HOUR * market.end_s / 3600)
    return Result(market_name, wanted, policy, full / steps, served / steps, cost, market.losses)


def compare(folder_series: Sequence[Series], start_up_s: float, grace_s: float) -> list[Result]:
    """Every policy on every market."""
    by_name = {series.name: series for series in folder_series}
    g4dn, gcp = by_name["AWS G4dn"], by_name["GCP A100"]
    three = [g4dn, *(by_name[f"AWS g4dn-xlarge-us-east-{zone}"] for zone in ("1c", "1d"))]
    markets = [("AWS G4dn", [g4dn], 4), ("AWS G4dn", [g4dn], 8), ("three G4dn traces", three, 8), ("GCP A100", [gcp], 32)]
    exposed_s = max(0.0, start_up_s - grace_s)
    most = HedgePolicy(max_instances=128)
    alone = replace(most, fall_back=False, max_spares=0, retry_s=STEP_S)
    results = []
    for name, zones, wanted in markets:
        policies = {
            "hedge": lambda wanted=wanted: hedging(wanted, most, exposed_s),
            "spot only": lambda wanted=wanted: hedging(wanted, alone, exposed_s),
            "on demand only": lambda wanted=wanted: hedging(wanted, replace(most, on_demand_floor=wanted), exposed_s),
            "SkyServe, 1": lambda wanted=wanted: skyserve(wanted, 1),
            "SkyServe, 2": lambda wanted=wanted: skyserve(wanted, 2),
        }
        results += [
            run(name, Market(zones, start_up_s=start_up_s, grace_s=grace_s), wanted, policy, make())
            for policy, make in policies.items()
        ]
    return results


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-up", type=float, default=183.0, metavar="S", help="from asking for an instance until it is ready")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="between notice and loss")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    arguments = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.exit(1, "no public traces here: set SPOTSERVE_DATA to a folder that has traces/spot/bamboo\n")
    results = compare(public_series(folder), arguments.start_up, arguments.grace)
    if arguments.json:
        print(json.dumps([asdict(each) for each in results], indent=1))
        return
    print(f"{'market':<20}{'wanted':>7}  {'policy':<16}{'available':>10}{'served':>9}{'cost':>8}{'losses':>8}")
    for each in results:
        row = f"{each.market:<20}{each.wanted:>7}  {each.policy:<16}{each.available:>10.1%}{each.served:>9.1%}"
        print(f"{row}{each.cost:>8.1%}{each.losses:>8}")


if __name__ == "__main__":
    main()
