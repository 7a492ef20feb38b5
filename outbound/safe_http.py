"""An HTTP client for addresses that users name: no private network, no redirect, no proxy, bounded time and size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkPolicy:
    """Where outgoing calls may go."""

    allowed_private_networks: tuple[str, ...] = ()
    """CIDR networks that are allowed although they are not public."""

    allow_http: bool = False
    """Plain http towards public addresses; towards `allowed_private_networks` it is always allowed."""
