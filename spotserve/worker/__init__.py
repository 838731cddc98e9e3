"""One instance: its engine, its sequences and their way to gateways, peers and the store.

Knows the engine, the progress store and the messages. Must not know text, HTTP, clouds, other instances' load, or why the
controller decides what it decides.
"""
