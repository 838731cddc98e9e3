"""From logits to tokens: the one law.

The token at output position t is argmax over x of log p_t(x) + G_t(x): p_t is the processed distribution (penalties, logit_bias,
min_tokens, temperature, top_k, top_p, min_p, in this order), G_t the keyed noise; temperature 0 drops the noise. The
normalizer of log p_t moves no argmax and no gap and is left out. All arithmetic is in float64 whatever the model computes in; of
equal scores the lowest id wins. Each row sees its own prefix, draft tokens before it included. Knows nothing of batches
and caches: a row's result depends on that row alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spotserve.core.request import SamplingParams, TokenLogprob
from spotserve.engine import kernels
from spotserve.engine.device import on_device
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
        scores = self._scores(raw, rows)
        chosen = scores.argmax(dim=-1)  # [rows]; the first of equals
        gaps = _gaps(scores, chosen, rows)
        logprobs = _logprobs(raw, chosen, rows)
        return [SampledToken(*choice) for choice in zip(chosen.tolist(), logprobs, gaps, strict=True)]

    def two_best(self, logits: torch.Tensor, rows: Sequence[SamplingRow] | None) -> list[tuple[int, float, int, float]]:
        """Per row of `logits` [rows, vocabulary] the token that `sample` chooses and the one that it would choose without that one,
        each with its share of exp(score) over all tokens: how sure the choice is. `rows` None: all are plainly greedy."""
        scores = logits.float() if rows is None else self._scores(logits.to(torch.float64), rows)
        best = scores.argmax(dim=-1, keepdim=True)  # [rows, 1]; the first of equals, which topk does not promise
        rest = scores.scatter(1, best, -torch.inf)
        second_best = rest.argmax(dim=-1, keepdim=True)
        values = torch.cat((scores.gather(1, best), rest.gather(1, second_best)), dim=1)  # [rows, 2]
        shares = (values - scores.logsumexp(dim=-1, keepdim=True)).exp()
        pairs = zip(torch.cat((best, second_best), dim=1).tolist(), shares.tolist(), strict=True)
        return [(first, share, second, second_share) for (first, second), (share, second_share) in pairs]

    def _scores(self, raw: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        """What the choice is the argmax of: log-probabilities but for the normalizer, processed, with noise; float64."""
        scores = raw.clone()
        for index, row in enumerate(rows):
            if row.adjusts_logits:
                _adjust(scores[index], row)
        _divide_by_temperature(scores, rows)
        _truncate(scores, rows)
        self._add_noise(scores, rows)
        return scores

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
        scores.index_add_(0, on_device(indices, scores.device), addend)


def _adjust(scores: torch.Tensor, row: SamplingRow) -> None:
    """Penalties, bias and ban of one row [vocabulary], in place."""
    sampling, device = row.sampling, scores.device
    if sampling.repetition_penalty != 1.0:
        seen = on_device(sorted({*row.prompt_token_ids, *row.output_token_ids}), device)
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counted = Counter(row.output_token_ids)
        counts = on_device(list(counted.values()), device, torch.float64)
        scores[on_device(list(counted), device)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        ids = on_device(list(sampling.logit_bias), device)
        scores[ids] += on_device(list(sampling.logit_bias.values()), device, torch.float64)
    if row.position < sampling.min_tokens and row.banned_token_ids:
        scores.index_fill_(0, on_device(row.banned_token_ids, device), -torch.inf)


def _divide_by_temperature(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    temperatures = [row.sampling.temperature or 1.0 for row in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        scores.div_(on_device(temperatures, scores.device, torch.float64)[:, None])


def _truncate(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """top_k, then top_p of what is left, then min_p; what falls becomes -inf. Only rows that ask for it are looked at."""
    cut = [index for index, row in enumerate(rows) if truncates(row.sampling)]
    if not cut:
        return
    device = scores.device
    at = on_device(cut, device)
    asked = [rows[index].sampling for index in cut]
    top_k = on_device([s.top_k for s in asked], device)[:, None]
    top_p = on_device([s.top_p for s in asked], device, torch.float64)[:, None]
    min_p = on_device([s.min_p for s in asked], device, torch.float64)[:, None]
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
        at = on_device(asked, scores.device)
        lead = scores[at, chosen[at]] - scores[at].scatter(1, chosen[at][:, None], -torch.inf).amax(dim=-1)
        for index, gap in zip(asked, lead.clamp(max=_MAX_GAP).tolist(), strict=True):
            gaps[index] = gap
    return gaps


def _logprobs(raw: torch.Tensor, chosen: torch.Tensor, rows: Sequence[SamplingRow]) -> list[TokenLogprob | None]:
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    asked = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if asked:
        at = on_device(asked, raw.device)
        log_p = raw[at].log_softmax(dim=-1)  # [asked, vocabulary]
        most = max(rows[index].sampling.logprobs or 0 for index in asked)
        values, ids = log_p.topk(min(most, log_p.shape[1]), dim=-1)
        of_chosen = log_p.gather(1, chosen[at][:, None])[:, 0].tolist()
        for index, logprob, top_ids, top_values in zip(asked, of_chosen, ids.tolist(), values.tolist(), strict=True):
            count = rows[index].sampling.logprobs
            logprobs[index] = TokenLogprob(logprob, tuple(zip(top_ids, top_values, strict=True))[:count])
    return logprobs
