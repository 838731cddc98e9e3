"""When to try again what has failed: at once, then after pauses that double, so that nothing is tried in a tight loop."""

from collections.abc import Hashable

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

FORGET_AFTER_S = 60.0
"""A cause that has not shown for so long begins anew."""


class Retries:
    """Counts failures by cause."""

    def __init__(self) -> None:
        self._failures: dict[Hashable, tuple[int, float]] = {}
        self.due_s: float | None = None
        """When to try again next; None: nothing waits."""

    def failed(self, cause: Hashable, now_s: float) -> float:
        """Notes a failure; the pause before another attempt, 0 for the first one."""
        self._failures = {
            known: (count, seen_s) for known, (count, seen_s) in self._failures.items() if now_s - seen_s <= FORGET_AFTER_S
        }
        count = self._failures.get(cause, (0, 0.0))[0] + 1
        self._failures[cause] = (count, now_s)
        if count == 1:
            return 0.0
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(count - 2, 20))
        self.due_s = now_s + pause_s if self.due_s is None else min(self.due_s, now_s + pause_s)
        return pause_s

    def take_due(self, now_s: float) -> bool:
        """Whether it is time to try again; says so once."""
        if self.due_s is None or now_s < self.due_s:
            return False
        self.due_s = None
        return True
