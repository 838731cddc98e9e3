"""Whatever owners say, in whatever order and batches: what is stored is a prefix of the one sequence, as in a naive model."""

import asyncio
import uuid

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotserve.checkpoint.codec import finish_code, finish_reason, pack_tokens, unpack_tokens
from spotserve.checkpoint.store import Commit, Progress
from spotserve.core.request import FinishReason

SEQUENCES = {name: [hash((name, position)) % 2**32 for position in range(40)] for name in (1, 2, 3)}

claims = st.tuples(
    st.sampled_from(sorted(SEQUENCES)),
    st.integers(1, 4),
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from([None, None, None, *FinishReason]),
)


class NaiveStore:
    """One token at a time, in a dictionary."""

    def __init__(self) -> None:
        self.epochs: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, FinishReason | None] = {}

    def commit(self, name: int, epoch: int, position: int, token_ids: list[int], finish: FinishReason | None) -> str:
        tokens = list(self.tokens.get(name, []))
        if epoch < self.epochs.get(name, 0):
            return "FENCED"
        for offset, token in enumerate(token_ids):
            if position + offset == len(tokens):
                tokens.append(token)
        if position > len(self.tokens.get(name, [])):
            return "GAP"
        self.tokens[name] = tokens
        self.epochs[name] = epoch
        if finish is not None:
            self.ends[name] = finish
        return "OK"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(claims, min_size=1, max_size=6), max_size=8))
def test_any_interleaving_stores_a_prefix(opener, batches) -> None:
    async def scenario() -> None:
        store, twin, prefix = opener(), NaiveStore(), uuid.uuid4()
        for batch in batches:
            rows = [(name, epoch, start, SEQUENCES[name][start : start + count], end) for name, epoch, start, count, end in batch]
            outcomes = await store.commit(
                [
                    Commit(request_id=f"{prefix}-{name}", epoch=epoch, position=start, token_ids=tokens, finish_reason=end)
                    for name, epoch, start, tokens, end in rows
                ]
            )
            for row, outcome in zip(rows, outcomes, strict=True):
                name = row[0]
                assert outcome.verdict.name == twin.commit(*row)
                assert outcome.length_tokens == len(twin.tokens.get(name, []))
                assert outcome.epoch == twin.epochs.get(name, 0)
        loaded = await store.load([f"{prefix}-{name}" for name in SEQUENCES])
        assert loaded == {
            f"{prefix}-{name}": Progress(twin.epochs[name], tuple(tokens), twin.ends.get(name))
            for name, tokens in twin.tokens.items()
        }
        for name, tokens in twin.tokens.items():
            assert tokens == SEQUENCES[name][: len(tokens)]
        await store.close()

    asyncio.run(scenario())


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_survive_packing(token_ids: list[int]) -> None:
    assert unpack_tokens(pack_tokens(token_ids)) == tuple(token_ids)
    assert pack_tokens(token_ids) == b"".join(token.to_bytes(4, "little") for token in token_ids)


def test_finish_codes_survive_and_are_stable() -> None:
    assert [finish_code(reason) for reason in (None, *FinishReason)] == [0, 1, 2, 3, 4]
    assert all(finish_reason(finish_code(reason)) is reason for reason in (None, *FinishReason))
