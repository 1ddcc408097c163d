"""netota_coap: update meta-data for IoT devices, CoAP first."""

__version__ = "0.1.0"
