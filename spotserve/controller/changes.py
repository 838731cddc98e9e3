"""The record of every change of what runs where: what it was to move, what it moved, and when it was over."""

from collections import deque
from collections.abc import Collection

from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Change
from spotserve.core.cluster import ReplicaState

CHANGES_KEPT = 100


class Changes:
    """The newest changes, newest last."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.kept: deque[Change] = deque(maxlen=CHANGES_KEPT)

    def begin(
        self, *, epoch: int, reason: str, incoming: Collection[str], outgoing: Collection[str], planned_bytes: int, now_s: float
    ) -> None:
        """A plan is carried out from now on."""
        self.kept.append(
            Change(
                epoch=epoch,
                reason=reason,
                started_s=now_s,
                incoming=frozenset(incoming),
                outgoing=frozenset(outgoing),
                planned_bytes=planned_bytes,
            )
        )

    def pulled(self, replica_id: str, num_bytes: int) -> None:
        """A slot of `replica_id` took weights from other devices."""
        for change in reversed(self.kept):
            if replica_id in change.incoming:
                change.moved_bytes += num_bytes
                return

    def moved(self, destination_replica_id: str, num_bytes: int) -> None:
        """A sequence moved with its KV; counts for a change that is not over, the one that brought its destination first."""
        under_way = [change for change in reversed(self.kept) if change.finished_s is None]
        change = next((each for each in under_way if destination_replica_id in each.incoming), next(iter(under_way), None))
        if change is not None:
            change.kv_bytes += num_bytes

    def settle(self, named: Collection[str], now_s: float) -> None:
        """Notes what has come to its end: incoming replicas serve or have ended, outgoing ones do not serve, or have ended, or are
        `named` by the plan again."""
        replicas = self._fleet.replicas
        for change in self.kept:
            if change.finished_s is not None:
                continue
            states = {replica_id: replica.state for replica_id, replica in replicas.items()}
            came = [states[each] for each in change.incoming if each in states]
            go = [states[each] for each in change.outgoing if each in states and each not in named]
            if not came and change.incoming and change.switched_s is None:
                change.finished_s = now_s
            elif change.switched_s is None and ReplicaState.LOADING not in came and ReplicaState.SERVING not in go:
                change.switched_s = now_s
            if change.switched_s is not None and not go:
                change.finished_s = now_s
