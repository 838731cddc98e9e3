"""Guessing ahead, losslessly.

Knows token ids, trees of guesses, who guesses, and what a guess costs and brings; decides before every step, for the whole batch at
once, what is drafted and what of it is verified. Must not know HTTP, clouds and torch: what a draft model's pass is, is behind a
Protocol, and of a request no more than how it samples is seen. A draft token is accepted exactly when it is what the target says
itself, so nothing here can change an answer.
"""
