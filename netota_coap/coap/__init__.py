"""The CoAP server: sockets, responses, observers.

`service` opens a `FrontDoor` for a `CoapSite`. Clients may import `options` and `protocol` only;
`http` imports `sockets`.
"""
