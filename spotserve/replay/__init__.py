"""Replays availability and request traces, and says what the interruptions cost.

Knows traces, timelines, HTTP and the formulas of the field's metrics. The timeline is pure: `live` carries it out against a
running system, and anything else that takes its actions may stand in the same place. Must not know torch, Redis, cloud SDKs
or the inside of the system under test: what it says about a system, it saw over HTTP.
"""
