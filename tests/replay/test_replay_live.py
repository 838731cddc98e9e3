"""The client and the live end against a real HTTP server."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from spotserve.core.errors import CloudError, ConfigError, TraceError
from spotserve.demo.run import run_demo
from spotserve.replay import client as client_module
from spotserve.replay import live
from spotserve.replay.admin import Admin
from spotserve.replay.client import StreamClient
from spotserve.replay.record import RequestRecord, RunRecord
from spotserve.replay.run import ReplayOptions, read_timeline, run_replay
from spotserve.replay.timeline import Arrive, GiveNotice, Launch, Scaling, Take, Timeline
from spotserve.system_clock import SystemClock


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WATCH_S", 0.01)
    monkeypatch.setattr(client_module, "REATTACH_PAUSE_S", 0.001)


def arrival(index: int = 0, *, at_s: float = 0.0, output_tokens: int = 20) -> Arrive:
    return Arrive(at_s, index, 8, output_tokens, 0.8, seed=100 + index)


def complete(fake_system, one: Arrive, *, patience_s: float = 20.0) -> RequestRecord:
    client = StreamClient(fake_system.url, model="fake-model", clock=SystemClock(), patience_s=patience_s)
    return asyncio.run(client.complete(one, "def f():", scheduled_s=SystemClock().now_s()))


def expected_tokens(one: Arrive) -> tuple[int, ...]:
    return tuple((one.seed * 31 + position * position * 7) % 1009 for position in range(one.output_tokens))


class TestClient:
    def test_every_token_comes_once_and_in_order(self, fake_system) -> None:
        record = complete(fake_system, arrival())
        assert record.complete and record.error is None and record.finish_reason == "length"
        assert record.token_ids == expected_tokens(arrival())
        assert record.gaps == (1.5,) * 20
        assert sum(record.event_tokens) == 20 and len(record.event_times_s) == len(record.event_tokens)
        assert list(record.event_times_s) == sorted(record.event_times_s)
        assert record.sent_s <= record.event_times_s[0] <= record.event_times_s[-1] <= record.ended_s
        assert record.prompt_tokens == 11 and record.request_id == "cmpl-1"
        assert record.duplicate_tokens == record.reattached == 0

    def test_the_request_says_what_the_timeline_says(self, fake_system) -> None:
        complete(fake_system, arrival())
        (body,) = fake_system.script.bodies
        assert body["model"] == "fake-model" and body["prompt"] == "def f():"
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (20, 0.8, 100)
        assert body["stream"] and body["ignore_eos"] and body["return_token_ids"] and body["return_gaps"]

    @pytest.mark.parametrize("from_start", [False, True])
    def test_a_broken_stream_is_taken_up_where_it_stood(self, fake_system, from_start: bool) -> None:
        fake_system.script.break_at[100] = [5, 11]
        fake_system.script.replay_from_start = from_start
        record = complete(fake_system, arrival())
        assert record.complete and record.token_ids == expected_tokens(arrival())
        assert record.reattached == 2
        assert (record.duplicate_tokens > 0) is from_start
        assert record.contradicted_tokens == 0
        assert len(fake_system.script.bodies) == 1, "a request must never be sent twice"

    def test_a_stream_that_breaks_before_its_first_token_is_taken_up_too(self, fake_system) -> None:
        fake_system.script.break_at[100] = [0]
        record = complete(fake_system, arrival())
        assert record.complete and record.token_ids == expected_tokens(arrival()) and record.reattached == 1
        assert len(fake_system.script.bodies) == 1

    def test_a_repeated_position_with_another_token_is_seen(self, fake_system) -> None:
        script = fake_system.script
        script.replay_from_start, script.wrong_token[100] = True, 2

        class Switch(list):
            """The first stream says the right token; what is said again after the break is another one."""

            def pop(self, index: int = -1) -> int:
                script.wrong = True
                return super().pop(index)

        script.break_at[100] = Switch([6])
        record = complete(fake_system, arrival())
        assert record.contradicted_tokens == 1
        assert record.token_ids == expected_tokens(arrival()), "what was emitted first stays"

    def test_a_stream_that_never_holds_is_lost(self, fake_system) -> None:
        fake_system.script.break_at[100] = [3] * 50
        record = complete(fake_system, arrival())
        assert not record.complete and record.reattached == client_module.REATTACH_TRIES
        assert record.token_ids == expected_tokens(arrival())[:3]
        assert record.error and "still broken" in record.error

    @pytest.mark.parametrize(("fault", "said"), [("refuse", "429: too many requests wait"), ("fail", "no replica took it")])
    def test_errors_of_the_system_are_kept_in_its_words(self, fake_system, fault: str, said: str) -> None:
        getattr(fake_system.script, fault).add(100)
        record = complete(fake_system, arrival())
        assert not record.complete and record.error and said in record.error and record.reattached == 0

    def test_patience_ends(self, fake_system) -> None:
        fake_system.script.hang.add(100)
        record = complete(fake_system, arrival(), patience_s=1.5)
        assert not record.complete and record.error == "no whole answer within 1.5 s"
        assert len(record.token_ids) == 19

    def test_nobody_listens(self, fake_system) -> None:
        client = StreamClient("http://127.0.0.1:1", model="m", clock=SystemClock(), patience_s=5)
        record = asyncio.run(client.complete(arrival(), "x", scheduled_s=0.0))
        assert not record.complete and record.error and "no connection" in record.error

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
    def test_an_address_that_is_none(self, url: str) -> None:
        with pytest.raises(ConfigError, match="http://HOST:PORT"):
            StreamClient(url, model="m", clock=SystemClock(), patience_s=1)


def run_live(fake_system, play: Callable[[live.System], object], shown: list[live.Progress] | None = None):
    async def run() -> object:
        admin = Admin(fake_system.url, fake_system.secret)
        client = StreamClient(fake_system.url, model="fake-model", clock=SystemClock(), patience_s=20)
        system = live.System(
            admin,
            client,
            SystemClock(),
            lambda tokens, seed: f"{tokens} {seed}",
            shown.append if shown is not None else lambda _: None,
        )
        try:
            return await play(system)
        finally:
            await admin.close()

    return asyncio.run(run())


def carry_out(fake_system, timeline: Timeline, shown: list[live.Progress] | None = None) -> RunRecord:
    return run_live(fake_system, lambda system: live.carry_out(timeline, system, label="run", patience_s=10), shown)


class TestLive:
    def test_actions_reach_the_fleet_that_stands_for_the_trace(self, fake_system) -> None:
        timeline = Timeline(
            {"x": "z", "y": "z", "w": "z"},
            (
                arrival(0),
                GiveNotice(0.02, "y", 0.52),
                Launch(0.05, "new", "z"),
                Take(0.06, "new", noticed=False),
                arrival(1, at_s=0.1),
                Take(0.15, "y", noticed=True),
            ),
            1.0,
        )
        fake_system.script.report("lost", "long-ago")
        shown: list[live.Progress] = []
        run = carry_out(fake_system, timeline, shown)
        script = fake_system.script
        assert script.calls("launch") == [{"count": 1}, {"count": 1}], "one to make three, one from the trace"
        assert run.initial_instances == ("a0", "a1", "n2")
        preempted = {body["instance"]: body["grace_s"] for body in script.calls("preempt")}
        assert preempted == {"a1": 0.5, "n3": 0.0} and len(script.calls("preempt")) == 2
        assert [deed.problem for deed in run.deeds] == [None] * 3
        assert [record.arrival.index for record in run.requests] == [0, 1]
        assert all(record.complete for record in run.requests)
        assert sorted(event.kind for event in run.fleet_events) == ["launched", "lost", "lost", "moved", "notice"]
        (moved,) = [event for event in run.fleet_events if event.kind == "moved"]
        assert moved.instance == "a1" and moved.details == {"request_id": "cmpl-1", "kv_bytes": 4096, "seconds": 0.01}
        assert run.tokens_recomputed == 10
        assert shown[-1].requests_ended == 2 and shown[-1].losses == 2 and shown[-1].instances == 2

    def test_a_surplus_is_returned_first(self, fake_system) -> None:
        run = carry_out(fake_system, Timeline({"x": ""}, (arrival(),), 1.0))
        assert fake_system.script.calls("terminate") == [{"instance": "a1"}]
        assert run.initial_instances == ("a0",)

    def test_without_a_capacity_trace_the_fleet_is_left_alone(self, fake_system) -> None:
        run = carry_out(fake_system, Timeline({}, (arrival(),), 1.0))
        assert fake_system.script.admin_calls == [] and run.initial_instances == ("a0", "a1")

    def test_what_the_cloud_refuses_is_written_down(self, fake_system) -> None:
        fake_system.script.refuse_launch = True
        run = carry_out(fake_system, Timeline({"x": "", "y": ""}, (Launch(0.0, "n", ""), Take(0.01, "n", noticed=False)), 1.0))
        assert ["no capacity" in str(deed.problem) for deed in run.deeds] == [True, False]
        assert "no instance of the cluster stands for it" in str(run.deeds[1].problem)

    def test_a_fleet_that_never_gets_ready_is_an_error(self, fake_system) -> None:
        fake_system.script.instances["a0"] = "pending"
        with pytest.raises(CloudError, match="a0 pending"):
            run_live(fake_system, lambda system: live.prepare_fleet(system, 2, patience_s=0.2))

    def test_a_wrong_secret_is_said(self, fake_system) -> None:
        fake_system.secret = "wrong"
        with pytest.raises(CloudError, match="401"):
            carry_out(fake_system, Timeline({}, (arrival(),), 1.0))

    def test_the_reference_is_answered_in_lanes(self, fake_system) -> None:
        arrivals = [arrival(index, output_tokens=5) for index in range(7)]
        run = run_live(fake_system, lambda system: live.answer_all(arrivals, system, label="reference", concurrency=3))
        assert [record.token_ids for record in run.requests] == [expected_tokens(one) for one in arrivals]


@pytest.fixture
def traces(tmp_path: Path) -> dict[str, Path]:
    capacity, requests = tmp_path / "capacity.csv", tmp_path / "requests.csv"
    capacity.write_text("time_s,event,instance\n0,add,a\n0,add,b\n1,remove,a\n2,add,c\n3,remove,b\n")
    rows = "".join(f"{i / 4},{10 + i},{4 + i},0.0,{i}\n" for i in range(12))
    requests.write_text("arrival_s,prompt_tokens,output_tokens,temperature,seed\n" + rows)
    return {"capacity": capacity, "requests": requests}


SCALING = Scaling(time_scale=10.0, grace_s=0.05, notice_share=0.5, seed=3)


class TestRun:
    def options(self, fake_system, traces: dict[str, Path], out: Path, **rest: object) -> ReplayOptions:
        return ReplayOptions(url=fake_system.url, secret=fake_system.secret, out=out, scaling=SCALING, **traces, **rest)

    def test_a_replay_leaves_a_folder_that_says_it_all(self, fake_system, traces, tmp_path: Path) -> None:
        out = tmp_path / "runs" / "one"
        console = Console(file=(tmp_path / "screen").open("w"), width=150)
        assert run_replay(self.options(fake_system, traces, out), console) == 0
        console.file.close()
        summary = json.loads((out / "summary.json").read_text())
        assert summary["requests_total"] == summary["requests_finished"] == summary["requests_equal"] == 12
        assert summary["requests_lost"] == summary["tokens_altered"] == 0
        assert summary["preemptions_with_notice"] + summary["preemptions_without_notice"] == 2
        assert summary["tokens_total"] == sum(4 + i for i in range(12))
        rows = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
        assert len(rows) == 12 and {row["verdict"] for row in rows} == {"equal"}
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        assert [row["at_s"] for row in events] == sorted(row["at_s"] for row in events)
        assert sum(row["kind"] == "lost" for row in events) == 2
        config = json.loads((out / "config.json").read_text())
        assert config["options"]["scaling"]["time_scale"] == 10.0
        assert set(config["traces"]) == {str(traces["capacity"]), str(traces["requests"])}
        assert fake_system.secret not in (out / "config.json").read_text()
        assert "tokens altered" in (out / "report.txt").read_text()
        restocks = [body["seconds"] for body in fake_system.script.calls("restock")]
        assert restocks == [None, 2.0], "the trace drives the fleet, and nothing after it"

    def test_a_lost_request_fails_the_run(self, fake_system, traces, tmp_path: Path) -> None:
        fake_system.script.refuse.add(5)
        options = self.options(fake_system, traces, tmp_path / "out", reference=False)
        assert run_replay(options, Console(quiet=True)) == 1
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["requests_lost"] == 1 and summary["requests_equal"] is None

    def test_without_a_capacity_trace_nothing_is_done_to_the_fleet(self, fake_system, traces, tmp_path: Path) -> None:
        del traces["capacity"]
        assert run_replay(self.options(fake_system, traces, tmp_path / "out"), Console(quiet=True)) == 0
        assert fake_system.script.admin_calls == []
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["requests_equal"] == 12

    def test_a_missing_trace_is_said_before_anything_runs(self, fake_system, traces, tmp_path: Path) -> None:
        traces["requests"] = tmp_path / "absent.csv"
        with pytest.raises(TraceError, match=r"absent\.csv"):
            run_replay(self.options(fake_system, traces, tmp_path / "out"), Console(quiet=True))
        assert fake_system.script.admin_calls == []

    def test_a_part_without_requests_is_said(self, traces) -> None:
        with pytest.raises(ConfigError, match=r"start_s=99.*0-2\.75 s"):
            read_timeline(traces["capacity"], traces["requests"], Scaling(start_s=99))


class TestDemo:
    @pytest.mark.parametrize(("wrong_gap", "code"), [(None, 0), (1e-6, 0), (0.5, 1)])
    def test_only_sound_answers_pass(self, fake_system, traces, tmp_path: Path, wrong_gap: float | None, code: int) -> None:
        script = fake_system.script
        if wrong_gap is not None:
            script.wrong_token[11], script.wrong_gap = 3, wrong_gap

        class Losing(list):
            """The wrong token is only said once instances have been lost: in the second pass."""

            def append(self, event: dict) -> None:
                super().append(event)
                script.wrong = script.wrong or event["kind"] == "lost"

        script.events = Losing()
        found = run_demo(fake_system.url, fake_system.secret, tmp_path / "demo", Console(quiet=True), scaling=SCALING, **traces)
        summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
        assert found == code, summary
        assert summary["tie_flips"] == (wrong_gap == 1e-6)
        assert (summary["tokens_altered"] > 0) is (wrong_gap == 0.5)
        assert (tmp_path / "demo" / "steady-summary.json").exists()
        report = (tmp_path / "demo" / "report.txt").read_text()
        assert "steady" in report and "with preemptions" in report

    def test_a_request_lost_on_the_steady_fleet_fails_too(self, fake_system, traces, tmp_path: Path) -> None:
        fake_system.script.fail.add(4)
        code = run_demo(fake_system.url, fake_system.secret, tmp_path / "demo", Console(quiet=True), scaling=SCALING, **traces)
        summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
        assert code == 1 and summary["requests_lost"] == 1 and summary["requests_equal"] == 11
