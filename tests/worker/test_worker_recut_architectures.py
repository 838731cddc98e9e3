"""Architectures are cut anew in mid-answer, with evictions and prefix hits on the way: the answers of one rank left alone.

In float64, where every difference would be a bug; mixtures of experts in float32, as the library computes them in nothing wider.
"""

import os
from pathlib import Path

import pytest
from architectures import SERVED, Architecture
from replica_scene import PATIENCE_S, Replica, Shape, devices, start
from stage_scene import random_model, tiny_config

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.engine import Engine
from spotserve.engine.weights import OpenModel, open_model

TYPICAL = ("llama", "gemma2", "gpt2", "phi3", "mixtral", "gpt_oss")
CHOSEN = [each for each in SERVED if each.model_type in TYPICAL or os.environ.get("SPOTSERVE_RECUT") == "long"]
"""Sequences of all of them move alike; `SPOTSERVE_RECUT=long` runs the others too."""
PATH: list[Shape] = [(1, 1), (3, 1), (1, 2), (2, 2), (1, 1)]
NUM_DEVICES = 4
NUM_REQUESTS = 4
NEW_TOKENS = 64
STEPS_BETWEEN = 12
SHARED = tuple((11 + 5 * place * place) % 90 + 4 for place in range(34))


def request(number: int) -> Request:
    """All begin alike, over two blocks, so that all but the first may find that in the cache."""
    return Request(
        request_id=f"s{number}",
        prompt_token_ids=(*SHARED, 5 + number),
        sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
    )


def collect(engine: Engine, answers: dict[str, list[int]], counts: dict[str, int], *, steps: int) -> None:
    for _ in range(steps):
        if not engine.has_work:
            break
        results = [engine.step()]
        if steps < NEW_TOKENS * NUM_REQUESTS:
            results += engine.settle()
        for output in (output for result in results for output in result.outputs):
            answers.setdefault(output.request_id, []).extend(output.token_ids)
            counts["cached"] += output.cached_tokens
            counts["recomputed"] += output.recomputed_tokens
        engine.check_integrity()


def undisturbed(settings: EngineSettings) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    engine = lone_engine(settings.model_copy(update={"prefix_cache": False, "kv_tokens": 1024}))
    for number in range(NUM_REQUESTS):
        engine.add(request(number))
        collect(engine, answers, {"cached": 0, "recomputed": 0}, steps=2 * NEW_TOKENS * NUM_REQUESTS)
    return answers


@pytest.mark.parametrize("architecture", CHOSEN, ids=lambda architecture: architecture.model_type)
def test_answers_go_on_through_every_shape(architecture: Architecture, tmp_path: Path) -> None:
    random_model(tiny_config(architecture.model_type, **architecture.settings)).save_pretrained(tmp_path / "model")
    dtype = "float32" if "num_experts_per_tok" in architecture.settings else "float64"
    settings = EngineSettings(
        model=str(tmp_path / "model"), dtype=dtype, speculation="off", kv_tokens=320, max_step_tokens=16, block_tokens=16
    )
    model = open_model(settings)
    answers: dict[str, list[int]] = {}
    counts = {"cached": 0, "recomputed": 0}
    with devices(NUM_DEVICES, settings) as made:
        replica: Replica | None = None
        for epoch, shape in enumerate(PATH):
            fresh = bring_up(f"r-{epoch}", shape, made, model, settings, epoch=epoch + 1)
            if fresh is None:
                continue  # it cannot be cut into so many shards, and says so
            if replica is None:
                for number in range(NUM_REQUESTS):
                    fresh.engine.add(request(number))
            else:
                pass_on(replica, fresh)
            replica = fresh
            collect(replica.engine, answers, counts, steps=STEPS_BETWEEN)
        assert replica is not None
        collect(replica.engine, answers, counts, steps=2 * NEW_TOKENS * NUM_REQUESTS)
        assert replica.engine.kv_tokens_used == 0
        replica.end()
    assert answers == undisturbed(settings)
    assert counts["cached"] > 0, "nothing was found in the prefix cache"
    assert counts["recomputed"] > 0, "nothing was evicted"


def bring_up(name: str, shape: Shape, on: list, model: OpenModel, settings: EngineSettings, *, epoch: int) -> Replica | None:  # type: ignore[type-arg]
    try:
        return start(name, shape, on, model, settings, epoch=epoch)
    except ModelError:
        assert shape[1] > 1, "every architecture can be cut into stages"
        return None


def pass_on(old: Replica, new: Replica) -> None:
    """Sequences with their KV as far as there is room for it, others from their tokens, as a worker does it."""
    for report in old.engine.reports():
        frozen = old.engine.freeze(report.request_id)
        assert frozen is not None
        new.fetcher.fetch(frozen, old.home).result(PATIENCE_S)
        if not new.engine.adopt(frozen):
            new.fetcher.forget(report.request_id).result(PATIENCE_S)
            new.engine.add(frozen.request, emitted_token_ids=frozen.output_token_ids)
        old.engine.release(report.request_id)
    assert old.engine.kv_tokens_used == 0
    old.end()
