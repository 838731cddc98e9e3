"""The rank processes of one replica: what each computes of a step, how they are joined, what they give to each other.

Knows slices of models, blocks and links. Must not know requests' clients, plans, and why a replica has the shape that it has.
"""
