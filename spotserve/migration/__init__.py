"""How to get from what runs to what should run: which device takes which slot, where its bytes come from and when, and what
becomes of each running sequence.

Knows the bytes of a model's slices, link and compute speeds, deadlines. Must not know how bytes are sent, who decided the
plan, clocks, or the cloud. Pure: same arguments, same verdicts.
"""
