"""Merged iterations against naive ones: token by token, in exact arithmetic of a simple speed, and the planner's own twin."""

import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.plan import Parallel
from spotserve.planner.cost import replica_cost
from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Lengths, Workload
from spotserve.replay.batching import Batch
from spotserve.replay.call import Call
from spotserve.replay.outcome import Gaps
from spotserve.replay.prefixes import Prefixes
from spotserve.replay.token_times import TokenTimes, token_times

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
import batching_twin


@dataclass(frozen=True)
class Simple:
    """A replica whose times are easy: a token takes `base + each * n + context * per_token`, a prompt `per_prompt` a token."""

    max_batch: int = 4
    kv_tokens: int = 10_000
    base_s: float = 0.5
    each_s: float = 0.25
    per_context_s: float = 0.0
    per_prompt_s: float = 0.125

    def token_s(self, sequences: float, context_tokens: float) -> float:
        return self.base_s + self.each_s * sequences + self.per_context_s * context_tokens

    def prompt_s(self, tokens: float) -> float:
        return self.per_prompt_s * tokens

    def first_token_s(self, tokens: float) -> float:
        return self.per_prompt_s * tokens


@dataclass
class Naive:
    """One iteration at a time: those who are done leave, one prompt after the other is computed, everybody gets a token."""

    speed: Simple
    waiting: deque[Call] = field(default_factory=deque)
    running: list[Call] = field(default_factory=list)
    now_s: float = 0.0
    times_s: dict[int, list[float]] = field(default_factory=dict)

    def play(self, calls: list[Call]) -> None:
        coming = deque(calls)
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.now_s = max(self.now_s, coming[0].arrival_s)
            while coming and coming[0].arrival_s <= self.now_s + 1e-9:
                self.waiting.append(coming.popleft())
            were_running = bool(self.running)
            admitted = self._admitted()
            for call in admitted:
                self.now_s += self.speed.prompt_s(call.prompt_tokens)
                self._token(call)
                self.running.append(call)
            self._retire()
            if (admitted and not were_running) or not self.running:
                continue  # nobody was kept waiting: the next step has the first token's successor and prompts that came meanwhile
            context = sum(call.prompt_tokens + len(self.times_s[call.index]) for call in self.running) + len(self.running)
            self.now_s += self.speed.token_s(len(self.running), context)
            for call in self.running:
                self._token(call)
            self._retire()

    def _retire(self) -> None:
        self.running = [call for call in self.running if len(self.times_s[call.index]) < call.output_tokens]

    def _admitted(self) -> list[Call]:
        admitted: list[Call] = []
        held = sum(call.prompt_tokens + len(self.times_s[call.index]) for call in self.running)
        while self.waiting and len(self.running) + len(admitted) < self.speed.max_batch:
            tokens = self.waiting[0].prompt_tokens + 1
            if held + tokens > self.speed.kv_tokens and (self.running or admitted):
                break
            held += tokens
            admitted.append(self.waiting.popleft())
        return admitted

    def _token(self, call: Call) -> None:
        self.times_s.setdefault(call.index, []).append(self.now_s)


def played(speed: ReplicaSpeed, calls: list[Call], gaps: Gaps | None = None, *, step_tokens: int = 10**9) -> dict[int, Call]:
    """Calls through a batch, by index, once all have ended."""
    batch = Batch(TokenTimes(speed), gaps or Gaps(), now_s=0.0, step_tokens=step_tokens)
    done: list[Call] = []
    for call in calls:
        done += batch.advance(call.arrival_s)
        batch.add(call, call.arrival_s)
    while len(done) < len(calls):
        done += batch.advance(batch.next_s)
    assert len(batch) == 0 and batch.held_tokens == 0
    return {call.index: call for call in done}


@st.composite
def loads(draw: st.DrawFn) -> list[Call]:
    """A few requests at times that are no sums of the times of steps, so that no order hangs on rounding."""
    now_s, calls = 0.0, []
    for index in range(draw(st.integers(1, 14))):
        now_s += draw(st.integers(1, 40)) * 0.3141592
        calls.append(Call(index, now_s, draw(st.integers(1, 30)), draw(st.integers(1, 25))))
    return calls


@settings(max_examples=300, deadline=None)
@given(loads(), st.integers(1, 5), st.sampled_from([0.0, 1 / 1024]))
def test_merged_iterations_are_those_of_one_at_a_time(calls: list[Call], max_batch: int, per_context_s: float) -> None:
    """Every first and last token, the longest gap of every call, and the number and mean of all gaps."""
    speed = Simple(max_batch=max_batch, per_context_s=per_context_s)
    naive = Naive(speed)
    naive.play([Call(c.index, c.arrival_s, c.prompt_tokens, c.output_tokens) for c in calls])
    gaps = Gaps()
    for index, call in played(speed, calls, gaps).items():
        times_s = naive.times_s[index]
        assert call.emitted == call.output_tokens == len(times_s)
        assert call.first_token_s == pytest.approx(times_s[0], abs=1e-6)
        assert call.last_token_s == pytest.approx(times_s[-1], abs=1e-6)
        longest_s = max((b - a for a, b in pairwise(times_s)), default=0.0)
        assert call.longest_gap_s == pytest.approx(longest_s, abs=1e-6)
    every = [b - a for times_s in naive.times_s.values() for a, b in pairwise(times_s)]
    assert gaps.total == len(every)
    if every:
        assert gaps.mean_s == pytest.approx(sum(every) / len(every), rel=0.005)


@settings(max_examples=200, deadline=None)
@given(loads(), st.data())
def test_nothing_is_lost_whatever_comes_and_goes(calls: list[Call], data: st.DataObject) -> None:
    """Calls are taken away at any time, and come back with their tokens or with their KV."""
    speed = Simple(kv_tokens=data.draw(st.integers(60, 400)), max_batch=3)
    gaps = Gaps()
    batch = Batch(TokenTimes(speed), gaps, now_s=0.0, step_tokens=data.draw(st.integers(5, 60)))
    away: list[Call] = []
    done: list[Call] = []
    emitted: dict[int, int] = {}
    now_s = 0.0
    for call in calls:
        now_s = max(now_s, call.arrival_s)
        done += batch.advance(now_s)
        batch.add(call, now_s)
        if data.draw(st.booleans()):
            now_s += data.draw(st.floats(0, 8))
            done += batch.advance(now_s)
            there = list(batch.calls())
            if there:
                chosen = there[data.draw(st.integers(0, len(there) - 1))]
                batch.take(chosen, now_s)
                assert chosen.emitted >= emitted.get(chosen.index, 0) and chosen.emitted < chosen.output_tokens
                emitted[chosen.index] = chosen.emitted
                away.append(chosen)
        if away and data.draw(st.booleans()):
            back = away.pop()
            back.resumed += 1
            if back.emitted == 0 or data.draw(st.booleans()) or not batch.adopt(back, now_s):
                batch.add(back, now_s)
        assert batch.held_tokens <= speed.kv_tokens + batch.num_running or batch.num_running <= 1
    for call in away:
        batch.add(call, now_s)
    while batch.next_s < float("inf"):
        done += batch.advance(batch.next_s)
    assert sorted(call.index for call in done) == [call.index for call in calls]
    assert all(call.emitted == call.output_tokens and call.first_token_s <= call.last_token_s for call in done)
    assert gaps.total == sum(call.output_tokens - 1 for call in done)
    assert batch.held_tokens == 0


def test_a_full_cache_evicts_the_youngest_who_is_computed_again() -> None:
    calls = [Call(0, 0.0, 40, 30), Call(1, 0.1, 40, 30)]
    ended = played(Simple(kv_tokens=110), calls)
    assert ended[0].recomputed_tokens == 0 and ended[1].recomputed_tokens > 40
    assert ended[0].last_token_s < ended[1].last_token_s


def test_who_was_interrupted_elsewhere_takes_the_place_of_younger_ones() -> None:
    batch = Batch(TokenTimes(Simple(max_batch=1)), Gaps(), now_s=0.0)
    young, old = Call(1, 5.0, 8, 50), Call(0, 1.0, 8, 20, emitted=10, resumed=1, first_token_s=2.0, last_token_s=6.0)
    batch.add(young, 5.0)
    batch.advance(9.0)
    batch.add(old, 9.0)
    done: list[Call] = []
    while batch.next_s < float("inf"):
        done += batch.advance(batch.next_s)
    assert [call.index for call in done] == [0, 1]


@pytest.mark.parametrize(("pipeline", "tensor", "rate_rps", "batch"), [(1, 4, 3.0, 64), (2, 2, 3.0, 64), (4, 1, 2.0, 16)])
def test_the_planners_twin_agrees(pipeline: int, tensor: int, rate_rps: float, batch: int) -> None:
    speed = replica_cost(
        named_model("llama-3-8b"), Parallel(pipeline=pipeline, tensor=tensor, max_batch=batch), instance_type("g5.12xlarge")
    )
    assert not isinstance(speed, str)
    lengths = Lengths(((0.0, 50), (0.5, 500), (1.0, 2000))), Lengths(((0.0, 2), (0.5, 100), (1.0, 500)))
    theirs = batching_twin.arrivals(Workload(rate_rps, *lengths), 800, Random(1))
    ours = played(speed, [Call(index, c.arrival_s, c.prompt, c.output) for index, c in enumerate(theirs)])
    batching_twin.simulate([speed], theirs)
    for mine, twin in ((lambda c: c.last_token_s - c.arrival_s, "e2e_s"), (lambda c: c.first_token_s - c.arrival_s, "ttft_s")):
        mean_s = sum(mine(call) for call in ours.values()) / len(ours)
        assert mean_s == pytest.approx(sum(getattr(c, twin) for c in theirs) / len(theirs), rel=0.01)


def test_looked_up_times_are_within_a_thousandth() -> None:
    speed = replica_cost(named_model("llama-3-70b"), Parallel(pipeline=2, tensor=4, max_batch=64), instance_type("p4d.24xlarge"))
    assert not isinstance(speed, str)
    times = token_times(speed)
    for sequences in (1, 2, 7, 40):
        for share in (0.0, 0.013, 0.3, 0.77, 1.0):
            context = share * speed.kv_tokens
            assert times.token_s(sequences, context) == pytest.approx(speed.token_s(sequences, context), rel=1e-3)


def test_prompts_that_begin_alike_are_computed_once() -> None:
    speed = Simple(base_s=0.1, each_s=0.0)
    batch = Batch(TokenTimes(speed), Gaps(), now_s=0.0, prefix_block_tokens=10)
    first = Call(0, 0.0, 35, 1, prefix=(1, 2, 3))
    other = Call(1, 100.0, 35, 1, prefix=(1, 2, 9))
    same = Call(2, 200.0, 30, 1, prefix=(1, 2, 3))
    for call in (first, other, same):
        batch.advance(call.arrival_s)
        batch.add(call, call.arrival_s)
        batch.advance(call.arrival_s + 50.0)
    took_s = [call.first_token_s - call.arrival_s for call in (first, other, same)]
    assert took_s == pytest.approx([35 * 0.125, 15 * 0.125, 1 * 0.125])


def test_blocks_go_when_there_is_no_room_for_them() -> None:
    prefixes = Prefixes(10)
    assert prefixes.find((1, 2), 25, room_tokens=30) == 0
    assert prefixes.find((1, 2), 25, room_tokens=30) == 20
    assert prefixes.find((3, 4), 25, room_tokens=30) == 0
    assert prefixes.find((1, 2), 25, room_tokens=30) == 0, "the longest unused went first"
    assert Prefixes(0).find((1,), 25, room_tokens=30) == 0
