"""What the worker relies on: refusals, cancelling, reports, exports, and a start after a fork."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spotserve.core.errors import ContextTooLong, InvalidRequest
from spotserve.core.request import FinishReason, Request
from spotserve.engine.engine import Engine


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


def test_exported_kv_has_the_promised_shape(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    engine = make_engine(dtype="bfloat16")
    engine.add(make_request("a", 12))
    engine.step()
    engine.step()
    exported = engine.export_sequence("a")
    assert exported is not None
    assert (exported.computed_tokens, exported.dtype, len(exported.output_token_ids)) == (13, "bfloat16", 2)
    assert [len(layer) for layer in exported.kv] == [2 * 13 * 2 * 8 * 2] * 2
    assert engine.export_sequence("a") is None
    assert not make_engine(dtype="float32").import_sequence(exported), "KV of another dtype is no use"
    other = make_engine(dtype="bfloat16")
    assert other.import_sequence(exported)
    again = other.export_sequence("a")
    assert again == exported
    assert not other.import_sequence(replace(exported, kv=exported.kv[:1])), "a layer is missing"
    assert other.kv_tokens_used == 0


def test_import_without_room_leaves_no_trace(make_engine: Callable[..., Engine], make_request: Callable[..., Request]) -> None:
    source, full = make_engine(), make_engine(max_batch=1)
    source.add(make_request("a", 12))
    source.step()
    full.add(make_request("b", 12))
    full.step()
    exported = source.export_sequence("a")
    assert exported is not None
    used = full.kv_tokens_used
    assert not full.import_sequence(exported)
    full.check_integrity()
    assert (full.num_running, full.num_waiting, full.kv_tokens_used) == (1, 0, used)


FORKED = """
import os, sys
from spotserve.engine.preload import preload
preload()
from spotserve.config import EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.engine import Engine
assert len(os.listdir("/proc/self/task")) <= int(sys.argv[2]), "importing the engine started threads"
for _ in range(2):
    child = os.fork()
    if not child:
        engine = Engine(EngineSettings(model=sys.argv[1], threads=2, kv_tokens=512))
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
