"""Turns a configuration into the parts of a mirror; it loads the gateway, so import it late."""

from __future__ import annotations

from pathlib import Path

from netota_coap.gateway.adoption import Choice
from netota_coap.gateway.blob_fetcher import BlobFetcher
from netota_coap.gateway.mirror import Terms
from netota_coap.model.selection import Selection
from netota_coap.service.config import Config


def parts_of(config: Config, root: Path, devices: Selection) -> tuple[BlobFetcher, Choice, Terms]:
    """Return what `Mirror` and `Gateway` need; `devices` are those that the repository serves."""
    fetcher = BlobFetcher(
        root,
        config.blobs_limit_bytes_s or None,
        config.blobs_keep_free,
        config.blobs_size_cap or None,
        config.blobs_in_flight,
    )
    terms = Terms(
        poll_s=config.mirror_poll_s,
        announce_at_once=config.mirror_announce == "at-once",
        ahead=config.blobs_cache == "ahead",
    )
    return fetcher, Choice(config.mirror_packages, config.mirror_streams, devices), terms
