"""The server process: configuration, start, reload, systemd, logs."""
