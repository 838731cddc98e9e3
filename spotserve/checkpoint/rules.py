"""The rules of commit (see `store.ProgressStore`), for a store that reads, decides and writes under its own lock.

Pure. Redis applies the same rules in a script beside the data; one property test holds both to a naive model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from spotserve.checkpoint.store import Commit, CommitOutcome, Verdict
from spotserve.core.request import FinishReason


class Stored(msgspec.Struct, frozen=True):
    """What the rules need to know of a stored request."""

    epoch: int
    length_tokens: int


@dataclass(slots=True)
class Write:
    """What is to be written of one request; grows while its commits are settled."""

    epoch: int
    length_tokens: int
    """Tokens stored once this is written."""
    tail: list[int]
    """Tokens to append."""
    finish_reason: FinishReason | None = None
    """None: keep what is stored."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """The answer to a batch, and what has to be written for the answer to be true: one write per request."""

    outcomes: list[CommitOutcome]
    writes: Mapping[str, Write]


_UNKNOWN = Stored(0, 0)


def settle(batch: Sequence[Commit], stored: Mapping[str, Stored]) -> Settlement:
    """Decides on each commit of `batch` in order; `stored` has the requests that are known."""
    outcomes: list[CommitOutcome] = []
    writes: dict[str, Write] = {}
    for commit in batch:
        request_id = commit.request_id
        current: Stored | Write = writes.get(request_id) or stored.get(request_id, _UNKNOWN)
        epoch, length = current.epoch, current.length_tokens
        if epoch > commit.epoch:
            outcomes.append(CommitOutcome(request_id, Verdict.FENCED, length, epoch))
        elif commit.position > length:
            outcomes.append(CommitOutcome(request_id, Verdict.GAP, length, epoch))
        else:
            write = writes.get(request_id)
            if write is None:
                write = writes[request_id] = Write(epoch, length, [])
            tail = commit.token_ids[length - commit.position :]
            write.epoch = commit.epoch
            write.length_tokens += len(tail)
            write.tail.extend(tail)
            write.finish_reason = commit.finish_reason or write.finish_reason
            outcomes.append(CommitOutcome(request_id, Verdict.OK, write.length_tokens, commit.epoch))
    return Settlement(outcomes, writes)
