"""Validation against wire.cddl, each rule a root of its own."""

from __future__ import annotations

import functools
from pathlib import Path

import pycddl

import netota_coap

TEXT = (Path(netota_coap.__file__).parent / "spec" / "wire.cddl").read_text()


@functools.cache
def _schema(rule: str) -> pycddl.Schema:
    # The first rule of a document is its root.
    return pycddl.Schema(f"root = {rule}\n{TEXT}")


def validate(payload: bytes, rule: str) -> None:
    """Fail unless the payload is as the rule of wire.cddl says.

    What the library does not judge: the number of free attributes, the later elements of an
    array of arrays, and integers of 1 to 64 where text of that size is asked for.
    """
    _schema(rule).validate_cbor(payload)
