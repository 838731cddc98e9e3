"""The command line: one verb per job, and the only place that chooses adapters.

Knows every room; decides nothing.
"""
