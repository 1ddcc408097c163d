"""Serves the catalog over HTTP: to programs, to reverse proxies, and as a page to people.

Only `service` imports it, `server` from it; it imports the catalog and what lies below that.
"""
