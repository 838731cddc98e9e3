"""A store that keeps nothing, for systems that would rather compute again: it agrees to everything and remembers none of it."""

from collections.abc import Mapping, Sequence

from spotserve.checkpoint.store import Commit, CommitOutcome, Progress, Verdict


class NullStore:
    """`store.Store` without a memory."""

    @property
    def display_url(self) -> str:
        """As in the settings."""
        return "none"

    async def commit(self, batch: Sequence[Commit]) -> list[CommitOutcome]:
        """OK, always."""
        return [CommitOutcome(c.request_id, Verdict.OK, c.position + len(c.token_ids), c.epoch) for c in batch]

    async def load(self, request_ids: Sequence[str]) -> Mapping[str, Progress]:
        """Nothing."""
        del request_ids
        return {}

    async def put_call(self, call_id: str, record: bytes) -> None:
        """Forgets it at once."""

    async def get_call(self, call_id: str) -> bytes | None:
        """None."""
        del call_id
        return None

    async def delete_call(self, call_id: str, request_ids: Sequence[str]) -> None:
        """There is nothing to delete."""

    async def ping(self) -> None:
        """Always there."""

    async def close(self) -> None:
        """There is nothing to close."""
