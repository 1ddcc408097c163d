"""coap/sockets.py: where a server listens."""

from __future__ import annotations

import errno
import socket

import pytest

from netota_coap.coap import sockets
from netota_coap.coap.sockets import open_sockets, uri_of
from netota_coap.errors import AddressError
from tests.support.environment import needs_ipv6


def test_port_is_not_shared() -> None:
    """A second server on a port fails, instead of taking half of the datagrams."""
    (first,) = open_sockets("127.0.0.1:0")
    with first, pytest.raises(AddressError, match="Address already in use") as caught:
        open_sockets(f"127.0.0.1:{first.getsockname()[1]}")

    assert "choose another" in caught.value.hint


@pytest.mark.parametrize(
    ("bind", "match"), [("192.0.2.99:0", "Cannot assign"), ("no.such.host.invalid:0", "no.such")]
)
def test_foreign_address(bind: str, match: str) -> None:
    """An address of another machine, or of none, is named."""
    with pytest.raises(AddressError, match=match):
        open_sockets(bind)


def test_no_ipv6_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AF_INET6 the error says what to allow."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(sockets.socket, "socket", refuse)
    with pytest.raises(AddressError, match="not supported") as caught:
        open_sockets("127.0.0.1:0")

    assert "RestrictAddressFamilies" in caught.value.hint


@pytest.mark.parametrize(
    "bind", ["127.0.0.1:0", pytest.param("[::1]:0", marks=needs_ipv6), "[::]:0"]
)
def test_uri(bind: str) -> None:
    """The URI says address and port."""
    (opened,) = open_sockets(bind)
    with opened:
        host, port = bind.rsplit(":", 1)[0], opened.getsockname()[1]

        assert f"coap://{host}:{port}" == uri_of(opened)


def test_buffers_that_were_not_granted_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says how to get them."""
    monkeypatch.setattr(sockets, "BUFFER", 2**40)
    opened = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with opened, caplog.at_level("INFO"):
        sockets.log_small_buffers(opened)
    assert [f"sysctl -w net.core.{name}={2**40}" in caplog.text for name in
            ("rmem_max", "wmem_max")] == [True, True]  # fmt: skip
