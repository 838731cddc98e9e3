"""The controller over HTTP, for people and scripts: what runs, what was decided and why, and the levers of the local cloud.

Reading is open to whoever reaches the port; every lever needs the system's secret as a bearer token.
"""

import hmac
from collections.abc import Callable
from dataclasses import asdict
from math import isfinite
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, HTTPException, Request, Response

from spotserve.cloud.local import LocalCloud
from spotserve.controller.controller import Controller
from spotserve.controller.records import Replica
from spotserve.core.cluster import InstanceState, NoticeKind, ReplicaState
from spotserve.core.cut import layers_of, misfit
from spotserve.core.errors import CloudError
from spotserve.core.messages import Reshape
from spotserve.metrics import Metrics

MAX_GRACE_S = 3600.0
MAX_LAUNCH = 64
MAX_DEGREE = 1024
MIGRATIONS_SHOWN = 20


def status_of(controller: Controller, *, model_name: str, store_url: str, store_healthy: bool) -> dict[str, Any]:
    """The `status --json` document; its keys are an interface that scripts rely on."""
    state = controller.state
    heartbeats = [
        instance.heartbeat for instance in state.instances.values() if instance.heartbeat is not None and instance.address
    ]
    reports = controller.gateway_reports.values()
    return {
        "epoch": state.plan.epoch if state.plan is not None else 0,
        "model": model_name,
        "instances": [
            {
                "id": instance.instance_id,
                "state": instance.state.value,
                "pid": instance.pid,
                "devices": len(instance.devices),
                "spot": instance.spot,
                "zone": instance.zone,
                "deadline_s": instance.notice.deadline_s if instance.notice is not None else None,
            }
            for instance in state.instances.values()
            if instance.state is not InstanceState.GONE
        ],
        "replicas": [
            {
                "id": replica.replica_id,
                "state": replica.state.value,
                "parallel": {"pipeline": replica.plan.parallel.pipeline, "tensor": replica.plan.parallel.tensor},
                "instances": list(replica.instance_ids),
                "slots": [
                    {"stage": slot.stage, "shard": slot.shard, "instance": device.instance_id, "device": device.index}
                    for slot, device in sorted(replica.devices.items())
                ],
                "layers": _layers_of(controller, replica),
                **_load_of(controller, replica.leader_id),
            }
            for replica in state.replicas.values()
        ],
        "requests": {
            name: sum(getattr(report, name) for report in reports)
            for name in ("queued", "running", "suspended", "finished", "lost")
        },
        "store": {"url": store_url, "healthy": store_healthy and all(heartbeat.store_healthy for heartbeat in heartbeats)},
        "kv": {
            "tokens_used": sum(heartbeat.kv_tokens_used for heartbeat in heartbeats),
            "tokens_total": sum(heartbeat.kv_tokens_total for heartbeat in heartbeats),
        },
        "arithmetic": {
            "emitted_tokens_change": "never",
            "invariant": state.invariant,
            "across_parallel_configurations": state.invariant == "full",
        },
        "shape": asdict(state.wanted) if state.wanted is not None else {"data": None, "pipeline": None, "tensor": None},
        "planner": _planner_of(controller),
        "migrations": [
            {
                "epoch": change.epoch,
                "reason": change.reason,
                "planned_bytes": change.planned_bytes,
                "moved_bytes": change.moved_bytes,
                "kv_bytes": change.kv_bytes,
                "started_s": change.started_s,
                "switched_s": change.switched_s,
                "finished_s": change.finished_s,
            }
            for change in list(state.changes)[-MIGRATIONS_SHOWN:]
        ],
        "hedge": state.hedging.summary() if state.hedging is not None else None,
    }


def _planner_of(controller: Controller) -> dict[str, Any]:
    """What the planner goes by, and what it weighed last; JSON has no infinity, so what never comes is null."""
    state = controller.state
    workload = state.terms.workload if state.terms is not None else None
    return {
        "planning": "auto" if state.wanted is None else "shape",
        "reason": state.plan.reason if state.plan is not None else None,
        "workload": None
        if workload is None
        else {
            "rate_rps": workload.rate_rps,
            "gap_cv": workload.gap_cv,
            "prompt_tokens_mean": workload.prompt.mean,
            "output_tokens_mean": workload.output.mean,
        },
        "alternatives": [
            {
                "replicas": each.proposal.name,
                "chosen": each.is_chosen,
                "e2e_p99_s": each.proposal.latency.e2e_p99_s if isfinite(each.proposal.latency.e2e_p99_s) else None,
                "throughput_rps": each.proposal.throughput_rps,
                "change_s": each.proposal.change_s,
                "moved_bytes": each.proposal.moved_bytes,
                "verdict": each.verdict,
            }
            for each in state.alternatives
        ],
        "machines": {
            name: {
                "memory_bytes": each.device.memory_bytes,
                "flops_per_s": each.device.flops_per_s,
                "memory_bytes_per_s": each.device.memory_bytes_per_s,
                "layer_overhead_s": each.device.layer_overhead_s,
                "network_bytes_per_s": each.network.bytes_per_s,
            }
            for name, each in state.hardware.items()
        },
    }


def _layers_of(controller: Controller, replica: Replica) -> list[list[int]]:
    """First decoder layer of each stage, and the first one after it."""
    model, parallel = controller.state.model, replica.plan.parallel
    if model is None or misfit(model, parallel.pipeline, parallel.tensor) is not None:
        return []
    return [[layers.start, layers.stop] for layers in layers_of(model, parallel)]


def _load_of(controller: Controller, leader_id: str | None) -> dict[str, int]:
    leader = controller.state.instances.get(leader_id or "")
    heartbeat = leader.heartbeat if leader is not None else None
    return {"running": heartbeat.running if heartbeat else 0, "waiting": heartbeat.waiting if heartbeat else 0}


def update_gauges(metrics: Metrics, status: dict[str, Any]) -> None:
    """Brings the gauges up to what `status` says."""
    for state in InstanceState:
        metrics.instances.labels(state.value).set(sum(item["state"] == state.value for item in status["instances"]))
    for replica_state in ReplicaState:
        metrics.replicas.labels(replica_state.value).set(sum(item["state"] == replica_state.value for item in status["replicas"]))
    for name in ("queued", "running", "suspended"):
        metrics.sequences.labels(name).set(status["requests"][name])
    metrics.kv_tokens_used.set(status["kv"]["tokens_used"])
    metrics.plan_epoch.set(status["epoch"])
    metrics.store_healthy.set(int(status["store"]["healthy"]))


def create_router(
    controller: Controller, cloud: LocalCloud, *, secret: str, status: Callable[[], dict[str, Any]], metrics: Metrics
) -> APIRouter:
    """Routes to be mounted beside the gateway's."""
    router = APIRouter()

    def authorised(request: Request) -> None:
        expected = f"Bearer {secret}"
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected.encode()):
            raise HTTPException(401, "this needs the system's secret as a bearer token")

    lever = [Depends(authorised)]

    @router.get("/status")
    async def read_status() -> dict[str, Any]:
        """Instances, replicas, requests, store."""
        return status()

    @router.get("/metrics")
    async def read_metrics() -> Response:
        """Prometheus text format."""
        update_gauges(metrics, status())
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/decisions")
    async def read_decisions(limit: int = 100) -> dict[str, Any]:
        """The newest decisions, newest last."""
        kept = list(controller.state.decisions)
        return {"decisions": [asdict(decision) for decision in kept[len(kept) - min(len(kept), max(0, limit)) :]]}

    @router.get("/admin/events", dependencies=lever)
    async def read_events(after: int = 0) -> dict[str, Any]:
        """What happened to the fleet since event number `after`."""
        return {
            "events": [
                {"seq": event.seq, "time_s": event.time_s, "kind": event.kind, "instance": event.instance, **event.detail}
                for event in controller.state.events
                if event.seq > after
            ]
        }

    @router.post("/admin/preempt", dependencies=lever)
    async def preempt(instance: Annotated[str, Body()], grace_s: Annotated[float, Body(ge=0, le=MAX_GRACE_S)]) -> dict[str, Any]:
        """Takes an instance: with a notice `grace_s` ahead, or at once."""
        try:
            return {"instance": instance, "deadline_s": cloud.preempt(instance, grace_s=grace_s)}
        except CloudError as error:
            raise HTTPException(404, str(error)) from error

    @router.post("/admin/notice", dependencies=lever)
    async def notice(
        instance: Annotated[str, Body()],
        deadline_s: Annotated[float, Body(ge=0, allow_inf_nan=False)],
        kind: Annotated[NoticeKind, Body()] = NoticeKind.HARD,
        source: Annotated[str, Body(min_length=1, max_length=64)] = "operator",
    ) -> dict[str, Any]:
        """Passes on that an instance will be taken (`hard`) or is at risk (`soft`); nothing is taken."""
        try:
            cloud.warn(instance, deadline_s=deadline_s, kind=kind, source=source)
        except CloudError as error:
            raise HTTPException(404, str(error)) from error
        return {"instance": instance, "deadline_s": deadline_s}

    @router.post("/admin/reshape", dependencies=lever)
    async def reshape(
        pipeline: Annotated[int | None, Body(ge=1, le=MAX_DEGREE)],
        tensor: Annotated[int | None, Body(ge=1, le=MAX_DEGREE)],
        data: Annotated[int | None, Body(ge=1, le=MAX_DEGREE)] = None,
    ) -> dict[str, Any]:
        """Wants another shape from now on; `data` null: as many replicas as the devices allow; all null: the planner chooses."""
        if (pipeline is None) is not (tensor is None) or (pipeline is None and data is not None):
            raise HTTPException(422, "give pipeline and tensor, or null for data, pipeline and tensor: then the planner chooses")
        wanted = Reshape(data=data, pipeline=pipeline, tensor=tensor)
        why_not = controller.state.refusal(wanted)
        if why_not is not None:
            raise HTTPException(409, why_not)
        controller.dispatch(wanted)
        return {"epoch": controller.state.plan.epoch if controller.state.plan is not None else 0}

    @router.post("/admin/launch", dependencies=lever)
    async def launch(count: Annotated[int, Body(ge=1, le=MAX_LAUNCH)], spot: Annotated[bool, Body()] = True) -> dict[str, Any]:
        """Starts instances."""
        try:
            return {"instances": await cloud.launch(count, spot=spot)}
        except CloudError as error:
            raise HTTPException(503, str(error)) from error

    @router.post("/admin/terminate", dependencies=lever)
    async def terminate(instance: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        """Ends an instance for good: its place stays empty."""
        await cloud.terminate(instance)
        return {"instance": instance}

    @router.post("/admin/restock", dependencies=lever)
    async def restock(seconds: Annotated[float | None, Body(embed=True, ge=0, allow_inf_nan=False)]) -> dict[str, Any]:
        """After how long a taken instance is replaced; null: never."""
        cloud.restock_s = seconds
        return {"seconds": seconds}

    return router
