"""Every error that SpotServe raises on purpose.

    SpotServeError
    |-- ConfigError            a setting is missing or makes no sense
    |-- InvalidRequest         the caller's request cannot be served as it stands (HTTP 4xx)
    |   |-- UnknownModel
    |   `-- ContextTooLong
    |-- Overloaded             the caller may try again later (HTTP 429 or 503)
    |-- ModelError             a model cannot be loaded or run
    |-- StoreError             the progress store did not do what it was asked
    |-- CloudError             a provider refused or failed
    |-- WireError              another process sent what this one does not accept
    |   `-- ChannelClosed      the other process is gone, or hung up
    |-- PeerLost               another rank of the replica is gone, hangs or broke off
    `-- TraceError             a trace file does not say what its format promises

An `AssertionError` or `IllegalTransition` is a bug of ours; all of the above are the world's doing.
"""


class SpotServeError(Exception):
    """Root of the tree above."""


class ConfigError(SpotServeError):
    """A setting is missing or makes no sense; the message names the setting, its value and what was expected."""


class InvalidRequest(SpotServeError):
    """The caller's request cannot be served as it stands.

    `param` names the offending field of the request (None: the body as a whole); `code` is the machine-readable reason of
    the OpenAI error body (None: there is none).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""


class ContextTooLong(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""


class Overloaded(SpotServeError):
    """There is no room for the request now; `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(SpotServeError):
    """A model cannot be loaded or run; the message names the model and the reason."""


class StoreError(SpotServeError):
    """The progress store is out of reach or refused; serving goes on without it."""


class CloudError(SpotServeError):
    """A cloud provider refused or failed."""


class WireError(SpotServeError):
    """Another process sent bytes that are not a message of the closed set, or did not prove that it knows the secret."""


class ChannelClosed(WireError):
    """The process at the other end is gone, or hung up."""


class PeerLost(SpotServeError):
    """Another rank of the replica is gone, hangs or broke off: what was being computed with it is lost."""


class TraceError(SpotServeError):
    """A trace file does not say what its format promises; the message names file, line and what was expected."""


class IllegalTransition(Exception):
    """A state machine was asked for a transition that its table does not have: a bug of ours, never the world's doing."""
