"""What is asked of the fleet, learned from what gateways report: how many sequences come, how evenly, and how long they are.

Counts per window give the rate and, by their dispersion, the burstiness: for a renewal process the variance of a count over its
mean tends to the squared coefficient of variation of the gaps. A window is long enough for slow swings to show, which the gaps
alone would hide.
"""

from collections import deque
from math import sqrt

from spotserve.core.messages import GatewayReport, Served
from spotserve.planner.workload import Lengths, Workload

WINDOW_S = 5.0
"""One count of arrivals."""

WINDOWS_KEPT = 24
"""Two minutes: long enough for a dispersion, short enough to follow a day."""

RATE_WINDOWS = 6
"""The newest half minute gives the rate (SpotServe, ASPLOS'24, section 3.2, takes as long)."""

LENGTHS_KEPT = 512
LEAST_LENGTHS = 8
"""Before so many sequences have been answered nothing is believed of their lengths."""

UNKNOWN = Workload(rate_rps=1.0, prompt=Lengths.fixed(512), output=Lengths.fixed(128))
"""Until anything is known: the requests of the SpotServe paper (section 6.1), one per second."""

BEYOND_CHANCE = 3.0
"""Standard errors by which an estimate has to differ before it is believed that the load has changed."""

MUCH_BURSTIER = 1.5

GAP_CV_LIMITS = (0.05, 8.0)


class Demand:
    """The newest windows and lengths. One owner; time is an argument."""

    def __init__(self, known: Workload | None = None) -> None:
        """`known`: what the user says is coming; then nothing is learned."""
        self._known = known
        self._counts: deque[int] = deque(maxlen=WINDOWS_KEPT)
        self._window: int | None = None
        self._arrived = 0
        self._served: deque[Served] = deque(maxlen=LENGTHS_KEPT)

    def note(self, report: GatewayReport, now_s: float) -> None:
        """One gateway has told what came and went."""
        self._roll(now_s)
        self._arrived += report.arrived
        self._served.extend(report.served)

    def workload(self, now_s: float) -> Workload:
        """What is expected from now on. Before the first requests: `UNKNOWN`."""
        if self._known is not None:
            return self._known
        self._roll(now_s)
        newest = list(self._counts)[-RATE_WINDOWS:]
        if not any(self._counts):
            return UNKNOWN
        rate_rps = sum(newest) / (len(newest) * WINDOW_S)
        prompt, output = UNKNOWN.prompt, UNKNOWN.output
        if len(self._served) >= LEAST_LENGTHS:
            prompt = Lengths.of([each.prompt_tokens for each in self._served])
            output = Lengths.of([each.output_tokens for each in self._served])
        return Workload(rate_rps=rate_rps, prompt=prompt, output=output, gap_cv=self._gap_cv())

    def has_changed(self, since: Workload, now_s: float) -> bool:
        """Whether what is expected now differs from what was expected then by more than chance: the rate by three standard errors
        of a count of as many arrivals, lengths by as many of a mean, burstiness by half."""
        now = self.workload(now_s)
        if now == since:
            return False
        counted_s = max(1, min(len(self._counts), RATE_WINDOWS)) * WINDOW_S
        error_rps = max(since.gap_cv, now.gap_cv) * sqrt(max(since.rate_rps, now.rate_rps) / counted_s)
        if abs(now.rate_rps - since.rate_rps) > BEYOND_CHANCE * sqrt(2) * error_rps:  # both are estimates
            return True
        lengths = ((since.prompt, now.prompt), (since.output, now.output))
        if any(abs(b.mean - a.mean) > BEYOND_CHANCE * _error(a, b, len(self._served)) for a, b in lengths):
            return True
        return not 1 / MUCH_BURSTIER < (now.gap_cv + 0.1) / (since.gap_cv + 0.1) < MUCH_BURSTIER

    def _gap_cv(self) -> float:
        """Of the windows; Poisson until there are enough of them."""
        if len(self._counts) < RATE_WINDOWS or sum(self._counts) < LEAST_LENGTHS:
            return 1.0
        mean = sum(self._counts) / len(self._counts)
        variance = sum((count - mean) ** 2 for count in self._counts) / (len(self._counts) - 1)
        low, high = GAP_CV_LIMITS
        return min(high, max(low, sqrt(variance / mean)))

    def _roll(self, now_s: float) -> None:
        """Closes the windows that have ended; those in which nothing was heard count as empty."""
        window = int(now_s // WINDOW_S)
        if self._window is None:
            self._window = window
        for _ in range(min(window - self._window, WINDOWS_KEPT)):
            self._counts.append(self._arrived)
            self._arrived = 0
        self._window = max(window, self._window)


def _error(one: Lengths, other: Lengths, seen: int) -> float:
    """Standard error of a mean length, of so many that were seen, by the wider of both distributions."""
    variance = max(each.mean_square - each.mean**2 for each in (one, other))
    return sqrt(2 * max(0.0, variance) / max(1, seen)) + 1e-9
