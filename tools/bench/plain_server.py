"""Serves by aiocoap without our front door, to compare the two.

Usage: tools/bench/plain_server.py PORT DIR|FILE...
A repository is served by the same `CoapSite` as in `netota-coap serve`, but never reloaded; each
file by a bare resource of aiocoap with the file's name.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from aiocoap.message import Message
from aiocoap.protocol import Context
from aiocoap.resource import Resource
from aiocoap.resource import Site as PlainSite

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.repository.loading import Loader


class _Bytes(Resource):
    def __init__(self, payload: bytes) -> None:
        super().__init__()
        self._payload = payload

    async def render_get(self, _request: Message) -> Message:
        return Message(payload=self._payload)


def _site(paths: Sequence[Path]) -> Any:
    if paths[0].is_dir():
        return CoapSite(Responder(Catalog.of(Loader(paths[0]).load())))
    site = PlainSite()
    for path in paths:
        site.add_resource([path.name], _Bytes(path.read_bytes()))
    return site


async def _serve(port: int, paths: Sequence[Path]) -> None:
    await Context.create_server_context(
        _site(paths), bind=("127.0.0.1", port), transports=["udp6"]
    )
    await asyncio.Event().wait()


@click.command()
@click.argument("port", type=int)
@click.argument("paths", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
def main(port: int, paths: Sequence[Path]) -> None:
    """Serve a repository, or files, until killed."""
    logging.disable()
    asyncio.run(_serve(port, paths))


if __name__ == "__main__":
    main()
