"""The models that ship are what their README says, and what trains them is what they were trained with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spotserve.config import DEMO_MODEL
from spotserve.demo import corpus, train
from spotserve.demo.measure import DEMO_DRAFT, ngram_proposals, play

MODELS = {"target": DEMO_MODEL, "draft": DEMO_DRAFT}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_has_the_shape_and_report_of_its_training(kind: str) -> None:
    model = LlamaForCausalLM.from_pretrained(MODELS[kind], dtype=torch.float32)
    report = json.loads((MODELS[kind] / "training.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == report["parameters"]
    for name, size in train.SHAPES[kind].items():
        assert getattr(model.config, name) == size


def test_the_target_beats_its_draft_clearly_on_text_neither_has_seen() -> None:
    losses = {kind: json.loads((folder / "training.json").read_text())["held_out_loss"] for kind, folder in MODELS.items()}
    assert losses["target"] < losses["draft"] - 0.5


def test_the_target_answers_a_question_with_a_function() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    model = LlamaForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "Write a function `size`. Return the size of the file."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        answer = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer).startswith("def")


def test_a_text_survives_the_tokenizer() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    for text in ("def f(x):\n\treturn x ** 2  # naïve ✓ 漢字\n", "  leading", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_target_and_draft_share_one_vocabulary() -> None:
    target, draft = ((folder / "tokenizer.json").read_text() for folder in MODELS.values())
    assert target == draft


def test_the_split_of_the_corpus_is_by_name_and_leaves_nothing_out() -> None:
    files = corpus.source_files()
    held_out = [path for path in files if corpus.is_held_out(path)]
    assert 0.005 < len(held_out) / len(files) < 0.1
    assert corpus.is_held_out(Path("/elsewhere") / held_out[0].name)


def test_pairs_are_dedented_functions_with_their_question() -> None:
    text = 'class A:\n    def f(self):\n        """Does it.\n\n        At length.\n        """\n        return 1\n'
    (pair,) = corpus.read_pairs(text)
    assert pair.question == "Write a function `f`. Does it."
    assert pair.answer.startswith("def f(self):\n    ")
    assert list(corpus.read_pairs("def broken(:")) == []


def test_a_speculative_run_over_a_known_text_counts_right() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    perfect = [text[position : position + 2] for position in range(2, 8)]
    assert play(text, 2, perfect) == (2, 4, 4)
    hopeless = [[0, 0]] * 6
    assert play(text, 2, hopeless) == (6, 12, 0)
    assert ngram_proposals([1, 2, 3, 1, 2, 3, 1, 2, 3, 1], 6, 2)[0] == [1, 2]
