"""HTTP beside CoAP: the same catalog for reverse proxies, SysOTA-like clients and people."""
