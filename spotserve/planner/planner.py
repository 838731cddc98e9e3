"""The plan for a set of devices: D replicas of one shape (P, M, B), as many as are wanted and fit.

Invariant: a plan that would say the same is the same object, so its epoch changes only when something is to be done. Replicas
that still have their devices keep their identity; an identity that once named a replica never names another.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from spotserve.core.cut import misfit
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Plan, ReplicaPlan

_PREFIX = "r-"

MANY_NAMES = 32
"""More replicas than this are not named one by one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the user wants: D replicas of P stages x M shards."""

    data: int | None
    """None: as many as the devices allow."""
    pipeline: int
    tensor: int

    @property
    def num_slots(self) -> int:
        """Devices that one replica takes."""
        return self.pipeline * self.tensor


def plan(
    num_devices: int,
    current: Plan | None,
    *,
    wanted: Shape,
    model: ModelSpec | None,
    max_batch: int,
    surviving: Sequence[ReplicaPlan],
    next_replica_number: int,
) -> Plan:
    """What should run on `num_devices` devices now.

    `surviving` are the replicas that run or are brought up, and all of whose devices remain; those of the right shape are kept,
    the first ones first. New replicas are numbered from `next_replica_number` on (see `number_after`). Without `model` every
    shape is believed to fit it. Returns `current` itself when nothing changes.
    """
    pipeline, tensor, why = fitting_shape(wanted, num_devices, model)
    shape = Parallel(pipeline=pipeline, tensor=tensor, max_batch=max_batch)
    num_fitting = num_devices // shape.num_slots
    num_wanted = num_fitting if wanted.data is None else wanted.data
    num_replicas = min(num_wanted, num_fitting)

    kept = [replica for replica in surviving if replica.parallel == shape][:num_replicas]
    added = [
        ReplicaPlan(replica_id=f"{_PREFIX}{next_replica_number + index}", parallel=shape)
        for index in range(num_replicas - len(kept))
    ]
    replicas = (*kept, *added)
    if current is not None and replicas == current.replicas:
        return current
    before = () if current is None else current.replicas
    reason = _reason(num_devices, num_wanted, shape, before=(*before, *surviving), kept=kept, added=added)
    return Plan(epoch=1 if current is None else current.epoch + 1, replicas=replicas, reason=reason + why)


def fitting_shape(wanted: Shape, num_devices: int, model: ModelSpec | None) -> tuple[int, int, str]:
    """Stages and shards of a replica, and why they are not the wanted ones (empty when they are).

    When one replica of the wanted shape does not fit the devices or the model, it has fewer stages, since that costs no
    communication that was not there; when this is not enough, fewer shards, and then as many stages as are wanted and fit.
    Without a device the wanted shape stands; without `model` only numbers of shards are tried that divide the wanted one, which
    fit when that does.
    """
    why = _unfit(wanted, num_devices, model)
    if why is None or num_devices == 0:
        return wanted.pipeline, wanted.tensor, ""
    for tensor in range(min(wanted.tensor, num_devices), 0, -1):
        for pipeline in range(min(wanted.pipeline, num_devices // tensor), 0, -1):
            if wanted.tensor % tensor == 0 if model is None else misfit(model, pipeline, tensor) is None:
                return pipeline, tensor, f"; not (P={wanted.pipeline}, M={wanted.tensor}): {why}"
    raise AssertionError("one stage of one shard fits every model and every device")


def _unfit(wanted: Shape, num_devices: int, model: ModelSpec | None) -> str | None:
    if model is not None and (problem := misfit(model, wanted.pipeline, wanted.tensor)) is not None:
        return problem
    if wanted.num_slots > num_devices:
        return f"a replica takes {_devices(wanted.num_slots)}, there {'is' if num_devices == 1 else 'are'} {num_devices}"
    return None


def refusal(wanted: Shape, num_devices: int, model: ModelSpec | None) -> str | None:
    """Why the user cannot have this shape now; None when it is possible."""
    if model is not None and (problem := misfit(model, wanted.pipeline, wanted.tensor)) is not None:
        return problem
    num_slots = wanted.num_slots * (wanted.data or 1)
    if num_slots > num_devices:
        data = "auto" if wanted.data is None else wanted.data
        told = f"{data},{wanted.pipeline},{wanted.tensor} takes {_devices(num_slots)}"
        return f"{told}{' at least' if wanted.data is None else ''}, there {'is' if num_devices == 1 else 'are'} {num_devices}"
    return None


def number_after(replica_ids: Collection[str], next_replica_number: int) -> int:
    """The number from which plans count on when `replica_ids` have been used as well."""
    numbers = (int(replica_id.removeprefix(_PREFIX)) for replica_id in replica_ids)
    return max([next_replica_number, *(number + 1 for number in numbers)])


def number_of(replica_id: str) -> int:
    """Its place in the order in which replicas were planned."""
    return int(replica_id.removeprefix(_PREFIX))


def listed(replica_ids: Sequence[str]) -> str:
    """Replicas in a sentence. Nobody reads a thousand names, and decisions are kept: of many, the first and the last, and how
    many."""
    if len(replica_ids) <= MANY_NAMES:
        return ", ".join(replica_ids)
    return f"{replica_ids[0]} .. {replica_ids[-1]} ({len(replica_ids)} of them)"


def _reason(
    num_devices: int,
    num_wanted: int,
    shape: Parallel,
    *,
    before: Sequence[ReplicaPlan],
    kept: Sequence[ReplicaPlan],
    added: Sequence[ReplicaPlan],
) -> str:
    names = {"keep": [each.replica_id for each in kept], "add": [each.replica_id for each in added]}
    stay = set(kept)
    names["drop"] = list(dict.fromkeys(each.replica_id for each in before if each not in stay))
    told = "; ".join(f"{verb} {listed(ids)}" for verb, ids in names.items() if ids)
    num_replicas = len(kept) + len(added)
    fewer = f" of {num_wanted} wanted" if num_replicas < num_wanted else ""
    size = f"(P={shape.pipeline}, M={shape.tensor}, B={shape.max_batch})"
    return f"{num_replicas}{fewer} x {size} on {_devices(num_devices)}: {told or 'nothing'}"


def _devices(count: int) -> str:
    return f"{count} device{'' if count == 1 else 's'}"
