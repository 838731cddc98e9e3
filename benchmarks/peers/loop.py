"""What every peer program speaks: one JSON document per line on its standard input and output.

It runs in the peer's own interpreter, so it knows the standard library only. The first line that a peer writes is
`{"ready": VERSION}`; then for each line `{"prompts": [[id, ...], ...], "new_tokens": N}` it submits all prompts at once and answers
`{"token_times_s": [[...], ...]}`: of each request, when each of its tokens came, in seconds since the submission.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

TokenTimes = list[list[float]]
Round = Callable[[list[list[int]], int], TokenTimes]


def peer_arguments() -> argparse.Namespace:
    """What every peer is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--further", default="{}", help="a JSON object for this peer alone")
    return parser.parse_args()


def answer_rounds(start: Callable[[], tuple[str, Round]]) -> None:
    """Starts the peer, then serves rounds until the input ends. What the peer itself prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    version, run = start()
    answers.write(json.dumps({"ready": version}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps({"token_times_s": run(asked["prompts"], asked["new_tokens"])}) + "\n")
