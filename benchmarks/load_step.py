"""A load that jumps from one client to many and back: is the adaptive speculator ever slower than plain decoding on the way?

    OMP_NUM_THREADS=1 python benchmarks/load_step.py

The model that ships, one engine each for plain decoding and for the adaptive speculator, which keeps what it has learned. In every
round both answer the same prompts, which are new, all submitted at once. Ratios are plain time over adaptive time of all rounds
together; the first rounds after each jump are shown by themselves.
"""

import argparse
import itertools
import json

from spotserve.bench.speculation import PROMPT_TOKENS, Bench, cut_into_prompts
from spotserve.config import EngineSettings
from spotserve.demo.kinds import texts_by_kind
from spotserve.engine.bring_up import load_alone
from spotserve.gateway.tokenizer import load_tokenizer

LOADS = (1, 64, 1)
FIRST_ROUNDS = {1: 4, 64: 1}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="with 64 clients; with one there are six times as many")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    room = 64 * (PROMPT_TOKENS + arguments.new_tokens + 48)
    settings = EngineSettings(max_batch=64, max_step_tokens=1024, kv_tokens=room, prefix_cache=False)
    model, tokenizer = load_alone(settings), load_tokenizer(settings.model)
    rows = []
    for kind, texts in texts_by_kind().items():
        prompts = cut_into_prompts(kind, [tokenizer.encode(text, add_special_tokens=False) for text in texts])
        bench = Bench(model, ("off", "adaptive"), settings)
        for load in LOADS:
            pairs = []
            for _ in range(arguments.rounds * (6 if load == 1 else 1)):
                wave = list(itertools.islice(prompts, load))
                taken_s = bench.round(wave, new_tokens=arguments.new_tokens, temperature=0.0)
                pairs.append((taken_s["off"], taken_s["adaptive"]))
            first = pairs[: FIRST_ROUNDS[load]]
            ratios = [sum(plain for plain, _ in some) / sum(adaptive for _, adaptive in some) for some in (first, pairs)]
            rows.append({"kind": kind, "clients": load, "first_rounds": ratios[0], "all_rounds": ratios[1]})
            if not arguments.json:
                print(f"{kind:<15} {load:>3} clients: first rounds {ratios[0]:.2f} x, all rounds {ratios[1]:.2f} x", flush=True)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
