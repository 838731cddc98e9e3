"""What a rehearsal found, as the document that `spotserve plan --json` prints: its keys are an interface that scripts rely on."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from spotserve.controller.proposals import Proposal
from spotserve.controller.records import Replica
from spotserve.controller.rehearsal import Rehearsal
from spotserve.core.cluster import DeviceId
from spotserve.core.cut import layers_of
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.planner.spotserve_2024 import PublishedChoice

DECISIONS_SHOWN = 12
POLICY = "spotserve"
PUBLISHED_POLICY = "spotserve-2024"


def document_of(rehearsal: Rehearsal, model: ModelSpec, *, rate_rps: float, lost: Sequence[str], advice: str) -> dict[str, Any]:
    """The plan, the plans that lost, and what has to move for it.

    Args:
        rehearsal: that was played.
        model: that is served.
        rate_rps: requests per second that were asked for.
        lost: machines that are gone in the end.
        advice: what would help where nothing can run.
    """
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
        "rate_rps": rate_rps,
        "throughput_rps": chosen.throughput_rps,
        "cost_usd_per_hour": chosen.usd_per_hour,
        **_migration(rehearsal),
        "alternatives": [_alternative(each.proposal, each.verdict) for each in state.alternatives[1:]],
        "losers": list(state.losers),
        "lost": list(lost),
        "reason": state.plan.reason if replicas and state.plan is not None else f"nothing can run; {advice}",
        "decisions": [f"{each.cause}: {each.reason}" for each in list(state.decisions)[-DECISIONS_SHOWN:] if each.reason],
    }


def published_document(
    choice: PublishedChoice | None, *, model: str, devices: Sequence[str], usd_per_hour: float, rate_rps: float, min_devices: int
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
        "rate_rps": rate_rps,
        "throughput_rps": choice.throughput_rps if choice is not None else 0.0,
        "cost_usd_per_hour": usd_per_hour,
        "transfers": [],
        "bytes_moved": 0,
        "bytes_lower_bound": 0,
        "makespan_s": 0.0,
        "makespan_lower_bound_s": 0.0,
        "alternatives": [],
        "reason": _published_reason(choice, rate_rps, min_devices, len(devices)),
    }


def _published_reason(choice: PublishedChoice | None, rate_rps: float, min_devices: int, num_devices: int) -> str:
    least = f"a replica takes at least {min_devices} devices (--min-devices)"
    if choice is None:
        return f"nothing fits: {least}, there are {num_devices}"
    if choice.throughput_rps < rate_rps:
        return f"the most throughput, as nothing carries {rate_rps:g} requests/s; {least}"
    return f"the shortest execution of a batch that carries {rate_rps:g} requests/s; {least}"


def _replica(replica: Replica, model: ModelSpec) -> dict[str, Any]:
    parallel = replica.plan.parallel
    return {
        "id": replica.replica_id,
        "pipeline": parallel.pipeline,
        "tensor": parallel.tensor,
        "batch": parallel.max_batch,
        "stage_layers": _stage_layers(parallel, model),
        "instance_type": replica.plan.instance_type,
        "devices": [_device(device) for _, device in sorted(replica.devices.items())],
    }


def _device(device: DeviceId) -> str:
    return f"{device.instance_id}/{device.index}"


def _stage_layers(parallel: Parallel, model: ModelSpec) -> list[int]:
    return [len(layers) for layers in layers_of(model, parallel)]


def _migration(rehearsal: Rehearsal) -> dict[str, Any]:
    """What the last change sends from device to device; times are from its beginning."""
    phases, start_s = rehearsal.phases, rehearsal.began_s
    sent = [each for phase in phases for each in phase.schedule.timed]
    from_files: Counter[str] = Counter()
    for phase in phases:
        from_files.update(phase.from_files_bytes)
    return {
        "transfers": [
            {
                "what": each.flow.what,
                "from": _device(each.flow.source),
                "to": _device(each.flow.destination),
                "bytes": each.flow.num_bytes,
                "start_s": each.start_s - start_s,
                "end_s": each.end_s - start_s,
            }
            for each in sent
        ],
        "bytes_moved": sum(each.flow.num_bytes for each in sent),
        "bytes_lower_bound": sum(phase.lower_bound_bytes for phase in phases),
        "makespan_s": max((each.end_s for each in sent), default=start_s) - start_s,
        "makespan_lower_bound_s": sum((phase.schedule.lower_bound_s for phase in phases), 0.0),
        "late": [each.what for phase in phases for each in phase.schedule.late],
        "bytes_from_files": dict(from_files),
    }


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
