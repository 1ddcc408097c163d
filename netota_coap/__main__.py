"""`python -m netota_coap` is the command `netota-coap`."""

from netota_coap.cli import main

if __name__ == "__main__":
    main()
