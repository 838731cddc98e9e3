"""An engine that computes nothing: a server with an OpenAI-compatible API does, and this room keeps account of it.

Knows HTTP, event streams, and what four servers say differently. Must not know torch, epochs, gateways and stores.
"""
