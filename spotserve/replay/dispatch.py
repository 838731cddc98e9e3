"""The gateway of a simulation: calls wait in one line, and go where the production router sends them.

Owner of which replica has which call. Knows no instances and no plans.
"""

from bisect import insort
from collections.abc import Callable, Sequence

from spotserve.core.messages import Route
from spotserve.replay.call import Call, seniority
from spotserve.router import pick


class Dispatch:
    """Calls that wait, and how many each replica has."""

    def __init__(self, send: Callable[[Call, str], None]) -> None:
        """`send` gives a call to a replica."""
        self._send = send
        self._routes: Sequence[Route] = ()
        self._waiting: list[Call] = []
        self.load: dict[str, int] = {}
        """By replica: calls that it has."""

    @property
    def num_waiting(self) -> int:
        """Calls that no replica has."""
        return len(self._waiting)

    def publish(self, routes: Sequence[Route]) -> None:
        """Who may be sent to from now on."""
        self._routes = routes
        self.fill()

    def dispatch(self, call: Call) -> None:
        """Sends a call to a replica, or lets it wait for one."""
        if (self._waiting and not call.known_tokens) or not self._place(call):
            insort(self._waiting, call, key=seniority)

    def give_up(self) -> list[Call]:
        """Nobody will answer what waits."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def left(self, call: Call) -> None:
        """Its replica has it no more."""
        if call.replica_id is not None:
            self.load[call.replica_id] -= 1
            call.replica_id = None

    def taken(self, call: Call, replica_id: str) -> None:
        """A replica has it now."""
        call.replica_id, call.prefer = replica_id, None
        self.load[replica_id] = self.load.get(replica_id, 0) + 1

    def _place(self, call: Call) -> bool:
        route = pick(self._routes, self.load, prefer=call.prefer, may_wait=call.known_tokens > 0)
        if route is None:
            return False
        self.taken(call, route.replica_id)
        self._send(call, route.replica_id)
        return True

    def fill(self) -> None:
        """A replica has room for one more."""
        while self._waiting and self._place(self._waiting[0]):
            self._waiting.pop(0)
