"""Mistakes that speculative decoders are known for, one test for each.

Where another test looks for the mistake already, its name stands here; what has no place in this engine (grammars, caches that
cannot be cut back) is left out.

- *Draft probabilities are not passed on, so that acceptance falls:* test_engine_law, a draft with the same noise is right as often
  as the formula says.
- *The assistant is greedy while the target samples:* test_engine_law, likely and unlikely chains; test_engine_speculation.
- *Batching or eviction changes what is sampled:* test_engine_speculation, all at once where memory is short.
- *Greedy drafts are verified wrongly:* test_engine_speculation, kinds `greedy` and `no more asked`.
- *Log-probabilities of the wrong row:* test_engine_speculation compares values; below they are held against a teacher-forced run.
- *KV of refused drafts is not rolled back:* test_engine_speculation, any tree gives the same answer.
- *The drafter lacks the KV of the last token after all were accepted:* test_engine_draft_model, the lag and its property test;
  test_engine_speculation, a draft model that is the target is always right.
- *Learning from one tenant shows in another's speed:* test_speculation_suffix, partitions.
"""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from drafts import DrafterOf, Oracle, Recorded
from speculation_scene import Answer, assert_same_answers, one_by_one, request_of, run
from transformers import AutoModelForCausalLM

from spotserve.core.request import FinishReason, Request
from spotserve.engine.blocks import BlockPool
from spotserve.engine.engine import Engine
from spotserve.engine.ranks import leader, messages, rank, server
from spotserve.engine.runner import sampling_rows
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import new_sequence
from spotserve.speculation.acceptance import Acceptance, Label, cells_of
from spotserve.speculation.drafter import DraftTask
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.speculator import ChosenDraft
from spotserve.speculation.tree import ROOT, DraftTree

MakeEngine = Callable[..., Engine]


def texts_of(requests: Sequence[Request], plain: Mapping[str, Answer]) -> dict[str, list[int]]:
    return {request.request_id: [*request.prompt_token_ids, *plain[request.request_id].token_ids] for request in requests}


def test_seeds_stay_with_their_requests_in_mixed_and_permuted_batches(make_engine: MakeEngine) -> None:
    """A seed is ignored, or that of a neighbour is used, where seeded, unseeded and greedy requests meet."""
    prompt = (5, 9, 13, 40)
    requests = [request_of(f"seed {seed}", prompt, seed=seed, temperature=1.0, max_tokens=12) for seed in (0, 1, 2, 2**64 - 1)]
    requests += [
        request_of("greedy", prompt, temperature=0.0, seed=1, max_tokens=12),
        request_of("unseeded", prompt, max_tokens=12),
    ]
    requests.append(request_of("seed 1 again", prompt, seed=1, temperature=1.0, max_tokens=12))
    plain = one_by_one(make_engine(), requests)
    assert plain["seed 1"].token_ids == plain["seed 1 again"].token_ids
    assert len({tuple(answer.token_ids) for answer in plain.values()}) == 5, "unseeded is seed 0; seed 1 is there twice"
    for order in range(4):
        permuted = random.Random(order).sample(requests, len(requests))
        oracle = Oracle(texts_of(requests, plain), right=lambda task: len(task.token_ids) % 4, wrong=1)
        engine = make_engine(speculator=oracle.speculator(), block_tokens=4)
        for request in permuted:
            engine.add(request)
        assert_same_answers(run(engine), plain)


def test_every_row_of_a_draft_sees_its_own_prefix() -> None:
    """Sampling parameters reach the first row only, or rows share a prefix: each node has its path, and its place in the noise."""
    request = request_of("s", (5, 6), repetition_penalty=1.2, min_tokens=3)
    sequence = new_sequence(request, seniority=(0, 0.0, 0), end_token_ids=(1, 2), emitted_token_ids=(7,))
    sequence.advance(2)
    tree = DraftTree((8, 9, 8, 10), (ROOT, 0, ROOT, 2))
    rows = sampling_rows(ScheduledSequence(sequence, 1, ChosenDraft(tree, "test")))
    assert [row.position for row in rows] == [1, 2, 3, 2, 3]
    assert [tuple(row.output_token_ids) for row in rows] == [(7,), (7, 8), (7, 8, 9), (7, 8), (7, 8, 10)]
    assert {tuple(row.prompt_token_ids) for row in rows} == {(5, 6)}
    assert {tuple(row.banned_token_ids) for row in rows} == {(1, 2)}
    assert [row.adjusts_logits for row in rows] == [True] * 5
    unpenalized = sampling_rows(
        ScheduledSequence(
            new_sequence(request_of("t", (5,), min_tokens=2), seniority=(0, 0.0, 1), end_token_ids=(1,), emitted_token_ids=()),
            1,
            ChosenDraft(DraftTree.chain([3, 4]), "test"),
        )
    )
    assert [row.adjusts_logits for row in unpenalized] == [True, True, False], "the third token may be an end"


def test_a_penalty_holds_within_an_accepted_run(make_engine: MakeEngine) -> None:
    """Penalties count only what was said before the step: then a run of accepted tokens could say one twice."""
    request = request_of("s", (5, 9, 13), temperature=0.9, presence_penalty=500.0, max_tokens=60)
    plain = one_by_one(make_engine(), [request])
    oracle = Oracle(texts_of([request], plain), right=lambda _: 7, wrong=2)
    engine = make_engine(speculator=oracle.speculator(), block_tokens=4)
    engine.add(request)
    got = run(engine)
    assert_same_answers(got, plain)
    assert len(set(got["s"].token_ids)) == 60
    assert len(got["s"].outputs) < 12, "hardly anything was accepted: nothing was tested"


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5, 6, 7])
def test_an_end_that_is_wanted_comes_exactly_when_it_may(min_tokens: int, make_engine: MakeEngine) -> None:
    """Minimum lengths that are off by one in the rows of a draft, the drafts being ends themselves or all that comes before."""
    sampling = {"temperature": 0.8, "logit_bias": {2: 500.0}, "min_tokens": min_tokens, "ignore_eos": False, "max_tokens": 12}
    request = request_of("s", (5, 9, 13), **sampling)
    plain = one_by_one(make_engine(), [request])
    assert plain["s"].token_ids[-1] == 2
    assert len(plain["s"].token_ids) == min_tokens + 1
    whole = Oracle(texts_of([request], plain), right=lambda _: 9, wrong=1).speculator()
    ends = FixedSpeculator(DrafterOf(lambda task: DraftTree.chain([2, 2, 2])), max_depth=3)
    for speculator in (whole, ends):
        engine = make_engine(speculator=speculator)
        engine.add(request)
        assert_same_answers(run(engine), plain)


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("how", ["stop id", "end of text", "length"])
def test_nothing_of_what_was_accepted_beyond_the_end_is_kept(how: str, at: int, make_engine: MakeEngine) -> None:
    """A stop inside an accepted run leaves ids, log-probabilities, or lessons behind: neither outputs nor the speculator see them,
    and the KV is freed."""
    prompt = (5, 9, 13)
    endless = request_of("s", prompt, temperature=0.0, presence_penalty=500.0, max_tokens=20)
    answer = one_by_one(make_engine(), [endless])["s"]
    end = answer.token_ids[at]
    changes = {"stop_token_ids": (end,)} if how == "stop id" else {"max_tokens": at + 1}
    if how == "end of text":
        changes = {"ignore_eos": False, "logit_bias": {2: 500.0}, "min_tokens": at}
    request = request_of("s", prompt, **{"temperature": 0.0, "presence_penalty": 500.0, "max_tokens": 20, **changes})
    plain = one_by_one(make_engine(), [request])
    assert len(plain["s"].token_ids) == at + 1
    text = [*prompt, *plain["s"].token_ids, *range(40, 60)]  # goes on beyond the end
    recorded = Recorded(Oracle({"s": text}, right=lambda _: 9).speculator())
    engine = make_engine(speculator=recorded, block_tokens=4)
    engine.add(request)
    got = run(engine)
    assert_same_answers(got, plain)
    answer = got["s"]
    assert answer.finish_reason is (FinishReason.LENGTH if how == "length" else FinishReason.STOP)
    assert len(answer.token_ids) == len(answer.logprobs) == len(answer.gaps) == at + 1
    assert recorded.observed["s"] == answer.token_ids
    assert recorded.forgotten["s"] == [*prompt, *answer.token_ids]
    for output in answer.outputs:
        assert len(output.token_ids) in (output.accepted_tokens, output.accepted_tokens + 1)
        assert output.accepted_tokens <= output.draft_tokens


def test_log_probabilities_are_those_of_a_teacher_forced_run(make_engine: MakeEngine, tiny_llama: Path) -> None:
    """They come from the wrong row, or from one that saw another branch: the library's own model, given the whole text, agrees."""
    requests = [
        request_of("branches", (5, 9, 13), temperature=1.0, seed=3, logprobs=4, max_tokens=25),
        request_of("penalties", (6, 9), temperature=0.0, frequency_penalty=1.0, logit_bias={4: 3.0}, logprobs=4, max_tokens=25),
    ]
    texts = texts_of(requests, one_by_one(make_engine(), requests))

    def branching(task: DraftTask) -> DraftTree:
        ahead = [*texts[task.sequence_id][len(task.token_ids) :], 3, 4, 5, 6]
        return DraftTree((50, ahead[0], 51, ahead[1], ahead[2], 52), (ROOT, ROOT, 1, 1, 3, 3))

    engine = make_engine(speculator=FixedSpeculator(DrafterOf(branching), max_depth=6), block_tokens=4)
    for request in requests:
        engine.add(request)
    got = run(engine)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    for request in requests:
        answer, prompt = got[request.request_id], len(request.prompt_token_ids)
        assert any(output.accepted_tokens >= 2 for output in answer.outputs)
        with torch.inference_mode():
            forced = model(torch.tensor([texts[request.request_id]])).logits[0, prompt - 1 : -1].log_softmax(-1)
        for token_id, logprob, expected in zip(answer.token_ids, answer.logprobs, forced, strict=True):
            assert logprob.logprob == pytest.approx(float(expected[token_id]), abs=1e-9)
            values, ids = expected.topk(4)
            assert [top for top, _ in logprob.top] == ids.tolist()
            assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_sequences_of_one_batch_accept_different_numbers_of_tokens(make_engine: MakeEngine) -> None:
    """Ragged acceptance breaks positions and masks where a batch is padded or cut to a common length."""
    requests = [request_of(f"{number}", (5 + number, 9, *range(20, 20 + 3 * number)), max_tokens=21) for number in range(6)]
    plain = one_by_one(make_engine(), requests)
    oracle = Oracle(texts_of(requests, plain), right=lambda task: int(task.sequence_id), wrong=2)
    engine = make_engine(speculator=oracle.speculator(), block_tokens=4)
    for request in requests:
        engine.add(request)
    got = run(engine)
    assert_same_answers(got, plain)
    steps = [[len(output.token_ids) for output in got[f"{number}"].outputs[1:-1]] for number in range(6)]
    assert [set(of_one) for of_one in steps] == [{1}, {2}, {3}, {4}, {5}, {6}]


@pytest.mark.parametrize("block_tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("right", [0, 1, 5, 12])
def test_drafts_longer_than_the_rest_of_a_block_have_blocks_to_go_to(
    block_tokens: int, right: int, make_engine: MakeEngine
) -> None:
    """Room for the tokens ahead is not reserved, so that a draft that crosses the border of a block writes past its table; and what
    was reserved for a refused draft is given back."""
    requests = [request_of(f"{number}", [7 + number] * (1 + number), max_tokens=30) for number in range(5)]
    plain = one_by_one(make_engine(), requests)
    oracle = Oracle(texts_of(requests, plain), right=lambda _: right, wrong=12 - right)
    engine = make_engine(speculator=oracle.speculator(), block_tokens=block_tokens)
    for request in requests:
        engine.add(request)
    answers = {request.request_id: Answer() for request in requests}
    while engine.has_work:
        for output in engine.step().outputs:
            answers[output.request_id].take(output)
        known = [report.context_tokens for report in engine.reports()]
        assert engine.kv_tokens_used <= sum(-(-tokens // block_tokens) * block_tokens for tokens in known)
    assert_same_answers(answers, plain)


def test_a_draft_gets_no_more_room_than_there_is(make_engine: MakeEngine) -> None:
    """In a cache that is nearly full the limits end with the last free slot, and with the context."""
    request = request_of("s", [5] * 45, temperature=0.0, max_tokens=100)
    recorded = Recorded(FixedSpeculator(DrafterOf(lambda task: DraftTree.chain([90] * 16)), max_depth=16))
    engine = make_engine(speculator=recorded, block_tokens=4, kv_tokens=64)
    engine.add(request)
    answer = run(engine)["s"]
    assert (len(answer.token_ids), answer.finish_reason) == (19, FinishReason.LENGTH)
    limits = [(known, limit) for (known,), (_, (limit,), _, _) in zip(recorded.known, recorded.proposed, strict=True)]
    assert limits == [(known, 63 - known) for known in range(46, 64)]


def test_tokens_that_nobody_said_are_not_found_in_the_prefix_cache(make_engine: MakeEngine) -> None:
    """Pages with unverified tokens are published: a prompt that begins with a refused draft finds what was said, and no more."""
    request = request_of("first", (5, 9, 13), temperature=0.0, max_tokens=30)
    plain = one_by_one(make_engine(), [request])
    refused = 61
    drafting = FixedSpeculator(DrafterOf(lambda task: DraftTree.chain([refused] * 9)), max_depth=9)
    engine = make_engine(speculator=drafting, block_tokens=4)
    engine.add(request)
    assert_same_answers(run(engine), plain)
    assert refused not in plain["first"].token_ids, "choose another token"
    said = [*request.prompt_token_ids, *plain["first"].token_ids]
    for known in (3, 7, 10, 15, 24):
        later = request_of(f"{known}", [*said[:known], *[refused] * 9], temperature=0.0, max_tokens=5)
        expected = one_by_one(make_engine(prefix_cache=False), [later])
        engine.add(later)
        got = run(engine)
        assert_same_answers(got, expected)
        assert sum(output.cached_tokens for output in got[later.request_id].outputs) == known // 4 * 4


def test_steps_write_nowhere_but_to_their_own_slots(make_engine: MakeEngine, tiny_llama: Path) -> None:
    """Rows that only fill up a step, and drafts that are refused, write into pages that others share: these keep every bit."""
    engine = make_engine(
        speculator=FixedSpeculator(DrafterOf(lambda task: DraftTree((90, 91, 92), (ROOT, ROOT, 0))), max_depth=3), block_tokens=4
    )
    shared = request_of("shared", [5, 9, 13, 40] * 5, temperature=0.0, max_tokens=9)
    engine.add(shared)
    run(engine)
    pool: BlockPool = engine._blocks
    cache = engine._ranks._rank.cache  # type: ignore[attr-defined]
    resting = [block for block in range(1, 1 + pool.num_blocks) if block in pool._published]
    assert len(resting) >= 5
    slots = [4 * block + place for block in resting for place in range(4)]
    before = [cache.layer(layer)[slots].clone() for layer in (0, 1)]
    for number in range(3):
        engine.add(request_of(f"{number}", [5, 9, 13, 40] * 3 + [60 + number], temperature=0.0, max_tokens=7 + number))
    run(engine)
    assert [block in pool._published for block in resting] == [True] * len(resting)
    assert all(torch.equal(cache.layer(layer)[slots], kept) for layer, kept in zip((0, 1), before, strict=True))


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("refused", ["none", "the last", "all"])
def test_a_refusal_at_the_last_token_counts_in_the_same_step(depth: int, refused: str, make_engine: MakeEngine) -> None:
    """Refusals that are noticed one step late show when the last draft token, or the only one, is the wrong one."""
    request = request_of("s", (5, 9, 13), temperature=0.8, seed=4, max_tokens=24)
    plain = one_by_one(make_engine(), [request])
    right = {"none": depth, "the last": depth - 1, "all": 0}[refused]
    oracle = Oracle(texts_of([request], plain), right=lambda _: right, wrong=depth - right)
    engine = make_engine(speculator=oracle.speculator(max_depth=depth), block_tokens=4)
    engine.add(request)
    got = run(engine)
    assert_same_answers(got, plain)
    whole = [output for output in got["s"].outputs[1:-1] if output.draft_tokens == depth]
    assert whole
    assert {output.accepted_tokens for output in whole[:-1]} == {right}


def test_ranks_are_told_what_to_verify_and_decide_nothing() -> None:
    """Ranks that choose draft lengths themselves come to different ones, and hang: theirs know no speculation at all, and what they
    are sent says every row. That several stages agree is in test_engine_speculation, two stages."""
    for module in (rank, messages, server, leader):
        assert "speculation" not in inspect.getsource(module), module.__name__
    assert {"token_ids", "positions", "slots", "groups", "logit_rows", "sampling"} <= set(messages.Compute.__struct_fields__)


def test_a_sequence_that_never_follows_its_drafts_does_not_spoil_those_that_do() -> None:
    """An estimate for everybody is poisoned by requests whose sampling drafts cannot follow: each has a factor of its own."""
    acceptance = Acceptance()
    cells = cells_of((1,), (0.6,))
    for _ in range(40):
        for number in range(6):
            acceptance.observe(f"deaf {number}", [Label(cells[0], False)])
        acceptance.observe("good", [Label(cells[0], True)])
        acceptance.end_step()
    deaf, good = (acceptance.survivals(name, (ROOT,), cells)[0] for name in ("deaf 0", "good"))
    assert good > 1.4 * acceptance.survivals("new", (ROOT,), cells)[0]
    assert deaf < acceptance.survivals("new", (ROOT,), cells)[0]


def test_the_engine_tells_drafters_whose_text_it_is(make_engine: MakeEngine) -> None:
    """Partitions of tenants: sequences learn from others of their own salt, and the salt reaches the drafter."""
    recorded = Recorded(FixedSpeculator(SuffixDrafter(), max_depth=4))
    engine = make_engine(speculator=recorded)
    for name in ("a", "b"):
        engine.add(request_of(name, (5, 9, 13), temperature=0.0, max_tokens=10))
        engine._sequences[name].cache_salt = f"of {name}"
    run(engine)
    tasks = {task.sequence_id: task.partition for tasks, _, _, _ in recorded.proposed for task in tasks}
    assert tasks == {"a": "of a", "b": "of b"}
    assert all(not chosen.tree for of_step in recorded.chosen[:1] for chosen in of_step)
