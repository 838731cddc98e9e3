"""One kind of replica under one mix of requests: what tokens, prompts and slots take of its time.

`ReplicaSpeed` answers for one number of sequences at a time; here it is asked some fifty times, whatever the batch limit, and the
rest is interpolated. Between two queries nothing may happen that a planner should know of: times are smooth, but for the kink
where reading weights ceases to be the bottleneck.

Pure. Knows a replica and lengths; no arrivals, no other replicas.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np

from spotserve.planner.sample import Floats, Sample
from spotserve.planner.speed import ReplicaSpeed

_NUM_KNOTS = 20
_EVICTED = 0.6
"""Where the KV cache is always full, sequences that grow evict others, whose prompts are computed again: so many per request, times
its decoded tokens over those of its prompt. Seen in simulation: 0.5 to 0.8 at ratios from 0.2 to 0.4."""


@dataclass(frozen=True, slots=True, eq=False)
class Pace:
    """What a replica does with a mix of requests."""

    max_batch: int
    """By which the router weighs its load."""
    slots: float
    """Sequences that run at once: the batch limit or, where that is less, as many as the KV cache holds on average."""
    slots_std: float
    """By how much their number varies with what the sequences hold; 0 where the batch limit binds."""
    running: Floats
    """Numbers of sequences (K,), ascending, from 1 to `slots`."""
    iterations_s: Floats
    """Time of an iteration when so many run (K,)."""
    others_s: float
    """What the prompts of others add to an iteration when all slots are taken: one each per turn."""
    context_s: float
    """By how much an iteration grows per token of context, when all slots are taken."""
    prompt_s: Floats
    """For how long each prompt of the sample stops everybody else (N,)."""
    first_token_s: Floats
    """Until each prompt of the sample is through (N,)."""
    prompt_mean_s: float
    prompt_var: float
    """Variance of `prompt_s`, s^2."""
    first_token_mean_s: float
    is_pipeline: bool
    """Whether a prompt has stages to pass when others need no longer wait for it."""
    decoded_mean: float
    """Tokens of a request after its first."""
    service_cv2: float
    """Squared coefficient of variation of the time for which a request has a slot, when all are taken."""
    capacity_rps: float
    """Requests per second when all slots are always taken."""


@lru_cache(maxsize=512)
def pace(speed: ReplicaSpeed, requests: Sample) -> Pace:
    """How a replica of this speed does with these requests. A request must take time."""
    slots, slots_std = _slots(speed, requests)
    running = np.unique(np.concatenate((np.geomspace(1.0, slots, _NUM_KNOTS), np.arange(1.0, min(slots, 4.0) + 0.5))))
    iterations_s = np.array([speed.token_s(count, count * requests.context_mean) for count in running.tolist()])
    longest_s = float(iterations_s[-1])
    prompt_s = _of_prompts(requests, speed.prompt_s)
    first_token_s = _of_prompts(requests, speed.first_token_s)
    prompt_mean_s, decoded_mean = float(prompt_s.mean()), requests.decoded_mean
    again = 1 + _EVICTED * min(1.0, decoded_mean / float(requests.prompt.mean())) if slots_std > 0 else 1.0
    turn_s = decoded_mean * longest_s + slots * prompt_mean_s * again
    assert turn_s > 0, "a request takes time"
    others_s = (slots - 1) * prompt_mean_s * again / decoded_mean if decoded_mean > 0 else 0.0
    taken_s = prompt_s + requests.decoded * (longest_s + others_s)
    more = 1.02 * slots * requests.context_mean
    return Pace(
        max_batch=speed.max_batch,
        slots=slots,
        slots_std=slots_std,
        running=running,
        iterations_s=iterations_s,
        others_s=others_s,
        context_s=(speed.token_s(slots, more) - longest_s) / (more - slots * requests.context_mean),
        prompt_s=prompt_s,
        first_token_s=first_token_s,
        prompt_mean_s=prompt_mean_s,
        prompt_var=float(prompt_s.var()),
        first_token_mean_s=float(first_token_s.mean()),
        is_pipeline=bool((first_token_s > 1.001 * prompt_s).any()),
        decoded_mean=decoded_mean,
        service_cv2=float(taken_s.var()) / max(float(taken_s.mean()) ** 2, 1e-300),
        capacity_rps=slots / turn_s,
    )


def _slots(speed: ReplicaSpeed, requests: Sample) -> tuple[float, float]:
    """Sequences that run at once, and the standard deviation of their number.

    Memory: as many contexts as fill the cache, less the prompt at the head of the queue that does not fit any more. The number that
    fits varies as the number of renewals in a time does.
    """
    fitting = (speed.kv_tokens - requests.prompt_residual) / requests.context_mean
    if fitting >= speed.max_batch:
        return float(speed.max_batch), 0.0
    slots = max(1.0, fitting)
    return slots, sqrt(slots * requests.context_var) / requests.context_mean + 1e-6


def _of_prompts(requests: Sample, seconds: Callable[[float], float]) -> Floats:
    """Times of all prompts of the sample, from those of a few (N,)."""
    times_s = [seconds(tokens) for tokens in requests.prompt_knots.tolist()]
    return np.asarray(np.interp(requests.prompt, requests.prompt_knots, times_s))
