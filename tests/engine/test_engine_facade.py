"""What the worker relies on: refusals, cancelling, reports, moving to another engine, and a start after a fork."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spotserve.core.errors import ContextTooLong, InvalidRequest, PeerLost
from spotserve.core.request import FinishReason, Request
from spotserve.engine.engine import Engine
from spotserve.engine.ranks.memory import RankMemory


def test_refusals(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.add(make_request("a", (1, 96)))
    with pytest.raises(InvalidRequest) as bias:
        engine.add(make_request("a", logit_bias={500: 1.0}))
    assert bias.value.param == "logit_bias"
    with pytest.raises(ContextTooLong):
        engine.add(make_request("a", 256))
    with pytest.raises(ContextTooLong):
        engine.add(make_request("a", 200), emitted_token_ids=[4] * 56)
    with pytest.raises(InvalidRequest, match="emitted"):
        engine.add(make_request("a", max_tokens=2), emitted_token_ids=[4, 4])
    engine.add(make_request("a"))
    with pytest.raises(InvalidRequest, match="already"):
        engine.add(make_request("a"))
    assert engine.num_waiting == 1


def test_full_context_ends_by_length(
    make_engine: Callable[..., Engine], collect: Callable, make_request: Callable[..., Request]
) -> None:
    engine = make_engine(speculation="ngram:4")
    engine.add(make_request("model", 250, max_tokens=50, temperature=0.0))
    got = collect(engine)["model"]
    assert (len(got.token_ids), got.finish_reason) == (6, FinishReason.LENGTH)
    small = make_engine(kv_tokens=64, speculation="ngram:4")
    small.add(make_request("cache", 40, max_tokens=50, temperature=0.0))
    assert len(collect(small)["cache"].token_ids) == 24


def test_cancel_gives_everything_back(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    engine = make_engine(max_batch=3, speculation="ngram:3")
    for name in "abcde":
        engine.add(make_request(name, 20))
    for _ in range(4):
        engine.step()
    assert (engine.num_running, engine.num_waiting) == (3, 2)
    assert engine.kv_tokens_used > 0
    for name in ("a", "e", "nobody", "b", "c", "d"):
        engine.cancel(name)
        engine.check_integrity()
    assert not engine.has_work
    assert engine.kv_tokens_used == 0
    assert engine.step().outputs == ()


def test_reports_and_positions(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    engine = make_engine()
    engine.add(make_request("a", 12, max_tokens=30))
    first, second = engine.step(), engine.step()
    assert (first.num_prefill_tokens, first.num_decode_tokens) == (12, 0)
    assert (second.num_prefill_tokens, second.num_decode_tokens) == (0, 1)
    assert [result.outputs[0].position for result in (first, second)] == [0, 1]
    (report,) = engine.reports()
    assert (report.request_id, report.context_tokens, report.computed_tokens, report.remaining_tokens) == ("a", 14, 13, 28)


def carry_over(memory: RankMemory, other: RankMemory, request_id: str, *, num_layers: int = 2, num_heads: int = 2) -> None:
    """What the ranks of a new owner do before it adopts."""
    layers = tuple(memory.read_kv(request_id, layer, range(num_heads)) for layer in range(num_layers))
    other.keep_fetched(request_id, layers)


def memory_of(engine: Engine) -> RankMemory:
    return engine._ranks._rank._memory  # type: ignore[attr-defined]


def test_frozen_kv_has_the_promised_shape_and_arrives_as_it_was(
    make_engine: Callable[..., Engine], make_request: Callable[..., Request]
) -> None:
    engine, other = make_engine(dtype="bfloat16"), make_engine(dtype="bfloat16")
    engine.add(make_request("a", 12))
    engine.step()
    engine.step()
    engine.settle()
    frozen = engine.freeze("a")
    assert frozen is not None
    assert (frozen.computed_tokens, len(frozen.output_token_ids)) == (13, 2)
    kept = [memory_of(engine).read_kv("a", layer, range(2)) for layer in range(2)]
    assert [(part.shape, part.dtype) for part in kept] == [((13, 2, 2, 8), torch.bfloat16)] * 2
    assert engine.freeze("a") is None
    carry_over(memory_of(engine), memory_of(other), "a")
    assert other.adopt(frozen)
    engine.release("a")
    engine.check_integrity()
    assert engine.kv_tokens_used == 0
    again = other.freeze("a")
    assert again == frozen
    for layer, part in enumerate(kept):
        assert torch.equal(memory_of(other).read_kv("a", layer, range(2)), part)


def test_a_frozen_sequence_can_be_cancelled(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    engine = make_engine()
    engine.add(make_request("a", 12))
    engine.step()
    engine.settle()
    assert engine.freeze("a") is not None
    with pytest.raises(InvalidRequest, match="already"):
        engine.add(make_request("a", 12))
    engine.cancel("a")
    engine.check_integrity()
    assert engine.kv_tokens_used == 0
    assert memory_of(engine)._kv == {}
    engine.add(make_request("a", 12))


def test_adopting_without_room_leaves_no_trace(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    source, full = make_engine(), make_engine(max_batch=1)
    source.add(make_request("a", 12))
    source.step()
    source.settle()
    full.add(make_request("b", 12))
    full.step()
    frozen = source.freeze("a")
    assert frozen is not None
    used = full.kv_tokens_used
    assert not full.adopt(frozen)
    full.check_integrity()
    assert (full.num_running, full.num_waiting, full.kv_tokens_used) == (1, 0, used)


@pytest.mark.parametrize("fetched_layers", [0, 1])
def test_kv_that_was_not_fetched_in_full_is_never_computed_on(
    fetched_layers: int, make_engine: Callable[..., Engine], make_request: Callable[..., Request]
) -> None:
    source, other = make_engine(), make_engine()
    source.add(make_request("a", 12))
    source.step()
    source.settle()
    frozen = source.freeze("a")
    assert frozen is not None
    if fetched_layers:
        carry_over(memory_of(source), memory_of(other), "a", num_layers=fetched_layers)
    with pytest.raises(PeerLost, match="fetched"):
        other.adopt(frozen)
    other.check_integrity()
    assert other.kv_tokens_used == 0


FORKED = """
import os, sys
from spotserve.engine.preload import preload
preload()
from spotserve.config import EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
assert len(os.listdir("/proc/self/task")) <= int(sys.argv[2]), "importing the engine started threads"
for _ in range(2):
    child = os.fork()
    if not child:
        engine = lone_engine(EngineSettings(model=sys.argv[1], threads=2, kv_tokens=512))
        engine.add(Request(request_id="a", prompt_token_ids=(5, 6), sampling=SamplingParams(max_tokens=3, ignore_eos=True)))
        made = 0
        while engine.has_work:
            made += sum(len(output.token_ids) for output in engine.step().outputs)
        os._exit(0 if made == 3 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_engines_start_in_forked_processes(tiny_llama: Path) -> None:
    """The pools of numpy and scipy, which survive a fork, are the only ones that importing may start."""
    allowed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; from transformers import AttentionInterface; print(len(os.listdir('/proc/self/task')))",
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tiny_llama), allowed], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
