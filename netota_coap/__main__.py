"""`python -m netota_coap` is the command `netota-coap`."""

import sys

try:
    from netota_coap.cli import main
except KeyboardInterrupt:  # so early, nothing else would keep it from being a traceback
    sys.exit(130)

if __name__ == "__main__":
    main()
