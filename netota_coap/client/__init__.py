"""The client of a server: get, observe, download and discover; users begin with `spec/client.md`.

Users import the names in `__all__` from here. The packages above (gateway, service, cli) import
the modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from netota_coap.errors import (
    ConfigError,
    IntegrityError,
    NetotaError,
    PeerError,
    RollbackError,
    TransferError,
)
from netota_coap.model.selection import Selection
from netota_coap.model.values import Archive, Offer, Stream

if TYPE_CHECKING:
    from netota_coap.client.coap_client import Client
    from netota_coap.client.discovery import discover
    from netota_coap.client.downloads import download

__all__ = [
    "Archive",
    "Client",
    "ConfigError",
    "IntegrityError",
    "NetotaError",
    "Offer",
    "PeerError",
    "RollbackError",
    "Selection",
    "Stream",
    "TransferError",
    "discover",
    "download",
]

if not TYPE_CHECKING:
    _HOMES = {"Client": "coap_client", "discover": "discovery", "download": "downloads"}

    def __getattr__(name: str) -> object:
        """Load a module when one of its names is used: aiocoap and httpx2 take 0.3 s."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
