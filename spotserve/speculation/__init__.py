"""Guessing ahead, losslessly.

Knows token ids, trees of guesses, and what a guess costs and brings. Must not know requests, HTTP and clouds; no torch outside
`drafters`. A draft token is accepted exactly when it is what the target says itself, so nothing here can change an answer.
"""
