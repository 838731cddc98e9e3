"""How many machines to hold where nobody has said: the fewest with which requests meet their limits or, where there are none, are
about as fast as with all that may be held.

Asked of the planner's search, machine by machine: what would be best on n machines of the kind that the fleet has, for the load
that is believed? More machines never serve worse, so the fewest are found by halving. Machines beyond them, for losses, are
`planner.hedge`'s.

Owner of what it found last. Knows no commands.
"""

from math import inf

from spotserve.controller.choosing import Chooser
from spotserve.planner.workload import Latency, Objective, Workload

ABOUT_AS_FAST = 1.25
"""Without limits: the end-to-end time at the 99th percentile may be so many times that with all machines that may be held."""

SPARE_SHARE = 0.15
"""Of what the machines can serve: loads swing, and where little is spare requests wait for each other."""

AGAIN_S = 60.0
"""No sooner is it asked again: machines take longer to start, and each question is some searches of large fleets."""


class Sizing:
    """The number of machines that the load needs."""

    def __init__(self, chooser: Chooser, *, least: int, most: int) -> None:
        """`least`: wanted while nothing is known of machines and model."""
        self._chooser = chooser
        self._least = least
        self._most = most
        self._found: tuple[Workload, int] | None = None
        self._asked_s = 0.0

    def wanted(self, now_s: float) -> int:
        """Machines to hold for the load that is expected now."""
        if self._chooser.blindness() is not None:
            return self._least
        workload = self._chooser.believed(now_s)
        if self._found is None or (self._found[0] != workload and now_s >= self._asked_s + AGAIN_S):
            self._found = (workload, max(self._least, self._fewest(now_s)))
            self._asked_s = now_s
        return self._found[1]

    def _fewest(self, now_s: float) -> int:
        all_of_them = self._chooser.prospect(self._most, now_s)
        limit_s = ABOUT_AS_FAST * all_of_them.e2e_p99_s

        def is_enough(latency: Latency) -> bool:
            objective = self._chooser.objective
            if latency.utilisation > 1 - SPARE_SHARE:
                return False
            return latency.meets(objective) if objective != Objective() else latency.e2e_p99_s <= limit_s

        low, high = 0, self._most
        if not is_enough(all_of_them) or limit_s == inf:
            return self._most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(self._chooser.prospect(middle, now_s)) else (middle, high)
        return high
