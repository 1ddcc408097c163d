"""Values as TOML, CBOR and JSON, and what of a stream fits one datagram."""
