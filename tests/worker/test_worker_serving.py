"""What gateways may ask of a worker: submit, claim, cancel, attach; and who is right when two of them ask."""

from pathlib import Path

import pytest
from worker_scene import FIRST, Ear, ScriptedStore, stage, submit, undisturbed, until

from spotserve.config import WorkerSettings
from spotserve.core.clock import ManualClock
from spotserve.core.epoch import after_dispatch
from spotserve.core.messages import Cancel, Claim, ClaimAnswered, Released
from spotserve.core.request import FinishReason
from spotserve.worker.worker import Worker

pytestmark = pytest.mark.anyio

SECOND = after_dispatch(FIRST)


async def test_a_request_is_run_to_its_end_and_committed(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=10))
        answer = await a.gateway.whole()
        assert len(answer.token_ids) == 10
        assert answer.finish_reason is FinishReason.LENGTH
        await a.check_idle()


async def test_a_request_that_is_submitted_twice_runs_once(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path)
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit())
        await a.tokens_so_far(3)
        a.worker.submit("g", submit())
        await a.check()
        assert (await a.gateway.whole()) == expected


async def test_an_older_epoch_is_ignored(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(SECOND))
        await a.tokens_so_far(2)
        late = Ear()
        a.worker.attach("late", late)  # type: ignore[arg-type]
        a.worker.submit("late", submit(FIRST))
        a.let_go()
        await a.gateway.whole()
        assert late.heard == []
        assert {delta.epoch for delta in a.gateway.deltas} == {SECOND}


async def test_a_newer_epoch_keeps_the_progress_and_speaks_to_the_new_gateway(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path, logprobs=2, gaps=True)
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(logprobs=2, gaps=True))
        await a.tokens_so_far(5)
        newer = Ear()
        a.worker.attach("newer", newer)  # type: ignore[arg-type]
        a.worker.submit("newer", submit(SECOND, logprobs=2, gaps=True))
        told = len(a.gateway.heard)
        assert len(newer.answer().token_ids) >= 5, "everything so far, at once"
        a.let_go()
        assert await newer.whole() == expected
        assert {delta.epoch for delta in newer.deltas} == {SECOND}
        assert len(a.gateway.heard) == told


async def test_a_request_goes_on_after_what_was_emitted(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path, logprobs=1)
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(emitted=expected.token_ids[:7], logprobs=1))
        await until(a.gateway.has_end)
        assert a.gateway.deltas[0].position == 7
        said = [token for delta in a.gateway.deltas for token in delta.token_ids]
        assert said == expected.token_ids[7:]
        assert [entry for delta in a.gateway.deltas for entry in delta.logprobs or ()] == expected.logprobs[7:]
        newcomer = Ear()
        a.worker.attach("g", newcomer)  # type: ignore[arg-type]
        assert newcomer.answer().token_ids == expected.token_ids, "from position 0, also what was not made here"


async def test_a_gateway_that_claims_gets_everything(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path)
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit())
        await a.tokens_so_far(4)
        other = Ear()
        a.worker.attach("other", other)  # type: ignore[arg-type]
        assert other.heard == []
        a.worker.claim("other", Claim(request_id="s"))
        a.worker.claim("other", Claim(request_id="unknown"))
        assert other.of(ClaimAnswered) == [
            ClaimAnswered(request_id="s", found=True),
            ClaimAnswered(request_id="unknown", found=False),
        ]
        a.let_go()
        assert await other.whole() == expected
        assert not a.gateway.has_end()


async def test_a_gateway_that_attaches_again_gets_everything(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path)
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit())
        await a.tokens_so_far(4)
        a.worker.detach("g", a.gateway)  # type: ignore[arg-type]
        a.let_go()
        await until(lambda: a.worker.running_requests(a.replica_id) == ())
        assert not a.gateway.has_end()
        again = Ear()
        a.worker.attach("g", again)  # type: ignore[arg-type]
        assert again.answer() == expected


async def test_the_end_of_an_old_connection_does_not_detach_the_new_one(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        newer = Ear()
        a.worker.attach("g", newer)  # type: ignore[arg-type]
        a.worker.detach("g", a.gateway)  # type: ignore[arg-type]
        a.worker.submit("g", submit(max_tokens=2))
        await newer.whole()


async def test_cancel_frees_everything(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(2)
        a.worker.cancel(Cancel(request_id="s", epoch=FIRST))
        a.worker.cancel(Cancel(request_id="s", epoch=FIRST))
        await a.check_idle()


async def test_cancel_by_a_gateway_that_is_behind_is_refused(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(SECOND))
        a.worker.cancel(Cancel(request_id="s", epoch=FIRST))
        await a.gateway.whole()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"prompt": (1, 95, 96)}, "96"), ({"prompt": tuple([3] * 512)}, "context"), ({"logit_bias": {500: 1.0}}, "500")],
)
async def test_what_the_engine_refuses_fails(model_folder: Path, tmp_path: Path, options: dict[str, object], says: str) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(**options))  # type: ignore[arg-type]
        answer = await a.gateway.whole()
        assert answer.finish_reason is FinishReason.FAILED
        assert answer.error is not None
        assert says in answer.error
        await a.check_idle()


async def test_finished_progress_is_kept_for_a_while(model_folder: Path, tmp_path: Path) -> None:
    clock = ManualClock(1000.0)
    async with stage(model_folder, tmp_path, "a", clock=clock) as [a]:
        a.worker.submit("g", submit(max_tokens=3))
        await a.gateway.whole()
        clock.advance_to(1029.0)
        await a.worker.heartbeat()
        a.worker.claim("g", Claim(request_id="s"))
        clock.advance_to(1031.0)
        await a.worker.heartbeat()
        a.worker.claim("g", Claim(request_id="s"))
        assert [answered.found for answered in a.gateway.of(ClaimAnswered)] == [True, False]  # type: ignore[attr-defined]


async def test_a_draining_worker_takes_nothing_new_and_says_where_to_go(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.replica.is_draining, a.replica.suggested_replica_id = True, "b"
        a.worker.submit("g", submit())
        (released,) = a.gateway.heard
        assert isinstance(released, Released)
        assert (released.epoch, released.destination_replica_id) == (FIRST, "b")
        await a.check_idle()


async def test_a_heartbeat_tells_what_runs(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        assert (await a.worker.heartbeat()).sequences == ()
        a.worker.submit("g", submit(max_tokens=60))
        await until(lambda: len(a.gateway.deltas) >= 3)
        heartbeat = await a.worker.heartbeat()
        if heartbeat.sequences:  # it may have ended meanwhile
            (report,) = heartbeat.sequences
            assert report.context_tokens + report.remaining_tokens == 63
            assert heartbeat.running == 1
            assert heartbeat.kv_tokens_used >= report.computed_tokens
        await a.gateway.whole()
        heartbeat = await a.worker.heartbeat()
        assert (heartbeat.running, heartbeat.waiting, heartbeat.kv_tokens_used) == (0, 0, 0)
        assert heartbeat.step_s > 0
        assert heartbeat.prefill_tokens_per_s > 0


async def test_a_fenced_sequence_is_dropped_unless_it_was_dispatched_anew(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(SECOND, max_tokens=400))
        await a.tokens_so_far(1)
        a.worker._fence("s", FIRST)
        assert len(a.worker.running_requests(a.replica_id)) == 1
        a.worker._fence("s", SECOND)
        await a.check_idle()


async def test_a_worker_without_a_model_releases() -> None:
    worker, gateway = Worker("a", WorkerSettings(), ScriptedStore(), ManualClock()), Ear()
    worker.attach("g", gateway)  # type: ignore[arg-type]
    worker.submit("g", submit())
    assert [type(message) for message in gateway.heard] == [Released]
    assert (await worker.heartbeat()).kv_tokens_total == 0
