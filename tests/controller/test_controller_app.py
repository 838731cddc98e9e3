"""The controller over HTTP: what everybody may read, which levers need the secret, and what mistakes are answered with."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from model_specs import small_spec
from prometheus_client.parser import text_string_to_metric_families
from starlette.exceptions import HTTPException

from spotserve.config import ControllerSettings
from spotserve.controller.app import create_router, status_of
from spotserve.controller.controller import Controller
from spotserve.controller.executor import Executor
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.state import ControllerState
from spotserve.core.clock import ManualClock
from spotserve.core.cluster import Notice, NoticeKind
from spotserve.core.errors import CloudError
from spotserve.core.messages import (
    Address,
    GatewayReport,
    Heartbeat,
    InstanceLaunched,
    InstanceLost,
    NoticeReceived,
    Registered,
    SlotReady,
)
from spotserve.core.model import Portion
from spotserve.core.plan import Slot
from spotserve.gateway.app import _http_error
from spotserve.metrics import Metrics

pytestmark = pytest.mark.anyio

SECRET = "s3cret"
WITH_SECRET = {"authorization": f"Bearer {SECRET}"}
MODEL = small_spec(
    name="tiny",
    num_layers=2,
    num_kv_heads=2,
    head_size=8,
    vocabulary_size=100,
    context_tokens=512,
    layer=(Portion(1, 1000),),
    embedding=(Portion(1, 400),),
    head=(Portion(1, 400),),
    value_bytes=4,
)
LEVERS: list[tuple[str, str, Any]] = [
    ("GET", "/admin/events", None),
    ("POST", "/admin/preempt", {"instance": "i-1", "grace_s": 3}),
    ("POST", "/admin/notice", {"instance": "i-1", "deadline_s": 3.0}),
    ("POST", "/admin/reshape", {"data": 1, "pipeline": 1, "tensor": 1}),
    ("POST", "/admin/launch", {"count": 1}),
    ("POST", "/admin/terminate", {"instance": "i-1"}),
    ("POST", "/admin/restock", {"seconds": 1}),
]


class ScriptedCloud:
    """Notes which levers were pulled."""

    def __init__(self) -> None:
        self.pulled: list[object] = []
        self.restock_s: float | None = 2.0
        self.full = False

    def warn(self, instance_id: str, *, deadline_s: float, kind: NoticeKind, source: str) -> None:
        if instance_id != "i-1":
            raise CloudError(f"there is no instance {instance_id!r}; running: i-1")
        self.pulled.append(("notice", instance_id, deadline_s, kind, source))

    def preempt(self, instance_id: str, *, grace_s: float) -> float:
        if instance_id != "i-1":
            raise CloudError(f"there is no instance {instance_id!r}; running: i-1")
        self.pulled.append(("preempt", instance_id, grace_s))
        return 100.0 + grace_s

    async def launch(self, count: int, *, spot: bool, zone: str | None = None) -> Sequence[str]:
        if self.full:
            raise CloudError("no capacity")
        self.pulled.append(("launch", count, spot))
        return [f"i-{number}" for number in range(count)]

    async def terminate(self, instance_id: str) -> None:
        self.pulled.append(("terminate", instance_id))

    async def close(self) -> None:
        return


class House:
    """A controller of one serving instance, and its routes."""

    def __init__(self) -> None:
        self.cloud, self.metrics, self.clock = ScriptedCloud(), Metrics(), ManualClock(1000.0)
        state = ControllerState(ControllerSettings(), EngineTerms(8))
        self.controller = Controller(
            state, Executor(self.cloud, lambda event: self.controller.dispatch(event)), clock=self.clock, metrics=self.metrics
        )
        hear = self.controller.dispatch
        hear(InstanceLaunched(instance_id="i-1", spot=True, zone="z", usd_per_hour=1.0))
        ranks = (Address("127.0.0.1", 2),)
        hear(Registered(instance_id="i-1", address=Address("127.0.0.1", 1), pid=7, ranks=ranks, spot=True, zone="z"))
        hear(
            SlotReady(
                instance_id="i-1",
                device_index=0,
                slot=Slot(next(iter(state.replicas)), 0, 0),
                plan_epoch=1,
                model=MODEL,
                pulled_bytes=0,
                invariant="batch",
            )
        )
        self.router = create_router(
            self.controller,
            self.cloud,  # type: ignore[arg-type]
            secret=SECRET,
            status=lambda: status_of(self.controller, model_name="tiny", store_url="sqlite:///x", store_healthy=True),
            metrics=self.metrics,
        )
        self.app = FastAPI()
        self.app.include_router(self.router)

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
            content = {"content": body} if isinstance(body, str) else {"json": body}
            return await client.request(method, path, **content, **options)

    async def pull(self, path: str, body: Any) -> httpx.Response:
        return await self.ask("POST", path, body, headers=WITH_SECRET)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def house() -> House:
    return House()


@pytest.mark.parametrize(("method", "path", "body"), LEVERS)
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer \xe9"]
)
async def test_no_lever_moves_without_the_secret(
    house: House, method: str, path: str, body: Any, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    answer = await house.ask(method, path, body, headers=headers)
    assert answer.status_code == 401
    assert "secret" in answer.json()["detail"]
    assert SECRET not in answer.text
    assert house.cloud.pulled == []
    assert house.cloud.restock_s == 2.0


@pytest.mark.parametrize(("method", "path", "body"), LEVERS)
async def test_every_lever_moves_with_the_secret(house: House, method: str, path: str, body: Any) -> None:
    assert (await house.ask(method, path, body, headers=WITH_SECRET)).status_code == 200


def test_every_admin_route_is_a_lever(house: House) -> None:
    paths = {route.path for route in house.router.routes if route.path.startswith("/admin")}  # type: ignore[attr-defined]
    assert paths == {path for _, path, _ in LEVERS}


async def test_what_levers_do(house: House) -> None:
    assert (await house.pull("/admin/preempt", {"instance": "i-1", "grace_s": 3})).json() == {
        "instance": "i-1",
        "deadline_s": 103.0,
    }
    warned = {"instance": "i-1", "deadline_s": 9.0}
    assert (await house.pull("/admin/notice", {**warned, "kind": "soft", "source": "queue"})).json() == warned
    assert (await house.pull("/admin/launch", {"count": 2, "spot": False})).json() == {"instances": ["i-0", "i-1"]}
    assert (await house.pull("/admin/terminate", {"instance": "i-1"})).json() == {"instance": "i-1"}
    assert (await house.pull("/admin/restock", {"seconds": None})).json() == {"seconds": None}
    noticed = ("notice", "i-1", 9.0, NoticeKind.SOFT, "queue")
    assert house.cloud.pulled == [("preempt", "i-1", 3.0), noticed, ("launch", 2, False), ("terminate", "i-1")]
    assert house.cloud.restock_s is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/preempt", {"instance": "i-1"}),
        ("/admin/preempt", {"instance": "i-1", "grace_s": -1}),
        ("/admin/preempt", {"instance": "i-1", "grace_s": 1e9}),
        ("/admin/preempt", '{"instance": "i-1", "grace_s": NaN}'),
        ("/admin/preempt", {"instance": 7, "grace_s": 1}),
        ("/admin/reshape", {"data": 0, "pipeline": 1, "tensor": 1}),
        ("/admin/reshape", {"data": 1, "pipeline": 1}),
        ("/admin/launch", {"count": 0}),
        ("/admin/launch", {"count": 10_000}),
        ("/admin/terminate", {}),
        ("/admin/restock", {"seconds": -1}),
        ("/admin/restock", '{"seconds": Infinity}'),
        ("/admin/restock", "{"),
    ],
)
async def test_what_makes_no_sense_is_refused(house: House, path: str, body: Any) -> None:
    answer = await house.pull(path, body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"]
    assert house.cloud.pulled == []
    assert house.cloud.restock_s == 2.0


async def test_a_shape_that_cannot_be_had_is_refused_with_its_reason(house: House) -> None:
    answer = await house.pull("/admin/reshape", {"pipeline": 2, "tensor": 1})
    assert (answer.status_code, answer.json()["detail"]) == (409, "auto,2,1 takes 2 devices at least, there is 1")
    answer = await house.pull("/admin/reshape", {"pipeline": 3, "tensor": 1})
    assert (answer.status_code, answer.json()["detail"]) == (409, "tiny has 2 layers: it cannot be cut into 3 stages")
    answer = await house.pull("/admin/reshape", {"data": 1, "pipeline": 1, "tensor": 1})
    assert (answer.status_code, answer.json()) == (200, {"epoch": 1})
    assert (await house.ask("GET", "/status")).json()["shape"] == {"data": 1, "pipeline": 1, "tensor": 1}


async def test_an_unknown_instance_is_named(house: House) -> None:
    answer = await house.pull("/admin/preempt", {"instance": "i-9", "grace_s": 1})
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no instance 'i-9'; running: i-1")


async def test_an_unknown_instance_is_named_also_beside_the_gateway(house: House) -> None:
    house.app.add_exception_handler(HTTPException, _http_error)
    answer = await house.pull("/admin/preempt", {"instance": "i-9", "grace_s": 1})
    assert "i-9" in answer.json()["error"]["message"]
    assert "Invalid URL" in (await house.pull("/admin/fly", {})).json()["error"]["message"]


async def test_a_cloud_without_capacity_is_unavailable(house: House) -> None:
    house.cloud.full = True
    answer = await house.pull("/admin/launch", {"count": 1})
    assert (answer.status_code, answer.json()["detail"]) == (503, "no capacity")


async def test_the_keys_of_status_are_an_interface(house: House) -> None:
    status = (await house.ask("GET", "/status")).json()
    assert list(status) == [
        "epoch",
        "model",
        "instances",
        "replicas",
        "requests",
        "store",
        "kv",
        "arithmetic",
        "shape",
        "planner",
        "migrations",
        "hedge",
    ]
    assert status["planner"] == {"planning": "shape", "reason": None, "workload": None, "alternatives": [], "machines": {}} | {
        "reason": status["planner"]["reason"]
    }
    assert status["hedge"] is None
    (instance,) = status["instances"]
    assert list(instance) == ["id", "state", "pid", "devices", "spot", "zone", "deadline_s"]
    (replica,) = status["replicas"]
    assert list(replica) == ["id", "state", "parallel", "instances", "slots", "layers", "running", "waiting"]
    assert replica["slots"] == [{"stage": 0, "shard": 0, "instance": "i-1", "device": 0}]
    assert replica["layers"] == [[0, 2]]
    assert status["shape"] == {"data": None, "pipeline": 1, "tensor": 1}
    assert status["arithmetic"]["invariant"] == "batch"
    (migration,) = status["migrations"]
    assert list(migration) == [
        "epoch",
        "reason",
        "planned_bytes",
        "moved_bytes",
        "kv_bytes",
        "started_s",
        "switched_s",
        "finished_s",
    ]
    assert replica["parallel"] == {"pipeline": 1, "tensor": 1}
    assert list(status["requests"]) == ["queued", "running", "suspended", "finished", "lost"]
    assert status["store"] == {"url": "sqlite:///x", "healthy": True}
    assert list(status["kv"]) == ["tokens_used", "tokens_total"]


def heartbeat(*, store_healthy: bool) -> Heartbeat:
    return Heartbeat(
        instance_id="i-1",
        running=3,
        waiting=1,
        kv_tokens_used=50,
        kv_tokens_total=100,
        step_s=0.01,
        prefill_tokens_per_s=1.0,
        store_healthy=store_healthy,
        sequences=(),
    )


async def test_status_follows_what_is_heard(house: House) -> None:
    house.controller.dispatch(heartbeat(store_healthy=False))
    house.controller.gateway_reports["g"] = GatewayReport(gateway_id="g", queued=1, running=2, suspended=3, finished=4, lost=5)
    house.controller.dispatch(NoticeReceived(notice=Notice(instance_id="i-1", deadline_s=1030.0)))
    status = (await house.ask("GET", "/status")).json()
    assert status["requests"] == {"queued": 1, "running": 2, "suspended": 3, "finished": 4, "lost": 5}
    assert (status["instances"][0]["state"], status["instances"][0]["deadline_s"]) == ("draining", 1030.0)
    assert (status["replicas"][0]["running"], status["replicas"][0]["waiting"]) == (3, 1)
    assert status["kv"] == {"tokens_used": 50, "tokens_total": 100}
    assert not status["store"]["healthy"]
    house.controller.dispatch(InstanceLost(instance_id="i-1", reason="preempted"))
    status = (await house.ask("GET", "/status")).json()
    assert (status["instances"], status["replicas"]) == ([], [])
    assert status["store"]["healthy"], "the dead do not complain"


async def test_metrics_can_be_read_by_prometheus(house: House) -> None:
    house.controller.dispatch(NoticeReceived(notice=Notice(instance_id="i-1", deadline_s=1030.0)))
    house.controller.dispatch(InstanceLost(instance_id="i-1", reason="preempted"))
    answer = await house.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["spotserve_notices_total", "local"] == 1
    assert samples["spotserve_preemptions_total", "yes"] == 1
    assert samples["spotserve_notice_to_published_seconds_count",] == 1
    assert samples["spotserve_instances", "ready"] == 0
    assert samples["spotserve_store_healthy",] == 1


@pytest.mark.parametrize(("limit", "shown"), [(0, 0), (-3, 0), (1, 1), (10_000, None)])
async def test_the_newest_decisions_are_shown(house: House, limit: int, shown: int | None) -> None:
    decisions = (await house.ask("GET", f"/decisions?limit={limit}")).json()["decisions"]
    kept = len(house.controller.state.decisions)
    assert [item["number"] for item in decisions] == list(range(1, kept + 1))[kept - (kept if shown is None else shown) :]
    assert all(set(item) == {"number", "time_s", "cause", "commands", "reason"} for item in decisions)


async def test_events_after_a_number(house: House) -> None:
    async def events(after: int) -> list[dict[str, Any]]:
        return list((await house.ask("GET", f"/admin/events?after={after}", headers=WITH_SECRET)).json()["events"])

    assert [event["kind"] for event in await events(0)] == ["launched", "registered", "ready"]
    assert [event["seq"] for event in await events(1)] == [2, 3]
    assert (await events(0))[0].keys() == {"seq", "time_s", "kind", "instance", "spot", "usd_per_hour"}
