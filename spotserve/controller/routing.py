"""The routing table: who may be talked to, published when it has changed."""

from spotserve.controller.fleet import Fleet
from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import Publish, RoutingTable


class Routing:
    """The table as gateways know it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._published = RoutingTable(version=0, replicas=(), model=None)

    def table(self) -> RoutingTable:
        """Replicas that gateways may talk to; those that drain are kept in it, so that their last tokens arrive.

        A replica whose machine will be taken drains from the first moment on, also when it is the only one and goes on with
        what it has until others take its place: gateways queue what is new meanwhile.
        """
        routes = []
        for replica in self._fleet.replicas.values():
            leader = self._fleet.leader_of(replica)
            if replica.state is not ReplicaState.LOADING and leader is not None:
                routes.append(replica.route(leader))
        return RoutingTable(version=self._published.version, replicas=tuple(routes), model=self._fleet.model)

    def publish(self) -> list[Publish]:
        """The table, when it has changed."""
        table = self.table()
        if table == self._published:
            return []
        self._published = RoutingTable(version=table.version + 1, replicas=table.replicas, model=table.model)
        return [Publish(table=self._published)]
