"""The vocabulary that every other room speaks: values, states, messages and errors.

Knows the standard library and msgspec. Must not know I/O, time, chance, tensors or any other room.
"""
