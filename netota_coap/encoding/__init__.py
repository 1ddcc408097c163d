"""Converts values to TOML, CBOR and JSON and back, and reads addresses.

It imports `model` and `errors`; every package above it imports it.
"""
