"""What a store of progress promises, and the values that go in and out of it.

Two independent kinds of rows: *call records* (opaque bytes that let another gateway take a call over) and *progress* of
each request: its epoch and its output tokens so far. The invariant of progress: what is stored is a prefix of the one
sequence that the request has, and it never grows shorter while it lives. Every method may raise `StoreError` and none
takes longer than the store's timeout; every method may be repeated, because saying a thing twice changes nothing.

Does not know where rows are kept, nor what a call record says.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from spotserve.core.request import FinishReason


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens of one request, as its owner of `epoch` knows them."""

    request_id: str
    epoch: int
    position: int
    """Output position of the first of `token_ids`."""
    token_ids: Sequence[int]
    """May be empty: a commit then only claims the epoch or says how the sequence ended."""
    finish_reason: FinishReason | None = None
    """None: more will come, or the end was committed before."""


class Verdict(Enum):
    """What became of one commit."""

    OK = "ok"
    """Everything up to the end of the commit is stored."""
    GAP = "gap"
    """Nothing written: tokens before `position` are missing; the owner sends its whole progress next time."""
    FENCED = "fenced"
    """Nothing written: a newer owner has committed; this one must stop."""


class CommitOutcome(msgspec.Struct, frozen=True):
    """The store's answer to one commit."""

    request_id: str
    verdict: Verdict
    length_tokens: int
    """Tokens stored now."""
    epoch: int
    """Epoch stored now; 0: nothing is known of the request."""


class Progress(msgspec.Struct, frozen=True):
    """What is stored of one request."""

    epoch: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class ProgressStore(Protocol):
    """What a worker needs: written once per engine step."""

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        """Applies `batch` in order and all at once, in one round trip; one outcome per commit.

        A commit of an epoch below the stored one is FENCED; else one that begins beyond the stored end is a GAP; else the
        tokens beyond the stored end are appended, the epoch is raised and the end of the sequence, if given, is stored.
        """
        ...

    async def load(self, request_ids: Sequence[str]) -> Mapping[str, Progress]:
        """Progress of those of `request_ids` that are known, in one round trip."""
        ...


class CallStore(Protocol):
    """What a gateway needs besides: written once at the beginning and once at the end of a call."""

    async def put_call(self, call_id: str, record: bytes) -> None:
        """Keeps `record`, in place of an earlier one."""
        ...

    async def get_call(self, call_id: str) -> bytes | None:
        """The record; None: unknown, deleted or expired."""
        ...

    async def delete_call(self, call_id: str, request_ids: Sequence[str]) -> None:
        """Forgets a call and the progress of its requests."""
        ...


class Store(ProgressStore, CallStore, Protocol):
    """A whole store."""

    @property
    def display_url(self) -> str:
        """Where it is, without credentials."""
        ...

    async def ping(self) -> None:
        """Returns when the store answers."""
        ...

    async def close(self) -> None:
        """Lets go of everything; may be called twice. A closed store raises `StoreError`."""
        ...
