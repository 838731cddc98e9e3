"""One system as the engine of another: this gateway, asked as a model server."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_client import MODEL, build_app, serving
from scripted_source import Reply, ScriptedSource

from spotserve.config import EngineSettings
from spotserve.core.request import FinishReason, Request, SamplingParams
from spotserve.engine.remote.remote_engine import RemoteEngine
from spotserve.gateway.tokenizer import Tokenizer

PROMPT = "The quick brown fox"
REST = " jumps over the lazy dog 🙂🚀 naïve café, then END of the story."


@pytest.fixture
def story(tokenizer: Tokenizer, eos_id: int) -> tuple[int, ...]:
    """Prompt and answer."""
    return (*tokenizer.encode(PROMPT + REST, add_special_tokens=False), eos_id)


@contextmanager
def engine_over(source: ScriptedSource, tokenizer: Tokenizer, folder: Path) -> Iterator[RemoteEngine]:
    with serving(build_app(source, tokenizer)) as url:
        settings = EngineSettings(kind="openai", url=f"{url}/v1", model=str(folder), served_name=MODEL)
        with closing(RemoteEngine(settings)) as engine:
            yield engine


def finish(engine: RemoteEngine) -> tuple[tuple[int, ...], FinishReason | None, str | None]:
    token_ids: list[int] = []
    while True:
        for output in engine.step().outputs:
            token_ids += output.token_ids
            if output.finish_reason is not None:
                return tuple(token_ids), output.finish_reason, output.error


@pytest.mark.parametrize("emitted", [0, 1, 9])
def test_a_gateway_serves_another_system_by_token_ids(
    emitted: int, story: tuple[int, ...], source_of: Callable[..., ScriptedSource], tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    source = source_of(lambda request: Reply(story[len(request.prompt_token_ids) :]))
    begins = len(tokenizer.encode(PROMPT, add_special_tokens=False))
    sampling = SamplingParams(
        max_tokens=100, temperature=0.7, top_k=5, seed=9, stop_token_ids=(7,), min_tokens=3, logit_bias={4: 1.5}
    )
    with engine_over(source, tokenizer, tokenizer_folder) as engine:
        assert engine.dialect.name == "spotserve" and engine.spec.context_tokens == 256
        request = Request(request_id="r", prompt_token_ids=story[:begins], sampling=sampling)
        engine.add(request, emitted_token_ids=story[begins : begins + emitted])
        token_ids, finish_reason, error = finish(engine)
    assert (token_ids, finish_reason, error) == (story[begins + emitted :], FinishReason.STOP, None)
    arrived = _only(source).sampling
    for name, value in (("temperature", 0.7), ("top_k", 5), ("stop_token_ids", (7,)), ("logit_bias", {4: 1.5})):
        assert getattr(arrived, name) == value
    assert (arrived.max_tokens, arrived.min_tokens) == (100 - emitted, max(0, 3 - emitted))


def test_what_the_gateway_refuses_fails_with_its_words(
    story: tuple[int, ...], source_of: Callable[..., ScriptedSource], tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    source = source_of(Reply(story, raises=RuntimeError("never asked")))
    with engine_over(source, tokenizer, tokenizer_folder) as engine:
        sampling = SamplingParams(max_tokens=10, logit_bias={3: 1000.0})
        engine.add(Request(request_id="r", prompt_token_ids=story[:3], sampling=sampling))
        token_ids, finish_reason, error = finish(engine)
    assert (token_ids, finish_reason) == ((), FinishReason.FAILED)
    assert error is not None and "logit_bias" in error


def _only(source: ScriptedSource) -> Any:
    (call,) = source.calls.values()
    (request,) = call.requests
    return request
