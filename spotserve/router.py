"""Which replica takes a request: the one with the most room, relative to how many sequences it can run at once.

Pure. Does not know what a request is, nor who counts the load.
"""

from collections.abc import Collection, Mapping, Sequence

from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import Route


def pick(
    routes: Sequence[Route], load: Mapping[str, int], *, exclude: Collection[str] = (), prefer: str | None = None
) -> Route | None:
    """The route for the next sequence; None: no replica may take it.

    `load` counts the sequences that each replica has (none when absent); `exclude` are replicas that just refused or failed;
    `prefer` is taken whatever the others have, as long as it serves and has room.
    """
    candidates = [route for route in routes if route.state is ReplicaState.SERVING and route.replica_id not in exclude]
    for route in candidates:
        if route.replica_id == prefer and load.get(prefer, 0) < route.max_batch:
            return route
    return min(candidates, key=lambda route: (load.get(route.replica_id, 0) / route.max_batch, route.replica_id), default=None)
