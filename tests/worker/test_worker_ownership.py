"""What an owner says of a step: what is new in it, under its own epoch, each accepted draft token once."""

from typing import Any

import msgspec

from spotserve.core.request import FinishReason, Request, SamplingParams, TokenDelta
from spotserve.engine.results import SequenceOutput
from spotserve.worker.ownership import OwnedSequence

EPOCH = 7


def owned(*token_ids: int) -> OwnedSequence:
    request = Request(request_id="s", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=9))
    return OwnedSequence(request=request, epoch=EPOCH, gateway_id="g", replica_id="r", token_ids=list(token_ids))


def output(position: int, *token_ids: int, **extra: Any) -> SequenceOutput:
    return SequenceOutput(request_id="s", position=position, token_ids=token_ids, **extra)


def test_what_was_drafted_goes_with_its_step() -> None:
    sequence = owned(4)
    said = sequence.extend(output(1, 5, 6, draft_tokens=3, accepted_tokens=1, drafter="suffix"))
    assert said == TokenDelta(
        request_id="s", epoch=EPOCH, position=1, token_ids=(5, 6), draft_tokens=3, accepted_tokens=1, drafter="suffix"
    )


def test_what_was_drafted_is_not_told_of_when_part_of_its_step_is_known() -> None:
    sequence = owned(4, 5)
    said = sequence.extend(output(1, 5, 6, draft_tokens=3, accepted_tokens=1, drafter="suffix", finish_reason=FinishReason.STOP))
    assert said is not None
    assert (said.position, said.token_ids, said.finish_reason) == (2, (6,), FinishReason.STOP)
    assert (said.draft_tokens, said.accepted_tokens, said.drafter) == (0, 0, "")


def test_all_progress_is_told_without_what_was_drafted() -> None:
    sequence = owned()
    sequence.extend(output(0, 4, 5, draft_tokens=3, accepted_tokens=1, drafter="suffix"))
    assert all((delta.draft_tokens, delta.drafter) == (0, "") for delta in sequence.whole_progress)


def test_a_delta_of_an_older_worker_is_read() -> None:
    new = TokenDelta(request_id="s", epoch=EPOCH, position=0, token_ids=(4,), draft_tokens=3, accepted_tokens=0, drafter="suffix")
    *older, drafter = msgspec.msgpack.decode(msgspec.msgpack.encode(new))
    assert drafter == "suffix", "it is the last field"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=TokenDelta) == msgspec.structs.replace(new, drafter="")
