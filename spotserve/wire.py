"""Framed messages."""
