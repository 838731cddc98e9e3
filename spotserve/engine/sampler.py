"""From logits to tokens: the one law.

The token at output position t is argmax over x of log p_t(x) + G_t(x): p_t is the processed distribution (penalties, logit_bias,
min_tokens, temperature, top_k, top_p, min_p, in this order), G_t the keyed noise; temperature 0 drops the noise. The
normalizer of log p_t moves no argmax and no gap and is left out. All arithmetic is in float64 whatever the model computes in; of
equal scores the lowest id wins. Each row sees its own prefix, draft tokens before it included. Knows nothing of batches
and caches: a row's result depends on that row alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spotserve.core.request import SamplingParams, TokenLogprob
from spotserve.engine import kernels
from spotserve.engine.noise import KeyedGumbel

_MAX_GAP = 1e9
"""Stands for the lead over nothing (a single token left), which has no finite value."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and what its choice depends on."""

    sampling: SamplingParams
    position: int
    """Output position of the token to be chosen."""
    prompt_token_ids: Sequence[int] = ()
    """Needed by the repetition penalty alone."""
    output_token_ids: Sequence[int] = ()
    """Output before this row's token, draft tokens on the way to it included; needed by penalties alone."""
    banned_token_ids: Sequence[int] = ()
    """Not before `min_tokens`."""

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything but temperature and truncation changes its logits."""
        s = self.sampling
        bans = self.position < s.min_tokens and len(self.banned_token_ids) > 0
        return bool(bans or s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The choice for one row; `logprob` and `gap` when the request asked for them."""

    token_id: int
    logprob: TokenLogprob | None = None
    gap: float | None = None


def truncates(sampling: SamplingParams) -> bool:
    """Whether part of the distribution is cut off (greedy choice is above every cut)."""
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def penalizes(sampling: SamplingParams) -> bool:
    """Whether a choice depends on the tokens before it by more than the logits."""
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def is_plain_greedy(sampling: SamplingParams) -> bool:
    """Whether every choice is the argmax of the raw logits and nothing else was asked."""
    return (
        sampling.temperature == 0
        and not (sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty)
        and sampling.repetition_penalty == 1.0
        and sampling.min_tokens == 0
        and sampling.logprobs is None
        and not sampling.gaps
    )


class Sampler:
    """Chooses tokens for one vocabulary."""

    def __init__(self, *, vocabulary_size: int, device: torch.device) -> None:
        self._noise = KeyedGumbel(vocabulary_size=vocabulary_size, device=device)

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token per row of `logits` [rows, vocabulary]."""
        assert logits.shape[0] == len(rows)
        if all(is_plain_greedy(row.sampling) for row in rows):
            return [SampledToken(token_id) for token_id in greedy(logits)]
        raw = logits.to(torch.float64)
        scores = raw.clone()
        for scores_row, row in zip(scores, rows, strict=True):
            if row.adjusts_logits:
                _adjust(scores_row, row)
        _divide_by_temperature(scores, rows)
        _truncate(scores, rows)
        self._add_noise(scores, rows)
        chosen = scores.argmax(dim=-1)  # [rows]; the first of equals
        gaps = _gaps(scores, chosen, rows)
        logprobs = _logprobs(raw, chosen, rows)
        return [SampledToken(*choice) for choice in zip(chosen.tolist(), logprobs, gaps, strict=True)]

    def _add_noise(self, scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        noisy = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
        if noisy:
            noise = self._noise.draw(seeds=[rows[i].sampling.seed for i in noisy], positions=[rows[i].position for i in noisy])
            _add_to_rows(scores, noisy, noise)


def greedy(logits: torch.Tensor) -> list[int]:
    """The lowest of each row's most probable ids."""
    if kernels.serves(logits):
        chosen = torch.empty(logits.shape[0], dtype=torch.int64)
        kernels.greatest(kernels.as_array(logits), chosen.numpy())
    else:
        chosen = logits.argmax(dim=-1)
    token_ids: list[int] = chosen.tolist()
    return token_ids


def _add_to_rows(scores: torch.Tensor, indices: list[int], addend: torch.Tensor) -> None:
    if len(indices) == scores.shape[0]:
        scores.add_(addend)
    else:
        scores.index_add_(0, torch.tensor(indices, device=scores.device), addend)


def _adjust(scores: torch.Tensor, row: SamplingRow) -> None:
    """Penalties, bias and ban of one row [vocabulary], in place."""
    sampling, output = row.sampling, torch.tensor(row.output_token_ids, dtype=torch.int64, device=scores.device)
    if sampling.repetition_penalty != 1.0:
        prompt = torch.tensor(row.prompt_token_ids, dtype=torch.int64, device=scores.device)
        seen = torch.cat((prompt, output)).unique()
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        seen, counts = output.unique(return_counts=True)
        scores[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(torch.float64)
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64, device=scores.device)
    if row.position < sampling.min_tokens and row.banned_token_ids:
        scores[torch.tensor(row.banned_token_ids, device=scores.device)] = -torch.inf


def _divide_by_temperature(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    temperatures = [row.sampling.temperature or 1.0 for row in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        scores.div_(torch.tensor(temperatures, dtype=torch.float64, device=scores.device)[:, None])


def _truncate(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """top_k, then top_p of what is left, then min_p; what falls becomes -inf. Only rows that ask for it are looked at."""
    cut = [index for index, row in enumerate(rows) if truncates(row.sampling)]
    if not cut:
        return
    device = scores.device
    at = torch.tensor(cut, device=device)
    asked = [rows[index].sampling for index in cut]
    top_k = torch.tensor([s.top_k for s in asked], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in asked], dtype=torch.float64, device=device)[:, None]
    min_p = torch.tensor([s.min_p for s in asked], dtype=torch.float64, device=device)[:, None]
    if device.type == "cpu":
        part = scores[at]
        weights = (part - part.amax(dim=-1, keepdim=True)).exp_()
        kernels.keep_likely(*(tensor.numpy() for tensor in (part, weights, top_k[:, 0], top_p[:, 0], min_p[:, 0])))
        scores[at] = part
    else:
        scores[at] = _keep_likely(scores[at], top_k, top_p, min_p)


def _keep_likely(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """`kernels.keep_likely` by sorting whole rows; scores [rows, vocabulary], the others [rows, 1]."""
    top_k = torch.where(top_k > 0, top_k, scores.shape[1])
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(scores.shape[1], device=scores.device) >= top_k, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # A token stays while those before it fall short of top_p; the first one always does.
    fallen = ((before >= top_p) & (top_p < 1.0)) | (probabilities < min_p * probabilities[:, :1])
    fallen[:, 0] = False
    ordered.masked_fill_(fallen, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, order, ordered)


def _gaps(scores: torch.Tensor, chosen: torch.Tensor, rows: Sequence[SamplingRow]) -> list[float | None]:
    gaps: list[float | None] = [None] * len(rows)
    asked = [index for index, row in enumerate(rows) if row.sampling.gaps]
    if asked:
        at = torch.tensor(asked, device=scores.device)
        lead = scores[at, chosen[at]] - scores[at].scatter(1, chosen[at][:, None], -torch.inf).amax(dim=-1)
        for index, gap in zip(asked, lead.clamp(max=_MAX_GAP).tolist(), strict=True):
            gaps[index] = gap
    return gaps


def _logprobs(raw: torch.Tensor, chosen: torch.Tensor, rows: Sequence[SamplingRow]) -> list[TokenLogprob | None]:
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    asked = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if asked:
        at = torch.tensor(asked, device=raw.device)
        log_p = raw[at].log_softmax(dim=-1)  # [asked, vocabulary]
        most = max(rows[index].sampling.logprobs or 0 for index in asked)
        values, ids = log_p.topk(min(most, log_p.shape[1]), dim=-1)
        of_chosen = log_p.gather(1, chosen[at][:, None])[:, 0].tolist()
        for index, logprob, top_ids, top_values in zip(asked, of_chosen, ids.tolist(), values.tolist(), strict=True):
            count = rows[index].sampling.logprobs
            logprobs[index] = TokenLogprob(logprob, tuple(zip(top_ids, top_values, strict=True))[:count])
    return logprobs
