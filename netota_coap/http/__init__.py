"""Serves the catalog over HTTP: to programs, to reverse proxies, and as pages to people.

Only `service` imports this package, and only its module `server`.
"""
