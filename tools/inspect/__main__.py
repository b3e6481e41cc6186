"""`python -m kvtier.tools.inspect`."""

import sys

from .cli import main

sys.exit(main())
