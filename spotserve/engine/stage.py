"""One rank's part of the forward pass."""

from typing import Protocol

import torch

from spotserve.engine.batch import StepRows


class Stage(Protocol):
    """Computes the layers of one `StageSlice` on one shard; holds their weights."""

    def __call__(self, rows: StepRows, hidden: torch.Tensor | None, logit_rows: torch.Tensor | None) -> torch.Tensor:
        """Computes the rows of a step and stores their keys and values of these layers and heads.

        Args:
            rows: the step; its KV cache is this rank's.
            hidden: [rows, hidden size] from the stage before; None on the first stage, which starts from the token ids.
            logit_rows: [wanted] indices of the rows whose logits are wanted; None on every stage but the last.

        Returns:
            [rows, hidden size] for the next stage; on the last stage the logits [wanted, vocabulary], whole on every shard.

        Raises:
            PeerLost: another shard of the stage is gone.
        """
        ...
