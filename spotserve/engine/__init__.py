"""One replica: token ids in, token ids out.

Knows the model, its KV cache and the sequences in the making. Must not know text, epochs, peers, clouds, stores and who asks.
`sequence`, `blocks`, `prefix` and `scheduler` decide which tokens a step computes, without torch. `catalogue`, `sharding` and
`cuts` know how a model is cut, `files` and `assemble` where its weights come from. A stage (`fused`, `library_stage`) computes
a slice, `ranks` join the slices of a replica, `engine` is the only door; `remote` is another engine behind the same one.
"""
