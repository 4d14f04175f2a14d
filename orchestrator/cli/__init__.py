"""The console command ``prunefield``.

One function a command, in ``sweeps.py`` (what takes a sweep file) and ``models.py`` (what takes a
checkpoint); ``parser.py`` says what each takes. Errors of the project end with a message and a
status, never with a traceback: 2 for mistakes in what was given, 1 for what went wrong later.
"""

from orchestrator.cli.main import main

__all__ = ["main"]
