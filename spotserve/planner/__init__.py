"""What should run: how many replicas, of which shape, on the devices that there are.

Knows devices, shapes and the current plan. Must not know which device takes what, how weights and KV get there, messages, or
time. Pure: same arguments, same plan.
"""
