"""Steps of a GPU that are recorded once and then started in one call.

A step of a stage is hundreds of calls, each of which costs the processor some microseconds: more than the GPU needs for it, unless
the model or the batch is large. What the calls are follows from the shape of the step alone (how many rows, how many keys they
read); what differs between steps of one shape are the numbers that they come with. A shape that comes up again is recorded, its
numbers in memory of its own, and from then on a step of it is a transfer of the numbers and one call, which runs the same kernels.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spotserve.engine.attention import KvCache
from spotserve.engine.batch import StepLayout, round_up
from spotserve.engine.device import apart, packed
from spotserve.engine.stage import Stage

MOST_GRAPHS = 256
"""Kept, the last used ones: each holds some megabytes of the GPU's memory."""
_SHAPES_IN_MIND = 256

_Shape = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A step of one shape."""

    graph: Any
    numbers: torch.Tensor
    """What it reads in place of a step's arrays."""
    logits: torch.Tensor
    """What it writes; valid until the next step."""
    scratch: torch.Tensor
    """Memory that it uses and the cache may have replaced since."""


class RecordedSteps:
    """A stage that is alone (a whole model, one shard) and queues all of its work without waiting; used by one thread."""

    def __init__(self, stage: Stage, cache: KvCache) -> None:
        self._stage = stage
        self._cache = cache
        self._beside = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # steps follow each other, so they may all use the same memory
        self._recorded: OrderedDict[_Shape, _Recorded] = OrderedDict()
        self._seen: deque[_Shape] = deque(maxlen=_SHAPES_IN_MIND)

    def logits(self, layout: StepLayout, logit_rows: Sequence[int]) -> torch.Tensor:
        """The stage's logits [logit_rows, vocabulary], valid until the next call."""
        wanted = len(logit_rows)
        padding = round_up(wanted) - wanted  # as rows are padded: then shapes are few
        return self._logits(layout.for_gpu(), [*logit_rows, *(list(logit_rows[-1:]) * padding)])[:wanted]

    def _logits(self, layout: StepLayout, logit_rows: Sequence[int]) -> torch.Tensor:
        arrays = layout.arrays(logit_rows)
        numbers = packed(arrays)
        shape = _shape(layout, len(logit_rows))
        recorded = self._recorded.get(shape)
        if recorded is None and shape not in self._seen:  # it may never come again; what it needs once, later ones find ready
            self._seen.append(shape)
            rows = layout.rows(self._cache, apart(numbers.to(self._cache.device, non_blocking=True), arrays))
            return self._stage(rows, None, rows.logit_rows)
        if recorded is None:
            recorded = self._recorded[shape] = self._record(layout, arrays)
            if len(self._recorded) > MOST_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(shape)
        recorded.numbers.copy_(numbers, non_blocking=True)
        recorded.graph.replay()
        return recorded.logits

    def _record(self, layout: StepLayout, arrays: Sequence[np.ndarray]) -> _Recorded:
        """Takes down what a step of this shape does; nothing is computed meanwhile."""
        numbers = torch.zeros(sum(array.size for array in arrays), dtype=torch.int64, device=self._cache.device)
        rows = layout.rows(self._cache, apart(numbers, arrays))
        graph = torch.cuda.CUDAGraph()
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads read KV meanwhile
            try:
                logits = self._stage(rows, None, rows.logit_rows)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._beside)
        return _Recorded(graph, numbers, logits, self._cache.scratch)


def _shape(layout: StepLayout, wanted: int) -> _Shape:
    """What the calls of a step follow from."""
    groups = tuple(
        (group.start, group.end, group.by_slot, group.num_keys, *(array.shape for array in group.arrays)) for group in layout.groups
    )
    return (len(layout.token_ids), wanted, groups)
