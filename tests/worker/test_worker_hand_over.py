"""A sequence moves from one worker to another over real channels, and is never stranded between them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worker_scene import FIRST, SECRET, Ear, Refused, Stage, stage, submit, undisturbed, until

from spotserve.core.epoch import after_dispatch, after_hand_over
from spotserve.core.errors import ChannelClosed
from spotserve.core.messages import (
    Address,
    Cancel,
    Claim,
    Drain,
    HandOver,
    HandOverAnswered,
    Moved,
    Released,
    SequenceAction,
    SequenceMoved,
    SequenceOrder,
    Submit,
)
from spotserve.core.request import TokenDelta
from spotserve.engine.ranks import memory as memory_module
from spotserve.wire import bound_port, connect, listen
from spotserve.worker import drain as drain_module
from spotserve.worker.drain import carry_out

pytestmark = pytest.mark.anyio

EVERYTHING = {"logprobs": 2, "gaps": True}


def order(action: SequenceAction, destination: Address | None = None, request_id: str = "s") -> SequenceOrder:
    return SequenceOrder(
        request_id=request_id, action=action, destination_replica_id="to-b", destination=destination, reason="as told"
    )


def drain(*orders: SequenceOrder, deadline_s: float = 1060.0) -> Drain:
    return Drain(
        instance_id="a",
        replica_id="r-a",
        deadline_s=deadline_s,
        orders=orders,
        fallback=order(SequenceAction.RESUME, request_id=""),
    )


async def drained(a: Stage, told: Drain) -> list[SequenceMoved]:
    """Carries a drain of its replica out; what it reported."""
    a.replica.is_draining = True
    moved: list[SequenceMoved] = []
    told = msgspec.structs.replace(told, replica_id=a.replica_id)
    await carry_out(a.worker, told, secret=SECRET, clock=a.clock, on_moved=moved.append)
    return moved


async def on_their_way(a: Stage, told: Drain) -> "asyncio.Task[list[SequenceMoved]]":
    """The same, as a task that has begun."""
    task = asyncio.create_task(drained(a, told))
    await asyncio.sleep(0)
    a.let_go()
    return task


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"temperature": 0.0, "frequency_penalty": 0.5}])
async def test_a_moved_answer_equals_an_undisturbed_one(model_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = await undisturbed(model_folder, tmp_path, **options)
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(**options))
        await a.tokens_so_far(6)
        (moved,) = await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address))))
        assert moved.kv_bytes > 0
        assert moved.destination_replica_id == "to-b"
        assert a.gateway.of(Moved) == [Moved(request_id="s", epoch=after_hand_over(FIRST), destination_replica_id="to-b")]
        answer = await b.gateway.whole()
        assert answer == expected, "tokens, log-probabilities and gaps, from position 0"
        assert {delta.epoch for delta in b.gateway.deltas} == {after_hand_over(FIRST)}
        await a.check_idle()
        await b.check_idle()


async def test_a_sequence_can_move_there_and_back(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path, max_tokens=60, **EVERYTHING)
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(max_tokens=60, **EVERYTHING))
        await a.tokens_so_far(6)
        await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address))))
        a.replica.is_draining = False
        await b.tokens_so_far(12)
        await (await on_their_way(b, drain(order(SequenceAction.MOVE, a.address))))
        again = Ear()
        a.worker.attach("g", again)  # type: ignore[arg-type]
        assert await again.whole() == expected
        assert again.deltas[-1].epoch == after_hand_over(after_hand_over(FIRST))


async def test_what_has_no_room_there_is_computed_again_from_its_tokens(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path, **EVERYTHING)
    async with stage(model_folder, tmp_path, "a") as [a], stage(model_folder, tmp_path, "b", dtype="float32") as [b]:
        a.worker.submit("g", submit(**EVERYTHING))
        await a.tokens_so_far(6)
        await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address))))
        answer = await b.gateway.whole()
        assert answer.token_ids[:6] == expected.token_ids[:6]
        assert answer.logprobs[:6] == expected.logprobs[:6]
        assert len(answer.token_ids) == len(answer.logprobs) == len(answer.gaps) == 24
        assert answer.recomputed_tokens > 0


async def test_a_refusal_gives_the_sequence_back_to_its_gateway(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        b.replica.is_draining = True
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        assert await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address)))) == []
        (released,) = a.gateway.of(Released)
        assert "takes nothing new" in released.reason  # type: ignore[attr-defined]
        await a.check_idle()
        await b.check_idle()


async def test_a_newer_owner_over_there_is_not_replaced(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        b.worker.submit("g", submit(after_dispatch(FIRST), max_tokens=400))
        assert await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address)))) == []
        assert "newer" in a.gateway.of(Released)[0].reason  # type: ignore[attr-defined]
        await b.gateway.whole()
        assert {delta.epoch for delta in b.gateway.deltas} == {after_dispatch(FIRST)}


async def test_a_peer_of_another_model_refuses_and_keeps_nothing(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "b") as [b]:
        channel = await connect(b.address.host, b.address.port, secret=SECRET, inbound=HandOverAnswered)
        channel.send(hand_over(b, emitted=(5, 4000)))
        answer = await channel.receive()
        assert not answer.accepted
        assert "4000" in answer.reason
        channel.close()
        await b.check_idle()


def hand_over(source: Stage, *, emitted: tuple[int, ...], computed_tokens: int = 0) -> HandOver:
    """One whose KV is said to be on the device of `source`."""
    message, home = submit(), source.replica.home
    return HandOver(
        gateway_id="g",
        request=message.request,
        epoch=FIRST,
        progress=TokenDelta(request_id="s", epoch=FIRST, position=0, token_ids=emitted),
        emitted_token_ids=emitted,
        computed_tokens=computed_tokens,
        replica_id=source.replica_id,
        parallel=home.parallel,
        holders=home.holders,
        dtype=home.dtype,
    )


async def test_a_peer_that_is_not_there_gives_the_sequence_back(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        assert await (await on_their_way(a, drain(order(SequenceAction.MOVE, Address("127.0.0.1", 1))))) == []
        assert len(a.gateway.of(Released)) == 1
        await a.check_idle()


async def test_a_peer_that_dies_in_the_middle_gives_the_sequence_back(model_folder: Path, tmp_path: Path) -> None:
    async def die(channel: Any) -> None:
        assert isinstance(await channel.receive(), HandOver)

    async with stage(model_folder, tmp_path, "a") as [a]:
        server = await listen("127.0.0.1", 0, secret=SECRET, inbound=HandOver, on_channel=die, on_refused=print)
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        there = Address("127.0.0.1", bound_port(server))
        assert await (await on_their_way(a, drain(order(SequenceAction.MOVE, there)))) == []
        assert len(a.gateway.of(Released)) == 1
        await a.check_idle()
        server.close()


async def test_a_peer_that_does_not_answer_gives_the_sequence_back(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain_module, "MOVE_TIMEOUT_S", 0.05)
    silent = asyncio.Event()

    async def listen_only(channel: Any) -> None:
        await silent.wait()

    async with stage(model_folder, tmp_path, "a") as [a]:
        server = await listen("127.0.0.1", 0, secret=SECRET, inbound=HandOver, on_channel=listen_only, on_refused=print)
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        there = Address("127.0.0.1", bound_port(server))
        assert await (await on_their_way(a, drain(order(SequenceAction.MOVE, there)))) == []
        assert "within" in a.gateway.of(Released)[0].reason  # type: ignore[attr-defined]
        silent.set()
        server.close()


async def test_what_the_old_owner_does_not_hold_is_computed_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "HOLD_TIMEOUT_S", 0.05)
    expected = await undisturbed(model_folder, tmp_path)
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        answer = await b.worker.adopt(hand_over(a, emitted=tuple(expected.token_ids[:5]), computed_tokens=7))
        assert (answer.accepted, answer.kv_bytes) == (True, 0)
        assert (await b.gateway.whole()).token_ids == expected.token_ids
        await b.check_idle()


async def test_kv_of_another_length_than_promised_is_not_used(model_folder: Path, tmp_path: Path) -> None:
    """An old owner of the same name holds fewer tokens: nothing of it may enter the cache."""
    expected = await undisturbed(model_folder, tmp_path)
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit())
        await a.tokens_so_far(6)
        a.let_go()
        packed = await a.worker.pack("s")
        assert packed is not None
        wrong = msgspec.structs.replace(
            packed, emitted_token_ids=tuple(expected.token_ids[:20]), computed_tokens=packed.computed_tokens + 2
        )
        answer = await b.worker.adopt(wrong)
        assert (answer.accepted, answer.kv_bytes) == (True, 0)
        assert (await b.gateway.whole()).token_ids == expected.token_ids
        a.worker.ship(packed, "to-b")
        await a.check_idle()
        await b.check_idle()


async def test_a_command_before_attach_cuts_the_connection(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "b") as [b]:
        channel = await connect(b.address.host, b.address.port, secret=SECRET, inbound=HandOverAnswered)
        channel.send(Claim(request_id="s"))
        with pytest.raises(ChannelClosed):
            await channel.receive()
        assert b.gateway.of(Refused) == [Refused("Claim before Attach")]


# ---------------------------------------------------------------------- races


@pytest.mark.parametrize("pause_s", [0.0, 0.02])
async def test_what_is_withdrawn_on_arrival_is_not_started(model_folder: Path, tmp_path: Path, pause_s: float) -> None:
    """While its KV is fetched, or when it is there and waits for the engine: nothing of it stays."""
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        a.let_go()
        packed = await a.worker.pack("s")
        assert packed is not None
        b.hold()
        adopting = asyncio.create_task(b.worker.adopt(packed))
        await asyncio.sleep(pause_s)
        b.worker.cancel(Cancel(request_id="s", epoch=after_hand_over(FIRST)))
        b.let_go()
        assert not (await adopting).accepted
        await b.check_idle()
        a.worker.cancel(Cancel(request_id="s", epoch=FIRST))
        await a.check_idle()


async def test_a_full_engine_does_not_keep_what_it_fetched(model_folder: Path, tmp_path: Path) -> None:
    expected = await undisturbed(model_folder, tmp_path)
    async with stage(model_folder, tmp_path, "a") as [a], stage(model_folder, tmp_path, "b") as [b]:
        full = b.replica.thread
        await full.call(lambda engine: setattr(engine._scheduler, "_max_running", 0))
        a.worker.submit("g", submit())
        await a.tokens_so_far(6)
        (moved,) = await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address))))
        assert moved.kv_bytes > 0
        await full.call(lambda engine: setattr(engine._scheduler, "_max_running", 1))
        answer = await b.gateway.whole()
        assert answer.token_ids == expected.token_ids
        assert answer.recomputed_tokens > 0
        await b.check_idle()


async def test_a_request_that_is_cancelled_while_it_is_packed_is_not_handed_over(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a", "b") as [a, _]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        packing = asyncio.create_task(a.worker.pack("s"))
        await asyncio.sleep(0)
        a.worker.cancel(Cancel(request_id="s", epoch=FIRST))
        a.let_go()
        assert await packing is None
        await a.check_idle()


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda a, _: a.worker.submit("newer", Submit(request=submit().request, epoch=after_dispatch(FIRST))),
        lambda a, _: a.worker.claim("newer", Claim(request_id="s")),
    ],
)
async def test_what_is_asked_for_anew_while_it_moves_is_given_back_to_who_asked(
    model_folder: Path, tmp_path: Path, meanwhile: Callable[[Stage, object], None]
) -> None:
    """The peer speaks to the gateway that waited when the sequence was packed; the newer one would wait for ever."""
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(3)
        newer = Ear()
        a.worker.attach("newer", newer)  # type: ignore[arg-type]
        b.hold()
        moving = await on_their_way(a, drain(order(SequenceAction.MOVE, b.address)))
        await until(lambda: b.worker._ownership.get("s") is not None)
        meanwhile(a, newer)
        b.let_go()
        await moving
        assert len(newer.of(Released)) == 1
        await a.check_idle()


@pytest.mark.parametrize("yields", range(8))
async def test_a_drain_that_is_called_off_strands_nothing(model_folder: Path, tmp_path: Path, yields: int) -> None:
    """At whatever moment: before it was packed, while it is packed, while it travels."""
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(max_tokens=40))
        await a.tokens_so_far(3)
        if yields >= 4:
            b.hold()
        moving = await on_their_way(a, drain(order(SequenceAction.MOVE, b.address)))
        for _ in range(yields):
            await asyncio.sleep(0.001 if yields >= 4 else 0)
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        a.replica.is_draining = False
        b.let_go()
        if a.gateway.of(Moved):
            await b.gateway.whole()
        elif not a.gateway.of(Released):
            await a.gateway.whole()  # it had not begun
        await a.check_idle()


# ---------------------------------------------------------------------- the rest of a drain


async def test_what_is_to_be_resumed_is_released_at_once(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(1)
        await (await on_their_way(a, drain(order(SequenceAction.RESUME))))
        assert a.gateway.of(Released) == [Released(request_id="s", epoch=FIRST, reason="as told", destination_replica_id="to-b")]
        await a.check_idle()


async def test_what_the_controller_had_not_heard_of_is_treated_as_the_fallback_says(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(1)
        await (await on_their_way(a, drain(order(SequenceAction.FINISH, request_id="ended long ago"))))
        assert len(a.gateway.of(Released)) == 1
        await a.check_idle()


async def test_what_is_to_finish_here_finishes(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit())
        await a.tokens_so_far(1)
        await (await on_their_way(a, drain(order(SequenceAction.FINISH))))
        assert len((await a.gateway.whole()).token_ids) == 24
        assert not a.gateway.of(Released)
        await a.check_idle()


async def test_what_has_not_finished_shortly_before_the_deadline_is_released(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a") as [a]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(1)
        draining = asyncio.create_task(drained(a, drain(order(SequenceAction.FINISH), deadline_s=1010.0)))
        await asyncio.sleep(0.01)
        assert not draining.done()
        a.clock.advance_to(1009.8)
        await draining
        assert "in time" in a.gateway.of(Released)[0].reason  # type: ignore[attr-defined]
        await a.check_idle()


async def test_nothing_is_sent_when_the_deadline_is_here(model_folder: Path, tmp_path: Path) -> None:
    async with stage(model_folder, tmp_path, "a", "b") as [a, b]:
        a.worker.submit("g", submit(max_tokens=400))
        await a.tokens_so_far(1)
        await (await on_their_way(a, drain(order(SequenceAction.MOVE, b.address), deadline_s=999.0)))
        assert "within 0.00 s" in a.gateway.of(Released)[0].reason  # type: ignore[attr-defined]
        await b.check_idle()
