"""The admin half of a running system: its state, its fleet's levers and what the fleet reports.

Foreign JSON becomes values here and nowhere else. Knows one system; does not know why a lever is pulled.
"""

import re
from collections.abc import Mapping
from typing import cast

import httpx
import msgspec

from spotserve.core.errors import CloudError
from spotserve.replay.record import FleetEvent

TIMEOUT_S = 30.0
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+(?P<value>\S+)")


class InstanceStatus(msgspec.Struct, frozen=True):
    """An instance, in the words of `core.cluster.InstanceState`."""

    id: str
    state: str


class ReplicaStatus(msgspec.Struct, frozen=True):
    """A replica, in the words of `core.cluster.ReplicaState`."""

    id: str
    state: str


class Status(msgspec.Struct, frozen=True):
    """The parts of `/status` that a replay reads."""

    instances: tuple[InstanceStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    model: object = None
    """The served model's name, or an object with it under `name`; None before the first worker knows it."""

    @property
    def model_name(self) -> str:
        """What clients call the model; empty while no worker knows it."""
        name = self.model.get("name", "") if isinstance(self.model, dict) else self.model
        return str(name or "")


class Admin:
    """Speaks to the admin API of one system."""

    def __init__(self, url: str, secret: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=TIMEOUT_S)
        self._seen = -1

    async def close(self) -> None:
        """Hangs up."""
        await self._client.aclose()

    async def status(self) -> Status:
        """What `/status` says."""
        try:
            return msgspec.convert(await self._call("GET", "/status"), Status)
        except msgspec.ValidationError as problem:
            raise CloudError(f"/status: {problem}") from problem

    async def preempt(self, instance: str, *, grace_s: float) -> None:
        """The cloud takes an instance: with a notice of `grace_s` seconds, or at once for 0."""
        await self._call("POST", "/admin/preempt", {"instance": instance, "grace_s": grace_s})

    async def launch(self, count: int) -> list[str]:
        """Rents instances; their ids."""
        instances = (await self._call("POST", "/admin/launch", {"count": count})).get("instances")
        if not isinstance(instances, list) or len(instances) != count:
            raise CloudError(f"/admin/launch: expected {count} instance ids, got {instances!r}")
        return [str(instance) for instance in instances]

    async def terminate(self, instance: str) -> None:
        """Returns an instance."""
        await self._call("POST", "/admin/terminate", {"instance": instance})

    async def restock(self, seconds: float | None) -> None:
        """How long the local cloud waits before it replaces a lost instance; None: it never does."""
        await self._call("POST", "/admin/restock", {"seconds": seconds})

    async def new_events(self) -> list[FleetEvent]:
        """What the fleet reported since the last call."""
        answer = await self._call("GET", f"/admin/events?after={self._seen}")
        rows = answer.get("events")
        if not isinstance(rows, list):
            raise CloudError(f"/admin/events: expected a list under `events`, got {rows!r}")
        events: list[FleetEvent] = []
        for row in cast("list[dict[str, object]]", rows):
            seq, time_s, instance = row.get("seq"), row.get("time_s"), row.get("instance")
            if not isinstance(seq, int) or not isinstance(time_s, int | float):
                raise CloudError(f"/admin/events: expected `seq` and `time_s`, got {row!r}")
            if seq <= self._seen:
                continue
            self._seen = seq
            details = {name: value for name, value in row.items() if name not in ("seq", "time_s", "kind", "instance")}
            events.append(FleetEvent(float(time_s), str(row.get("kind")), None if instance is None else str(instance), details))
        return events

    async def metric(self, name: str) -> float | None:
        """Sum of a metric's samples in `/metrics`; None: it is not exported."""
        try:
            answer = await self._client.get("/metrics")
        except httpx.HTTPError as problem:
            raise CloudError(f"/metrics: {problem}") from problem
        matches = [match for line in answer.text.splitlines() if (match := _SAMPLE.match(line)) and match["name"] == name]
        return sum(float(match["value"]) for match in matches) if matches else None

    async def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Mapping[str, object]:
        try:
            answer = await self._client.request(method, path, json=body)
            answer.raise_for_status()
            content = answer.json()
        except httpx.HTTPStatusError as problem:
            raise CloudError(f"{path}: status {problem.response.status_code}: {problem.response.text[:200]}") from problem
        except (httpx.HTTPError, ValueError) as problem:
            raise CloudError(f"{path}: {type(problem).__name__}: {problem}") from problem
        if not isinstance(content, dict):
            raise CloudError(f"{path}: expected a JSON object, got {content!r}")
        return content
