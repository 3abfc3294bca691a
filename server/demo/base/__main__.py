"""`python -m server.demo.base [--output DIR]`: builds the demo's base model, once."""

import sys

from server.demo.base.build import main

if __name__ == "__main__":
    sys.exit(main())
