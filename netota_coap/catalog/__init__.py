"""The repository rendered for serving: path, selection and format → ready bytes.

It imports `repository.blobs` and what lies below, and knows no transport. The servers (coap, http)
and `service` import it.
"""
