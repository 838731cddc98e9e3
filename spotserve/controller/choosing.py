"""What should run where the planner may choose: what is kept, what is found, and whether changing pays.

Two kinds of plans are weighed. *Grown* ones keep every replica that has its devices and give the free devices something to do.
*Anew* ones are the best for all devices, whatever runs now; what they have in common with what runs stays where it is. A plan from
anew has to earn what the change costs (`planner.outlook`). Devices that idle otherwise are used at once: machines that are there
are paid for. With `use_idle` off growing has to pay as well, and machines on which nothing runs can be returned.

A large fleet reacts to an event by growing, which costs the same whatever its size, and is looked at as a whole when it has been
quiet for a while; one that serves too little also in between, but not at every event.

Owner of what is learned of the fleet for planning. Knows no commands.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from spotserve.config import ControllerSettings
from spotserve.controller.bringup import reckon
from spotserve.controller.demand import Demand
from spotserve.controller.fleet import Fleet
from spotserve.controller.offer import offer_of
from spotserve.controller.proposals import EngineTerms, Proposal, Proposer, Terms
from spotserve.controller.records import Replica
from spotserve.core.cluster import DeviceId
from spotserve.core.hardware import InstanceType
from spotserve.core.plan import Parallel, Plan, ReplicaPlan
from spotserve.planner.fleets import Pool
from spotserve.planner.hazard import HazardBook
from spotserve.planner.outlook import Option, Worth, weigh
from spotserve.planner.risk import Risk
from spotserve.planner.workload import Latency, Objective, Workload

AT_ONCE_DEVICES = 64
"""Fleets of at most so many devices are looked at as a whole after every event: that takes tenths of a second."""

QUIET_S = 10.0
"""A fleet is looked at as a whole when nothing has happened to it for so long: a larger one may have grown crooked, and the load of
any may have changed."""

ANEW_WEIGHED = 3
"""Plans from anew that are weighed against the grown one."""

BELIEVED_S = 1800.0
"""While neither machines nor load have changed a look at the whole fleet finds what the last one found, but for what is believed of
risks, which moves slowly: so often it is looked at all the same."""

BRING_UP_S = 1.0
"""Until a slot whose weights are there serves: building the stage, and joining the group."""

RECOVER_S = 120.0
"""Until a replacement of a lost machine serves: the launch and start-up time of SpotServe (section 6.1)."""

AS_MUCH_SHARE = 0.01
"""Of the load: plans whose expected service differs by less serve about as much."""

FASTER_SHARE = 0.8
"""Without limits plans that serve about as much are about as fast, too, if the quicker one takes at least this share of the time at
the 99th percentile."""

COSTS_AT_MOST = 0.05
"""And if the change takes at most this share of the time over which it pays."""

REQUEST_WORTH = 100.0
"""What serving a request is worth, in what it costs: dollars decide between plans that serve about the same."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan that was weighed, for people."""

    proposal: Proposal
    is_chosen: bool
    verdict: str


@dataclass(frozen=True, slots=True)
class Whole:
    """What was known when every plan was weighed last, and what was chosen."""

    devices: frozenset[DeviceId]
    workload: Workload
    hardware: Mapping[str, InstanceType]
    replicas: tuple[ReplicaPlan, ...]
    looked_s: float


class Chooser:
    """Chooses plans for one fleet."""

    def __init__(self, fleet: Fleet, demand: Demand, settings: ControllerSettings, engine: EngineTerms) -> None:
        self._fleet = fleet
        self._demand = demand
        self.objective = Objective(ttft_s=settings.ttft_s, tpot_s=settings.tpot_s, e2e_s=settings.e2e_s)
        self._engine = engine
        self._use_idle = settings.use_idle
        self._proposer = Proposer(fleet)
        self.hazards = HazardBook()
        self.alternatives: tuple[Alternative, ...] = ()
        """Plans that were weighed last, the chosen one first."""
        self.terms: Terms | None = None
        """What the last plan was made for."""
        self._looked_s = -inf
        """When the fleet was last looked at as a whole."""
        self.look_s: float | None = None
        """When the fleet is to be looked at as a whole again; None: nothing was planned yet."""
        self._whole: Whole | None = None
        self._asked: Workload | None = None

    def blindness(self) -> str | None:
        """Why nothing can be chosen; None when something can."""
        if self._fleet.model is None:
            return "no worker has said yet what the model is"
        if not any(each.instance_type for each in self._fleet.alive()):
            return "no worker says what kind of machine it is: start the system with --parallel auto to have them measured"
        return None

    @property
    def losers(self) -> tuple[str, ...]:
        """What never became a plan when the last search found little, and why."""
        return self._proposer.losers

    def refuse(self, shape: Parallel, reason: str) -> None:
        """A shape cannot be brought up: it is not planned again."""
        self._proposer.refuse(shape, reason)
        self._whole = None

    def choose(self, staying: Sequence[Replica], current: Plan | None, *, next_replica_number: int, now_s: float) -> Plan | str:
        """What should run on the machines that are there to stay, or why nothing can be planned.

        Args:
            staying: replicas that may be kept, those that matter most first.
            current: what should run until now; it is returned itself when it is to go on.
            next_replica_number: names of new replicas count from here.
            now_s: the time.
        """
        if (problem := self.blindness()) is not None:
            return problem
        is_look = self.look_s is not None and now_s >= self.look_s
        self.look_s = now_s + QUIET_S
        if current is not None and self._is_as_before(current, staying, now_s):
            return current
        asked = self.believed(now_s)
        terms = self._terms(now_s)
        self.terms = terms
        kept = self._proposer.keepable(staying, terms)
        running, fixed = [replica for replica, _ in kept], [choice for _, choice in kept]
        offer = offer_of(self._fleet, running)
        propose = partial(self._proposer.propose, staying=running, terms=terms, next_replica_number=next_replica_number)
        found = propose(offer.free, fixed=fixed, most=1)
        base = grown = found[0] if found else Proposal()
        others: list[Proposal] = []
        is_short = grown.throughput_rps <= terms.workload.rate_rps and (not grown.replicas or now_s >= self._looked_s + QUIET_S)
        if is_look or offer.num_devices <= AT_ONCE_DEVICES or is_short:
            others = propose(offer.all, most=ANEW_WEIGHED)
            self._looked_s = now_s
        if fixed and not self._use_idle:
            base, others = propose((), fixed=fixed, most=1)[0], [grown, *others]
        if not base.replicas and not others:
            return f"nothing can be planned: {'; '.join(self.losers) or 'there are no machines'}"
        chosen, reason = self._weigh(base, others, now_s)
        whole = Whole(frozenset(self._fleet.ready_devices()), asked, dict(self._fleet.hardware), chosen.replicas, now_s)
        self._whole = whole if self._looked_s == now_s else None
        if current is not None and chosen.replicas == current.replicas:
            return current
        return Plan(epoch=1 if current is None else current.epoch + 1, replicas=chosen.replicas, reason=reason)

    def put_off(self, now_s: float) -> None:
        """A look that was due could not be taken, for want of machines perhaps: the next one is due later."""
        if self.look_s is not None and self.look_s <= now_s:
            self.look_s = now_s + QUIET_S

    def prospect(self, num_machines: int, now_s: float) -> Latency:
        """What requests would meet on so many machines like those that the fleet has most of, whatever runs on them now."""
        kinds = Counter((each.instance_type, each.usd_per_hour) for each in self._fleet.alive() if each.instance_type)
        (name, usd_per_hour), _ = min(kinds.items(), key=lambda item: (-item[1], item[0]))
        hardware = self._fleet.hardware[name]
        pool = Pool(hardware, num_machines * hardware.num_devices, usd_per_hour)
        return self._proposer.prospect(pool, self._terms(now_s))

    def believed(self, now_s: float) -> Workload:
        """The load to plan for: what it was when it was last looked at, unless it has changed by more than chance."""
        if self._asked is None or self._demand.has_changed(self._asked, now_s):
            self._asked = self._demand.workload(now_s)
        return self._asked

    def _terms(self, now_s: float) -> Terms:
        workload = self.believed(now_s).within(self._longest())
        return Terms(workload, self.objective, self._engine, use_idle=self._use_idle)

    def _is_as_before(self, current: Plan, staying: Sequence[Replica], now_s: float) -> bool:
        """Whether the machines and the load are those for which the plan was found when everything was last weighed, and all of it
        still stands: then nothing better would be found."""
        seen = self._whole
        return (
            seen is not None
            and now_s < seen.looked_s + BELIEVED_S
            and seen.replicas == current.replicas
            and {each.replica_id for each in staying}.issuperset([each.replica_id for each in current.replicas])
            and seen.devices == frozenset(self._fleet.ready_devices())
            and seen.hardware == self._fleet.hardware
            and not self._demand.has_changed(seen.workload, now_s)
        )

    def _longest(self) -> int:
        """Tokens of the longest request that a replica can run."""
        assert self._fleet.model is not None
        context = self._fleet.model.context_tokens
        return context if self._engine.kv_tokens is None else min(context, self._engine.kv_tokens)

    # ------------------------------------------------------------------ weighing

    def _weigh(self, base: Proposal, found: Sequence[Proposal], now_s: float) -> tuple[Proposal, str]:
        """What to run, and why. What a change costs is worked out only for plans that would win if it cost nothing."""
        others = list({each.name: each for each in found if each.name != base.name}.values())
        risk = self.hazards.risk(now_s, RECOVER_S) if self._fleet.methods.looks_ahead else Risk()
        tempting = [each for each in others if self._better(base, [each], risk)[0] is not base]
        weighed = [self._with_change(each) for each in tempting]
        chosen, reason = self._better(base, weighed, risk)
        if not base.replicas:
            reason = f"{chosen.name}: {chosen.why}"
        told = {each.name: Alternative(each, False, each.why) for each in others}
        told |= {each.name: Alternative(each, False, f"does not pay what the change costs; {each.why}") for each in weighed}
        if chosen is not base and base.replicas:
            told[base.name] = Alternative(base, False, f"without a change: {base.why}")
        told.pop(chosen.name, None)
        self.alternatives = (Alternative(chosen, True, reason), *told.values())
        return chosen, reason

    def _better(self, base: Proposal, others: Sequence[Proposal], risk: Risk) -> tuple[Proposal, str]:
        """The best of these by what they are expected to serve; without limits, of those that serve about as much, the fastest."""
        assert self.terms is not None
        if not others:
            is_limited = self.objective.is_set
            return base, f"stay with {base.name}: there is nothing else" if is_limited else f"{base.name}: {base.why}"
        rate_rps = self.terms.workload.rate_rps
        by_name = {each.name: each for each in (*others, base)}
        dearest = max(each.usd_per_hour for each in by_name.values())
        verdict = weigh(
            [_option(each) for each in by_name.values()],
            stay=base.name,
            demand_rps=rate_rps,
            risk=risk,
            recover_s=RECOVER_S,
            request_usd=REQUEST_WORTH * max(dearest, 1e-3) / 3600 / max(rate_rps, 1e-3),
        )
        chosen = by_name[verdict.option.name]
        if self.objective.is_set:
            return chosen, verdict.reason
        return self._soonest(chosen, by_name.values(), {each.name: each for each in verdict.worths}, verdict.reason)

    def _soonest(
        self, chosen: Proposal, proposals: Iterable[Proposal], worths: Mapping[str, Worth], reason: str
    ) -> tuple[Proposal, str]:
        """Of plans that serve about as much as the chosen one the fastest; of those about as fast the one that moves least."""
        assert self.terms is not None
        enough_rps = worths[chosen.name].served_rps - AS_MUCH_SHARE * self.terms.workload.rate_rps
        near = [
            each
            for each in proposals
            if worths[each.name].served_rps >= enough_rps and each.change_s <= COSTS_AT_MOST * worths[each.name].life_s
        ]
        fastest_s = min((each.latency.e2e_p99_s for each in near), default=inf)
        fast = [each for each in near if FASTER_SHARE * each.latency.e2e_p99_s <= fastest_s]
        best = min(fast, key=lambda each: (each.moved_bytes, each.latency.e2e_p99_s), default=chosen)
        if best is chosen:
            return chosen, reason
        told = f"end-to-end p99 {best.latency.e2e_p99_s:.3g} s, {best.moved_bytes} bytes to move, {best.change_s:.3g} s of change"
        instead = f"{chosen.latency.e2e_p99_s:.3g} s, {chosen.moved_bytes} bytes, {chosen.change_s:.3g} s with {chosen.name}"
        return best, f"{best.name} serves as much: {told}; {instead}"

    def _with_change(self, proposal: Proposal) -> Proposal:
        """The same with the time and the bytes until it serves, at least."""
        if not self._fleet.methods.looks_ahead:
            return proposal
        running = self._fleet.replicas
        missing = [each for each in proposal.replicas if each.replica_id not in running]
        kept = {
            device
            for each in proposal.replicas
            if each.replica_id in running
            for device in running[each.replica_id].devices.values()
        }
        free = [device for device in self._fleet.ready_devices() if device not in kept]
        fetch_s, num_bytes = reckon(self._fleet, missing, free)
        return replace(proposal, change_s=fetch_s + BRING_UP_S, moved_bytes=num_bytes)


def _option(proposal: Proposal) -> Option:
    """What runs goes on beside a change, so no capacity is missing meanwhile."""
    return Option(
        name=proposal.name,
        replicas=proposal.footprints,
        usd_per_hour=proposal.usd_per_hour,
        change_s=proposal.change_s,
        lost_rps=0.0,
        moved_bytes=proposal.moved_bytes,
    )
