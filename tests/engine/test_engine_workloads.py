"""The scheduler under whole workloads, with ranks that execute steps in order and remember, for every slot of the cache, the token
ids whose key and value are there: whatever is shared, evicted, cancelled, drafted or in flight, a step finds what it must find."""

from collections import deque
from dataclasses import dataclass, field

from drafts import chains_of
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.request import Request, SamplingParams
from spotserve.engine.blocks import BlockPool
from spotserve.engine.scheduler import Schedule, Scheduler
from spotserve.engine.sequence import Sequence, new_sequence, seniority_of

CONTEXT_TOKENS = 40
SAID = 7
"""What the model says at every position."""


@dataclass
class Ranks:
    """The KV cache as token ids: a slot holds everything up to its token."""

    block_tokens: int
    slots: dict[tuple[int, int], tuple[int | str, ...]] = field(default_factory=dict)

    def execute(self, schedule: Schedule) -> None:
        for entry in schedule.entries:
            known = entry.sequence.token_ids
            salt = entry.sequence.cache_salt
            end = entry.start + entry.num_tokens
            row = [*known[:end], *entry.draft.token_ids]
            for position in range(entry.start, len(row)):
                self.slots[self._slot(entry.sequence, position)] = (salt, *row[: position + 1])
        for entry in schedule.entries:
            end = entry.start + entry.num_tokens + len(entry.draft)
            row = [*entry.sequence.token_ids[: entry.start + entry.num_tokens], *entry.draft.token_ids]
            for position in range(end):
                held = self.slots[self._slot(entry.sequence, position)]
                assert held == (entry.sequence.cache_salt, *row[: position + 1]), "a step reads KV of other tokens"

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self.block_tokens], position % self.block_tokens


@dataclass(frozen=True)
class Shape:
    """One request."""

    prompt: tuple[int, ...]
    output: int
    emitted: int
    priority: int
    arrival: int
    salt: str
    cancelled_after: int | None


PROMPTS = [(5,) * 24, (5, 6) * 12, (5,) * 9 + (6,) * 15]
shapes = st.builds(
    lambda base, length, output, emitted, priority, arrival, salt, cancelled: Shape(
        base[:length], output + emitted, emitted, priority, arrival, salt, cancelled
    ),
    st.sampled_from(PROMPTS),
    st.integers(1, 20),
    st.integers(1, 14),
    st.sampled_from([0, 0, 0, 2, 6]),
    st.sampled_from([0, 0, 0, 1, -1]),
    st.integers(0, 25),
    st.sampled_from(["", "", "tenant"]),
    st.sampled_from([None, None, None, 1, 4, 9]),
)


def sequence_of(shape: Shape, number: int) -> Sequence:
    request = Request(
        request_id=str(number),
        prompt_token_ids=shape.prompt,
        sampling=SamplingParams(max_tokens=shape.output),
        arrival_s=float(shape.arrival - (30 if shape.emitted else 0)),
        priority=shape.priority,
    )
    return new_sequence(
        request,
        seniority=seniority_of(request, number),
        end_token_ids=(),
        emitted_token_ids=(SAID,) * shape.emitted,
        cache_salt=shape.salt,
    )


@settings(max_examples=200, deadline=None)
@given(
    workload=st.lists(shapes, min_size=1, max_size=14),
    block_tokens=st.integers(1, 8),
    num_tokens=st.integers(CONTEXT_TOKENS, 140),
    max_batch=st.integers(1, 9),
    max_step_tokens=st.integers(1, 24),
    num_groups=st.integers(1, 4),
    prefix_cache=st.booleans(),
    ahead=st.booleans(),
    chunk=st.one_of(st.none(), st.integers(1, 12)),
    drafted=st.integers(0, 5),
    accepted=st.integers(0, 5),
    landing=st.randoms(use_true_random=False),
)
def test_every_step_finds_its_keys_and_everything_ends(
    workload,
    block_tokens,
    num_tokens,
    max_batch,
    max_step_tokens,
    num_groups,
    prefix_cache,
    ahead,
    chunk,
    drafted,
    accepted,
    landing,
) -> None:
    blocks = BlockPool(num_blocks=-(-num_tokens // block_tokens), block_tokens=block_tokens, first_block_id=1)
    scheduler = Scheduler(
        blocks=blocks,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        context_tokens=min(CONTEXT_TOKENS, num_tokens),
        num_groups=num_groups,
        prefix_cache=prefix_cache,
        chunk_tokens=None if chunk is None else lambda start, position, end: min(chunk, end - position),
    )
    ranks = Ranks(block_tokens)
    arriving = deque(sorted(((shape, sequence_of(shape, i)) for i, shape in enumerate(workload)), key=lambda pair: pair[0].arrival))
    cancels = {sequence: shape.arrival + shape.cancelled_after for shape, sequence in arriving if shape.cancelled_after is not None}
    alive: set[Sequence] = set()
    in_flight: deque[Schedule] = deque()

    def busy() -> set[Sequence]:
        """Who may not be touched: all of a step, or those that sample in it when prompts run ahead."""
        return {entry.sequence for step in in_flight for entry in step.entries if entry.samples or not ahead}

    def land() -> None:
        schedule = in_flight.popleft()
        for entry in schedule.entries:
            sequence = entry.sequence
            if sequence not in alive or (ahead and not entry.samples):
                continue
            sequence.advance(entry.num_tokens)
            if entry.samples:
                kept = min(accepted, len(entry.draft))
                sequence.token_ids.extend([SAID] * (kept + 1))
                sequence.advance(kept)
                if sequence.remaining_tokens == 0:
                    scheduler.remove(sequence)
                    alive.remove(sequence)
                else:
                    scheduler.settle(sequence)
        scheduler.landed(schedule)

    for step in range(4000):
        while arriving and arriving[0][0].arrival <= step:
            alive.add(arriving[0][1])
            scheduler.add(arriving.popleft()[1])
        for sequence in [sequence for sequence, at in cancels.items() if at <= step and sequence in alive]:
            scheduler.remove(sequence)
            alive.remove(sequence)
        running = list(scheduler.sequences())[: scheduler.num_running]
        untouchable = busy()
        schedule = scheduler.schedule(chains_of(SAID, most=drafted))
        scheduled = [entry.sequence for entry in schedule.entries]
        assert schedule.num_tokens <= max_step_tokens
        assert scheduler.num_running <= max_batch
        assert len(set(scheduled)) == len(scheduled)
        assert not untouchable & {*scheduled, *schedule.evicted}
        assert sum(entry.samples and entry.num_tokens == 1 for entry in schedule.entries) <= max_batch
        if not in_flight and (running or scheduler.num_waiting):
            assert scheduled, "nothing is in flight and nothing is scheduled"
            if running and running[0] not in schedule.evicted:
                senior = next(scheduler.sequences())
                assert senior in scheduled, "the most senior running sequence stood still"
        ranks.execute(schedule)
        if schedule.entries:
            in_flight.append(schedule)
            if ahead:
                scheduler.issued(schedule)
        scheduler.check_integrity()
        while in_flight and (len(in_flight) >= num_groups or not schedule.entries or landing.random() < 0.4):
            land()
            scheduler.check_integrity()
            if not schedule.entries:
                break
        if not alive and not arriving:
            break
    assert not alive and not arriving
    while in_flight:
        land()
    scheduler.check_integrity()
    assert scheduler.num_steps_in_flight == 0
    assert blocks.used_blocks == 0
    assert blocks.free_blocks == blocks.num_blocks
    assert prefix_cache or blocks.resting_blocks == 0
    scheduler.forget_cache()
    assert blocks.resting_blocks == 0
    scheduler.check_integrity()
