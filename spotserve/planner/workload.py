"""What is asked of a fleet: how many requests, how they arrive, how long they are, and how soon they must be answered."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of a number of tokens, by quantiles: `points` are (share of requests, tokens at most), linear in between."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares, tokens = zip(*self.points, strict=True)
        assert shares[0] == 0.0 and shares[-1] == 1.0 and tokens[0] >= 0
        assert all(a < b for a, b in pairwise(shares)) and all(a <= b for a, b in pairwise(tokens))

    @classmethod
    def fixed(cls, tokens: float) -> "Lengths":
        """Every request has as many."""
        return cls(((0.0, tokens), (1.0, tokens)))

    @classmethod
    def of(cls, tokens: Sequence[float], *, num_points: int = 21) -> "Lengths":
        """As seen: quantiles of a sample that is not empty."""
        ordered = sorted(tokens)
        shares = [index / (num_points - 1) for index in range(num_points)]
        return cls(tuple((share, ordered[round(share * (len(ordered) - 1))]) for share in shares))

    def capped(self, most: float) -> "Lengths":
        """The same, with nothing longer than `most` tokens."""
        return Lengths(tuple((share, min(tokens, most)) for share, tokens in self.points))

    @property
    def mean(self) -> float:
        """Expected tokens."""
        return sum((b_share - a_share) * (a + b) / 2 for (a_share, a), (b_share, b) in pairwise(self.points))

    @property
    def mean_square(self) -> float:
        """Expected square of the tokens."""
        return sum((b_share - a_share) * (a * a + a * b + b * b) / 3 for (a_share, a), (b_share, b) in pairwise(self.points))

    def quantile(self, share: float) -> float:
        """Tokens that `share` of the requests do not exceed."""
        assert 0 <= share <= 1
        after = max(1, bisect_left(self.points, (share, 0.0)))
        (a_share, a), (b_share, b) = self.points[after - 1], self.points[after]
        return b if share == b_share else min(b, a + (b - a) * ((share - a_share) / (b_share - a_share)))


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests as they are expected."""

    rate_rps: float
    """Requests per second."""
    prompt: Lengths
    output: Lengths
    gap_cv: float = 1.0
    """Burstiness: standard deviation of the time between two arrivals, over its mean. 1: Poisson; 0: a metronome."""

    def __post_init__(self) -> None:
        assert self.rate_rps >= 0 and self.gap_cv >= 0 and self.prompt.mean > 0 and self.output.mean >= 1

    def within(self, context_tokens: int) -> "Workload":
        """The same, as far as a model of this context can serve it: the longest prompt and answer together fit."""
        longest = self.prompt.quantile(1.0) + self.output.quantile(1.0)
        if longest <= context_tokens:
            return self
        share = context_tokens / longest
        prompt = self.prompt.capped(share * self.prompt.quantile(1.0))
        return replace(self, prompt=prompt, output=self.output.capped(max(1.0, share * self.output.quantile(1.0))))


@dataclass(frozen=True, slots=True)
class Objective:
    """How soon requests must be answered; None: as soon as can be. Limits hold at the 99th percentile."""

    ttft_s: float | None = None
    """From arrival to the first token."""
    tpot_s: float | None = None
    """Between two tokens: (time from the first to the last token) / (tokens - 1)."""
    e2e_s: float | None = None
    """From arrival to the last token."""

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return (self.ttft_s, self.tpot_s, self.e2e_s) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Latency:
    """What requests meet. Infinite where the load is beyond what can be served."""

    ttft_mean_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    e2e_mean_s: float
    e2e_p99_s: float
    utilisation: float
    """Load over the largest load that can be served for ever."""

    def meets(self, objective: Objective) -> bool:
        """Whether every limit is kept."""
        pairs = ((self.ttft_p99_s, objective.ttft_s), (self.tpot_p99_s, objective.tpot_s), (self.e2e_p99_s, objective.e2e_s))
        return self.utilisation < 1 and all(limit is None or seconds <= limit for seconds, limit in pairs)
