"""Which of several fleets is the best, and in which words the others lost.

With limits: those that keep them by dollars, then machines, then time; of those that do not the one that serves most within them.
Without: those that carry the rate by time, but of those nearly as fast as the fastest the cheapest first; then by throughput.
Knows what fleets are worth, not what they are made of.
"""

from collections.abc import Sequence
from math import inf

from spotserve.planner.fleets import Fleet
from spotserve.planner.judge import Judge, Verdict
from spotserve.planner.workload import Latency, Objective

NEAR = 1.02
"""Times that differ by less are equal to a model that is a few per cent wrong."""


class Ranking:
    """An order of fleets. One owner, for one search."""

    def __init__(self, judge: Judge, objective: Objective, limits: Objective) -> None:
        """`objective` is what is wanted; `limits` the same, or none when nothing keeps it at any rate."""
        self._judge, self._objective, self._limits = judge, objective, limits

    def ranked(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The best first, each fleet once."""
        every = list({verdict.fleet: verdict for verdict in verdicts}.values())
        if not self._limits.is_set:
            return self._by_time(every)
        meeting = sorted((verdict for verdict in every if verdict.meets), key=_cost_of)
        others = sorted(
            (verdict for verdict in every if not verdict.meets), key=lambda verdict: (-verdict.throughput_rps, verdict.fleet)
        )
        if meeting:
            return meeting + others
        goodputs, best_rps = dict.fromkeys((verdict.fleet for verdict in others), 0.0), 0.0
        for verdict in others:
            goodputs[verdict.fleet] = self._judge.goodput_rps(verdict.fleet, above=best_rps)
            best_rps = max(best_rps, goodputs[verdict.fleet])
        return (
            sorted(others, key=lambda verdict: (-goodputs[verdict.fleet], *_cost_of(verdict)))
            if best_rps
            else self._by_time(others)
        )

    def _by_time(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The best first when there are no limits."""
        carrying = [verdict for verdict in verdicts if verdict.latency.e2e_p99_s < inf]
        near_s = NEAR * min((verdict.latency.e2e_p99_s for verdict in carrying), default=inf)
        near = sorted((verdict for verdict in carrying if verdict.latency.e2e_p99_s <= near_s), key=_cost_of)
        slower = sorted(
            (verdict for verdict in carrying if verdict.latency.e2e_p99_s > near_s), key=lambda v: (v.latency.e2e_p99_s, v.fleet)
        )
        short = [verdict for verdict in verdicts if verdict.latency.e2e_p99_s == inf]
        return near + slower + sorted(short, key=lambda verdict: (-verdict.throughput_rps, *_cost_of(verdict)))

    def is_better(self, one: Verdict, other: Verdict) -> bool:
        """Whether `one` is better than `other`, by more than a model's noise where they are equally dear."""
        if self._limits.is_set and one.meets != other.meets:
            return one.meets
        if self._limits.is_set and one.meets:
            return _cost_of(one) < _cost_of(other)
        if self._limits.is_set:
            reached_rps = self._judge.goodput_rps(other.fleet)
            return self._judge.goodput_rps(one.fleet, above=1.01 * reached_rps) > reached_rps
        if min(one.latency.e2e_p99_s, other.latency.e2e_p99_s) < inf:
            return one.latency.e2e_p99_s < 0.999 * other.latency.e2e_p99_s
        return one.throughput_rps > 1.001 * other.throughput_rps

    def why_best(self, best: Verdict) -> str:
        """What makes it the best."""
        if self._objective.is_set and best.meets:
            return "the least dollars per hour that keep the limits"
        if self._limits.is_set:
            return "the most requests per second within the limits, which not all of them are"
        limits = "nothing keeps the limits at any rate: " if self._objective.is_set else ""
        if best.latency.utilisation < 1:
            return f"{limits}the shortest end-to-end time at the 99th percentile, within 2 % the least dollars"
        return f"{limits}the most requests per second, which are fewer than come"

    def why_not(self, verdict: Verdict, best: Verdict) -> str:
        """The first thing in which it is worse than the best."""
        mine, its = verdict.latency, best.latency
        if mine.utilisation >= 1:
            return f"serves {verdict.throughput_rps:.3g} requests per second for ever, the best {best.throughput_rps:.3g}"
        if best.meets and not verdict.meets:
            return _missed(mine, self._objective)
        slower = f"end-to-end p99 is {mine.e2e_p99_s:.4g} s, that of the best {its.e2e_p99_s:.4g} s"
        if not self._limits.is_set and mine.e2e_p99_s > NEAR * its.e2e_p99_s:
            return slower
        if self._limits.is_set and not best.meets:
            return "serves fewer requests per second within the limits"
        if verdict.usd_per_hour > best.usd_per_hour:
            return f"costs {verdict.usd_per_hour - best.usd_per_hour:.2f} dollars per hour more"
        if verdict.num_instances > best.num_instances:
            return f"takes {verdict.num_instances - best.num_instances} more machines"
        return slower


def _cost_of(verdict: Verdict) -> tuple[float, int, float, Fleet]:
    """Dollars to a hundredth of a cent, machines, time."""
    return round(verdict.usd_per_hour, 4), verdict.num_instances, verdict.latency.e2e_p99_s, verdict.fleet


def _missed(latency: Latency, objective: Objective) -> str:
    """The first limit that is missed."""
    names = (
        ("TTFT", latency.ttft_p99_s, objective.ttft_s),
        ("TPOT", latency.tpot_p99_s, objective.tpot_s),
        ("end-to-end", latency.e2e_p99_s, objective.e2e_s),
    )
    return next(
        f"{name} p99 is {took:.3g} s, the limit {limit:.3g} s" for name, took, limit in names if limit is not None and took > limit
    )
