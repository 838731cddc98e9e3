"""The memory of one sequence: each position once and in order, to any reader, whatever came in whichever order."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_scene import delta, request

from spotserve.core.cluster import REQUEST_TRANSITIONS, RequestState
from spotserve.core.epoch import after_dispatch, first_epoch
from spotserve.core.errors import IllegalTransition
from spotserve.core.request import FinishReason, TokenDelta, TokenLogprob
from spotserve.gateway.transcript import Transcript

LENGTH = 12


@st.composite
def heard(draw: st.DrawFn) -> list[TokenDelta]:
    """Pieces of one sequence of 12 tokens in any order: duplicates, overlaps, gaps, bare ids or with log-probabilities; at last
    all of it, so that it ends."""
    pieces = []
    for _ in range(draw(st.integers(0, 15))):
        position = draw(st.integers(0, LENGTH))
        end = draw(st.integers(position, LENGTH))
        finish = FinishReason.LENGTH if end == LENGTH and draw(st.booleans()) else None
        pieces.append((position, end, finish, draw(st.booleans()), draw(st.integers(1, 3))))
    pieces.append((0, LENGTH, FinishReason.LENGTH, True, 1))
    return [
        delta(
            epoch,
            position,
            end,
            finish=finish,
            logprobs=tuple(TokenLogprob(-float(at)) for at in range(position, end)) if scored else None,
            gaps=tuple(float(at) for at in range(position, end)) if scored else None,
        )
        for position, end, finish, scored, epoch in pieces
    ]


@settings(max_examples=150, deadline=None)
@given(pieces=heard(), readers=st.lists(st.integers(0, 16), min_size=1, max_size=4))
def test_every_reader_gets_each_position_once_and_in_order(pieces: list[TokenDelta], readers: list[int]) -> None:
    async def read(transcript: Transcript) -> list[TokenDelta]:
        return [item async for item in transcript.read()]

    async def scenario() -> None:
        transcript = Transcript(request(logprobs=0, gaps=True))
        transcript.dispatched_to("r")
        reading = []
        for turn, piece in enumerate(pieces):
            reading += [asyncio.create_task(read(transcript)) for start in readers if start == turn]
            before = len(transcript.token_ids)
            new = transcript.extend(piece)
            assert (len(new.token_ids) if new is not None else 0) == len(transcript.token_ids) - before
            await asyncio.sleep(0)
        reading += [asyncio.create_task(read(transcript)) for start in readers if start >= len(pieces)]
        for got in await asyncio.wait_for(asyncio.gather(*reading), 5):
            position = 0
            for item in got:
                assert item.position == position
                assert item.token_ids == tuple(100 + at for at in range(position, item.end_position))
                if item.logprobs is not None:
                    assert [entry.logprob for entry in item.logprobs] == [-float(at) for at in range(position, item.end_position)]
                    assert item.gaps == tuple(float(at) for at in range(position, item.end_position))
                position = item.end_position
            assert position == LENGTH
            assert [item.finish_reason for item in got if item.finish_reason] == [FinishReason.LENGTH]
        assert transcript.is_finished

    asyncio.run(scenario())


def test_what_begins_beyond_the_end_is_not_taken() -> None:
    transcript = Transcript(request())
    assert transcript.extend(delta(1, 1, 4)) is None
    assert transcript.extend(delta(1, 3, 3, finish=FinishReason.STOP)) is None
    assert not transcript.is_finished


def test_an_end_without_tokens_is_taken() -> None:
    transcript = Transcript(request())
    transcript.extend(delta(1, 0, 3))
    transcript.extend(delta(1, 3, 3, finish=FinishReason.STOP))
    assert transcript.finish_reason is FinishReason.STOP


def test_nothing_extends_a_finished_transcript() -> None:
    transcript = Transcript(request())
    transcript.extend(delta(1, 0, 3, finish=FinishReason.STOP))
    assert transcript.extend(delta(1, 0, 3, finish=FinishReason.STOP)) is None
    assert transcript.extend(delta(1, 3, 5)) is None
    assert transcript.token_ids == [100, 101, 102]


def test_a_draft_counts_when_all_of_its_step_is_new() -> None:
    transcript = Transcript(request())
    drafted = {"draft_tokens": 4, "accepted_tokens": 2, "drafter": "ngram"}
    new = transcript.extend(delta(1, 0, 3, **drafted))
    assert new is not None
    assert (new.draft_tokens, new.accepted_tokens, new.drafter) == (4, 2, "ngram")
    again = transcript.extend(delta(1, 2, 5, **drafted))
    assert again is not None
    assert again.token_ids == (103, 104)
    assert (again.draft_tokens, again.accepted_tokens, again.drafter) == (0, 0, "")


@pytest.mark.parametrize("sampling", [{"logprobs": 0}, {"gaps": True}])
def test_bare_tokens_of_the_store_are_not_taken_when_more_was_asked_for(sampling: dict[str, object]) -> None:
    transcript = Transcript(request(**sampling))
    transcript.extend_from_store((100, 101), FinishReason.STOP)
    assert not transcript.token_ids
    assert not transcript.is_finished


def test_each_dispatch_is_ahead_of_every_hand_over_before_it() -> None:
    transcript = Transcript(request())
    transcript.dispatched_to("a")
    assert transcript.epoch == first_epoch()
    transcript.owned_by("b", transcript.epoch + 1)
    transcript.suspend("its owner was lost")
    assert transcript.owner is None
    transcript.dispatched_to("c")
    assert transcript.epoch == after_dispatch(first_epoch())


def test_a_sequence_of_an_earlier_gateway_waits_under_the_epoch_that_is_known() -> None:
    transcript = Transcript(request())
    transcript.suspend_unseen(7 << 16)
    assert transcript.is_waiting
    assert transcript.state is RequestState.SUSPENDED
    transcript.dispatched_to("a")
    assert transcript.epoch == 8 << 16


MOVES: dict[RequestState, Callable[[Transcript], None]] = {
    RequestState.RUNNING: lambda transcript: transcript.dispatched_to("r"),
    RequestState.FINISHED: lambda transcript: transcript.finish_early(FinishReason.CANCELLED),
}


@pytest.mark.parametrize("target", MOVES)
@pytest.mark.parametrize("current", RequestState)
def test_the_table_of_states_is_kept(current: RequestState, target: RequestState) -> None:
    transcript = Transcript(request())
    if current is not RequestState.QUEUED:
        transcript.dispatched_to("r")
    if current is RequestState.SUSPENDED:
        transcript.suspend("its owner was lost")
    if current is RequestState.FINISHED:
        transcript.finish_early(FinishReason.CANCELLED)
    assert transcript.state is current
    if target in REQUEST_TRANSITIONS[current]:
        MOVES[target](transcript)
        assert transcript.state is target
    else:
        with pytest.raises(IllegalTransition):
            MOVES[target](transcript)
        assert transcript.state is current
