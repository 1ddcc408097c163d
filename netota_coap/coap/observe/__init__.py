"""Observing over CoAP (RFC 7641): the table of observers, its congestion window, its journal.

Only the rest of `coap` and `service` import from here.
"""
