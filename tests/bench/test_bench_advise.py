"""How drafters are judged and steps are fitted, on answers and times that are known."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.bench.describe import describe
from spotserve.bench.guesses import HOST_DRAFTERS, Answer, Guess, host_drafter, host_guesses, model_guesses, worth
from spotserve.bench.step_cost import DECODING, EXTENSIONS, PROMPTS, StepKind, fit
from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
from spotserve.speculation.drafter import Draft, DraftTask
from spotserve.speculation.tree import DraftTree

SPEC = describe(str(DEMO_MODEL), "float32")


class Oracle:
    """A drafter that knows the answers, wrong at some places of the text."""

    name = "oracle"

    def __init__(self, answer: Answer, wrong: Sequence[int] = ()) -> None:
        self._text = [*answer.prompt_token_ids, *answer.token_ids]
        self._wrong = set(wrong)
        self.forgotten: list[int] = []

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        drafts = []
        for task in tasks:
            places = range(len(task.token_ids), min(len(task.token_ids) + task.max_depth, len(self._text)))
            tree = DraftTree.chain([9_999 if place in self._wrong else self._text[place] for place in places])
            drafts.append(Draft(tree, (1.0,) * len(tree)))
        return drafts

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        self.forgotten = list(token_ids)


def played(answer: Answer, drafter: Oracle, length: int) -> tuple[float, float]:
    """Tokens and drafted tokens per step: the same by really going on, where a whole draft fits."""
    text, at = [*answer.prompt_token_ids, *answer.token_ids], len(answer.prompt_token_ids) + 1
    tokens, drafted, steps = 0, 0, 0
    while at + length < len(text):
        (draft,) = drafter.propose([DraftTask("x", text[:at], max_depth=length)]) if length else (Draft(),)
        kept = 0
        while kept < length and draft.tree.token_ids[kept] == text[at + kept]:
            kept += 1
        tokens, drafted, steps, at = tokens + kept + 1, drafted + len(draft.tree), steps + 1, at + kept + 1
    return (tokens / steps, drafted / steps) if steps else (1.0, float(length))


@given(st.integers(8, 40), st.sets(st.integers(0, 45)), st.integers(1, 6))
def test_judging_every_place_gives_what_playing_gives(size: int, wrong: set[int], depth: int) -> None:
    answer = Answer((1, 2, 3), tuple(range(100, 100 + size)))
    oracle = Oracle(answer, sorted(wrong))
    guesses, seconds = host_guesses(oracle, [answer], depth)
    assert seconds >= 0 and oracle.forgotten == [*answer.prompt_token_ids, *answer.token_ids]
    found = worth(guesses, depth)
    for length in range(depth + 1):
        assert (found.tokens_by_length[length], found.drafted_by_length[length]) == pytest.approx(played(answer, oracle, length))


def test_acceptance_is_that_of_each_depth_given_the_one_before() -> None:
    guesses = [[Guess((1, 1), 2), Guess((1, 1), 1), Guess((1, 1), 0), Guess((1, 1), 2), Guess((1, 0), 1)]]
    assert worth(guesses, 2).acceptance == pytest.approx((4 / 5, 2 / 3)), "the last place has no second token to be judged by"


def test_a_tree_is_judged_by_its_best_path() -> None:
    answer = Answer((1,), (5, 6, 7, 8))

    class Tree(Oracle):
        def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
            tree = DraftTree((9, 6, 7), (-1, -1, 1))
            return [Draft(tree, (0.5, 0.5, 0.5)) for _ in tasks]

    ((first, *_),), _ = host_guesses(Tree(answer), [answer], 2)
    assert first == Guess((2, 1), 2)


def test_a_model_is_the_perfect_drafter_of_its_own_answers() -> None:
    engine = lone_engine(EngineSettings(speculation="off", max_batch=16, kv_tokens=4096))
    prompt = tuple((31 * place) % SPEC.vocabulary_size for place in range(20))
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="a", prompt_token_ids=prompt, sampling=sampling))
    said: list[int] = []
    while engine.has_work:
        said += [token for output in engine.step().outputs for token in output.token_ids]
    found = worth(model_guesses(engine, [Answer(prompt, tuple(said))], 3), 3)
    assert found.acceptance == (1.0, 1.0, 1.0) and found.tokens_by_length == (1.0, 2.0, 3.0, 4.0)


def test_host_drafters_have_names() -> None:
    (draft,) = host_drafter("ngram").propose([DraftTask("x", [1, 2, 3, 1, 2], max_depth=2)])
    assert draft.tree.token_ids[0] == 3
    assert [host_drafter(name).name for name in HOST_DRAFTERS] == list(HOST_DRAFTERS)
    with pytest.raises(ModelError, match="no drafter 'oracle': there are ngram and suffix"):
        host_drafter("oracle")


@given(st.floats(1e-3, 1e-1), st.floats(1e-5, 1e-3), st.floats(1e-5, 1e-3), st.floats(1e-7, 1e-5), st.floats(0.1, 0.9))
def test_the_fit_finds_the_constants_of_exact_times(
    constant_s: float, per_sequence_s: float, per_row_s: float, per_kv_token_s: float, reread: float
) -> None:
    kinds = [StepKind(n, n, n * context, 0.0) for n, context in DECODING if n % 4 == 0]
    kinds += [StepKind(n, n * tokens, n * tokens, n * tokens * (tokens - 1) / 2) for n, tokens in PROMPTS]
    kinds += [StepKind(n, n * tokens, n * 256, n * 256 * (tokens - 1)) for n, tokens in EXTENSIONS]
    seconds = {
        kind: constant_s
        + kind.sequences * per_sequence_s
        + kind.rows * per_row_s
        + (kind.kv_tokens + reread * kind.kv_tokens_again) * per_kv_token_s
        for kind in kinds
    }
    found = fit(seconds, SPEC)
    assert found.error < 1e-6
    assert found.cost.constant_s == pytest.approx(constant_s, rel=1e-3)
    assert found.cost.kv_reread == pytest.approx(reread, rel=1e-2)
    assert found.cost.per_row_s >= per_row_s * (1 - 1e-6), "a row of a draft has the head's work, too"
    assert found.cost.per_row_s + found.cost.per_sequence_s == pytest.approx(per_row_s + per_sequence_s, rel=1e-3)
