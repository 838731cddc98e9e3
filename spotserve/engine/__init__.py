"""One replica: token ids in, token ids out.

Knows the model, its KV cache and the sequences in the making. Must not know text, epochs, peers, clouds, stores and who asks.
`sequence`, `blocks` and `scheduler` decide which tokens a step computes, without torch; `batch`, `attention`, `forward`,
`sampler` and `runner` compute them; `engine` is the only door.
"""
