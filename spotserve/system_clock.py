"""The one place where wall time is read."""

import time


class SystemClock:
    """The machine's clock, as a `core.clock.Clock`. Every process of a system reads the same epoch-based time."""

    def now_s(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()
