"""How often instances of one type in one zone are taken, and how many at once, learned from what happened to them.

A loss *instant* takes a group of instances. Instants of a cell with n instances alive arrive at the rate

    n * (calm + stirred * exp(-(t - last instant) / stir_s))        per hour

since losses draw others after them (SkyServe, EuroSys'25: after a first preemption, 83-97 % of the time another follows in that
zone within 5 minutes). Both coefficients are posterior means of a Gamma prior: instants over instance-hours, the latter weighted
by how stirred the cell was; an instant counts for each in proportion to what each had predicted (one step of expectation
maximisation). How many an instant takes is a histogram. All of it is forgotten exponentially, down to the prior.

Invariant: losses within `merge_s` of the first one are one instant; one whose notice did not come true is taken back. Knows no
clock: times are arguments and should not go back (what is late counts as now).
"""

from dataclasses import dataclass, field
from math import exp, expm1, inf

from spotserve.planner.risk import Sizes

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class HazardPrior:
    """What is believed before anything is seen, and how fast that is what is believed again."""

    instants_per_hour: float = 0.32
    """Loss instants per instance-hour. Bamboo's G4dn trace: 48 instants in 136 instance-hours, 0.35; its P3 trace: 0.61 losses
    per instance-hour, 2.1 at a time, 0.29. With `sizes` that makes 0.50 losses; the traces have 0.55-0.61."""
    weight_h: float = 3.0
    """Instance-hours that the prior counts as. One instant's worth: other public traces lie between 0.02 and 1.6 losses per
    instance-hour (Bamboo's p2 and g4dn.xlarge series, GCP A100 at 0.10), so what a zone does itself must soon prevail."""
    stirred_per_hour: float = 0.32
    """Further instants per instance-hour right after an instant. Between SkyServe's figure, which would be ten times as much
    for its small fleets, and what the public single-zone traces show: 14-36 % of instants have another one within 5 minutes where
    independent ones would have 10-31 %."""
    stirred_weight_h: float = 1.0
    """Stirred instance-hours that `stirred_per_hour` counts as."""
    stir_s: float = 180.0
    """In which the effect of an instant falls to 1/e: most of it within SkyServe's 5 minutes."""
    sizes: Sizes = ((1, 0.65), (2, 0.25), (3, 0.04), (4, 0.04), (5, 0.02))
    """Bamboo's G4dn trace: 31, 12, 2, 2 and 1 of 48 instants."""
    sizes_weight: float = 5.0
    """Instants that `sizes` counts as."""
    memory_s: float = 12 * HOUR_S
    """In which the weight of what was seen falls to 1/e."""
    merge_s: float = 60.0
    """Losses within less than this of the first are one instant: the public traces are sampled once a minute."""
    merge_share: float = 0.25
    """And within less than this share of the usual time between two instants: where a fleet is so large that one comes every few
    seconds, what is close together need not belong together."""
    settle_s: float = 300.0
    """For how long a notice can be taken back; clouds give 120 s at most."""
    signal_s: float = 900.0
    """For how long a soft signal raises the risk of its instance. Ours: no cloud states one."""
    signal_truth: float = 0.5
    """Share of soft signals that are followed by a loss in `signal_s`. Ours: there is no public figure."""
    signal_weight: float = 2.0
    """Signals that `signal_truth` counts as."""

    def __post_init__(self) -> None:
        positive = (self.instants_per_hour, self.weight_h, self.stirred_weight_h, self.stir_s, self.sizes_weight, self.memory_s)
        assert min(positive) > 0 and self.stirred_per_hour >= 0 and self.stir_s != self.memory_s
        assert 0 < self.signal_truth < 1 and min(self.signal_weight, self.signal_s) > 0 and self.merge_s <= self.settle_s


@dataclass(slots=True)
class _Instant:
    """Losses that count as one, and can still be taken back."""

    at_s: float
    stirred_share: float
    """How much of it counts as drawn by the instant before."""
    before_s: float
    """When that was."""
    instance_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Tally:
    """Decayed sums as of a moment."""

    alive_h: float
    stirred_h: float
    calm: float
    stirred: float


@dataclass(slots=True)
class CellBook:
    """What is known of one type in one zone, as of `as_of_s`."""

    as_of_s: float
    alive: dict[str, None] = field(default_factory=dict)
    tally: _Tally = _Tally(0.0, 0.0, 0.0, 0.0)
    sizes: dict[int, float] = field(default_factory=dict)
    last_s: float = -inf
    """When the latest instant was."""
    unsettled: list[_Instant] = field(default_factory=list)

    def settled(self, prior: HazardPrior, now_s: float) -> _Tally:
        """The sums at `now_s`, when nothing happened since: what was seen decays, those alive add their hours."""
        elapsed_s = max(0.0, now_s - self.as_of_s)
        kept = exp(-elapsed_s / prior.memory_s)
        hours = len(self.alive) / HOUR_S
        alive_h = hours * prior.memory_s * (1 - kept)
        stir = exp(-max(0.0, self.as_of_s - self.last_s) / prior.stir_s)
        stir_gone = exp(-elapsed_s / prior.stir_s)
        stirred_h = hours * stir * (kept - stir_gone) / (1 / prior.stir_s - 1 / prior.memory_s)
        old = self.tally
        return _Tally(old.alive_h * kept + alive_h, old.stirred_h * kept + stirred_h, old.calm * kept, old.stirred * kept)

    def advance(self, prior: HazardPrior, now_s: float) -> None:
        """Brings the sums to `now_s` and settles instants that can no longer be taken back."""
        if now_s > self.as_of_s:
            kept = exp(-(now_s - self.as_of_s) / prior.memory_s)
            self.tally = self.settled(prior, now_s)
            self.sizes = {size: count * kept for size, count in self.sizes.items() if count * kept > 1e-6}
            self.as_of_s = now_s
        while self.unsettled and self.unsettled[0].at_s + prior.settle_s < self.as_of_s:
            instant, old = self.unsettled.pop(0), self.tally
            weight = exp(-(self.as_of_s - instant.at_s) / prior.memory_s)
            stirred = instant.stirred_share * weight
            self.tally = _Tally(old.alive_h, old.stirred_h, old.calm + weight - stirred, old.stirred + stirred)
            size = len(instant.instance_ids)
            self.sizes[size] = self.sizes.get(size, 0.0) + weight

    def coefficients(self, prior: HazardPrior, now_s: float) -> tuple[float, float]:
        """Posterior means: instants per instance-hour when calm, and what the moment after an instant adds."""
        tally = self.settled(prior, now_s)
        weights = [exp(-max(0.0, now_s - each.at_s) / prior.memory_s) for each in self.unsettled]
        stirred = sum(weight * each.stirred_share for weight, each in zip(weights, self.unsettled, strict=True))
        calm, stirred = tally.calm + sum(weights) - stirred, tally.stirred + stirred
        calm_rate = (prior.instants_per_hour * prior.weight_h + calm) / (prior.weight_h + tally.alive_h)
        told = prior.stirred_per_hour * prior.stirred_weight_h + stirred
        return calm_rate, told / (prior.stirred_weight_h + tally.stirred_h)

    def instants_per_hour(self, prior: HazardPrior, now_s: float, over_s: float) -> float:
        """Per instance, on average from `now_s` on over `over_s`, when no further instant stirs the cell."""
        calm, stirred = self.coefficients(prior, now_s)
        stir = exp(-max(0.0, now_s - self.last_s) / prior.stir_s)
        mean_stir = stir if over_s <= 0 else stir * -expm1(-over_s / prior.stir_s) * prior.stir_s / over_s
        return calm + stirred * mean_stir

    def size_shares(self, prior: HazardPrior, now_s: float) -> Sizes:
        """Posterior mean of the distribution of sizes."""
        kept = exp(-max(0.0, now_s - self.as_of_s) / prior.memory_s)
        counts = {size: share * prior.sizes_weight for size, share in prior.sizes}
        for size, count in self.sizes.items():
            counts[size] = counts.get(size, 0.0) + count * kept
        for instant in self.unsettled:
            size = len(instant.instance_ids)
            counts[size] = counts.get(size, 0.0) + exp(-max(0.0, now_s - instant.at_s) / prior.memory_s)
        total = sum(counts.values())
        return tuple((size, count / total) for size, count in sorted(counts.items()))

    def take(self, prior: HazardPrior, instance_id: str, now_s: float) -> None:
        """One of its instances is lost, or will be."""
        self.advance(prior, now_s)
        calm, stirred = self.coefficients(prior, now_s)
        usual_gap_s = HOUR_S / (calm * len(self.alive)) if self.alive else inf
        self.alive.pop(instance_id, None)
        if not self.unsettled or now_s - self.unsettled[-1].at_s >= min(prior.merge_s, prior.merge_share * usual_gap_s):
            stir = stirred * exp(-max(0.0, now_s - self.last_s) / prior.stir_s)
            self.unsettled.append(_Instant(now_s, stir / (calm + stir), self.last_s))
            self.last_s = now_s
        self.unsettled[-1].instance_ids.add(instance_id)

    def spare(self, prior: HazardPrior, instance_id: str, now_s: float) -> None:
        """One that was said to go stays: its part in an instant is taken back, unless that is settled."""
        self.advance(prior, now_s)
        self.alive[instance_id] = None
        for index, instant in enumerate(self.unsettled):
            instant.instance_ids.discard(instance_id)
            if not instant.instance_ids:
                if self.last_s == instant.at_s:
                    self.last_s = instant.before_s
                del self.unsettled[index]
                return
