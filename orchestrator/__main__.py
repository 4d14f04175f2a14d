"""``python -m orchestrator`` is the console command, for where it is not installed."""

import sys

from orchestrator.cli import main

sys.exit(main())
