"""The scheduler alone: budgets, fairness and blocks, with a stand-in for the model that says token 7 for ever."""

from drafts import chains_of
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.request import Request, SamplingParams
from spotserve.engine.blocks import BlockPool
from spotserve.engine.scheduler import Scheduler
from spotserve.engine.sequence import Sequence, new_sequence

CONTEXT_TOKENS = 40


def sequence_of(name: str, *, seniority: int, prompt: int, output: int) -> Sequence:
    request = Request(request_id=name, prompt_token_ids=(5,) * prompt, sampling=SamplingParams(max_tokens=output))
    return new_sequence(request, seniority=(0, 0.0, seniority), end_token_ids=(), emitted_token_ids=())


def make(*, num_blocks: int, block_tokens: int, max_batch: int, max_step_tokens: int) -> tuple[Scheduler, BlockPool]:
    blocks = BlockPool(num_blocks=num_blocks, block_tokens=block_tokens, first_block_id=1)
    context = min(CONTEXT_TOKENS, num_blocks * block_tokens)
    return Scheduler(blocks=blocks, max_batch=max_batch, max_step_tokens=max_step_tokens, context_tokens=context), blocks


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
    block_tokens=st.integers(1, 8),
    num_tokens=st.integers(CONTEXT_TOKENS, 120),
    max_batch=st.integers(1, 8),
    max_step_tokens=st.integers(1, 24),
    draft_tokens=st.integers(0, 6),
    accepted=st.integers(0, 6),
    late=st.integers(0, 10),
)
def test_everything_ends_within_budget(
    shapes: list[tuple[int, int]],
    block_tokens: int,
    num_tokens: int,
    max_batch: int,
    max_step_tokens: int,
    draft_tokens: int,
    accepted: int,
    late: int,
) -> None:
    scheduler, blocks = make(
        num_blocks=-(-num_tokens // block_tokens), block_tokens=block_tokens, max_batch=max_batch, max_step_tokens=max_step_tokens
    )
    arriving = [sequence_of(str(i), seniority=i, prompt=prompt, output=output) for i, (prompt, output) in enumerate(shapes)]
    unfinished = list(arriving)

    for step in range(3000):
        while arriving and (step >= late or len(arriving) > len(shapes) // 2):
            scheduler.add(arriving.pop(0))
        oldest = next((sequence for sequence in unfinished if sequence not in arriving), None)
        before = None if oldest is None else (len(oldest.token_ids), oldest.computed_tokens)
        schedule = scheduler.schedule(chains_of(7, most=draft_tokens) if draft_tokens else None)
        assert schedule.num_tokens <= max_step_tokens
        assert scheduler.num_running <= max_batch
        assert len({id(entry.sequence) for entry in schedule.entries}) == len(schedule.entries)
        for entry in schedule.entries:
            sequence = entry.sequence
            assert entry.sequence not in schedule.evicted
            held = len(sequence.block_ids) * block_tokens
            assert held >= sequence.computed_tokens + entry.num_tokens + len(entry.draft)
            samples = entry.samples
            sequence.advance(entry.num_tokens)
            if samples:
                kept = min(accepted, len(entry.draft))
                sequence.token_ids.extend([7] * (kept + 1))
                sequence.advance(kept)
                assert sequence.remaining_tokens >= 0
                if sequence.remaining_tokens == 0:
                    scheduler.remove(sequence)
                    unfinished.remove(sequence)
                else:
                    scheduler.settle(sequence)
        scheduler.landed(schedule)
        scheduler.check_integrity()
        if oldest is not None and oldest in unfinished:
            assert (len(oldest.token_ids), oldest.computed_tokens) != before, "the most senior sequence stood still"
            assert oldest not in schedule.evicted
        if not unfinished:
            break
    assert not unfinished
    assert blocks.free_blocks == blocks.num_blocks


def test_decoding_comes_before_prompts_and_prompts_before_drafts() -> None:
    scheduler, _ = make(num_blocks=40, block_tokens=4, max_batch=4, max_step_tokens=8)
    first, second = (sequence_of(str(i), seniority=i, prompt=prompt, output=9) for i, prompt in enumerate((3, 12)))
    scheduler.add(first)
    schedule = scheduler.schedule()
    first.advance(schedule.entries[0].num_tokens)
    first.token_ids.append(7)
    scheduler.landed(schedule)
    scheduler.add(second)
    schedule = scheduler.schedule(chains_of(7))
    assert [(entry.sequence, entry.num_tokens, len(entry.draft)) for entry in schedule.entries] == [(first, 1, 0), (second, 7, 0)]
    first.advance(1)
    first.token_ids.append(7)
    second.advance(7)
    scheduler.landed(schedule)
    schedule = scheduler.schedule(chains_of(7))
    assert [(entry.num_tokens, len(entry.draft)) for entry in schedule.entries] == [(1, 2), (5, 0)]


def test_the_youngest_is_evicted_and_comes_back_by_seniority() -> None:
    scheduler, _ = make(num_blocks=10, block_tokens=4, max_batch=4, max_step_tokens=64)
    old, young, later = (sequence_of(str(i), seniority=i, prompt=16, output=20) for i in range(3))
    scheduler.add(old)
    scheduler.add(young)
    schedule = scheduler.schedule()
    assert [entry.sequence for entry in schedule.entries] == [old, young]
    for entry in schedule.entries:
        entry.sequence.advance(entry.num_tokens)
    scheduler.landed(schedule)
    old.token_ids.extend([7] * 16)
    young.token_ids.append(7)
    old.advance(old.pending_tokens - 1)
    scheduler.add(later)
    schedule = scheduler.schedule()
    assert schedule.evicted == (young,)
    assert young.computed_tokens == 0
    assert young.recompute_until == 16
    assert scheduler.num_waiting == 2
    scheduler.remove(old)
    assert scheduler.schedule().entries[0].sequence is young
    scheduler.check_integrity()
