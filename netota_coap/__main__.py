"""Run the command `netota-coap` by `python -m netota_coap`."""

import sys

try:
    from netota_coap.cli import main
except KeyboardInterrupt:  # while importing, when no command can catch it
    sys.exit(130)

if __name__ == "__main__":
    main()
