"""Writes generated traces: `python -m spotserve.replay fleet --instances 4 ... > FILE`, `python -m spotserve.replay load ...`.

The flags are the fields of `FleetModel` and `LoadModel`.
"""

import argparse
import sys
from dataclasses import fields

from spotserve.core.errors import SpotServeError
from spotserve.replay.generate import FleetModel, LoadModel, fleet_comments, fleet_events, load_comments, load_requests
from spotserve.replay.trace import capacity_csv, requests_csv


def main(arguments: list[str] | None = None) -> int:
    """Writes one trace to standard output; the comment header holds its model and statistics."""
    parser = argparse.ArgumentParser(prog="python -m spotserve.replay", description="Write a generated trace to standard output.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, model in (("fleet", FleetModel), ("load", LoadModel)):
        flags = verbs.add_parser(verb, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for field in fields(model):
            kind = str if isinstance(field.default, str) else type(field.default)
            flags.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=" ")
    given = vars(parser.parse_args(arguments))
    verb = given.pop("verb")
    try:
        if verb == "fleet":
            fleet = FleetModel(**given)
            events = fleet_events(fleet)
            sys.stdout.write(capacity_csv(events, fleet_comments(fleet, events)))
        else:
            load = LoadModel(**given)
            requests = load_requests(load)
            sys.stdout.write(requests_csv(requests, load_comments(load, requests)))
    except SpotServeError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
