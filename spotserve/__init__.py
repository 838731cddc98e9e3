"""SpotServe serves large language models on spot instances: one URL, unbroken token streams, machines that come and go.

Notice -> state -> plan -> placement -> migration -> commands -> tokens. Each of these words has one home among the rooms
of this package; `docs/architecture.md` shows them and who may import whom.
"""
