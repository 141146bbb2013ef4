"""`python -m halfbyte` is the `halfbyte` command."""

import sys

from .cli import main

sys.exit(main())
