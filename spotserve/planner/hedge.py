"""How many instances to hold, spot or on demand, and in which zones.

    spot       = wanted - floor, and spares: as few as keep the chance of a shortage while a replacement starts under a share
    on demand  = the floor, and what spot instances cannot cover because no zone gives them

What is under notice does not count, so its replacement is asked for when the notice comes. Each spot instance goes where fewest
of ours are, then where fewest are taken, then where it is cheapest. While on-demand instances stand in, spot ones are still
asked for as soon as a zone may be asked again; the stand-ins go when those have been ready for a while.

The peer is SpotHedge (SkyServe, EuroSys'25). What differs: it adds a fixed number of spares, here they follow from hazard and
group sizes; it rents an on-demand instance for every spot one that is not ready, here only for those that no zone gives in time,
since both take equally long to start; it keeps a two-state mark per zone, here a breaker on a learned rate; and it knows no notice.

Invariants: the floor is held, the maximum kept, no zone is asked whose breaker is open while another may be; a wish that is
carried out leaves nothing to wish for.

Pure: what must be remembered comes in and goes out as a value. Knows counts and zones, not plans or replicas.
"""

from collections.abc import Mapping, Sequence
from math import inf

from spotserve.planner.asking import Asking
from spotserve.planner.breaker import Breaker, BreakerState, renew
from spotserve.planner.fleet_view import HedgeMemory, HedgePolicy, Held, Surplus, TerminationWish, Wish, Zone
from spotserve.planner.risk import mixed, taken


def hedge(
    wanted: int,
    held: Sequence[Held],
    zones: Sequence[Zone],
    memory: HedgeMemory,
    policy: HedgePolicy,
    *,
    exposed_s: float,
    now_s: float,
) -> Wish:
    """What to rent and to return now.

    Args:
        wanted: instances that the plan needs for the demand.
        held: every instance that was asked for and is not gone.
        zones: every place that can be asked; not empty, their names differ.
        memory: of the last wish; `HedgeMemory()` at first.
        policy: see there.
        exposed_s: from a loss until its replacement serves: the time that starting takes, less the notice that clouds give.
        now_s: now.
    """
    assert zones and len({zone.name for zone in zones}) == len(zones) and wanted >= 0 and exposed_s >= 0
    counting = [each for each in held if not each.is_leaving]
    overdue = [each for each in counting if each.ready_s is None and now_s - each.asked_s >= policy.arrive_s]
    staying = [each for each in counting if each not in overdue]
    breakers = _renewed(zones, staying, memory, policy, now_s)
    in_vain = _in_vain(memory, overdue, policy, now_s)

    floor, room = policy.on_demand_floor, policy.max_instances - policy.on_demand_floor
    needed = min(max(0, wanted - floor), room)
    spares, shortage = num_spares(needed, _not_open(zones, breakers), policy, exposed_s)
    spares = min(spares, room - needed)

    returned, spot_surplus, on_demand_surplus = _returned(staying, needed, spares, zones, memory, policy, now_s)
    remembered = HedgeMemory(tuple(breakers.items()), in_vain, spot_surplus, on_demand_surplus)
    going = {each.instance_id for each in returned}
    staying = [each for each in staying if each.instance_id not in going]
    asking = Asking(zones, breakers, in_vain, staying, policy, now_s)
    stand_ins = _ask(asking, staying, policy, wanted, needed, spares)
    given_up = [TerminationWish(each.instance_id, f"not there {policy.arrive_s:g} s after it was asked for") for each in overdue]
    return Wish(
        launches=asking.wishes,
        terminations=(*given_up, *returned),
        memory=remembered,
        num_spot=needed + spares,
        num_spares=spares,
        num_on_demand=floor + stand_ins,
        wake_s=_wake_s(staying, remembered, zones, policy, now_s),
        reason=(
            f"{wanted} wanted: {needed} spot and {spares} spare ({shortage:.2%} chance to lack some in {exposed_s:.0f} s),"
            f" {floor} on demand and {stand_ins} standing in"
        ),
    )


def num_spares(needed: int, zones: Sequence[Zone], policy: HedgePolicy, exposed_s: float) -> tuple[int, float]:
    """How many spot instances to hold beyond `needed`, and the chance that more than those are lost within `exposed_s`.

    The instances are taken to be spread over `zones` evenly. The chance stays above `policy.shortage_share` where `max_spares`
    do not suffice.
    """
    if needed == 0:
        return 0, 0.0
    rate, sizes = mixed([(zone.instants_per_hour, zone.sizes) for zone in zones])
    each = rate / len(zones) * exposed_s / 3600
    shortage = 0.0
    for spares in range(policy.max_spares + 1):
        total = needed + spares
        shortage = float(taken(each * total, sizes, total)[spares + 1 :].sum())
        if shortage <= policy.shortage_share:
            return spares, shortage
    return policy.max_spares, shortage


def _ask(asking: Asking, staying: Sequence[Held], policy: HedgePolicy, wanted: int, needed: int, spares: int) -> int:
    """Asks for what is missing, what matters most first; how many on-demand instances should stand in."""
    num_spot, floor = sum(each.is_spot for each in staying), policy.on_demand_floor
    num_on_demand = len(staying) - num_spot
    asking.on_demand(floor - num_on_demand, f"{floor} on demand at least")
    asking.spot(needed - num_spot, f"{needed} of {wanted} wanted on spot")
    stand_ins = max(0, needed - num_spot - asking.num_spot) if policy.fall_back else 0
    asking.on_demand(stand_ins - max(0, num_on_demand - floor), f"{stand_ins} stand in: no zone gives spot instances")
    asking.spot(needed + spares - num_spot - asking.num_spot, f"{spares} spare")
    return stand_ins


def _renewed(
    zones: Sequence[Zone], staying: Sequence[Held], memory: HedgeMemory, policy: HedgePolicy, now_s: float
) -> dict[str, Breaker]:
    """Every zone's breaker as of now."""
    before = dict(memory.breakers)
    lived: dict[str, float] = {}
    for each in staying:
        if each.is_spot and each.ready_s is not None:
            lived[each.zone] = min(each.ready_s, lived.get(each.zone, inf))
    return {
        zone.name: renew(
            before.get(zone.name, Breaker()),
            policy.breaker,
            losses_per_hour=zone.losses_per_hour,
            last_loss_s=zone.last_loss_s,
            lived_since_s=lived.get(zone.name),
            now_s=now_s,
        )
        for zone in zones
    }


def _in_vain(
    memory: HedgeMemory, overdue: Sequence[Held], policy: HedgePolicy, now_s: float
) -> tuple[tuple[str, bool, float], ...]:
    """Instances that did not come, as far as they still matter."""
    recent = [each for each in memory.in_vain if now_s - each[2] < policy.retry_s]
    return tuple(dict.fromkeys([*recent, *((each.zone, each.is_spot, now_s) for each in overdue)]))


def _not_open(zones: Sequence[Zone], breakers: Mapping[str, Breaker]) -> list[Zone]:
    """Where spot instances are going to be: all zones but those whose breaker is open, unless it is open everywhere."""
    return [zone for zone in zones if breakers[zone.name].state is not BreakerState.OPEN] or list(zones)


def _surplus(before: Surplus | None, too_many: int, now_s: float) -> Surplus | None:
    if too_many <= 0:
        return None
    return Surplus(too_many, now_s) if before is None else Surplus(min(before.count, too_many), before.since_s)


def _returned(
    staying: Sequence[Held], needed: int, spares: int, zones: Sequence[Zone], memory: HedgeMemory, policy: HedgePolicy, now_s: float
) -> tuple[list[TerminationWish], Surplus | None, Surplus | None]:
    """Whom to return because there have been too many for long enough, and the surplus of spot and on-demand ones that waits.

    On-demand instances are too many when spot ones that are ready cover what is needed. Those go first that are not there yet,
    then those on which nothing runs; of these, spot ones of the zone that loses most and on-demand ones of the dearest, the
    youngest first.
    """
    spot, on_demand = [each for each in staying if each.is_spot], [each for each in staying if not each.is_spot]
    losses = {zone.name: zone.losses_per_hour for zone in zones}
    prices = {zone.name: zone.on_demand_usd_per_hour for zone in zones}
    uncovered = max(0, needed - sum(each.ready_s is not None for each in spot)) if policy.fall_back else 0
    spot_surplus = _surplus(memory.spot_surplus, len(spot) - needed - spares, now_s)
    on_demand_surplus = _surplus(memory.on_demand_surplus, len(on_demand) - policy.on_demand_floor - uncovered, now_s)
    wishes = []
    if spot_surplus is not None and now_s - spot_surplus.since_s >= policy.scale_down_s:
        going = sorted(spot, key=lambda each: _need(each, losses))[: spot_surplus.count]
        wishes += [TerminationWish(each.instance_id, f"too many for {policy.scale_down_s:g} s") for each in _there(going)]
        spot_surplus = _left(spot_surplus, going)
    if on_demand_surplus is not None and now_s - on_demand_surplus.since_s >= policy.return_s:
        going = sorted(on_demand, key=lambda each: _need(each, prices))[: on_demand_surplus.count]
        wishes += [TerminationWish(each.instance_id, f"not needed for {policy.return_s:g} s") for each in _there(going)]
        on_demand_surplus = _left(on_demand_surplus, going)
    return wishes, spot_surplus, on_demand_surplus


def _there(going: Sequence[Held]) -> list[Held]:
    """Those that can be returned now; the others as soon as they are there."""
    return [each for each in going if not each.is_only_asked]


def _left(surplus: Surplus, going: Sequence[Held]) -> Surplus | None:
    """What is still too many when those that can be returned have been: it waits no longer than the cloud does."""
    count = len(going) - len(_there(going))
    return Surplus(count, surplus.since_s) if count else None


def _need(each: Held, badness: Mapping[str, float]) -> tuple[bool, bool, float, float, str]:
    """Sorts those first that can be spared most easily. A zone that is no longer known is the worst."""
    return each.ready_s is not None, each.is_serving, -badness.get(each.zone, inf), -each.asked_s, each.instance_id


def _wake_s(staying: Sequence[Held], memory: HedgeMemory, zones: Sequence[Zone], policy: HedgePolicy, now_s: float) -> float | None:
    """The next time at which something is given up, asked again, proven or returned."""
    times = [each.asked_s + policy.arrive_s for each in staying if each.ready_s is None]
    refused = [when_s for zone in zones for when_s in (zone.spot_refused_s, zone.on_demand_refused_s) if when_s is not None]
    times += [when_s + policy.retry_s for when_s in (*refused, *(each[2] for each in memory.in_vain))]
    for name, breaker in memory.breakers:
        times.append(breaker.until_s)
        ready = [each.ready_s for each in staying if each.is_spot and each.zone == name and each.ready_s is not None]
        if breaker.state is BreakerState.HALF_OPEN and ready:
            times.append(max(min(ready), breaker.until_s) + policy.trial_s)
    times += [] if memory.spot_surplus is None else [memory.spot_surplus.since_s + policy.scale_down_s]
    times += [] if memory.on_demand_surplus is None else [memory.on_demand_surplus.since_s + policy.return_s]
    return min((each for each in times if each > now_s), default=None)
