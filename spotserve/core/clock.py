"""Time as an argument: what needs to know the time takes a `Clock`, so that tests and replays can own it."""

from typing import Protocol


class Clock(Protocol):
    """A source of time."""

    def now_s(self) -> float:
        """Seconds since the Unix epoch (or since the start of a replay)."""
        ...


class ManualClock:
    """A clock that moves when it is told to."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        """Where it was last set."""
        return self._now_s

    def advance_to(self, now_s: float) -> None:
        """Moves forward; time never goes back."""
        assert now_s >= self._now_s, "time went back"
        self._now_s = now_s
