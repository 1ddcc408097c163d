"""The gateway: copies streams of upstreams to a repository, and fetches files for devices.

`service` and `cli` import its modules.
"""
