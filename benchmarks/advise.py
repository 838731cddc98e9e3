"""How far the predictions of `spotserve advise` are from what an engine does with the same drafter, lengths and loads.

    OMP_NUM_THREADS=1 python benchmarks/advise.py [--json]

The model that ships answers 16 prompts (64 of them at the largest load), greedily, 64 tokens each, with prompt lookup of a fixed
length and without; only steps in which everybody decodes are counted. The best of three rounds each, in turn. Predicted from a
measurement in the same process.
"""

import argparse
import json
import statistics
from collections.abc import Sequence

from spotserve.bench.advise import ANSWER_TOKENS, measure
from spotserve.cli.advise import default_prompts
from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.engine import Engine
from spotserve.gateway.tokenizer import load_tokenizer
from spotserve.speculation.advice import advice_for

LOADS = (1, 4, 16, 64)
LENGTHS = (1, 2, 3, 5, 8)
NUM_PROMPTS = 16
ROUNDS = 3


def decoded_per_s(engine: Engine, prompts: Sequence[tuple[int, ...]], load: int) -> float:
    """Output tokens per second of a load, while all of it decodes."""
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    tokens, seconds = 0, 0.0
    for start in range(0, len(prompts), load):
        wave = prompts[start : start + load]
        for index, prompt in enumerate(wave):
            engine.add(Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        while engine.has_work:
            result = engine.step()
            if result.num_prefill_tokens == 0 and engine.num_running == len(wave):
                tokens += sum(len(output.token_ids) for output in result.outputs)
                seconds += result.step_s
    return tokens / seconds


def main() -> None:
    """Measures, predicts, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    texts = default_prompts()[:NUM_PROMPTS]
    findings = measure(str(DEMO_MODEL), ["ngram"], texts, depth=max(LENGTHS), tokens=10_000, settings=EngineSettings())
    predicted = advice_for(findings, loads=LOADS, lengths=LENGTHS).drafts[0].loads
    tokenizer = load_tokenizer(str(DEMO_MODEL))
    rendered = [tokenizer.render_chat([{"role": "user", "content": text}], {"add_generation_prompt": True}) for text in texts]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
    room = {"max_batch": max(LOADS), "max_step_tokens": 1024}
    engines = {k: lone_engine(EngineSettings(speculation=f"ngram:{k}" if k else "off", **room)) for k in (0, *LENGTHS)}
    rows = []
    for load, prediction in zip(LOADS, predicted, strict=True):
        asked = prompts * max(1, load // NUM_PROMPTS)
        rounds = [{length: decoded_per_s(engine, asked, load) for length, engine in engines.items()} for _ in range(ROUNDS)]
        real = {length: max(each[length] for each in rounds) for length in engines}
        for length in LENGTHS:
            gains = prediction.tokens_per_s[length] / prediction.tokens_per_s[0], real[length] / real[0]
            rows.append({"clients": load, "length": length, "predicted": gains[0], "real": gains[1], "tokens_per_s": real[length]})
    errors = [abs(row["predicted"] / row["real"] - 1) for row in rows]
    if arguments.json:
        print(json.dumps({"rows": rows, "mean_error": statistics.fmean(errors), "largest_error": max(errors)}))
        return
    for row in rows:
        print("{clients:>3} clients, {length} drafted: {predicted:.2f} x predicted, {real:.2f} x real".format(**row))
    print(f"off by {statistics.fmean(errors):.1%} on average, {max(errors):.0%} at most")


if __name__ == "__main__":
    main()
