"""A worker that leads two replicas at once, as it does while it is cut anew: sequences pass from one to the other in mid-answer."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from worker_scene import FIRST, PATIENCE_S, Ear, Stage, stage, submit, undisturbed, until

from spotserve.core.epoch import after_dispatch, after_hand_over
from spotserve.core.errors import PeerLost
from spotserve.core.messages import Cancel, Drain, Moved, Released, SequenceAction, SequenceMoved, SequenceOrder
from spotserve.worker.drain import carry_out

pytestmark = pytest.mark.anyio

EVERYTHING = {"logprobs": 2, "gaps": True}
NEW = "r-new"


def everything_to(destination: str, a: Stage, source: str | None = None) -> Drain:
    move = SequenceOrder(
        request_id="",
        action=SequenceAction.MOVE,
        destination_replica_id=destination,
        destination=a.address,
        reason="another shape",
    )
    return Drain(instance_id="a", replica_id=source or a.replica_id, deadline_s=1060.0, orders=(), fallback=move)


async def drained(a: Stage, told: Drain) -> list[SequenceMoved]:
    """Carries a drain out; what it reported."""
    led = a.worker.led(told.replica_id)
    assert led is not None
    led.is_draining = True
    moved: list[SequenceMoved] = []
    await carry_out(a.worker, told, secret="not needed", clock=a.clock, on_moved=moved.append)
    return moved


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"temperature": 0.0, "frequency_penalty": 0.5, **EVERYTHING}])
async def test_an_answer_passes_to_the_new_replica_without_a_break(
    model_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    asked = {"max_tokens": 60, **options}
    expected = await undisturbed(model_folder, tmp_path, **asked)
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(**asked))
        await a.tokens_so_far(6)
        await a.lead(NEW)
        moving = asyncio.create_task(drained(a, everything_to(NEW, a)))
        await asyncio.sleep(0)
        a.let_go()
        (moved,) = await moving
        assert (moved.destination_replica_id, moved.kv_bytes) == (NEW, 0), "its KV was on the same device already"
        answer = await a.gateway.whole()
        assert answer == expected
        assert answer.recomputed_tokens == 0
        newer = after_hand_over(FIRST)
        assert a.gateway.of(Moved) == [Moved(request_id="s", epoch=newer, destination_replica_id=NEW)]
        at = a.gateway.heard.index(a.gateway.of(Moved)[0])
        before, after = Ear(), Ear()
        before.heard, after.heard = a.gateway.heard[:at], a.gateway.heard[at:]
        assert {delta.epoch for delta in before.deltas} == {FIRST}
        assert {delta.epoch for delta in after.deltas} == {newer}
        assert all(first.position + len(first.token_ids) == then.position for first, then in pairwise(a.gateway.deltas))
        await a.check_idle()
        a.end(a.replica_id)
        a.worker.submit("g", submit(request_id="t"))
        assert len((await a.gateway.whole("t")).token_ids) == 24


async def test_what_is_new_goes_to_the_newest_replica_that_does_not_drain(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        newest = await a.lead(NEW)
        a.worker.submit("g", submit(request_id="new"))
        newest.is_draining = True
        a.worker.submit("g", submit(request_id="old"))
        assert [owned.request_id for owned in a.worker.running_requests(NEW)] == ["new"]
        assert [owned.request_id for owned in a.worker.running_requests(a.replica_id)] == ["old"]
        await a.gateway.whole("new")
        await a.gateway.whole("old")


async def test_a_replica_that_ends_gives_back_its_own_sequences_only(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(request_id="old", max_tokens=400))
        await a.lead(NEW)
        a.worker.submit("g", submit(request_id="new"))
        a.end(a.replica_id)
        assert [released.request_id for released in a.gateway.of(Released)] == ["old"]  # type: ignore[attr-defined]
        assert len((await a.gateway.whole("new")).token_ids) == 24
        assert (await asyncio.wait_for(a.worker.heartbeat(), PATIENCE_S)).kv_tokens_used == 0


async def test_many_sequences_pass_and_come_back(model_folder: Path, tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(5)]
    expected = {
        name: await undisturbed(model_folder, tmp_path, request_id="s", max_tokens=120, seed=at) for at, name in enumerate(names)
    }
    async with stage(model_folder, tmp_path, "a") as [a]:
        for at, name in enumerate(names):
            a.worker.submit("g", submit(request_id=name, max_tokens=120, seed=at))
        await until(lambda: len(a.gateway.answer(names[-1]).token_ids) > 2)
        new = await a.lead(NEW)
        await drained(a, everything_to(NEW, a))
        a.replica.is_draining = False
        await drained(a, everything_to(a.replica_id, a, source=new.replica_id))
        for name in names:
            answer = await a.gateway.whole(name)
            assert answer.token_ids == expected[name].token_ids
        assert not a.gateway.of(Released)
        await a.check_idle()


@pytest.mark.parametrize("pause_s", [0.0, 0.005, 0.02])
async def test_a_request_that_is_cancelled_while_it_passes_leaves_nothing(
    model_folder: Path, tmp_path: Path, pause_s: float
) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        await a.lead(NEW)
        a.hold()  # the new one as well
        moving = asyncio.create_task(drained(a, everything_to(NEW, a)))
        a._free.set()
        await asyncio.sleep(pause_s)
        for epoch in (FIRST, after_hand_over(FIRST)):
            a.worker.cancel(Cancel(request_id="s", epoch=epoch))
        await moving
        await a.check_idle()


@pytest.mark.parametrize("yields", range(10))
async def test_a_drain_that_is_called_off_while_it_passes_strands_nothing(model_folder: Path, tmp_path: Path, yields: int) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=60))
        await a.tokens_so_far(3)
        await a.lead(NEW)
        moving = asyncio.create_task(drained(a, everything_to(NEW, a)))
        await asyncio.sleep(0)
        a.let_go()
        for _ in range(yields):
            await asyncio.sleep(0.001 if yields >= 5 else 0)
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await until(lambda: bool(a.gateway.of(Released)) or a.gateway.has_end())
        await a.check_idle()


async def test_a_replica_that_breaks_while_a_sequence_is_packed_gives_it_back(model_folder: Path, tmp_path: Path) -> None:
    def lose_a_peer(_: object) -> None:
        raise PeerLost("its machine is gone")

    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        await a.lead(NEW)
        a.replica.thread.post(lose_a_peer)
        moving = asyncio.create_task(drained(a, everything_to(NEW, a)))
        await asyncio.sleep(0)
        a.let_go()
        assert await asyncio.wait_for(moving, PATIENCE_S) == []
        assert len(a.gateway.of(Released)) == 1
        assert a.worker.led(a.replica_id) is None
        a.worker.submit("g", submit(after_dispatch(FIRST)))
        assert len((await a.gateway.whole()).token_ids) == 24
        await a.check_idle()


async def test_a_sequence_goes_back_to_its_gateway_when_its_new_replica_has_gone(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        await a.lead(NEW)
        a.let_go()
        packed = await a.worker.pack("s")
        assert packed is not None
        a.end(NEW)
        answer = await a.worker.pass_on(packed, NEW)
        assert not answer.accepted
        a.worker.release("s", "not moved", None)
        await a.check_idle()


async def test_the_new_replica_ends_while_a_sequence_is_on_its_way(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        new = await a.lead(NEW)
        a.hold()
        a._free.set()
        packed = await a.worker.pack("s")
        assert packed is not None
        passing = asyncio.create_task(a.worker.pass_on(packed, NEW))
        await asyncio.sleep(0)
        a.end(NEW)
        await asyncio.wait_for(passing, PATIENCE_S)
        assert len(a.gateway.of(Released)) == 1
        await asyncio.to_thread(new.thread._thread.join)
        await until(lambda: a.memory._fetched == {})
        await a.check_idle()
