"""CoAP, server side: resources, sockets, observers."""
