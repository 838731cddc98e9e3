"""What a rehearsal found, as the document that `spotserve plan --json` prints: its keys are an interface that scripts rely on."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from spotserve.controller.proposals import Proposal
from spotserve.controller.records import Replica
from spotserve.controller.rehearsal import Rehearsal
from spotserve.core.cluster import DeviceId
from spotserve.core.cut import layers_of
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, Slot
from spotserve.migration.matching import place_freely
from spotserve.migration.scores import Scores
from spotserve.planner.spotserve_2024 import PublishedChoice

DECISIONS_SHOWN = 12
POLICY = "spotserve"
PUBLISHED_POLICY = "spotserve-2024"


def document_of(rehearsal: Rehearsal, model: ModelSpec) -> dict[str, Any]:
    """The plan, the plans that lost, and what has to move for it."""
    state = rehearsal.state
    chosen = state.alternatives[0].proposal if state.alternatives else Proposal()
    planned = state.plan.replicas if state.plan is not None else ()
    replicas = [state.replicas[each.replica_id] for each in planned if each.replica_id in state.replicas]
    return {
        "policy": POLICY,
        "model": model.name,
        "replicas": [_replica(each, model) for each in replicas],
        "latency_s": _finite(chosen.latency.e2e_mean_s),
        "ttft_p99_s": _finite(chosen.latency.ttft_p99_s),
        "tpot_p99_s": _finite(chosen.latency.tpot_p99_s),
        "e2e_p99_s": _finite(chosen.latency.e2e_p99_s),
        "utilisation": _finite(chosen.latency.utilisation),
        "throughput_rps": chosen.throughput_rps,
        "cost_usd_per_hour": chosen.usd_per_hour,
        **_migration(rehearsal),
        "alternatives": [_alternative(each.proposal, each.verdict) for each in state.alternatives[1:]],
        "losers": list(state.losers),
        "reason": state.plan.reason if state.plan is not None else "nothing can be planned",
        "decisions": [f"{each.cause}: {each.reason}" for each in list(state.decisions)[-DECISIONS_SHOWN:] if each.reason],
    }


def published_document(
    choice: PublishedChoice | None, *, model: str, devices: Sequence[str], usd_per_hour: float
) -> dict[str, Any]:
    """What the published rule chooses: configurations alone, all of one shape, on the first devices in order."""
    size = choice.pipeline * choice.tensor if choice is not None else 0
    return {
        "policy": PUBLISHED_POLICY,
        "model": model,
        "replicas": [
            {
                "id": f"r-{number + 1}",
                "pipeline": choice.pipeline,
                "tensor": choice.tensor,
                "batch": choice.batch,
                "devices": list(devices[number * size : (number + 1) * size]),
            }
            for number in range(choice.data)
        ]
        if choice is not None
        else [],
        "latency_s": choice.latency_s if choice is not None else None,
        "throughput_rps": choice.throughput_rps if choice is not None else 0.0,
        "cost_usd_per_hour": usd_per_hour,
        "transfers": [],
        "bytes_moved": 0,
        "bytes_lower_bound": 0,
        "makespan_s": 0.0,
        "makespan_lower_bound_s": 0.0,
        "alternatives": [],
    }


def _replica(replica: Replica, model: ModelSpec) -> dict[str, Any]:
    parallel = replica.plan.parallel
    return {
        "id": replica.replica_id,
        "pipeline": parallel.pipeline,
        "tensor": parallel.tensor,
        "batch": parallel.max_batch,
        "stage_layers": _stage_layers(parallel, model),
        "instance_type": replica.plan.instance_type,
        "devices": [f"{device.instance_id}/{device.index}" for _, device in sorted(replica.devices.items())],
    }


def _stage_layers(parallel: Parallel, model: ModelSpec) -> list[int]:
    return [len(layers) for layers in layers_of(model, parallel)]


def _migration(rehearsal: Rehearsal) -> dict[str, Any]:
    """What the last change sends from device to device; times are from its beginning."""
    found = rehearsal.state.arrangement if rehearsal.activations else None
    if found is None:
        return {
            "transfers": [],
            "bytes_moved": 0,
            "bytes_lower_bound": 0,
            "makespan_s": 0.0,
            "makespan_lower_bound_s": 0.0,
            "late": [],
        }
    start_s = rehearsal.began_s
    kept = _found_bytes(found.scores, found.placement.devices)
    most = _found_bytes(found.scores, place_freely(found.scores).devices)
    return {
        "transfers": [
            {
                "what": each.flow.what,
                "from": f"{each.flow.source.instance_id}/{each.flow.source.index}",
                "to": f"{each.flow.destination.instance_id}/{each.flow.destination.index}",
                "bytes": each.flow.num_bytes,
                "start_s": each.start_s - start_s,
                "end_s": each.end_s - start_s,
            }
            for each in found.schedule.timed
        ],
        "bytes_moved": found.num_bytes,
        "bytes_lower_bound": max(0, found.num_bytes - (most - kept)),
        "makespan_s": found.schedule.makespan_s,
        "makespan_lower_bound_s": found.schedule.lower_bound_s,
        "late": [each.what for each in found.schedule.late],
    }


def _found_bytes(scores: Scores, devices: Mapping[Slot, DeviceId]) -> int:
    """What stays where it is under a placement."""
    rows = dict(zip(scores.slots, scores.kinds, strict=True))
    columns = {device: index for index, device in enumerate(scores.devices)}
    return sum(int(scores.found_bytes[rows[slot], columns[device]]) for slot, device in devices.items())


def _alternative(proposal: Proposal, verdict: str) -> dict[str, Any]:
    return {
        "replicas": proposal.name,
        "e2e_p99_s": _finite(proposal.latency.e2e_p99_s),
        "throughput_rps": proposal.throughput_rps,
        "cost_usd_per_hour": proposal.usd_per_hour,
        "change_s": proposal.change_s,
        "bytes_moved": proposal.moved_bytes,
        "why": verdict,
    }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: None is what never comes."""
    return seconds if isfinite(seconds) else None
