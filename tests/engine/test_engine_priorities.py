"""Who is served first, and who may take whose place."""

from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.request import Request, SamplingParams
from spotserve.engine.blocks import BlockPool
from spotserve.engine.scheduler import Schedule, Scheduler
from spotserve.engine.sequence import Sequence, new_sequence, seniority_of


def sequence_of(number: int, *, priority: int = 0, arrival_s: float = 0.0, prompt: int = 8, emitted: int = 0) -> Sequence:
    request = Request(
        request_id=str(number),
        prompt_token_ids=(5 + number,) * prompt,
        sampling=SamplingParams(max_tokens=30),
        arrival_s=arrival_s,
        priority=priority,
    )
    seniority = seniority_of(request, number)
    return new_sequence(request, seniority=seniority, end_token_ids=(), emitted_token_ids=(7,) * emitted)


def make(*, max_batch: int = 2, num_blocks: int = 40, max_step_tokens: int = 64) -> Scheduler:
    return Scheduler(
        blocks=BlockPool(num_blocks=num_blocks, block_tokens=4),
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        context_tokens=min(60, num_blocks * 4),
        prefix_cache=True,
    )


def step(scheduler: Scheduler) -> Schedule:
    schedule = scheduler.schedule()
    for entry in schedule.entries:
        entry.sequence.advance(entry.num_tokens)
        if entry.samples:
            entry.sequence.token_ids.append(7)
            scheduler.settle(entry.sequence)
            if entry.sequence.remaining_tokens == 0:
                scheduler.remove(entry.sequence)
    scheduler.landed(schedule)
    scheduler.check_integrity()
    return schedule


def running(scheduler: Scheduler) -> list[Sequence]:
    return list(scheduler.sequences())[: scheduler.num_running]


def test_lower_numbers_are_admitted_first() -> None:
    scheduler = make(max_batch=1)
    late, urgent = sequence_of(0, arrival_s=1.0), sequence_of(1, arrival_s=2.0, priority=-1)
    scheduler.add(late)
    scheduler.add(urgent)
    assert [entry.sequence for entry in step(scheduler).entries] == [urgent]


def test_a_more_urgent_request_takes_the_place_of_the_youngest_of_the_least_urgent() -> None:
    scheduler = make()
    first, second = (sequence_of(i, arrival_s=float(i)) for i in range(2))
    for sequence in (first, second):
        scheduler.add(sequence)
    step(scheduler)
    urgent = sequence_of(2, arrival_s=9.0, priority=-1)
    scheduler.add(urgent)
    schedule = step(scheduler)
    assert schedule.evicted == (second,)
    assert running(scheduler) == [urgent, first]
    scheduler.remove(urgent)
    step(scheduler)
    assert running(scheduler) == [first, second]
    assert second.cached_tokens == 8, "being displaced costs no more than what was not published"


def test_a_more_urgent_request_takes_blocks_where_there_are_too_few_and_no_more_than_it_needs() -> None:
    scheduler = make(max_batch=8, num_blocks=15)
    for number in range(4):
        scheduler.add(sequence_of(number, arrival_s=float(number), prompt=8))
    step(scheduler)
    assert scheduler.num_running == 4
    urgent = sequence_of(9, priority=-1, arrival_s=9.0, prompt=28)
    scheduler.add(urgent)
    schedule = step(scheduler)
    assert [sequence.request_id for sequence in schedule.evicted] == ["3", "2"]
    assert urgent in running(scheduler)


def test_an_urgent_request_does_not_wait_behind_a_long_prompt() -> None:
    scheduler = make(max_step_tokens=4)
    long, urgent = sequence_of(0, prompt=40), sequence_of(1, priority=-1)
    scheduler.add(long)
    step(scheduler)
    scheduler.add(urgent)
    assert [entry.sequence for entry in step(scheduler).entries] == [urgent]


def test_equals_never_displace_each_other() -> None:
    scheduler = make(max_batch=1)
    newer, older = sequence_of(0, arrival_s=5.0), sequence_of(1, arrival_s=1.0)
    scheduler.add(newer)
    step(scheduler)
    scheduler.add(older)
    assert step(scheduler).evicted == ()
    assert running(scheduler) == [newer]


def test_an_interrupted_answer_goes_on_before_newcomers_and_not_before_its_seniors() -> None:
    scheduler = make(max_batch=2)
    senior, newcomer = sequence_of(0, arrival_s=1.0), sequence_of(1, arrival_s=9.0)
    for sequence in (senior, newcomer):
        scheduler.add(sequence)
    step(scheduler)
    interrupted, younger = sequence_of(2, arrival_s=5.0, emitted=3), sequence_of(3, arrival_s=6.0, emitted=3)
    moved = sequence_of(4, arrival_s=2.0)
    for sequence in (moved, interrupted, younger):
        scheduler.add(sequence)
    assert step(scheduler).evicted == (newcomer,)
    assert running(scheduler) == [senior, interrupted]
    for _ in range(5):
        assert step(scheduler).evicted == ()


def test_nobody_is_displaced_for_whom_there_would_be_no_room_all_the_same() -> None:
    scheduler = make(max_batch=4, num_blocks=15)
    senior, younger = sequence_of(0, priority=-2, prompt=30), sequence_of(1, prompt=8)
    for sequence in (senior, younger):
        scheduler.add(sequence)
    step(scheduler)
    assert scheduler.num_running == 2
    scheduler.add(sequence_of(2, priority=-1, prompt=40))
    assert step(scheduler).evicted == ()
    assert running(scheduler) == [senior, younger]


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(-1, 1), st.integers(0, 20), st.integers(1, 20), st.sampled_from([0, 0, 4])), min_size=1, max_size=12
    ),
    max_batch=st.integers(1, 4),
    num_blocks=st.integers(15, 30),
)
def test_displacing_is_no_thrashing(requests: list[tuple[int, int, int, int]], max_batch: int, num_blocks: int) -> None:
    """Once nobody arrives any more, sequences are evicted only for want of blocks, and the running ones outrank no waiting one."""
    scheduler = make(max_batch=max_batch, num_blocks=num_blocks)
    for number, (priority, arrival, prompt, emitted) in enumerate(requests):
        scheduler.add(sequence_of(number, priority=priority, arrival_s=float(arrival), prompt=prompt, emitted=emitted))
        before = running(scheduler)
        schedule = step(scheduler)
        for displaced in schedule.evicted:
            assert any(
                sequence.seniority < displaced.seniority for sequence in running(scheduler) if sequence not in before
            ) or any(sequence.seniority < displaced.seniority for sequence in before)
    for _ in range(1500):
        before = running(scheduler)
        waiting = list(scheduler.sequences())[len(before) :]
        schedule = step(scheduler)
        admitted = [sequence for sequence in running(scheduler) if sequence in waiting]
        for sequence in admitted:
            assert not any(sequence.seniority > displaced.seniority for displaced in schedule.evicted), (
                "a junior displaced a senior"
            )
        if not list(scheduler.sequences()):
            return
    raise AssertionError("not everything ended")
