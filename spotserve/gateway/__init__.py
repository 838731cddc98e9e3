"""The front that clients see: OpenAI's HTTP interface over streams of token ids.

The only room that knows text, JSON, tokenizers and HTTP. A call comes in as JSON, becomes token ids (`openai`, `intake`),
leaves through a `TokenSource` (`calls`), comes back as tokens and becomes text and events (`text`, `answer`, `chunks`, `stream`).
Everything that shapes an answer travels in the call's envelope, so that any gateway can rebuild the same bytes at any time.

Must not know tensors, models' insides, replicas, or why a machine went away: that a stream goes on is the source's promise.
"""
