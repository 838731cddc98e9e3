"""Takes instances away at random, in every bad way, while clients stream; then compares every answer with the undisturbed one."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from local_cluster import Answer, LocalCluster, stream

from spotserve.core.ties import near_tie_gap

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "class Queue:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    '"""Reads a file and counts its words."""\n',
    "for key, value in sorted(table.items()):\n    ",
    "try:\n    value = int(text)\nexcept ValueError:\n    ",
)


@dataclass
class Tally:
    """What a chaos run saw."""

    answers: int = 0
    tokens: int = 0
    altered: list[str] = field(default_factory=list)
    tie_flips: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    longest_gap_s: float = 0.0

    @property
    def num_preemptions(self) -> int:
        """Instances taken."""
        return sum(self.preemptions.values())


def make_bodies(count: int, *, seed: int, model: str) -> list[dict[str, object]]:
    """Requests of every sort: greedy and sampled, long and short prompts, penalties, stop strings, n = 2, log-probabilities."""
    choose = random.Random(seed)
    bodies = []
    for index in range(count):
        prompt = "".join(choose.choice(PROMPTS) for _ in range(choose.choice((1, 1, 2, 4, 12))))
        body: dict[str, object] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": choose.randint(20, 110),
            "seed": choose.getrandbits(40),
            "temperature": choose.choice((0.0, 0.0, 0.7, 1.0)),
        }
        for chance, extra in (
            (0.2, {"n": 2}),
            (0.2, {"logprobs": 2}),
            (0.2, {"stop": ["\n\n", "return"]}),
            (0.2, {"top_p": 0.9, "top_k": 50}),
            (0.2, {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1}),
            (0.5, {"ignore_eos": True}),
            (0.1, {"logit_bias": {"20": 2.0, "30": -100.0}, "min_tokens": 5}),
        ):
            if choose.random() < chance:
                body |= extra
        bodies.append(body | {"user": str(index)})
    return bodies


async def undisturbed(cluster: LocalCluster, bodies: list[dict[str, object]], *, concurrency: int) -> list[Answer]:
    """Answers of a cluster that nobody disturbs."""
    slots = asyncio.Semaphore(concurrency)

    async def one(client: httpx.AsyncClient, body: dict[str, object]) -> Answer:
        async with slots:
            return await stream(client, cluster.url, body)

    async with _client() as client:
        return list(await asyncio.gather(*(one(client, body) for body in bodies)))


async def disturbed(
    cluster: LocalCluster,
    bodies: list[dict[str, object]],
    references: list[Answer],
    *,
    streams: int,
    preemptions: int,
    seed: int,
    dtype: str,
) -> Tally:
    """Keeps `streams` calls open, round and round through `bodies`, until `preemptions` instances were taken."""
    tally = Tally()
    over = asyncio.Event()
    numbers = iter(range(10**9))

    async def client_loop(client: httpx.AsyncClient) -> None:
        while True:
            number = next(numbers)
            index = number % len(bodies)
            answer = await stream(client, cluster.url, bodies[index])
            judge(answer, references[index], bodies[index], tally, dtype=dtype)
            if over.is_set() and number >= len(bodies):
                return

    async with _client() as client, asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(client_loop(client))
        await wreak_havoc(cluster, tally, preemptions=preemptions, seed=seed)
        over.set()
    return tally


async def wreak_havoc(cluster: LocalCluster, tally: Tally, *, preemptions: int, seed: int) -> None:
    """Takes instances, one blow after the other, until enough were taken."""
    choose = random.Random(seed)
    blows = {
        "notice": _notice,
        "sudden": _sudden,
        "two at once": _two_at_once,
        "owner and destination": _owner_and_destination,
        "all but one": _all_but_one,
    }
    async with _client() as client:
        while tally.num_preemptions < preemptions:
            await asyncio.sleep(choose.uniform(0.05, 0.8))
            ready = await _ready_instances(client, cluster)
            if len(ready) < 2:
                continue
            kind = choose.choices(list(blows), weights=(8, 6, 2, 2, 1))[0]
            tally.kinds[kind] += 1
            await blows[kind](client, cluster, ready, choose, tally)


async def _notice(client, cluster, ready, choose, tally) -> None:
    await _take(client, cluster, choose.choice(ready), choose.uniform(0.5, 10.0), tally)


async def _sudden(client, cluster, ready, choose, tally) -> None:
    await _take(client, cluster, choose.choice(ready), 0.0, tally)


async def _two_at_once(client, cluster, ready, choose, tally) -> None:
    await asyncio.gather(*(_take(client, cluster, victim, 0.0, tally) for victim in choose.sample(ready, 2)))


async def _owner_and_destination(client, cluster, ready, choose, tally) -> None:
    """A notice that sets sequences moving, and death for whoever they may be moving to, and from, meanwhile."""
    victim, *others = choose.sample(ready, len(ready))
    await _take(client, cluster, victim, choose.uniform(0.5, 2.0), tally)
    await asyncio.sleep(choose.uniform(0.0, 0.05))
    await _take(client, cluster, others[0], 0.0, tally)
    if choose.random() < 0.5:
        await _take(client, cluster, victim, 0.0, tally)


async def _all_but_one(client, cluster, ready, choose, tally) -> None:
    survivor = choose.choice(ready)
    grace_s = choose.choice((0.0, 1.0))
    await asyncio.gather(*(_take(client, cluster, victim, grace_s, tally) for victim in ready if victim != survivor))


async def _take(client: httpx.AsyncClient, cluster: LocalCluster, instance: str, grace_s: float, tally: Tally) -> None:
    body = {"instance": instance, "grace_s": grace_s}
    answer = await client.post(f"{cluster.url}/admin/preempt", json=body, headers=cluster.credentials)
    if answer.status_code == 404:
        return  # it went before its turn came
    answer.raise_for_status()
    tally.preemptions["with notice" if grace_s else "without notice"] += 1


async def _ready_instances(client: httpx.AsyncClient, cluster: LocalCluster) -> list[str]:
    document = (await client.get(f"{cluster.url}/status")).json()
    serving = {instance for replica in document["replicas"] if replica["state"] == "serving" for instance in replica["instances"]}
    return [item["id"] for item in document["instances"] if item["state"] == "ready" and item["id"] in serving]


def judge(answer: Answer, reference: Answer, body: dict[str, object], tally: Tally, *, dtype: str) -> None:
    """Everything a client can see, against the undisturbed answer; each position once, usage once."""
    tally.answers += 1
    tally.tokens += sum(map(len, answer.token_ids.values()))
    tally.longest_gap_s = max(tally.longest_gap_s, answer.longest_gap_s)
    assert answer.is_done, "the stream ended without [DONE]"
    assert answer.num_usages == 1
    if same(answer, reference):
        return
    if is_tie_flip(answer, reference, near_tie_gap(dtype)):
        tally.tie_flips += 1
        return
    tally.altered.append(f"{body}\n  got  {answer.token_ids} {answer.text}\n  want {reference.token_ids} {reference.text}")


def same(answer: Answer, reference: Answer) -> bool:
    """Equal in all but times; log-probabilities up to rounding."""
    close = all(
        len(got) == len(want) and all(abs(a - b) < 1e-3 for a, b in zip(got, want, strict=True))
        for got, want in ((answer.logprobs[index], reference.logprobs[index]) for index in reference.logprobs)
    )
    fields = ("text", "token_ids", "finish_reasons", "usage")
    return close and all(getattr(answer, name) == getattr(reference, name) for name in fields)


def is_tie_flip(answer: Answer, reference: Answer, near_tie: float) -> bool:
    """Whether every choice that differs begins to differ at a near tie."""
    for index, wanted in reference.token_ids.items():
        got = answer.token_ids[index]
        first = next((at for at, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        if first is None and len(got) != len(wanted):
            return False
        if first is not None and min(answer.gaps[index][first], reference.gaps[index][first]) > near_tie:
            return False
    return any(answer.token_ids[index] != wanted for index, wanted in reference.token_ids.items())


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


def report(tally: Tally, dtype: str, path: Path | None = None) -> str:
    """A few lines for people."""
    text = (
        f"{dtype}: {tally.answers} answers, {tally.tokens} tokens, altered {len(tally.altered)}, tie flips {tally.tie_flips}, "
        f"preemptions {dict(tally.preemptions)}, blows {dict(tally.kinds)}, longest gap {tally.longest_gap_s:.2f} s"
    )
    if path is not None:
        path.write_text(text + "\n")
    return text
