"""``python -m kmebench`` is ``kmebench``."""

import sys

from kmebench.cli.main import main

sys.exit(main())
