"""How many sequences a request finds on a pool of replicas, and how long it waits when all slots are taken.

The router keeps replicas equally full, so a pool is one system with one number in it. An arrival makes the number grow by one; it
falls as fast as replicas that are so full finish requests. With Poisson arrivals this is a birth-death chain of processor sharing:
q(n + 1) / q(n) = rate / departures(n + 1), whatever the lengths. Every other case keeps the form and has the slope of log q divided
by z, as in the diffusion limit: half of what comes and goes at random per request. Two things move z away from 1:

- Bursts. Gaps of variation c make arrivals as irregular as groups of c^2 requests.
- Prompts. While one is computed nobody else gets a token: an arrival adds itself *and* keeps others from leaving.

With groups the slope is not quite proportional to log(rate / departures); `_steepness` has the next term. Beyond the slots it is a
queue: geometric by the same rule, with waits scaled by variability (Allen and Cunneen) and corrected for many servers and regular
work (Cosmetatos, Operational Research Quarterly 27(3), 1976; interpolated as by Kimura, Queueing Systems 17, 1994).

Exact: M/M/1, M/M/c, the mean of M/G/1, and processor sharing with Poisson arrivals. Exact in the limit of high load: the single
server with any gaps and any lengths. Pure. Knows rates and counts; of latencies only the wait for a slot.
"""

from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from spotserve.planner.sample import Floats

MIN_Z = 0.01
"""Nothing is as regular as a metronome that serves a metronome."""


@dataclass(frozen=True, slots=True)
class Wait:
    """For a server: how many wait, and for how long those who do (exponential)."""

    probability: float
    mean_s: float


NO_WAIT = Wait(0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Occupancy:
    """What arrivals find. Cells are runs of equally many sequences, a single one each in pools of ordinary size."""

    shares: Floats
    """Of arrivals, per cell (L + 1,); the last stands for everything from "all slots are taken" on."""
    wait_mean_s: float
    """Of those that find all slots taken."""
    relaxation_s: float
    """For how long the number of sequences remembers what it was."""


def queue(utilisation: float, capacity_rps: float, *, gap_cv2: float, service_cv2: float, servers: float = 1.0) -> Wait:
    """A queue before servers that finish `capacity_rps` together when all are busy, at a utilisation below 1.

    The probability is that of a single server; where there are several it has to be multiplied by that of finding all but one busy.
    """
    if utilisation <= 0:
        return NO_WAIT
    ratio = exp(-float(_steepness(np.array(-log(utilisation)), np.array(max((1 + gap_cv2) / 2, MIN_Z)))))
    variability = (gap_cv2 + service_cv2) / (gap_cv2 + 1) * _regular_work(utilisation, servers, gap_cv2, service_cv2)
    return Wait(ratio, variability / (capacity_rps * (1 - ratio)))


def _steepness(slope: Floats, z: Floats) -> Floats:
    """How fast q falls from one number to the next: `slope` is log(departures / rate).

    Gamma gaps of variation c are like groups of b = c^2 at rate / b. Solving rate / b * (e^(b t) - 1) = departures * (1 - e^-t)
    to second order in t gives slope = z t (1 + (z - 1) t / 6) with z = (1 + b) / 2.
    """
    first = slope / z
    return first / np.maximum(1 + (z - 1) / 6 * first, 0.3)


def _regular_work(utilisation: float, servers: float, gap_cv2: float, service_cv2: float) -> float:
    """By how much many servers wait longer than Allen and Cunneen have it, when work varies less than exponential work does.

    Made for Poisson arrivals; groups of requests make a server's load of its own, so the correction is left out in proportion.
    """
    if service_cv2 >= 1:
        return 1.0
    more = (1 - utilisation) * (servers - 1) * (sqrt(4 + 5 * servers) - 2) / (16 * utilisation * servers * max(1.0, gap_cv2))
    regular = min(1 + more, 2.0)
    return 1 / (service_cv2 + (1 - service_cv2) / regular)


def occupancy(departures_rps: Floats, z: Floats, *, rate_rps: float, step: float, seats: int, beyond: Wait) -> Occupancy:
    """Where arrivals at `rate_rps` find the pool.

    Args:
        departures_rps: when so many are there as an arrival into each cell makes it (L + 1,); the last is the pool's capacity.
        z: half the variance per request of what comes and goes, in the same states (L + 1,).
        rate_rps: below capacity, above 0.
        step: sequences per cell.
        seats: slots in all.
        beyond: the queue before the slots.
    """
    falls = _steepness(np.log(departures_rps[:-1] / rate_rps), z[:-1])
    after = -np.cumsum(step * falls)
    within = after + (step + 1) / 2 * falls  # log q in the middle of a cell
    top = max(float(within.max()), float(after[-1]))
    mass = np.append(np.exp(within - top) * step, exp(float(after[-1]) - top) / (1 - beyond.probability))
    shares = mass / mass.sum()

    levels = np.append((np.arange(len(falls)) + 0.5) * step - 0.5, seats + beyond.probability / (1 - beyond.probability))
    mean = float(shares @ levels)
    variance = float(shares @ (levels - mean) ** 2) + float(shares[-1]) * beyond.probability / (1 - beyond.probability) ** 2
    noise = float(np.interp(mean, levels, z))
    return Occupancy(shares, beyond.mean_s, max(variance, 1e-12) / (rate_rps * noise))
