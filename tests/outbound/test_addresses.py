from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbound.addresses import AddressRefused, NetworkPolicy, effective_address, is_public

PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "168.63.129.16",
    "100.64.0.1",
    "100.100.100.200",
    "0.0.0.0",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
    "100::1",
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(AddressRefused):
        NetworkPolicy(allow_http=True).check([address], cleartext=False)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_reached(address: str) -> None:
    NetworkPolicy().check([address], cleartext=False)


def test_one_private_answer_refuses_the_name() -> None:
    with pytest.raises(AddressRefused):
        NetworkPolicy().check(["8.8.8.8", "10.0.0.1"], cleartext=False)


def test_an_allowed_network_is_reached_also_through_its_mapped_form_and_without_tls() -> None:
    policy = NetworkPolicy(("10.1.0.0/16", "::1/128"))
    policy.check(["10.1.2.3", "::ffff:10.1.2.3", "::1"], cleartext=True)
    for refused in ("10.2.0.1", "127.0.0.1"):
        with pytest.raises(AddressRefused):
            policy.check([refused], cleartext=True)


def test_plain_http_to_the_public_needs_the_setting() -> None:
    NetworkPolicy(allow_http=True).check(["8.8.8.8"], cleartext=True)
    with pytest.raises(AddressRefused, match="https"):
        NetworkPolicy().check(["8.8.8.8"], cleartext=True)


@given(st.ip_addresses(v=4))
def test_every_wrapping_of_an_ipv4_address_is_judged_as_that_address(address: object) -> None:
    bits = int(address)  # type: ignore[call-overload]
    wrapped = [
        f"::ffff:{address}",
        f"64:ff9b::{address}",
        f"::ffff:0:{address}",
        str(ip_address((0x2002 << 112) | (bits << 80))),
        str(ip_address((0x20010000 << 96) | (bits ^ 0xFFFFFFFF))),
    ]
    assert {effective_address(text) for text in wrapped} == {address}


@given(st.ip_addresses())
def test_never_more_generous_than_the_standard_library(address: object) -> None:
    """Where we say public, Python's own table says so too."""
    effective = effective_address(str(address))
    if is_public(effective):
        assert effective.is_global
        assert not effective.is_multicast
