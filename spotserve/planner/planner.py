"""The plan for a set of devices: D replicas of one shape (P, M, B), as many as are wanted and fit.

Invariant: a plan that would say the same is the same object, so its epoch changes only when something is to be done. Replicas
that still have their devices keep their identity; an identity that once named a replica never names another.
"""

from collections.abc import Collection, Sequence

from spotserve.config import ControllerSettings
from spotserve.core.cluster import DeviceId
from spotserve.core.plan import Parallel, Plan, ReplicaPlan

_PREFIX = "r-"


def plan(
    devices: Sequence[DeviceId],
    current: Plan | None,
    *,
    settings: ControllerSettings,
    max_batch: int,
    surviving: Collection[str],
    next_replica_number: int,
) -> Plan:
    """What should run on `devices` now.

    `surviving` are the ids of replicas of `current` all of whose devices remain; they are kept first, in their order.
    New replicas are numbered from `next_replica_number` on (see `number_after`). Returns `current` itself when nothing changes.
    """
    shape = Parallel(pipeline=settings.pipeline, tensor=settings.tensor, max_batch=max_batch)
    num_fitting = len(devices) // shape.num_slots
    num_wanted = num_fitting if settings.data is None else settings.data
    num_replicas = min(num_wanted, num_fitting)

    before = () if current is None else current.replicas
    kept = [replica for replica in before if replica.replica_id in surviving and replica.parallel == shape][:num_replicas]
    added = [
        ReplicaPlan(replica_id=f"{_PREFIX}{next_replica_number + index}", parallel=shape)
        for index in range(num_replicas - len(kept))
    ]
    replicas = (*kept, *added)
    if current is not None and replicas == current.replicas:
        return current
    return Plan(
        epoch=1 if current is None else current.epoch + 1,
        replicas=replicas,
        reason=_reason(len(devices), num_wanted, shape, before=before, after=replicas),
    )


def number_after(planned: Plan, next_replica_number: int) -> int:
    """The number from which the plan after `planned` counts on."""
    numbers = (int(replica.replica_id.removeprefix(_PREFIX)) for replica in planned.replicas)
    return max([next_replica_number, *(number + 1 for number in numbers)])


def _reason(
    num_devices: int, num_wanted: int, shape: Parallel, *, before: Sequence[ReplicaPlan], after: Sequence[ReplicaPlan]
) -> str:
    old, new = ([replica.replica_id for replica in replicas] for replicas in (before, after))
    changes = {
        "keep": [each for each in old if each in new],
        "add": [each for each in new if each not in old],
        "drop": [each for each in old if each not in new],
    }
    told = "; ".join(f"{verb} {', '.join(ids)}" for verb, ids in changes.items() if ids)
    fewer = f" of {num_wanted} wanted" if len(new) < num_wanted else ""
    devices = f"{num_devices} device{'' if num_devices == 1 else 's'}"
    return f"{len(new)}{fewer} x (P={shape.pipeline}, M={shape.tensor}, B={shape.max_batch}) on {devices}: {told or 'nothing'}"
