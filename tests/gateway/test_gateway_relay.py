"""The relay against replicas that the test plays: whatever they do, every answer is whole and has one owner."""

import asyncio

import msgspec
import pytest
from relay_scene import ScriptedStore, call, delta, length, read, scene, until

from spotserve.checkpoint.store import Progress
from spotserve.core.cluster import ReplicaState
from spotserve.core.epoch import after_dispatch, after_hand_over, first_epoch
from spotserve.core.errors import Overloaded, StoreError
from spotserve.core.messages import Attach, Cancel, Claim, ClaimAnswered, Moved, Released, Served, Submit
from spotserve.core.request import FinishReason, TokenDelta
from spotserve.gateway import relay as relay_module

pytestmark = pytest.mark.anyio

END = FinishReason.LENGTH
FIRST = first_epoch()
SECOND = after_dispatch(FIRST)


def tokens(end: int) -> tuple[int, ...]:
    return delta(0, 0, end).token_ids


# ---------------------------------------------------------------------- the plain way


async def test_an_answer_passes_through() -> None:
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        submit = await a.hears(Submit)
        assert (submit.epoch, submit.emitted_token_ids) == (FIRST, ())
        a.say(delta(FIRST, 0, 3), delta(FIRST, 3, 5, finish=END))
        assert await length(stream) == 5
        stage.relay.release("call")
        assert stage.report() == {"finished": 1}


async def test_choices_are_spread_over_replicas() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        await stage.relay.submit(call(choices=4))
        for replica in (a, a, b, b):
            await replica.hears(Submit)
        assert stage.report() == {"running": 4}


async def test_a_reader_that_starts_late_gets_everything() -> None:
    async with scene("a") as (stage, [a]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 3), delta(FIRST, 3, 5, finish=END))
        await until(lambda: stage.report() == {"finished": 1})
        found = await stage.relay.reattach("call")
        assert found is not None
        assert await length(found[1][0]) == 5


async def test_what_finds_nobody_waits_for_the_next_table() -> None:
    async with scene("a", connected=False) as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        stage.publish(a.route(ReplicaState.DRAINING))
        await a.hears(Attach)
        assert stage.report() == {"queued": 1}
        assert not stage.relay.ready
        stage.publish(a.route())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 1, finish=END))
        assert await length(stream) == 1


async def test_more_than_may_wait_are_refused() -> None:
    async with scene(max_queued=2) as (stage, _):
        await stage.relay.submit(call("one"))
        with pytest.raises(Overloaded):
            await stage.relay.submit(call("two", choices=2))
        await stage.relay.submit(call("three"))
        assert stage.report() == {"queued": 2}


async def test_what_fails_is_lost_and_says_why() -> None:
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 0, finish=FinishReason.FAILED, error="no such token"))
        assert (await read(stream))[-1].error == "no such token"
        assert stage.report() == {"finished": 1, "lost": 1}


# ---------------------------------------------------------------------- owners come and go


async def test_a_loss_is_resumed_elsewhere_after_what_arrived() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 4))
        await until(lambda: stage.metrics.output_tokens._value.get() == 4)
        a.die()
        submit = await b.hears(Submit)
        assert (submit.epoch, submit.emitted_token_ids) == (SECOND, tokens(4))
        b.say(delta(SECOND, 4, 6, finish=END))
        assert await length(stream) == 6
        assert [news.request_id for news in stage.resumed] == ["call-0"]


async def test_the_store_may_know_more_than_what_arrived() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 2))
        stage.store.progress["call-0"] = Progress(FIRST, tokens(7), None)
        a.die()
        assert (await b.hears(Submit)).emitted_token_ids == tokens(7)
        b.say(delta(SECOND, 7, 9, finish=END))
        assert await length(stream) == 9


async def test_the_store_may_know_the_end() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        stage.store.progress["call-0"] = Progress(FIRST, tokens(3), END)
        a.die()
        assert await length(stream) == 3
        assert b.has_heard_nothing_more
        assert stage.report() == {"finished": 1}


async def test_without_its_store_it_goes_on_from_what_arrived() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 2))
        await until(lambda: stage.metrics.output_tokens._value.get() == 2)
        stage.store.down = True
        a.die()
        assert (await b.hears(Submit)).emitted_token_ids == tokens(2)
        b.say(delta(SECOND, 2, 3, finish=END))
        assert await length(stream) == 3


async def test_a_table_that_comes_while_the_store_is_asked_does_not_jump_the_queue() -> None:
    """The controller usually publishes a loss in the same moment in which the connection ends."""
    async with scene("a", "b") as (stage, [a, b]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        await until(lambda: "call" in stage.store.calls)
        stage.store.gate.clear()
        stage.store.progress["call-0"] = Progress(FIRST, tokens(5), None)
        a.die()
        await until(lambda: stage.report() == {"suspended": 1})
        stage.publish(b.route())
        stage.store.gate.set()
        assert (await b.hears(Submit)).emitted_token_ids == tokens(5)
        assert len(stage.resumed) == 1


async def test_two_losses_in_a_row() -> None:
    async with scene("a", "b", "c") as (stage, [a, b, c]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.die()
        await b.hears(Submit)
        b.say(delta(SECOND, 0, 2))
        await until(lambda: stage.metrics.output_tokens._value.get() == 2)
        b.die()
        submit = await c.hears(Submit)
        assert (submit.epoch, submit.emitted_token_ids) == (after_dispatch(SECOND), tokens(2))
        c.say(delta(submit.epoch, 2, 3, finish=END))
        assert await length(stream) == 3
        assert len(stage.resumed) == 2


async def test_a_replica_that_leaves_the_table_is_lost() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        stage.publish(b.route())
        assert (await b.hears(Submit)).epoch == SECOND


async def test_a_replica_that_moved_to_another_address_is_attached_to_anew() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        b.replica_id = "a"
        stage.publish(b.route())
        await b.hears(Attach)
        assert (await b.hears(Submit)).epoch == SECOND


async def test_a_late_owner_is_not_believed_and_told_to_stop() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(Released(request_id="call-0", epoch=FIRST, reason="drain"))
        await b.hears(Submit)
        a.say(delta(FIRST, 0, 3))
        assert await a.hears(Cancel) == Cancel(request_id="call-0", epoch=FIRST)
        assert stage.metrics.output_tokens._value.get() == 0
        b.say(delta(SECOND, 0, 1, finish=END))
        assert await length(stream) == 1


async def test_what_still_runs_after_the_end_is_told_to_stop() -> None:
    async with scene("a") as (stage, [a]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 1, finish=END), delta(FIRST, 1, 2))
        await a.hears(Cancel)
        assert stage.report() == {"finished": 1}


async def test_a_moved_sequence_belongs_to_its_new_owner_and_its_source_may_go() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        moved = after_hand_over(FIRST)
        a.say(delta(FIRST, 0, 2), Moved(request_id="call-0", epoch=moved, destination_replica_id="b"))
        await until(lambda: stage.relay._transcripts["call-0"].owner == "b")
        a.die()
        b.say(delta(moved, 0, 4, finish=END))
        assert await length(stream) == 4
        assert not stage.resumed
        assert b.has_heard_nothing_more


async def test_the_new_owner_may_speak_before_the_old_one_says_that_it_moved() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        moved = after_hand_over(FIRST)
        b.say(delta(moved, 0, 2))
        await until(lambda: stage.relay._transcripts["call-0"].owner == "b")
        a.say(Moved(request_id="call-0", epoch=moved, destination_replica_id="b"))
        a.die()
        b.say(delta(moved, 2, 3, finish=END))
        assert await length(stream) == 3
        assert not stage.resumed


async def test_a_sequence_that_moved_to_a_machine_which_is_gone_already_is_not_stranded() -> None:
    """The end of the new owner may be heard before the old one's word that it moved there."""
    async with scene("a", "b") as (stage, [a, b]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        b.die()
        await until(lambda: set(stage.relay._links.connected_ids()) == {"a"})
        a.say(Moved(request_id="call-0", epoch=after_hand_over(FIRST), destination_replica_id="b"))
        assert (await a.hears(Submit)).epoch == SECOND
        a.say(delta(SECOND, 0, 1, finish=END))
        assert await length(stream) == 1


async def test_what_is_released_goes_where_the_controller_suggests() -> None:
    async with scene("a", "b", "c") as (stage, [a, b, c]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(Released(request_id="call-0", epoch=FIRST, reason="drain", destination_replica_id="c"))
        assert (await c.hears(Submit)).epoch == SECOND
        assert b.has_heard_nothing_more


async def test_what_is_released_does_not_go_back_as_long_as_there_is_another() -> None:
    async with scene("a", "b") as (stage, [a, b]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(Released(request_id="call-0", epoch=FIRST, reason="drain"))
        assert (await b.hears(Submit)).epoch == SECOND
        a.say(Released(request_id="call-0", epoch=FIRST, reason="said twice"))
        assert stage.report() == {"running": 1}


async def test_the_only_replica_is_asked_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "RETRY_RELEASED_S", 0.02)
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(Released(request_id="call-0", epoch=FIRST, reason="no model yet"))
        await until(lambda: stage.report() == {"suspended": 1})
        assert a.has_heard_nothing_more, "no ping-pong"
        assert (await a.hears(Submit)).epoch == SECOND
        a.say(delta(SECOND, 0, 1, finish=END))
        assert await length(stream) == 1


async def test_a_connection_that_breaks_and_comes_back_costs_nothing_but_an_epoch() -> None:
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 2))
        await until(lambda: stage.metrics.output_tokens._value.get() == 2)
        a.glitch()
        await a.hears(Attach)
        a.say(delta(FIRST, 0, 3))  # what a worker says when a gateway attaches
        assert (await a.hears(Submit)).epoch == SECOND
        a.say(delta(SECOND, 0, 5, finish=END))
        assert await length(stream) == 5


# ---------------------------------------------------------------------- clients leave and come back


async def test_cancel_reaches_the_owner_and_ends_the_stream() -> None:
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 2))
        await until(lambda: stage.metrics.output_tokens._value.get() == 2)
        stage.relay.cancel("call-0")
        stage.relay.cancel("call-0")
        stage.relay.cancel("unknown")
        assert await a.hears(Cancel) == Cancel(request_id="call-0", epoch=FIRST)
        assert (await read(stream))[-1].finish_reason is FinishReason.CANCELLED
        assert a.has_heard_nothing_more
        assert stage.report() == {"finished": 1}


async def test_what_waits_can_be_cancelled() -> None:
    async with scene() as (stage, _):
        (stream,) = await stage.relay.submit(call())
        stage.relay.cancel("call-0")
        assert (await read(stream))[-1].finish_reason is FinishReason.CANCELLED


async def test_a_call_that_nobody_reads_is_cancelled_after_its_grace() -> None:
    async with scene("a", detach_grace_s=0.02) as (stage, [a]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        stage.relay.detach("call")
        await a.hears(Cancel)
        assert stage.report() == {"finished": 1}
        assert not stage.relay._transcripts
        assert not stage.relay._calls


async def test_a_client_that_comes_back_in_time_loses_nothing() -> None:
    async with scene("a", detach_grace_s=0.05) as (stage, [a]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        stage.relay.detach("call")
        found = await stage.relay.reattach("call")
        await asyncio.sleep(0.1)  # longer than the grace
        assert a.has_heard_nothing_more
        a.say(delta(FIRST, 0, 3, finish=END))
        assert found is not None
        assert await length(found[1][0]) == 3


async def test_two_readers_must_both_leave() -> None:
    async with scene("a", detach_grace_s=0.02) as (stage, [a]):
        await stage.relay.submit(call())
        await a.hears(Submit)
        await stage.relay.reattach("call")
        stage.relay.detach("call")
        await asyncio.sleep(0.05)
        assert a.has_heard_nothing_more
        stage.relay.detach("call")
        await a.hears(Cancel)


async def test_a_delivered_answer_can_be_read_again() -> None:
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 3, finish=END))
        await read(stream)
        stage.relay.release("call")
        found = await stage.relay.reattach("call")
        assert found is not None
        assert await length(found[1][0]) == 3


# ---------------------------------------------------------------------- a gateway that is gone


def stored(progress: Progress | None = None, **sampling: object) -> ScriptedStore:
    """A store that knows a call of a gateway that is gone."""
    store = ScriptedStore()
    record = call(**sampling)
    store.calls["call"] = msgspec.msgpack.encode(record)
    if progress is not None:
        store.progress["call-0"] = progress
    return store


async def reattach(stage: object) -> object:
    found = await stage.relay.reattach("call")  # type: ignore[attr-defined]
    assert found is not None
    return found[1][0]


async def test_what_nobody_knows_is_not_found() -> None:
    async with scene("a") as (stage, _):
        assert await stage.relay.reattach("never") is None


async def test_a_worker_that_runs_the_sequence_goes_on_with_it() -> None:
    async with scene("a", "b", store=stored(Progress(SECOND, tokens(2), None))) as (stage, [a, b]):
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        await b.hears(Claim)
        b.say(ClaimAnswered(request_id="call-0", found=True))
        await asyncio.sleep(0.05)  # the answer may come long before the progress
        b.say(delta(SECOND, 0, 4))
        a.say(ClaimAnswered(request_id="call-0", found=False))
        stream = await reading
        b.say(delta(SECOND, 4, 6, finish=END))
        assert await length(stream) == 6  # type: ignore[arg-type]
        assert a.has_heard_nothing_more
        assert b.has_heard_nothing_more, "it was not dispatched anew"


async def test_a_sequence_that_no_worker_has_is_resumed_from_the_store() -> None:
    async with scene("a", store=stored(Progress(SECOND, tokens(2), None))) as (stage, [a]):
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=False))
        submit = await a.hears(Submit)
        assert (submit.epoch, submit.emitted_token_ids) == (after_dispatch(SECOND), tokens(2))
        a.say(delta(submit.epoch, 2, 3, finish=END))
        assert await length(await reading) == 3  # type: ignore[arg-type]


async def test_a_worker_with_an_outdated_copy_is_not_the_owner() -> None:
    async with scene("a", store=stored(Progress(SECOND, tokens(4), None))) as (stage, [a]):
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=True), delta(FIRST, 0, 2))
        assert (await a.hears(Cancel)).epoch == FIRST
        submit = await a.hears(Submit)
        assert (submit.epoch, submit.emitted_token_ids) == (after_dispatch(SECOND), tokens(4))
        await reading


async def test_a_worker_that_says_nothing_does_not_hold_the_call_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "CLAIM_TIMEOUT_S", 0.05)
    async with scene("a", store=stored()) as (stage, [a]):
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        assert (await a.hears(Submit)).epoch == FIRST
        await reading


async def test_a_worker_that_dies_while_it_is_asked_has_answered() -> None:
    async with scene("a", "b", store=stored()) as (stage, [a, b]):
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        await b.hears(Claim)
        b.say(ClaimAnswered(request_id="call-0", found=False))
        a.die()
        await b.hears(Submit)
        await reading


async def test_two_readers_come_back_at_once() -> None:
    async with scene("a", store=stored(Progress(FIRST, tokens(2), None))) as (stage, [a]):
        reading = [asyncio.create_task(reattach(stage)) for _ in range(2)]
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=False))
        await a.hears(Submit)
        a.say(delta(SECOND, 2, 3, finish=END))
        assert [await length(stream) for stream in await asyncio.gather(*reading)] == [3, 3]  # type: ignore[arg-type]
        assert a.has_heard_nothing_more


async def test_a_store_that_goes_while_a_call_is_taken_over_leaves_nothing_behind() -> None:
    async with scene("a", store=stored(Progress(FIRST, tokens(2), None))) as (stage, [a]):
        get_call = stage.store.get_call

        async def last_word(call_id: str) -> bytes | None:
            record = await get_call(call_id)
            stage.store.down = True
            return record

        stage.store.get_call = last_word  # type: ignore[method-assign]
        with pytest.raises(StoreError):
            await stage.relay.reattach("call")
        stage.store.down, stage.store.get_call = False, get_call  # type: ignore[method-assign]
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=False))
        await a.hears(Submit)
        await reading


async def test_a_reader_that_leaves_while_its_call_is_taken_over_does_not_strand_it() -> None:
    async with scene("a", store=stored(), detach_grace_s=0.02) as (stage, [a]):
        reading = asyncio.create_task(stage.relay.reattach("call"))
        await a.hears(Claim)
        reading.cancel()
        await asyncio.sleep(0.05)  # longer than the grace
        a.say(ClaimAnswered(request_id="call-0", found=False))
        await a.hears(Submit)
        await a.hears(Cancel)
        assert not stage.relay._transcripts


async def test_a_finished_answer_of_the_store_needs_no_worker() -> None:
    store = stored(Progress(FIRST, tokens(3), END))
    async with scene("a", store=store) as (stage, [a]):
        assert await length(await reattach(stage)) == 3  # type: ignore[arg-type]
        assert a.has_heard_nothing_more


async def test_log_probabilities_are_computed_again_when_only_the_store_is_left() -> None:
    async with scene("a", store=stored(Progress(FIRST, tokens(3), END), logprobs=1)) as (stage, [a]):
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=False))
        assert (await a.hears(Submit)).emitted_token_ids == ()
        await reading


async def test_a_restarted_gateway_lets_unknown_sequences_run_until_their_clients_had_time_to_come_back() -> None:
    async with scene("a", store=stored(Progress(FIRST, tokens(2), None)), detach_grace_s=0.2) as (stage, [a]):
        other = TokenDelta(request_id="abandoned", epoch=FIRST, position=0, token_ids=(1,))
        a.say(delta(FIRST, 0, 3), other)  # what a worker says when a gateway of this name attaches
        reading = asyncio.create_task(reattach(stage))
        await a.hears(Claim)
        a.say(ClaimAnswered(request_id="call-0", found=True), delta(FIRST, 0, 4))
        stream = await reading
        assert await a.hears(Cancel) == Cancel(request_id="abandoned", epoch=FIRST)
        a.say(delta(FIRST, 4, 5, finish=END))
        assert await length(stream) == 5  # type: ignore[arg-type]


async def test_a_store_that_is_down_does_not_keep_a_call_from_being_served() -> None:
    async with scene("a") as (stage, [a]):
        stage.store.down = True
        (stream,) = await stage.relay.submit(call())
        await a.hears(Submit)
        a.say(delta(FIRST, 0, 1, finish=END))
        assert await length(stream) == 1
        with pytest.raises(StoreError):
            await stage.relay.reattach("another")


async def test_a_report_tells_what_came_and_went_once() -> None:
    async with scene("a") as (stage, [a]):
        (stream,) = await stage.relay.submit(call())
        submit = await a.hears(Submit)
        first = stage.relay.report("gateway")
        assert (first.arrived, first.served) == (1, ())
        a.say(delta(FIRST, 0, 5, finish=END))
        assert await length(stream) == 5
        second = stage.relay.report("gateway")
        assert (second.arrived, second.served) == (0, (Served(len(submit.request.prompt_token_ids), 5),))
        assert stage.relay.report("gateway").served == ()
