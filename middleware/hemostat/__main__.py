"""Runs the command line for `python -m hemostat`."""

import sys

from hemostat.cli import main

sys.exit(main())
