"""How two processes prove to each other that they know the system's secret, as bytes: whoever has the connection moves them.

    both:  greeting   magic, protocol version, a nonce of 16 bytes
    both:  proof      HMAC-SHA256(secret, role + client's nonce + server's nonce)

The secret itself never travels, and neither end sends anything else before it has the other one's proof.
"""

import hmac
import secrets
import struct

from spotserve.core.errors import WireError
from spotserve.core.messages import PROTOCOL_VERSION

_MAGIC = b"SPOTSERVE"
_GREETING = struct.Struct(f">{len(_MAGIC)}sH16s")

GREETING_BYTES = _GREETING.size
PROOF_BYTES = 32


class Handshake:
    """One end of it; used once."""

    def __init__(self, secret: str, *, is_server: bool) -> None:
        self._secret = secret.encode()
        self._is_server = is_server
        self._nonce = secrets.token_bytes(16)
        self._expected = b""

    def greeting(self) -> bytes:
        """What to send first."""
        return _GREETING.pack(_MAGIC, PROTOCOL_VERSION, self._nonce)

    def prove(self, greeting: bytes) -> bytes:
        """What to send after the other end's greeting.

        Raises:
            WireError: it is no greeting, or one of another version.
        """
        magic, version, other_nonce = _GREETING.unpack(greeting)
        if magic != _MAGIC:
            raise WireError("the other end does not speak this protocol")
        if version != PROTOCOL_VERSION:
            raise WireError(f"the other end speaks protocol version {version}, this one {PROTOCOL_VERSION}: upgrade the older one")
        nonces = other_nonce + self._nonce if self._is_server else self._nonce + other_nonce
        own_role, other_role = (b"server", b"client") if self._is_server else (b"client", b"server")
        self._expected = hmac.digest(self._secret, other_role + nonces, "sha256")
        return hmac.digest(self._secret, own_role + nonces, "sha256")

    def check(self, proof: bytes) -> None:
        """The last step.

        Raises:
            WireError: the other end does not know the secret.
        """
        if not self._expected or not hmac.compare_digest(proof, self._expected):
            raise WireError("the other end does not know the shared secret")
