"""Which replica takes a request. Pure; grows with the gateway."""
