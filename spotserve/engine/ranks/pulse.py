"""Tells a rank that hangs from one that computes: leader and rank send each other a byte now and then, on a link of its own.

A process that dies closes its links, and everybody knows at once. One that is stopped, or a machine that has vanished from the
network, keeps them open and says nothing: whoever waits for its tensors would wait for ever. The pulse is sent by a thread
of its own, so a long step does not silence it.
"""

import threading
import time

from spotserve.core.errors import PeerLost
from spotserve.engine.ranks.group import Group
from spotserve.link import Link

INTERVAL_S = 0.2
_BEAT = b"."


def watch(group: Group, *, silence_s: float) -> None:
    """Starts a thread for each pulse of a group; the group breaks when one is silent for `silence_s`."""
    for pulse in group.pulses:
        pulse.set_timeout(silence_s)
        threading.Thread(target=_beat, args=(group, pulse), name="pulse", daemon=True).start()


def _beat(group: Group, pulse: Link[None]) -> None:
    try:
        while group.broken is None:
            pulse.write(_BEAT)
            pulse.read(1)
            time.sleep(INTERVAL_S)
    except PeerLost as error:
        group.break_off(f"no sign of life: {error}")
