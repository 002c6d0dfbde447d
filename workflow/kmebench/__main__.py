"""``python -m kmebench`` is ``kmebench``."""

import sys

from kmebench.cli import main

sys.exit(main())
