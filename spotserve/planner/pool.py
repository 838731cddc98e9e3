"""What requests meet on replicas that share a router: the pieces of `pace` and `occupancy` put together.

A request waits for a slot, for the iteration that is on its way, and for prompts before its own; then its own prompt; then its
tokens come at the pace of as many sequences as there are, slowed down by the prompts of others. How many there are is drawn from
what it finds. Over an answer that takes longer than the occupancy remembers this evens out, and the spread shrinks.

While slots are free, prompts come as requests arrive; when all are taken, as requests leave: then each turn of a slot sees one
prompt of each of the others. A router that takes the emptiest replica keeps prompts away from those who are decoding elsewhere.

Pure. Knows nothing of limits and choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from spotserve.planner.occupancy import MIN_Z, NO_WAIT, Occupancy, Wait, occupancy, queue
from spotserve.planner.pace import Pace
from spotserve.planner.sample import BOUNDARY, CONTEXT, OCCUPANCY, PROMPT_WAIT, STALL, Floats, Sample

_MAX_CELLS = 512
_TINY = 1e-12
_AVOIDED = 0.7
"""Of the arrivals that would find a prompt so long that many sequences pile up behind it, those that the router sends elsewhere.
Fitted to simulations of eight replicas with prompts of 0.04 to 1 s."""


@dataclass(frozen=True, slots=True)
class Member:
    """Replicas of one kind, in a pool."""

    pace: Pace
    count: int

    @property
    def capacity_rps(self) -> float:
        """Of all of them."""
        return self.count * self.pace.capacity_rps


@dataclass(frozen=True, slots=True, eq=False)
class Met:
    """What the requests that go to one kind of replica meet. Sums over kinds are means over requests."""

    weights: Floats
    """Share of such a request that goes here (N,)."""
    ttft_s: Floats
    decode_s: Floats
    """From the first token to the last (N,)."""
    ttft_sum_s: float
    tpot_sum_s: float
    e2e_sum_s: float


@dataclass(frozen=True, slots=True)
class _Load:
    """One replica of a kind under its share of the arrivals."""

    pace: Pace
    count: int
    """Replicas that are alike."""
    weight: float
    """Of the sequences in the pool, the share that the router gives it."""
    rate_rps: float
    gap_cv2: float
    prompt_load: float
    """Share of its time that prompts take."""
    prompt_wait: Wait
    """For prompts before one's own, when a slot is free."""

    def backlog_s(self, decoded: Floats, waited_s: Floats | float, prompt_s: Floats | float) -> Floats:
        """Prompts that came while one's own waited and was computed, and that are computed before one's last token.

        Prompts that wait are computed together between two iterations. Of those together with one's own as many come after it as
        before; those that came meanwhile make the next batch, after the next token, and so on, shorter by the load each time.
        """
        load = self.prompt_load
        residual_s = waited_s / (1 + load)
        batches = load / (1 - load) * (1 - load ** np.maximum(decoded - 1, 0.0))
        return np.where(decoded > 0, load * residual_s + batches * (prompt_s + 2 * load * residual_s), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """One replica of a kind as an arrival makes it that finds the pool in each cell of its occupancy: arrays (L + 1,)."""

    full: Floats
    """Probability that all its slots are taken: 0 or 1, but where memory says how many there are."""
    shares_iteration: Floats
    """Probability that an iteration is on its way, and there is a slot."""
    disturbed: Floats
    """Of its share of the arrivals, those that come while it is in this state and has a slot."""
    late_s: Floats
    """Wait for a slot of this replica while others have some."""
    running: Floats
    """Sequences that decode."""
    iteration_s: Floats
    token_s: Floats
    """Between two tokens, prompts of others included."""
    boundary_s: Floats
    """The longest wait for the end of an iteration."""
    departures_rps: Floats
    """Of all replicas of the kind."""
    z: Floats
    """Half the variance per request of what comes and goes; see `occupancy`."""


def meet(members: Sequence[Member], requests: Sample, *, rate_rps: float, gap_cv2: float) -> list[Met]:
    """What requests meet that arrive at `rate_rps`, which is above 0 and below the capacity of all members."""
    capacity_rps = sum(member.capacity_rps for member in members)
    total = sum(member.count * member.pace.max_batch for member in members)
    loads = [
        _load(each, each.pace.max_batch / total, rate_rps * each.pace.capacity_rps / capacity_rps, gap_cv2) for each in members
    ]
    fullest = max((load.pace.slots + 2 * load.pace.slots_std) / load.weight for load in loads)
    seats = max(1, int(fullest + 1e-9))
    num_cells = min(seats, _MAX_CELLS)
    step = seats / num_cells
    with_one = np.append(np.minimum(np.arange(num_cells) * step + (step + 1) / 2, fullest), fullest)
    views = [_view(load, with_one, requests, gap_cv2) for load in loads]
    departures = np.sum([view.departures_rps for view in views], axis=0)
    beyond = queue(
        rate_rps / capacity_rps,
        capacity_rps,
        gap_cv2=gap_cv2,
        service_cv2=sum(member.capacity_rps * member.pace.service_cv2 for member in members) / capacity_rps,
        servers=sum(member.count * member.pace.slots for member in members),
    )
    z = np.sum([view.z * (member.capacity_rps / capacity_rps) for view, member in zip(views, members, strict=True)], axis=0)
    found = occupancy(departures, np.maximum(z, MIN_Z), rate_rps=rate_rps, step=step, seats=seats, beyond=beyond)
    cells = np.searchsorted(np.cumsum(found.shares[:-1]), OCCUPANCY)
    return [
        _met(load, view, requests, found, view.departures_rps / departures, cells, capacity_rps)
        for load, view in zip(loads, views, strict=True)
    ]


def _load(member: Member, weight: float, rate_rps: float, gap_cv2: float) -> _Load:
    """A replica of several has smoother arrivals than the pool, and seldom gets one while it computes a long prompt.

    Those who do not leave during the prompt make it look full, the longer the more, and the router takes one without a prompt.
    """
    pace = member.pace
    prompt_load = rate_rps * pace.prompt_mean_s
    seen_prompt_s = pace.prompt_mean_s + pace.prompt_var / max(pace.prompt_mean_s, _TINY)  # of the one that an arrival finds
    piled_up = rate_rps / (1 - prompt_load) * seen_prompt_s
    avoided = _AVOIDED * piled_up / (1 + piled_up)
    in_turn = gap_cv2 / member.count  # bursts are dealt out; which replica is emptiest is chance
    own_gap_cv2 = in_turn + min(1.0, gap_cv2) * (1 - 1 / member.count) * (1 - avoided) / 2
    wait = NO_WAIT
    if pace.slots > 1 and prompt_load > 0:
        prompt_cv2 = pace.prompt_var / pace.prompt_mean_s**2
        wait = queue(prompt_load, 1 / pace.prompt_mean_s, gap_cv2=own_gap_cv2, service_cv2=prompt_cv2)
        wait = Wait(wait.probability * (1 - avoided * (1 - prompt_load ** (member.count - 1))), wait.mean_s)
    return _Load(pace, member.count, weight, rate_rps, own_gap_cv2, prompt_load, wait)


def _view(load: _Load, with_one: Floats, requests: Sample, gap_cv2: float) -> _View:
    """`with_one`: sequences in the pool with the one that arrives (L + 1,)."""
    pace = load.pace
    on_each = with_one * load.weight
    full, excess = _beyond_slots(pace, on_each)
    shares_iteration = (1 - full) * ((with_one - 1) * load.weight >= 1 - 1e-9)
    running = full * pace.slots + (1 - full) * _decoding(load, on_each)
    iteration_s = np.interp(running, pace.running, pace.iterations_s)
    disturbed = np.maximum(0.0, 1 - (1 - 1 / load.count) / on_each)
    prompts = load.prompt_load * disturbed
    queued = full if pace.slots_std == 0 else np.minimum(full, excess)  # a full cache is no queue yet
    token_s = queued * (iteration_s + pace.others_s) + (1 - queued) * iteration_s / (1 - prompts)
    alone_rps = np.sqrt(running / np.maximum(pace.decoded_mean * iteration_s, _TINY) * (load.rate_rps / (1 - load.prompt_load)))
    stay_s = pace.first_token_mean_s + load.prompt_wait.probability * load.prompt_wait.mean_s + pace.decoded_mean * token_s
    decoding = np.minimum(1.0, on_each * pace.decoded_mean * token_s / np.maximum(stay_s, _TINY))  # whether anyone is
    leaving_rps = queued * pace.capacity_rps + (1 - queued) * np.minimum(on_each, pace.slots) / np.maximum(stay_s, _TINY)
    return _View(
        full=full,
        shares_iteration=shares_iteration,
        disturbed=(1 - full) * disturbed,
        late_s=excess / pace.capacity_rps,
        running=running,
        iteration_s=iteration_s,
        token_s=token_s,
        boundary_s=shares_iteration * decoding * iteration_s * (1 + prompts) / (1 - prompts),
        departures_rps=load.count * leaving_rps,
        z=_z(load, alone_rps * disturbed * (1 - 1 / pace.slots), requests, gap_cv2),
    )


def _beyond_slots(pace: Pace, on_each: Floats) -> tuple[Floats, Floats]:
    """Of so many sequences, the probability that they take all slots, and how many more there are on average."""
    more = on_each - pace.slots
    if pace.slots_std == 0:
        return np.where(more >= -1e-9, 1.0, 0.0), np.maximum(more, 0.0)
    scaled = more / pace.slots_std
    full = np.asarray(ndtr(scaled))
    excess = pace.slots_std * (scaled * full + np.exp(-scaled * scaled / 2) / sqrt(2 * pi))
    full[-1] = 1.0
    return full, excess


def _decoding(load: _Load, on_each: Floats) -> Floats:
    """Of so many sequences, those that have their first token: a prompt takes as long however many decode."""
    pace = load.pace
    decode_s = np.maximum(pace.decoded_mean * pace.iterations_s, _TINY) / (1 - load.prompt_load)
    with_prompts = pace.running * (1 + pace.first_token_mean_s / decode_s)
    return np.minimum(np.interp(on_each, with_prompts, pace.running), pace.slots)


def _z(load: _Load, per_s: Floats, requests: Sample, gap_cv2: float) -> Floats:
    """Half the variance per request of what comes and goes.

    A request adds 1 + m p sequences: itself, and those that do not leave while its prompt is computed for p seconds, of the m per
    second that leave otherwise. Lengths count by the work left, as in M/G/1 processor sharing: the more it varies from sequence to
    sequence, the fewer sequences a given variation of the work is.
    """
    pace = load.pace
    added = gap_cv2 * (1 + per_s * pace.prompt_mean_s) ** 2 + per_s**2 * pace.prompt_var
    return np.asarray((added + requests.decoded_cv2) / (1 + requests.decoded_cv2))


def _met(
    load: _Load, view: _View, requests: Sample, found: Occupancy, routed: Floats, cells: npt.NDArray[np.intp], pool_rps: float
) -> Met:
    """What those meet that are `routed` here, a share per cell (L + 1,); `cells` is where each point of the sample falls (N,)."""
    pace, decoded = load.pace, requests.decoded
    shares = found.shares * routed
    beyond_s = found.wait_mean_s * load.weight * pool_rps / pace.capacity_rps
    prompts_s = load.prompt_wait.probability * load.prompt_wait.mean_s

    first_s = pace.first_token_mean_s + view.late_s + view.boundary_s / 2 + view.shares_iteration * prompts_s
    ttft_sum_s = float(shares @ first_s + shares[-1] * beyond_s)
    token_sum_s = float(shares @ view.token_s)
    once_s = float(shares @ view.disturbed) * load.backlog_s(decoded, prompts_s, pace.prompt_mean_s)
    if pace.is_pipeline:
        ready_s = view.boundary_s / 2 + view.shares_iteration * (prompts_s / (1 + load.prompt_load))
        once_s = np.where(decoded > 0, once_s + float(shares @ ready_s), 0.0)
    once_per_token_s = float((once_s / np.maximum(decoded, 1.0)).sum()) / max(1, int(np.count_nonzero(decoded)))

    waited_s = _prompt_waits(load.prompt_wait, PROMPT_WAIT) * view.shares_iteration[cells]
    slot_s = _beyond_waits(float(found.shares[-1]), beyond_s) + view.late_s[cells]
    return Met(
        weights=routed[cells],
        ttft_s=slot_s + view.boundary_s[cells] * BOUNDARY + waited_s + pace.first_token_s,
        decode_s=_decode_s(
            load, view, requests, cells, token_sum_s / max(float(shares.sum()), _TINY), found.relaxation_s, waited_s
        ),
        ttft_sum_s=ttft_sum_s,
        tpot_sum_s=token_sum_s + once_per_token_s if pace.decoded_mean > 0 else 0.0,
        e2e_sum_s=ttft_sum_s + pace.decoded_mean * token_sum_s + float(once_s.mean()),
    )


def _prompt_waits(wait: Wait, shares: Floats) -> Floats:
    """Waits that these shares of the requests do not exceed (N,)."""
    if wait.probability < 1e-9:
        return np.zeros_like(shares)
    return np.maximum(-wait.mean_s * np.log((1 - shares) / wait.probability), 0.0)


def _beyond_waits(share: float, mean_s: float) -> Floats:
    """Per point of the sample (N,): those of the upper `share` of the occupancy wait."""
    if share < 1e-9:
        return np.zeros_like(OCCUPANCY)
    return np.maximum(-mean_s * np.log((1 - OCCUPANCY) / share), 0.0)


def _decode_s(
    load: _Load, view: _View, requests: Sample, cells: npt.NDArray[np.intp], mean_s: float, relaxation_s: float, waited_s: Floats
) -> Floats:
    """From the first token to the last (N,), when a token takes `mean_s` on average."""
    pace, decoded = load.pace, requests.decoded
    memories = np.maximum(decoded * mean_s / max(relaxation_s, _TINY), 1e-4)
    spread = np.sqrt(2 * (memories + np.expm1(-memories))) / memories  # of the average of an Ornstein-Uhlenbeck process
    context_s = pace.context_s * np.sqrt((view.running[cells] - 1) * requests.context_var)  # one's own evens out
    token_s = np.maximum(mean_s + (view.token_s[cells] - mean_s + context_s * CONTEXT) * spread, pace.iterations_s[0])
    alone = (view.iteration_s / view.token_s)[cells]
    disturbed = view.disturbed[cells]
    stalled_s = decoded * token_s * (1 - alone) + disturbed * load.backlog_s(decoded, waited_s, pace.prompt_s)
    arrived = load.rate_rps * (np.maximum(view.full[cells], disturbed) * decoded * token_s + disturbed * (waited_s + pace.prompt_s))
    variance = arrived * (load.gap_cv2 * pace.prompt_mean_s**2 + pace.prompt_var)
    deviation2 = np.log1p(variance / np.maximum(stalled_s, _TINY) ** 2)
    decode_s = decoded * token_s * alone + stalled_s * np.exp(np.sqrt(deviation2) * STALL - deviation2 / 2)
    if pace.is_pipeline:  # the first token comes out in the middle of something
        batch_s = _prompt_waits(load.prompt_wait, 1 - PROMPT_WAIT) * view.shares_iteration[cells] / (1 + load.prompt_load)
        decode_s = np.where(decoded > 0, decode_s + view.boundary_s[cells] * (1 - BOUNDARY) + batch_s, 0.0)
    return np.asarray(decode_s)
