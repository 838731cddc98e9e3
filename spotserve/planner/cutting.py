"""Where the stages of a replica are cut: by what layers and head take in a step under full load, rather than by their bytes.

`core.cut.stage_cuts` knows bytes alone, which is what a step costs as long as it does little else than read weights. Reading KV,
overheads and sums over shards belong to layers and not to the head, computing logits to the head and not to layers. Where that
makes a difference the slowest stage is faster when it is cut by time.
"""

from functools import lru_cache

from spotserve.core.cut import held_bytes, stage_cuts
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.planner.memory import STEP_TOKENS, USABLE_SHARE, activation_bytes, kv_tokens
from spotserve.planner.shards import head_cost, layer_cost, share_held
from spotserve.planner.stages import Stage, best_cut, welded

WORTH_SHARE = 0.02
"""Of the slowest stage's time that another cut must save: less is within the error of the times."""


@lru_cache(maxsize=1024)
def cut_by_time(
    model: ModelSpec, parallel: Parallel, hardware: InstanceType, *, context_tokens: float, step_tokens: int = STEP_TOKENS
) -> Parallel:
    """The same shape with `stage_layers` of the cut whose slowest stage is fastest; the shape itself where that saves too little.

    The KV cache holds no fewer tokens than with the usual cut.

    Args:
        model: what is served.
        parallel: the shape, cut as usual.
        hardware: machines that it goes to.
        context_tokens: of a typical sequence.
        step_tokens: the largest step, whose activations must fit.
    """
    room = kv_tokens(model, parallel, hardware.device, step_tokens)
    if parallel.pipeline == 1 or isinstance(room, str):
        return parallel
    sequences = max(1.0, min(float(parallel.max_batch), room / context_tokens) / parallel.pipeline)
    kv = sequences * context_tokens
    layer_s = layer_cost(model, parallel.tensor, hardware).seconds(sequences, kv, kv)
    head_s = head_cost(model, parallel.tensor, hardware).seconds(sequences)
    times = welded(layer_s, model.num_layers, embedding=0.0, head=head_s)
    kv_bytes = 2 * model.num_kv_heads * share_held(model.num_kv_heads, parallel.tensor) * model.head_size * model.value_bytes
    each, embedding, head = (held_bytes(part, parallel.tensor, 0) for part in (model.layer, model.embedding, model.head))
    held = welded(each + room * kv_bytes, model.num_layers, embedding=embedding, head=head)
    budget = int(USABLE_SHARE * hardware.device.memory_bytes) - activation_bytes(model, parallel, step_tokens)
    best = best_cut([Stage(times, 0.0, budget)] * parallel.pipeline, held)
    usual_s = max(sum(times[layers.start : layers.stop]) for layers in stage_cuts(model, parallel.pipeline))
    if best is None or best.slowest_s > (1 - WORTH_SHARE) * usual_s:
        return parallel
    return Parallel(pipeline=parallel.pipeline, tensor=parallel.tensor, max_batch=parallel.max_batch, stage_layers=best.sizes)
