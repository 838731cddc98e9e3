"""ctranslate2, in the interpreter of an environment that has it; one static batch. `--further` names the converted model."""

import json
from time import perf_counter

from loop import Round, TokenTimes, answer_rounds, peer_arguments


def start() -> tuple[str, Round]:
    """Loads a model that `bench_engine.py` converted."""
    import ctranslate2

    arguments = peer_arguments()
    further = json.loads(arguments.further)
    generator = ctranslate2.Generator(
        further["converted"], device="cpu", compute_type=arguments.dtype, inter_threads=1, intra_threads=arguments.threads
    )
    tokens: list[str] = further["vocabulary"]

    def run(prompts: list[list[int]], new_tokens: int) -> TokenTimes:
        times: TokenTimes = [[] for _ in prompts]
        started_s = perf_counter()

        def note(step: "ctranslate2.GenerationStepResult") -> bool:
            times[step.batch_id].append(perf_counter() - started_s)
            return False

        generator.generate_batch(
            [[tokens[token_id] for token_id in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=note,
        )
        return times

    return ctranslate2.__version__, run


if __name__ == "__main__":
    answer_rounds(start)
