"""How long slices of prompts are over several stages: the planner's choice, by costs that the replica's own steps teach."""

from spotserve.planner.chunks import SliceCost, SliceCostFit, choose_chunk

_PRIOR = SliceCost(constant_s=2e-3, token_s=5e-5, pair_s=1e-8)
"""A small model on a processor core; a dozen steps replace it."""


class PrefillChunks:
    """See `engine.ChunkChooser`. Used by the engine's thread."""

    def __init__(self, *, num_stages: int, max_tokens: int) -> None:
        """`max_tokens`: what a step may have at most."""
        self._num_stages = num_stages
        self._max_tokens = max_tokens
        self._fit = SliceCostFit(_PRIOR)

    def choose(self, start: int, position: int, end: int) -> int:
        """See `ChunkChooser.choose`."""
        return choose_chunk(
            self._fit.cost, num_stages=self._num_stages, start=start, position=position, end=end, max_tokens=self._max_tokens
        )

    def observe(self, *, tokens: int, pairs: float, seconds: float) -> None:
        """See `ChunkChooser.observe`."""
        self._fit.observe(tokens=tokens, pairs=pairs, seconds=seconds)
