"""The engine over a server: whole answers, resumed answers, and what becomes of them when the server misbehaves."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from model_server import CONTEXT_TOKENS, EOS, KEY, MODEL, PROMPT, STORY, Fault, ModelServer, at_home, serving
from pydantic import SecretStr

from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.errors import ContextTooLong, InvalidRequest, ModelError, PeerLost
from spotserve.core.request import FinishReason, Request, SamplingParams, TokenLogprob
from spotserve.engine.remote.remote_engine import RemoteEngine
from spotserve.engine.remote.upstream import Patience
from spotserve.engine.remote.vocabulary import load_vocabulary

HASTY = Patience(start_s=0.0, answer_s=5.0, check_s=0.05, misses=2, retries=3, pause_s=0.001, busy_s=0.5)
VOCABULARY = load_vocabulary(str(DEMO_MODEL))
STORY_IDS = VOCABULARY.encode(STORY)
PROMPT_IDS = VOCABULARY.encode(PROMPT)
ANSWER = (*STORY_IDS[len(PROMPT_IDS) :], EOS)
WITH_IDS = ("vllm", "sglang", "llamacpp", "tgi")
DIALECTS = (*WITH_IDS, "plain")


@dataclass
class Collected:
    """Everything that one sequence got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    recomputed_tokens: int = 0

    @property
    def text(self) -> str:
        return VOCABULARY.decode([token_id for token_id in self.token_ids if token_id != EOS])


@pytest.fixture
def open_remote() -> Iterator[Callable[..., RemoteEngine]]:
    """Engines over servers; all are closed in the end."""
    with ExitStack() as at_end:

        def build(server: ModelServer, *, patience: Patience = HASTY, **settings: object) -> RemoteEngine:
            given = {"kind": "openai", "url": server.url, "served_name": MODEL, **settings}
            engine = RemoteEngine(EngineSettings.model_validate(given), patience=patience)
            at_end.callback(engine.close)
            return engine

        yield build


def request(request_id: str = "r", **sampling: object) -> Request:
    given = {"max_tokens": 200, "temperature": 0.0, **sampling}
    return Request(request_id=request_id, prompt_token_ids=PROMPT_IDS, sampling=SamplingParams(**given))  # type: ignore[arg-type]


def finish(engine: RemoteEngine, collected: dict[str, Collected] | None = None, emitted: int = 0) -> dict[str, Collected]:
    """Steps until nothing is left; positions must follow each other."""
    collected = {} if collected is None else collected
    deadline_s = time.monotonic() + 20
    while engine.has_work:
        assert time.monotonic() < deadline_s, "it does not end"
        for output in engine.step().outputs:
            into = collected.setdefault(output.request_id, Collected())
            assert output.position == emitted + len(into.token_ids)
            into.token_ids += output.token_ids
            into.logprobs += output.logprobs or ()
            into.finish_reason, into.error = output.finish_reason, output.error
            into.recomputed_tokens += output.recomputed_tokens
        engine.check_integrity()
    return collected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_is_the_servers(dialect: str, open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer(dialect)) as server:
        engine = open_remote(server)
        assert engine.spec.context_tokens == CONTEXT_TOKENS and engine.spec.vocabulary_size == 4096
        engine.add(request())
        engine.add(request("short", max_tokens=7))
        assert len(engine.reports()) == 2
        answers = finish(engine)
    whole, short = answers["r"], answers["short"]
    assert PROMPT + whole.text == STORY
    assert whole.finish_reason is FinishReason.STOP and short.finish_reason is FinishReason.LENGTH
    assert whole.error is None and whole.recomputed_tokens == 0
    if dialect in WITH_IDS:
        assert tuple(whole.token_ids) == ANSWER and tuple(short.token_ids) == ANSWER[:7]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("emitted", [1, 30, len(ANSWER) - 2])
def test_an_answer_goes_on_after_what_was_emitted(dialect: str, emitted: int, open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer(dialect)) as server:
        engine = open_remote(server)
        engine.add(request(max_tokens=len(ANSWER)), emitted_token_ids=ANSWER[:emitted])
        answer = finish(engine, emitted=emitted)["r"]
    begun = VOCABULARY.decode(ANSWER[:emitted])
    assert PROMPT + begun + answer.text == STORY
    assert answer.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert answer.recomputed_tokens == len(PROMPT_IDS) + emitted
    if dialect in WITH_IDS:
        assert tuple(answer.token_ids) == ANSWER[emitted:]
    body = server.bodies[0]
    limit = body.get("max_tokens", body.get("n_predict")) or body["parameters"]["max_new_tokens"]
    assert limit == len(ANSWER) - emitted


FAULTS = [
    Fault("cut", after=0),
    Fault("cut", after=9),
    Fault("end", after=9),
    Fault("garbage", after=9),
    Fault("error", after=9),
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("status", status=429),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind}-{fault.after or fault.status}")
def test_a_fault_is_not_seen(dialect: str, fault: Fault, open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer(dialect, faults=[fault])) as server:
        engine = open_remote(server)
        engine.add(request())
        answer = finish(engine)["r"]
    assert PROMPT + answer.text == STORY and answer.finish_reason is FinishReason.STOP
    assert len(server.bodies) == 2
    if dialect in WITH_IDS:
        assert tuple(answer.token_ids) == ANSWER
        assert answer.recomputed_tokens == (len(PROMPT_IDS) + fault.after if fault.after else 0)


def test_a_stream_may_be_cut_more_often_than_patience_lasts_if_tokens_come_in_between(
    open_remote: Callable[..., RemoteEngine],
) -> None:
    with at_home(ModelServer("vllm", faults=[Fault("cut", after=3)] * 12)) as server:
        engine = open_remote(server)
        engine.add(request())
        answer = finish(engine)["r"]
    assert tuple(answer.token_ids) == ANSWER
    assert len(server.bodies) == 13


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_refused_request_fails_alone_and_says_why(dialect: str, open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer(dialect, faults=[Fault("status", status=422, message="too curious")])) as server:
        engine = open_remote(server, max_batch=1)
        engine.add(request("bad"))
        engine.add(request("good"))
        answers = finish(engine)
    assert answers["bad"].finish_reason is FinishReason.FAILED
    assert answers["bad"].error is not None and "too curious" in answers["bad"].error
    assert PROMPT + answers["good"].text == STORY


@pytest.mark.parametrize("fault", [Fault("status", status=500), Fault("cut", after=0), Fault("garbage", after=0)])
def test_a_request_that_a_healthy_server_cannot_answer_fails_alone(fault: Fault, open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", faults=[fault] * 4)) as server:
        engine = open_remote(server)
        engine.add(request())
        answer = finish(engine)["r"]
    assert answer.finish_reason is FinishReason.FAILED and answer.error is not None and "again and again" in answer.error
    assert len(server.bodies) == 1 + HASTY.retries


def test_a_server_that_stays_overloaded_fails_the_request(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", faults=[Fault("status", status=429)] * 10_000)) as server:
        engine = open_remote(server)
        engine.add(request())
        answer = finish(engine)["r"]
    assert answer.finish_reason is FinishReason.FAILED and answer.error is not None and "overloaded" in answer.error


def test_a_server_that_goes_away_in_mid_answer_breaks_the_engine(open_remote: Callable[..., RemoteEngine]) -> None:
    server = ModelServer("vllm", token_s=0.005)
    collected: dict[str, Collected] = {}
    with serving(server):
        engine = open_remote(server)
        engine.add(request())
        while not collected:
            for output in engine.step().outputs:
                collected[output.request_id] = Collected(list(output.token_ids))
    with pytest.raises(PeerLost, match=r"127\.0\.0\.1"):
        finish(engine, collected)
    begun = collected["r"].token_ids
    assert len(begun) > 0 and tuple(begun) == ANSWER[: len(begun)], "nothing that was made is lost or made up"


def test_a_silent_server_is_asked_whether_it_is_well(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", faults=[Fault("hang", after=5)])) as server:
        engine = open_remote(server)
        engine.add(request())
        for _ in range(10):
            engine.step()  # it is well, so its silence is waited out
        assert engine.num_running == 1
        server.is_well = False
        with pytest.raises(PeerLost, match="health check"):
            finish(engine, {"r": Collected(list(ANSWER[:5]))})


def test_an_idle_engine_notices_that_its_server_died(open_remote: Callable[..., RemoteEngine]) -> None:
    server = ModelServer("vllm")
    with serving(server):
        engine = open_remote(server)
        assert not engine.has_work
    deadline_s = time.monotonic() + 20
    while not engine.has_work:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    with pytest.raises(PeerLost):
        engine.step()


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_turns_everyone_away_breaks_the_engine(status: int, open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", faults=[Fault("status", status=status)])) as server:
        engine = open_remote(server)
        engine.add(request())
        with pytest.raises(ModelError, match=rf"127\.0\.0\.1.*{status}"):
            finish(engine)


def test_the_key_is_sent_and_needed(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", key=KEY)) as server:
        with pytest.raises(ModelError, match="SPOTSERVE_ENGINE__API_KEY"):
            open_remote(server)
        with pytest.raises(ModelError) as refused:
            open_remote(server, api_key=SecretStr("sk-wrong"))
        assert "sk-wrong" not in str(refused.value)
        engine = open_remote(server, api_key=SecretStr(KEY))
        engine.add(request(max_tokens=3))
        assert tuple(finish(engine)["r"].token_ids) == ANSWER[:3]


def test_no_server_at_all(open_remote: Callable[..., RemoteEngine]) -> None:
    server = ModelServer("vllm", url="http://127.0.0.1:9/v1")
    with pytest.raises(PeerLost, match="no model server answers"):
        open_remote(server)
    for url, says in (("http://u:secret@h/v1", "password"), ("not a url", "expected a URL"), ("ftp://h", "expected a URL")):
        server.url = url
        with pytest.raises(ModelError, match=says) as refused:
            open_remote(server)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("id_shift", [1, 4096])
def test_another_models_tokenizer_is_noticed_at_the_start(
    dialect: str, id_shift: int, open_remote: Callable[..., RemoteEngine]
) -> None:
    with at_home(ModelServer(dialect, id_shift=id_shift)) as server, pytest.raises(ModelError, match="another tokenizer"):
        open_remote(server)


def test_a_server_that_is_still_loading_is_waited_for(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", is_well=False)) as server:
        timer = threading.Timer(0.3, lambda: setattr(server, "is_well", True))
        timer.start()
        engine = open_remote(server, patience=Patience(start_s=20.0))
        assert engine.spec.context_tokens == CONTEXT_TOKENS
        timer.join()


def test_a_cancelled_request_is_hung_up_on_and_its_id_is_free_again(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", token_s=0.005)) as server:
        engine = open_remote(server)
        engine.add(request())
        while not engine.step().outputs:
            pass
        engine.cancel("r")
        engine.cancel("unknown")
        assert not engine.has_work
        engine.add(request(), emitted_token_ids=ANSWER[:50])
        answer = finish(engine, emitted=50)["r"]
        assert tuple(answer.token_ids) == ANSWER[50:]
        assert server.hung_up == 1


def test_no_more_than_max_batch_are_asked_for_at_once(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", token_s=0.001)) as server:
        engine = open_remote(server, max_batch=3)
        for number in range(10):
            engine.add(request(f"r{number}", max_tokens=20))
        while engine.num_running < 3:
            engine.step()
        assert engine.num_waiting >= 1 and engine.num_running == 3
        while engine.has_work:
            engine.step()
        assert server.most_active == 3
        assert len(server.bodies) == 10


@pytest.mark.parametrize("dialect", WITH_IDS)
def test_a_stop_id_ends_the_answer_where_the_server_would_go_on(dialect: str, open_remote: Callable[..., RemoteEngine]) -> None:
    stop = ANSWER[20]
    first = ANSWER.index(stop)
    with at_home(ModelServer(dialect, token_s=0.001)) as server:
        engine = open_remote(server)
        engine.add(request(stop_token_ids=(stop,)))
        answer = finish(engine)["r"]
    assert tuple(answer.token_ids) == ANSWER[: first + 1]
    assert answer.finish_reason is FinishReason.STOP


def test_log_probabilities_come_by_token_id(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm", faults=[Fault("cut", after=4)])) as server:
        engine = open_remote(server)
        engine.add(request(logprobs=2, max_tokens=10))
        answer = finish(engine)["r"]
    assert [each.logprob for each in answer.logprobs] == [-0.5] * 10
    assert answer.logprobs[3].top == ((ANSWER[3], -0.5), (ANSWER[3] + 1, -1.5)), "no more than were asked for"


def test_the_context_ends_the_answer(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("vllm")) as server:
        engine = open_remote(server)
        with pytest.raises(ContextTooLong):
            engine.add(request(), emitted_token_ids=(5,) * CONTEXT_TOKENS)
        engine.add(request(max_tokens=100_000))
        finish(engine)
    assert server.bodies[0]["max_tokens"] == CONTEXT_TOKENS - len(PROMPT_IDS)


def test_what_cannot_come_in(open_remote: Callable[..., RemoteEngine]) -> None:
    with at_home(ModelServer("tgi")) as server:
        engine = open_remote(server)
        engine.add(request())
        for bad, param in (
            (request(), None),
            (request("a", min_p=0.1, temperature=1.0), "min_p"),
            (request("b", stop_token_ids=(99_999,)), "stop_token_ids"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                engine.add(bad)
            assert refused.value.param == param
        assert list(finish(engine)) == ["r"], "what was refused left nothing behind"
