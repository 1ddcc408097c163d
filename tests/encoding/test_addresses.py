"""encoding/addresses.py: where to listen. The URIs of upstreams are tested with hostile ones."""

from __future__ import annotations

import pytest

from netota_coap.encoding.addresses import parse_bind
from netota_coap.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:1234", ("127.0.0.1", 1234)),
        ("127.0.0.1", ("127.0.0.1", 5683)),
        ("[::1]:1234", ("::1", 1234)),
        ("[::1]", ("::1", 5683)),
        ("::1", ("::1", 5683)),
        ("localhost:0", ("localhost", 0)),
        (":1234", ("::", 1234)),
        ("[fe80::1%lo]:1", ("fe80::1%lo", 1)),
    ],
)
def test_parse_bind(text: str, address: tuple[str, int]) -> None:
    """Hosts, ports, both or one."""
    assert address == parse_bind(text)


@pytest.mark.parametrize("text", ["[::1", "[::1]x", "h:65536", "h:-1", "h:x", "h:\uff11"])
def test_parse_bind_refused(text: str) -> None:
    """What is no address is named."""
    with pytest.raises(ConfigError, match="must be"):
        parse_bind(text)
