"""Which addresses outgoing calls may reach: public ones, and the private networks that a setting names.

Source: IANA special-purpose address registries, https://www.iana.org/assignments/iana-ipv4-special-registry and -ipv6-.
The tables are ours because `ipaddress.is_global` differs between Python releases.
"""

from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from core.errors import InvalidRequest

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PRIVATE_IPV4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's platform address, reachable from every virtual machine there
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
GLOBAL_IPV6 = IPv6Network("2000::/3")
PRIVATE_IPV6 = tuple(IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "3fff::/20"))

# Networks whose last 32 bits are an IPv4 address that the packet is finally sent to.
TRANSLATED = tuple(IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96"))
SIX_TO_FOUR = IPv6Network("2002::/16")
TEREDO = IPv6Network("2001::/32")


class AddressRefused(InvalidRequest):
    """The URL leads, or its name resolves, to where outgoing calls may not go."""

    code = "address_refused"


@dataclass(frozen=True)
class NetworkPolicy:
    """Where outgoing calls may go."""

    allowed_private_networks: tuple[str, ...] = ()
    """CIDR networks that are allowed although they are not public."""

    allow_http: bool = False
    """Plain http towards public addresses; towards `allowed_private_networks` it is always allowed."""

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        return tuple(ip_network(text, strict=False) for text in self.allowed_private_networks)

    def check(self, addresses: list[str], *, cleartext: bool) -> None:
        """Raises: AddressRefused unless every one of `addresses`, all that a name resolved to, may be reached."""
        for text in addresses:
            address = effective_address(text)
            if any(address in network for network in self.networks):
                continue
            if not is_public(address):
                raise AddressRefused("The address is not public; an administrator can allow it in HONE_ALLOWED_PRIVATE_NETWORKS.")
            if cleartext and not self.allow_http:
                raise AddressRefused("Plain http is not allowed towards public addresses; use https.")


def effective_address(text: str) -> Address:
    """The address that a packet to `text` finally goes to: an IPv4 address where the IPv6 one only wraps it."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv4Address) or address == IPv6Address("::1"):
        return address
    bits = int(address)
    if any(address in network for network in TRANSLATED):
        return IPv4Address(bits & 0xFFFFFFFF)
    if address in SIX_TO_FOUR:
        return IPv4Address(bits >> 80 & 0xFFFFFFFF)
    if address in TEREDO:
        return IPv4Address(bits & 0xFFFFFFFF ^ 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in PRIVATE_IPV4)
    return address in GLOBAL_IPV6 and not any(address in network for network in PRIVATE_IPV6)
