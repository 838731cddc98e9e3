"""Where weights come from, read by byte ranges: a local folder, the hub's cache, S3-compatible storage.

Knows files, tensors' names, shapes and places, and how bytes get here. Must not know layers, shards, ranks or what a tensor is
for: who wants a part of a tensor says which indices along which dimension. `open` is the only door. Every source ends as a file
on this machine that is mapped into memory: what comes from a network lands in a sparse file that all ranks of an instance share.
"""
