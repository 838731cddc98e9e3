"""Measures a target and drafters for it: what a step costs, what a draft costs, and how much of it the target would say itself.

    python -m spotserve.bench.advise --target T --drafts D1,ngram < prompts.txt

Prompts come from standard input, one per line; one JSON document (`speculation.findings`) goes to standard output, progress to
standard error. What `spotserve advise` runs, in a process of its own because the command line does not load torch.
"""

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean

import msgspec
from pydantic import ValidationError

from spotserve.bench.guesses import HOST_DRAFTERS, Answer, Worth, host_drafter, host_guesses, model_guesses, worth
from spotserve.bench.step_cost import KV_TOKENS, MOST_ROWS, MOST_SEQUENCES, FittedStep, measure_step_cost
from spotserve.config import EngineSettings
from spotserve.core.errors import InvalidRequest, ModelError
from spotserve.core.model import ModelSpec
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.engine import Engine
from spotserve.engine.weights import open_model
from spotserve.gateway.tokenizer import Tokenizer, load_tokenizer
from spotserve.speculation.advisor import DraftCost, DraftProfile
from spotserve.speculation.findings import DraftFindings, Findings

USAGE_ERROR = 2
PROMPT_TOKENS = 256
"""Of a longer prompt the end is taken."""
ANSWER_TOKENS = 64
"""Of a longer answer the beginning is judged by."""


def measure(
    target: str, drafts: Sequence[str], prompts: Sequence[str], *, depth: int, tokens: int, settings: EngineSettings
) -> Findings:
    """Everything, the target first.

    Args:
        target: a folder in Hugging Face format, or a hub id.
        drafts: the same, or names of `HOST_DRAFTERS`.
        prompts: texts; as messages of a user where the target has a chat template.
        depth: the longest draft.
        tokens: of answers, about; fewer when there are too few prompts.
        settings: dtype and threads; what else is in them is replaced.

    Raises:
        ModelError: a model cannot be read or computed, or does not have the target's vocabulary.
    """
    tokenizer = load_tokenizer(target)
    prompt_ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    spec = open_model(_settings_of(settings, target)).catalogue.spec
    for name in drafts:
        _check(name, target, spec, settings, prompts, tokenizer)
    _tell(f"{target}: reading")
    engine = lone_engine(_settings_of(settings, target))
    _tell(f"{target}: answering")
    answers = _answers(engine, prompt_ids, depth=depth, tokens=tokens)
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    if num_tokens < 2 * depth:
        raise ModelError(f"{target}: answered only {num_tokens} tokens; more prompts are needed, or longer answers")
    _tell(f"{target}: {len(answers)} answers, {num_tokens} tokens; timing its steps")
    step = measure_step_cost(engine)
    context = fmean(len(a.prompt_token_ids) + place for a in answers for place in range(1, len(a.token_ids) + 1))
    return Findings(
        target=target,
        dtype=settings.dtype,
        threads=settings.threads,
        step=step.cost,
        step_error=step.error,
        answer_tokens=num_tokens,
        context_tokens=context,
        drafts=tuple(_draft(name, answers, depth=depth, context=context, settings=settings) for name in drafts),
    )


def _draft(name: str, answers: Sequence[Answer], *, depth: int, context: float, settings: EngineSettings) -> DraftFindings:
    _tell(f"{name}: guessing")
    if name in HOST_DRAFTERS:
        guesses, seconds = host_guesses(host_drafter(name), answers, depth)
        profile = _profile(name, DraftCost(0.0, 0.0, 0.0, per_sequence_s=seconds), worth(guesses, depth))
        return DraftFindings(profile=profile, is_model=False, weight_bytes=0, kv_bytes_per_token=0)
    engine = lone_engine(_settings_of(settings, name))
    found = worth(model_guesses(engine, answers, depth), depth)
    _tell(f"{name}: timing its steps")
    profile = _profile(name, _cost_of_passes(measure_step_cost(engine), context), found)
    config = open_model(_settings_of(settings, name)).catalogue.config.get_text_config()
    twice = engine.spec.embedding_bytes if config.tie_word_embeddings else 0  # a shape counts a tied embedding at both ends
    return DraftFindings(
        profile=profile,
        is_model=True,
        weight_bytes=engine.spec.weight_bytes - twice,
        kv_bytes_per_token=engine.spec.kv_bytes_per_token,
    )


def _profile(name: str, cost: DraftCost, found: Worth) -> DraftProfile:
    return DraftProfile(name, cost, found.acceptance, found.tokens_by_length, found.drafted_by_length)


def _cost_of_passes(step: FittedStep, context: float) -> DraftCost:
    """A pass is a step of the draft model: the line through one sequence and many, whose padding is in the constant.

    The first pass has one row more per sequence, the last accepted token, which the draft has not seen.
    """
    one_s, many_s = (step.cost.at(sequences=n, rows=n, kv_tokens=n * context) for n in (1, MOST_SEQUENCES))
    per_row_s = (many_s - one_s) / (MOST_SEQUENCES - 1)
    catch_up_s = step.cost.per_row_s + context * step.cost.kv_reread * step.cost.per_kv_token_s
    return DraftCost(0.0, one_s - per_row_s, per_row_s, per_sequence_s=catch_up_s)


def _check(name: str, target: str, spec: ModelSpec, settings: EngineSettings, prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """A draft must speak the target's token ids."""
    if name in HOST_DRAFTERS:
        host_drafter(name)
        return
    size = open_model(_settings_of(settings, name)).catalogue.spec.vocabulary_size
    if size != spec.vocabulary_size:
        raise ModelError(f"{name}: has a vocabulary of {size} tokens, {target} one of {spec.vocabulary_size}: no draft for it")
    theirs = load_tokenizer(name)
    if any(theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text, add_special_tokens=False) for text in prompts):
        raise ModelError(f"{name}: cuts text into other tokens than {target}: no draft for it")


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    try:
        text = tokenizer.render_chat([{"role": "user", "content": prompt}], {"add_generation_prompt": True})
    except InvalidRequest:
        return tokenizer.encode(prompt, add_special_tokens=True)[-PROMPT_TOKENS:]
    return tokenizer.encode(text, add_special_tokens=False)[-PROMPT_TOKENS:]


def _answers(engine: Engine, prompts: Sequence[tuple[int, ...]], *, depth: int, tokens: int) -> list[Answer]:
    """Greedy answers until there are enough tokens, several at a time; each leaves room for a draft after it."""
    answers: list[Answer] = []
    for start in range(0, len(prompts), MOST_SEQUENCES // 4):
        wave = prompts[start : start + MOST_SEQUENCES // 4]
        said: list[list[int]] = [[] for _ in wave]
        for index, prompt in enumerate(wave):
            room = engine.spec.context_tokens - len(prompt) - depth
            if prompt and room > 0:
                sampling = SamplingParams(max_tokens=min(ANSWER_TOKENS, room), temperature=0.0)
                engine.add(Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        while engine.has_work:
            for output in engine.step().outputs:
                said[int(output.request_id)].extend(output.token_ids)
        answers += [Answer(prompt, tuple(ids)) for prompt, ids in zip(wave, said, strict=True) if len(ids) > 1]
        if sum(len(answer.token_ids) for answer in answers) >= tokens:
            break
    return answers


def _settings_of(settings: EngineSettings, model: str) -> EngineSettings:
    """An engine with room for every kind of step, that drafts nothing."""
    replaced = {"kind": "native", "model": model, "served_name": None, "speculation": "off", "prefix_cache": True}
    room = {"max_batch": MOST_SEQUENCES, "max_step_tokens": MOST_ROWS, "kv_tokens": KV_TOKENS}
    return settings.model_copy(update=replaced | room)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints; exit code 2 and one line when the models do not go together or cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="a folder in Hugging Face format, or a hub id")
    parser.add_argument("--drafts", required=True, help=f"the same, or {' or '.join(HOST_DRAFTERS)}; several with commas between")
    parser.add_argument("--depth", type=int, default=8, help="the longest draft")
    parser.add_argument("--tokens", type=int, default=512, help="of the target's answers, about")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    parser.add_argument("--threads", type=int, default=1, help="compute threads")
    parsed = parser.parse_args(arguments)
    prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    try:
        settings = EngineSettings.model_validate({"dtype": parsed.dtype, "threads": parsed.threads})
        drafts = parsed.drafts.split(",")
        findings = measure(parsed.target, drafts, prompts, depth=parsed.depth, tokens=parsed.tokens, settings=settings)
    except (ValidationError, ModelError) as error:
        _tell(f"error: {' '.join(str(error).split())}")
        sys.exit(USAGE_ERROR)
    print(msgspec.json.encode(findings).decode())


if __name__ == "__main__":
    main()
