"""The gateway: follows upstreams into a local repository, and fetches the files devices need.

`service` and `cli` import its modules. `upstream_uri` is light, for those who check settings.
"""
