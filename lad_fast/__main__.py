"""``python -m lad_fast`` is ``lad-fast``."""

import sys

from lad_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
