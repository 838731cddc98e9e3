"""A model is cut anew while it answers: the same tokens, no byte moved that was there, and nothing left behind."""

from itertools import product

import pytest
import torch
from replica_scene import Replica, Shape, devices, hand_over, start
from transformers import AutoModelForCausalLM, LlamaConfig

from spotserve.config import EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.results import StepResult
from spotserve.engine.weights import OpenModel, open_model

SHAPES: list[Shape] = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]
NUM_DEVICES = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return EngineSettings(model=str(folder), dtype="float64", speculation="off", kv_tokens=2048, max_step_tokens=32)


@pytest.fixture(scope="module")
def model(settings: EngineSettings) -> OpenModel:
    return open_model(settings)


def request(number: int) -> Request:
    prompt = tuple((5 + 7 * number + 3 * place * place) % 96 for place in range(20 + number))
    temperature = float(number % 2)
    return Request(
        request_id=f"s{number}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=24, temperature=temperature, seed=number, ignore_eos=True),
    )


def take(answers: dict[str, list[int]], results: list[StepResult]) -> None:
    for result in results:
        for output in result.outputs:
            assert output.position == len(answers.setdefault(output.request_id, []))
            answers[output.request_id] += output.token_ids


def finish(replica: Replica, answers: dict[str, list[int]]) -> None:
    while replica.engine.has_work:
        take(answers, [replica.engine.step()])
        replica.engine.check_integrity()
    assert replica.engine.kv_tokens_used == 0


@pytest.fixture(scope="module")
def undisturbed(settings: EngineSettings, model: OpenModel) -> dict[str, list[int]]:
    """What the requests are answered by one rank that is left alone."""
    answers: dict[str, list[int]] = {}
    with devices(1, settings) as made:
        replica = start("r-0", (1, 1), made, model, settings)
        for number in range(4):
            replica.engine.add(request(number))
        finish(replica, answers)
        replica.end()
    return answers


CUTS: list[Shape] = [(2, 1, (1, 2)), (2, 2, (2, 1)), (3, 1, (1, 1, 1))]
"""Stages of other sizes, one pair of which differs in nothing else."""


@pytest.mark.parametrize(
    ("old", "new"), [*product(SHAPES, SHAPES), *product(CUTS[:2], CUTS), ((2, 1), CUTS[0]), (CUTS[0], (2, 1)), (CUTS[1], (1, 2))]
)
def test_answers_go_on_when_the_model_is_cut_anew(
    old: Shape, new: Shape, settings: EngineSettings, model: OpenModel, undisturbed: dict[str, list[int]]
) -> None:
    answers: dict[str, list[int]] = {}
    with devices(NUM_DEVICES, settings) as made:
        before = start("r-1", old, made, model, settings)
        for number in range(4):
            before.engine.add(request(number))
        for _ in range(10 * old[0]):
            take(answers, [before.engine.step()])
        take(answers, before.engine.settle())
        after = start("r-2", new, made, model, settings, epoch=2)
        for number in range(4):
            hand_over(f"s{number}", before, after)
            take(answers, [after.engine.step()])  # the first ones go on while the others still move
        take(answers, after.engine.settle())
        assert before.engine.kv_tokens_used == 0
        before.end()
        finish(after, answers)
        after.end()
    assert answers == undisturbed
