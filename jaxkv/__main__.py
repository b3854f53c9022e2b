"""``python -m jaxkv``."""

import sys

from jaxkv.cli.main import main

sys.exit(main())
