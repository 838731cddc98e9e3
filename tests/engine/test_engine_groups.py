"""Micro-batch groups: P steps on their way at once, of equal size, and nobody in two of them."""

from collections import deque

import pytest
from drafts import chains_of
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.request import Request, SamplingParams
from spotserve.engine.blocks import BlockPool
from spotserve.engine.scheduler import ChunkTokens, Schedule, Scheduler
from spotserve.engine.sequence import Sequence, new_sequence, seniority_of


def sequence_of(number: int, *, prompt: int = 4, output: int = 1000) -> Sequence:
    request = Request(request_id=str(number), prompt_token_ids=(5,) * prompt, sampling=SamplingParams(max_tokens=output))
    return new_sequence(request, seniority=seniority_of(request, number), end_token_ids=(), emitted_token_ids=())


class Pipeline:
    """A scheduler kept busy as an engine does it: as many steps in flight as there are groups, landing in order."""

    def __init__(
        self, *, num_groups: int, max_batch: int = 32, num_blocks: int = 600, chunk_tokens: ChunkTokens | None = None
    ) -> None:
        self.blocks = BlockPool(num_blocks=num_blocks, block_tokens=4)
        self.scheduler = Scheduler(
            blocks=self.blocks,
            max_batch=max_batch,
            max_step_tokens=64,
            context_tokens=min(num_blocks * 4, 2000),
            num_groups=num_groups,
            chunk_tokens=chunk_tokens,
        )
        self.num_groups = num_groups
        self.in_flight: deque[Schedule] = deque()

    def issue(self, *, ahead: bool = False) -> Schedule:
        schedule = self.scheduler.schedule()
        if schedule.entries:
            self.in_flight.append(schedule)
            if ahead:
                self.scheduler.issued(schedule)
        return schedule

    def land(self, *, ahead: bool = False) -> None:
        schedule = self.in_flight.popleft()
        for entry in schedule.entries:
            if not ahead or entry.samples:
                entry.sequence.advance(entry.num_tokens)
            if entry.samples:
                entry.sequence.token_ids.append(7)
                self.scheduler.settle(entry.sequence)
        self.scheduler.landed(schedule)
        self.scheduler.check_integrity()

    def cycle(self) -> list[int]:
        """Sizes of the groups after every group had its turn."""
        for _ in range(self.num_groups):
            while len(self.in_flight) < self.num_groups and self.issue().entries:
                pass
            if self.in_flight:
                self.land()
        while len(self.in_flight) < self.num_groups and self.issue().entries:
            pass
        return [len(schedule.entries) for schedule in self.in_flight]


@settings(max_examples=60, deadline=None)
@given(num_groups=st.integers(1, 4), changes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_groups_even_out_after_every_change(num_groups: int, changes: list[tuple[int, int]]) -> None:
    pipeline = Pipeline(num_groups=num_groups, max_batch=40)
    alive: list[Sequence] = []
    for arrivals, departures in changes:
        for _ in range(arrivals):
            alive.append(sequence_of(len(alive)))
            pipeline.scheduler.add(alive[-1])
        for sequence in [alive.pop() for _ in range(min(departures, len(alive)))]:
            pipeline.scheduler.remove(sequence)
        for _ in range(12):
            pipeline.cycle()
        sizes = [sum(entry.sequence in alive for entry in schedule.entries) for schedule in pipeline.in_flight]
        assert sum(sizes) == len(alive), "somebody is in no group"
        sizes += [0] * (num_groups - len(sizes))
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= -(-40 // num_groups)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_a_lone_sequence_decodes_in_every_step(num_groups: int) -> None:
    pipeline = Pipeline(num_groups=num_groups)
    sequence = sequence_of(0)
    pipeline.scheduler.add(sequence)
    for _ in range(5):
        assert [entry.sequence for entry in pipeline.issue().entries] == [sequence]
        assert pipeline.issue().entries == ()
        pipeline.land()
    assert sequence.output_tokens == 5


def test_everybody_decodes_equally_often() -> None:
    pipeline = Pipeline(num_groups=3)
    sequences = [sequence_of(i) for i in range(10)]
    for sequence in sequences:
        pipeline.scheduler.add(sequence)
    for _ in range(20):
        pipeline.cycle()
    counts = [sequence.output_tokens for sequence in sequences]
    assert max(counts) - min(counts) <= 2
    assert min(counts) >= 18


def test_a_prompt_waits_for_its_chunk_to_land_unless_the_step_was_issued() -> None:
    for ahead in (False, True):
        pipeline = Pipeline(num_groups=3, chunk_tokens=lambda start, position, end: 10)
        sequence = sequence_of(0, prompt=25)
        pipeline.scheduler.add(sequence)
        steps = [pipeline.issue(ahead=ahead) for _ in range(3)]
        chunks = [(entry.start, entry.num_tokens, entry.samples) for step in steps for entry in step.entries]
        assert chunks == ([(0, 10, False), (10, 10, False), (20, 5, True)] if ahead else [(0, 10, False)])
        while pipeline.in_flight:
            pipeline.land(ahead=ahead)
        assert sequence.output_tokens == (1 if ahead else 0)


def test_the_chunk_is_chosen_from_the_whole_run_of_prompts() -> None:
    asked: list[tuple[int, int, int]] = []

    def chunk(start: int, position: int, end: int) -> int:
        asked.append((start, position, end))
        return 6

    pipeline = Pipeline(num_groups=2, chunk_tokens=chunk)
    for number, prompt in enumerate((9, 4)):
        pipeline.scheduler.add(sequence_of(number, prompt=prompt))
    assert [entry.num_tokens for entry in pipeline.issue(ahead=True).entries] == [6]
    assert [entry.num_tokens for entry in pipeline.issue(ahead=True).entries] == [3, 3]
    assert asked == [(0, 0, 13), (0, 6, 13)]


def test_whoever_is_in_flight_is_not_evicted_and_the_step_does_without() -> None:
    pipeline = Pipeline(num_groups=2, num_blocks=5)
    old, young = sequence_of(0, prompt=4), sequence_of(1, prompt=8)
    for sequence in (old, young):
        pipeline.scheduler.add(sequence)
    assert len(pipeline.issue().entries) == 2
    pipeline.land()
    first, second = pipeline.issue(), pipeline.issue()
    assert [[entry.sequence for entry in step.entries] for step in (first, second)] == [[old], [young]]
    assert pipeline.blocks.free_blocks == 0
    pipeline.land()
    old.token_ids.extend([7, 7, 7])
    old.advance(3)
    without = pipeline.scheduler.schedule()
    assert (without.entries, without.evicted) == ((), ())
    pipeline.land()
    after = pipeline.scheduler.schedule()
    assert after.evicted == (young,)
    assert [entry.sequence for entry in after.entries] == [old]


def test_groups_take_turns_even_when_every_step_lands_before_the_next() -> None:
    pipeline = Pipeline(num_groups=3)
    sequences = [sequence_of(i) for i in range(6)]
    for sequence in sequences:
        pipeline.scheduler.add(sequence)
    for _ in range(24):
        pipeline.issue()
        pipeline.land()
    assert min(sequence.output_tokens for sequence in sequences) >= 4


def test_a_draft_leaves_the_other_groups_a_block_to_grow_into() -> None:
    pipeline = Pipeline(num_groups=2, num_blocks=5)
    drafting, plain = sequence_of(0), sequence_of(1)
    for sequence in (drafting, plain):
        pipeline.scheduler.add(sequence)
    pipeline.issue()
    pipeline.land()
    schedule = pipeline.scheduler.schedule(chains_of(8))
    assert [(entry.sequence, len(entry.draft)) for entry in schedule.entries] == [(drafting, 7)]
    assert [entry.sequence for entry in pipeline.issue().entries] == [plain]


def test_a_cancel_in_flight_gives_its_blocks_to_a_later_step_at_once() -> None:
    pipeline = Pipeline(num_groups=2, num_blocks=3)
    first, second = sequence_of(0, prompt=9), sequence_of(1, prompt=9)
    pipeline.scheduler.add(first)
    pipeline.scheduler.add(second)
    pipeline.issue()
    held = set(first.block_ids)
    assert pipeline.issue().entries == ()
    pipeline.scheduler.remove(first)
    assert [entry.sequence for entry in pipeline.issue().entries] == [second]
    assert set(second.block_ids) == held
    pipeline.scheduler.check_integrity()
    cancelled = pipeline.in_flight.popleft()
    pipeline.scheduler.landed(cancelled)
    assert pipeline.scheduler.num_steps_in_flight == 1
    pipeline.land()
    assert second.output_tokens == 1


def test_steps_land_in_order() -> None:
    pipeline = Pipeline(num_groups=2)
    pipeline.scheduler.add(sequence_of(0))
    pipeline.issue()
    pipeline.scheduler.add(sequence_of(1))
    later = pipeline.issue()
    with pytest.raises(AssertionError, match="order"):
        pipeline.scheduler.landed(later)
