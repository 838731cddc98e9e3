"""Continuous batching, iteration by iteration: the naive twin of `planner.queueing`.

One replica: at each boundary between iterations those who had their last token leave, waiting requests are admitted in order of
arrival as long as there are a slot and KV for their tokens, their prompts are computed one after the other, and then every
sequence whose first token is out gets one more. When the KV cache would overflow, the youngest sequence is evicted; it goes to the
head of the queue and is later computed again from its tokens, as in `engine.scheduler`. The router is the real one.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random

from spotserve.core.cluster import ReplicaState
from spotserve.core.messages import Address, Route
from spotserve.planner.speed import ReplicaSpeed
from spotserve.planner.workload import Workload
from spotserve.router import pick


@dataclass(slots=True, eq=False)
class Call:
    """One request and what it met."""

    arrival_s: float
    prompt: int
    output: int
    first_token_s: float = inf
    end_s: float = inf
    decoded: int = 0
    """Tokens it had before it was last evicted."""

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_token_s) / (self.output - 1)


@dataclass(slots=True, eq=False)
class _Running:
    call: Call
    ready_s: float
    begun: int = -1
    """Iteration before its first one; -1: its prompt is still on its way."""


@dataclass(slots=True, eq=False)
class _Replica:
    speed: ReplicaSpeed
    now_s: float = 0.0
    """Next boundary."""
    iteration: int = 0
    context: int = 0
    waiting: deque[Call] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)
    """In order of admission."""
    num_begun: int = 0
    decoding: int = 0
    ends: list[tuple[int, int, _Running]] = field(default_factory=list)
    """(iteration of the last token, order, who), a heap; evicted ones stay in it until they come up."""
    preparing: deque[_Running] = field(default_factory=deque)

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def advance(self, until_s: float) -> None:
        """Passes all boundaries before `until_s`; an idle replica has none and is ready then."""
        while self.load and self.now_s < until_s:
            self._boundary()
        if not self.load:
            self.now_s = max(self.now_s, until_s)

    def _boundary(self) -> None:
        self._retire()
        self._admit()
        while self.preparing and self.preparing[0].ready_s <= self.now_s + 1e-12:
            self._begin(self.preparing.popleft())
        self._make_room()
        if self.decoding:
            self.context += self.decoding
            self.iteration += 1
            self.now_s += self.speed.token_s(self.decoding, self.context)
        elif self.preparing:
            self.now_s = self.preparing[0].ready_s

    def _retire(self) -> None:
        while self.ends and self.ends[0][0] <= self.iteration:
            _, _, who = heapq.heappop(self.ends)
            if who in self.running:
                who.call.end_s = self.now_s
                self._remove(who)

    def _remove(self, who: _Running) -> None:
        self.running.remove(who)
        self.decoding -= 1
        self.context -= who.call.prompt + 1 + who.call.decoded + self.iteration - who.begun

    def _admit(self) -> None:
        held = self.context + sum(each.call.prompt + 1 + each.call.decoded for each in self.preparing)
        while self.waiting and len(self.running) < self.speed.max_batch:
            call = self.waiting[0]
            tokens = call.prompt + call.decoded + 1
            if held + tokens > self.speed.kv_tokens and self.running:
                return
            self.waiting.popleft()
            held += tokens
            who = _Running(call, self.now_s + self.speed.first_token_s(tokens - 1))
            self.now_s += self.speed.prompt_s(tokens - 1)
            call.first_token_s = min(call.first_token_s, who.ready_s)
            self.running.append(who)
            self.preparing.append(who)

    def _begin(self, who: _Running) -> None:
        who.begun = self.iteration
        self.decoding += 1
        self.context += who.call.prompt + 1 + who.call.decoded
        end = self.iteration + who.call.output - 1 - who.call.decoded
        heapq.heappush(self.ends, (end, self.num_begun, who))
        self.num_begun += 1
        if end == self.iteration:
            who.call.end_s = max(who.ready_s, who.call.first_token_s)
            self._remove(who)

    def _make_room(self) -> None:
        while self.context + self.decoding > self.speed.kv_tokens and self.decoding > 1:
            who = next(each for each in reversed(self.running) if each.begun >= 0)
            self._remove(who)
            who.call.decoded += self.iteration - who.begun
            self.waiting.appendleft(who.call)


def arrivals(workload: Workload, count: int, random: Random) -> list[Call]:
    """Requests with gamma gaps and independent lengths."""
    shape = 1 / workload.gap_cv**2 if workload.gap_cv else inf
    calls, now_s = [], 0.0
    for _ in range(count):
        mean_s = 1 / workload.rate_rps
        now_s += mean_s if shape == inf else random.gammavariate(shape, mean_s / shape)
        lengths = (max(1, round(each.quantile(random.random()))) for each in (workload.prompt, workload.output))
        calls.append(Call(now_s, *lengths))
    return calls


def simulate(speeds: Sequence[ReplicaSpeed], calls: Sequence[Call]) -> list[Call]:
    """Serves `calls`, in order of arrival, and notes what they met."""
    replicas = {f"r-{index}": _Replica(speed) for index, speed in enumerate(speeds)}
    routes = [
        Route(replica_id=name, instance_id=name, address=Address("", 0), state=ReplicaState.SERVING, max_batch=each.speed.max_batch)
        for name, each in replicas.items()
    ]
    for call in calls:
        for replica in replicas.values():
            replica.advance(call.arrival_s)
        route = pick(routes, {name: replica.load for name, replica in replicas.items()})
        assert route is not None
        replicas[route.replica_id].waiting.append(call)
    for replica in replicas.values():
        replica.advance(inf)
    return list(calls)
