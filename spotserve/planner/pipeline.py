"""How long stages take together: closed forms of a pipeline, each exact for what it assumes.

A link between two stages is a station of its own: it carries one message while the stages compute the next. Pure arithmetic on
seconds; does not know what a stage computes.
"""

from collections.abc import Sequence


def cycle_s(stations_s: Sequence[float], groups: float) -> float:
    """Between two tokens of one sequence when `groups` groups of sequences go round through all stations.

    Exact for groups alike: either a group is alone with its way round, or the slowest station serves one group after the other.
    With stages alike and as many groups this is P * t. `groups` may be a mean.
    """
    return max(sum(stations_s), groups * max(stations_s))


def through_s(stations_s: Sequence[float], slices: int) -> float:
    """Until `slices` slices that take equal time are through all stations, which need not be alike.

    Exact (a proportionate flow shop; TeraPipe, ICML'21, has it for stages alike): the first slice passes every station, the others
    follow at the pace of the slowest one.
    """
    return sum(stations_s) + (slices - 1) * max(stations_s)
