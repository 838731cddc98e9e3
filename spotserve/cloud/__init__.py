"""Providers of machines: renting, returning, and the news that one will be taken.

Translates foreign words (a provider's JSON, a process's exit) into `core.messages`. Must not know plans, replicas, requests or
any other room of its floor.
"""
