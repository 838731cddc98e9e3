"""Measures one part of an installed SpotServe, alone. Knows the part that it measures; nothing else here knows it.

Comparisons with other projects, which need their own environments, are in the repository's `benchmarks/`.
"""
