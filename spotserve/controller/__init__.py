"""Hears what happens to the fleet, decides what should run, and commands it.

`state` decides and is pure; `executor` acts; `controller` joins them; `app` shows them. Must not know tokens, text, tensors,
or how a provider spells its notices.
"""
