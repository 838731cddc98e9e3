"""Progress of requests, kept outside the processes that make it.

Knows request ids, epochs, token ids and opaque call records; SQLite for one machine, Redis for many, one Protocol for both.
Must not know the engine, HTTP, replicas or why anybody commits. What it keeps only saves time: any copy of a request's
progress is a prefix of the same sequence, so a store that lost something, or everything, can never change an answer.
"""
