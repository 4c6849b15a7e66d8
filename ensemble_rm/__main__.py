"""``python -m ensemble_rm``: the command line under another name."""

import sys

from ensemble_rm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
