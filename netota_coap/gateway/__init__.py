"""The gateway: follows upstreams into a local repository, and fetches the files devices need.

`service` and `cli` import its modules.
"""
