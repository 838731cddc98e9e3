"""One forward pass over the rows of a step.

`LibraryForward` calls the library's model as it is: it serves every architecture whose attention can be replaced, and is
the measure of any faster way.
"""

from typing import Protocol

import torch

from spotserve.engine.batch import StepRows
from spotserve.engine.weights import LoadedModel


class Forward(Protocol):
    """Computes a step."""

    def __call__(self, rows: StepRows, logit_rows: torch.Tensor) -> torch.Tensor:
        """Logits [logit rows, vocabulary] of the rows that `logit_rows` names; stores every row's keys and values."""
        ...


class LibraryForward:
    """The library's own forward pass."""

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module

    def __call__(self, rows: StepRows, logit_rows: torch.Tensor) -> torch.Tensor:
        """See `Forward`."""
        output = self._module(
            input_ids=rows.token_ids[None],
            position_ids=rows.positions[None],
            logits_to_keep=logit_rows,
            use_cache=False,
            paged=rows.paged,
        )
        logits: torch.Tensor = output.logits[0]
        return logits
