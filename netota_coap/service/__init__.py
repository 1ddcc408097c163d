"""Runs the servers as one process: configuration, start, reload, systemd, logs.

Only `cli` imports it. It may import everything else; HTTP and the gateway only when they are used.
"""
