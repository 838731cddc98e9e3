"""What should run: how many replicas, of which shape, on the devices that there are, and how many machines to ask for.

Rests on four models: what a step costs (`cost`), what clients wait for (`queueing`), which machines will go (`hazard`, `outlook`)
and what a change takes (asked of the caller). Knows devices, shapes, prices and the current plan. Must not know which device
takes what, how weights and KV get there, messages, or clocks: who asks says what time it is. Pure: same arguments, same plan.
"""
