"""Machines that are too many: emptied as if the cloud had given notice, and given back as soon as nothing runs on them.

Invariant: a machine is given back once; nothing serves on it then, unless its time is up.

Knows the fleet, not why a machine is too many.
"""

from spotserve.controller.fleet import Fleet
from spotserve.controller.leaving import REPLACED_DRAIN_S
from spotserve.controller.notices import announce
from spotserve.controller.records import Instance
from spotserve.core.cluster import Notice
from spotserve.core.messages import Deactivate, Terminate


def send_back(fleet: Fleet, instance: Instance, now_s: float) -> list[Deactivate]:
    """Its replicas take nothing new from here on; it takes none."""
    instance.is_returned = True
    notice = Notice(instance_id=instance.instance_id, deadline_s=now_s + REPLACED_DRAIN_S, source="controller")
    return announce(fleet, instance, notice, now_s)


def give_back(fleet: Fleet, now_s: float) -> list[Terminate]:
    """Those on which nothing is left, or that have had the time for it."""
    told = []
    for instance in fleet.alive():
        if not instance.is_returned or instance.is_given_back or instance.notice is None:
            continue
        if now_s >= instance.notice.deadline_s or not fleet.replicas_on(instance.instance_id):
            instance.is_given_back = True
            told.append(Terminate(instance_id=instance.instance_id))
    return told
