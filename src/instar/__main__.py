"""``python -m instar`` is the command ``instar``; launchers of several processes want it so."""

import sys

from instar.cli import main

sys.exit(main())
