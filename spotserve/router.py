"""Which replica takes a request: the one with the most room, relative to how many sequences it can run at once.

Pure. Does not know what a request is, nor who counts the load.
"""

from collections.abc import Collection, Mapping, Sequence
from math import ceil

from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import Route

AHEAD_SHARE = 0.25
"""Of its batch: so many sequences may wait at a replica, so that it never stands still for want of the next one. What waits beyond
them waits where it can still go to another, one that has just come say."""


def pick(
    routes: Sequence[Route],
    load: Mapping[str, int],
    *,
    exclude: Collection[str] = (),
    prefer: str | None = None,
    may_wait: bool = True,
) -> Route | None:
    """The route for the next sequence; None: no replica may take it.

    `load` counts the sequences that each replica has (none when absent); `exclude` are replicas that just refused or failed;
    `prefer` is taken whatever the others have, as long as it serves and has room. With `may_wait` off a replica takes no more than
    its batch and `AHEAD_SHARE` of it.
    """
    candidates = [route for route in routes if route.state is ReplicaState.SERVING and route.replica_id not in exclude]
    for route in candidates:
        if route.replica_id == prefer and load.get(prefer, 0) < route.max_batch:
            return route
    chosen = min(candidates, key=lambda route: (load.get(route.replica_id, 0) / route.max_batch, route.replica_id), default=None)
    if chosen is None or may_wait or load.get(chosen.replica_id, 0) < most_held(chosen.max_batch):
        return chosen
    return None


def most_held(max_batch: int) -> int:
    """Sequences that a replica has at once, those that wait there included, while others may wait elsewhere."""
    return max_batch + max(1, ceil(AHEAD_SHARE * max_batch))
