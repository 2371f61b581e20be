"""`python -m fxopt` is the command `fxopt`."""

from __future__ import annotations

import sys

from fxopt.cli import main

sys.exit(main())
