"""A request gives the same tokens whatever runs beside it, however it is cut, drafted, evicted, resumed or moved."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from drafts import DrafterOf

from spotserve.core.request import Request
from spotserve.core.ties import near_tie_gap
from spotserve.engine.engine import Engine
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.results import FrozenSequence
from spotserve.speculation.drafter import DraftTask
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.tree import ROOT, DraftTree

DTYPES = ["float64", "float32", "bfloat16"]
NAMES = [f"r{index}" for index in range(9)]


def request_of(make_request: Callable[..., Request], name: str, **changes: object) -> Request:
    index = NAMES.index(name)
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    ]
    return make_request(
        name, 3 + 17 * index, **{"max_tokens": 24 + index, "gaps": True, "logprobs": 1, **kinds[index % 3], **changes}
    )


def assert_same(got: Sequence[int], alone: "object", dtype: str) -> None:
    """Equal; below float64 the first difference may be a near tie where products cannot be packed."""
    expected, gaps = alone.token_ids, alone.gaps  # type: ignore[attr-defined]
    if torch.backends.mkldnn.is_available():
        assert list(got) == expected
    for position, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if mine != theirs:
            assert gaps[position] < near_tie_gap(dtype), f"altered at {position} with a lead of {gaps[position]}"
            return


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(dtype: str, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable[..., Request]) -> dict:
    """What each request gives with the engine to itself."""
    engine = make_engine(dtype=dtype)
    results = {}
    for name in NAMES:
        engine.add(request_of(make_request, name))
        results.update(collect(engine))
    return results


def test_batched(dtype: str, alone: dict, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable) -> None:
    engine = make_engine(dtype=dtype)
    for name in NAMES:
        engine.add(request_of(make_request, name))
    for name, got in collect(engine).items():
        assert_same(got.token_ids, alone[name], dtype)
        if got.token_ids == alone[name].token_ids and dtype == "float64":
            mine, theirs = ([item.logprob for item in items] for items in (got.logprobs, alone[name].logprobs))
            assert mine == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("max_step_tokens", [16, 23, 256])
def test_chunked(
    max_step_tokens: int, dtype: str, alone: dict, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable
) -> None:
    engine = make_engine(dtype=dtype, max_step_tokens=max_step_tokens, block_tokens=8)
    for name in reversed(NAMES):
        engine.add(request_of(make_request, name))
    for name, got in collect(engine).items():
        assert_same(got.token_ids, alone[name], dtype)


def test_evicted(dtype: str, alone: dict, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable) -> None:
    engine = make_engine(dtype=dtype, kv_tokens=208)
    for name in NAMES:
        engine.add(request_of(make_request, name))
    collected = collect(engine)
    for name, got in collected.items():
        assert_same(got.token_ids, alone[name], dtype)
    assert sum(got.recomputed_tokens for got in collected.values()) > 0, "nothing was evicted: nothing was tested"


@pytest.mark.parametrize("after", [1, 7, 20])
def test_resumed(
    after: int, dtype: str, alone: dict, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable
) -> None:
    engine = make_engine(dtype=dtype, max_step_tokens=32)
    for name in NAMES:
        engine.add(request_of(make_request, name), emitted_token_ids=alone[name].token_ids[:after])
    for name, got in collect(engine).items():
        assert_same([*alone[name].token_ids[:after], *got.token_ids], alone[name], dtype)
        assert got.recomputed_tokens == len(request_of(make_request, name).prompt_token_ids) + after


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_moved(
    steps: int, dtype: str, alone: dict, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable
) -> None:
    """With its KV where the sequence has some, from its tokens where it has none."""
    first, second = make_engine(dtype=dtype, max_step_tokens=64), make_engine(dtype=dtype, block_tokens=8)
    for name in NAMES:
        first.add(request_of(make_request, name))
    emitted: dict[str, list[int]] = {name: [] for name in NAMES}
    for _ in range(steps):
        for output in first.step().outputs:
            emitted[output.request_id].extend(output.token_ids)
    first.settle()
    adopted = 0
    for name in NAMES:
        frozen = first.freeze(name)
        assert frozen is not None
        assert list(frozen.output_token_ids) == emitted[name]
        if frozen.computed_tokens and hand_over(first, second, frozen):
            adopted += 1
        else:
            second.add(frozen.request, emitted_token_ids=frozen.output_token_ids)
        first.release(name)
    assert adopted > 0
    assert not first.has_work
    assert first.kv_tokens_used == 0
    for name, got in collect(second).items():
        assert_same([*emitted[name], *got.token_ids], alone[name], dtype)


def memory_of(engine: Engine) -> RankMemory:
    return engine._ranks._rank._memory  # type: ignore[attr-defined,no-any-return]


def hand_over(source: Engine, other: Engine, frozen: FrozenSequence) -> bool:
    """Gives the other engine a sequence with its KV, as their ranks would."""
    request_id, heads = frozen.request.request_id, range(source.spec.num_kv_heads)
    layers = tuple(memory_of(source).read_kv(request_id, layer, heads) for layer in range(source.spec.num_layers))
    memory_of(other).keep_fetched(request_id, layers)
    return other.adopt(frozen)


class LeakyOracle:
    """Knows the answers and hides them among wrong branches: accepted paths of every shape come up."""

    def __init__(self, answers: dict[str, list[int]], prompts: dict[str, int], *, branching: bool) -> None:
        self._answers, self._prompts, self._branching = answers, prompts, branching
        self._chance = random.Random(5)

    def draft(self, task: DraftTask) -> DraftTree:
        ahead = self._answers[task.sequence_id][len(task.token_ids) - self._prompts[task.sequence_id] :]
        nodes: list[int] = []
        parents: list[int] = []
        right = ROOT
        for token_id in ahead[: self._chance.randint(0, 4)]:
            before = right
            if self._branching:
                for _ in range(self._chance.randint(0, 2)):
                    nodes.append((token_id + self._chance.randint(1, 50)) % 96)
                    parents.append(self._chance.choice([before, ROOT]))
            nodes.append(token_id if self._chance.random() < 0.8 else (token_id + 1) % 96)
            parents.append(before)
            right = len(nodes) - 1
        return DraftTree(tuple(nodes), tuple(parents)).cut(task.max_depth)

    def speculator(self) -> FixedSpeculator:
        return FixedSpeculator(DrafterOf(self.draft), max_depth=12)


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_drafted(
    together: bool,
    branching: bool,
    dtype: str,
    alone: dict,
    make_engine: Callable[..., Engine],
    collect: Callable,
    make_request: Callable,
) -> None:
    prompts = {name: len(request_of(make_request, name).prompt_token_ids) for name in NAMES}
    oracle = LeakyOracle({name: got.token_ids for name, got in alone.items()}, prompts, branching=branching)
    engine = make_engine(dtype=dtype, speculator=oracle.speculator(), block_tokens=4)
    collected = {}
    for name in NAMES:
        engine.add(request_of(make_request, name))
        if not together:
            collected.update(collect(engine))
    collected.update(collect(engine))
    for name, got in collected.items():
        assert_same(got.token_ids, alone[name], dtype)
    accepted = sum(got.accepted_tokens for got in collected.values())
    assert 0 < accepted < sum(got.draft_tokens for got in collected.values())


def test_stop_inside_an_accepted_run_trims_what_follows(
    dtype: str, alone: dict, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable
) -> None:
    name = "r1"
    answer = alone[name].token_ids
    stop = answer[5]
    end = answer.index(stop) + 1
    oracle = LeakyOracle({name: answer}, {name: 20}, branching=False)
    engine = make_engine(dtype=dtype, speculator=oracle.speculator())
    engine.add(request_of(make_request, name, stop_token_ids=(stop,)))
    got = collect(engine)[name]
    assert got.token_ids == answer[:end]
    assert len(got.logprobs) == len(got.gaps) == end


def test_cached(dtype: str, make_engine: Callable[..., Engine], collect: Callable, make_request: Callable) -> None:
    """A request that finds the KV of another in the prefix cache says what it says alone."""
    beginning = tuple((5 + 11 * place * place) % 90 for place in range(70))
    requests = [make_request(name, (*beginning, 3 + index), max_tokens=24, gaps=True) for index, name in enumerate("abc")]
    alone_engine = make_engine(dtype=dtype, prefix_cache=False)
    expected = {}
    for request in requests:
        alone_engine.add(request)
        expected.update(collect(alone_engine))
    engine = make_engine(dtype=dtype)
    cached_tokens = 0
    for request in requests:
        engine.add(request)
        got: list[int] = []
        while engine.has_work:
            for output in engine.step().outputs:
                got += output.token_ids
                cached_tokens += output.cached_tokens
        assert_same(got, expected[request.request_id], dtype)
    assert cached_tokens >= 2 * 64
