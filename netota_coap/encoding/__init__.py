"""Values to TOML, CBOR and JSON and back. Everything above `model` may import it."""
