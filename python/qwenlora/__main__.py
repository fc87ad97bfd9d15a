"""`python -m qwenlora`."""

import sys

from qwenlora.cli import main

sys.exit(main())
