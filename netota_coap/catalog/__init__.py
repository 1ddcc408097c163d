"""The repository rendered for serving: path, selection and format → ready bytes.

The servers (coap, http) and service import it; it knows no transport.
"""
