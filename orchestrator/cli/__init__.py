"""The console command ``prunefield``.

One function a command, in ``sweeps.py`` (what takes a sweep file), ``remote.py`` (sweeps that run
elsewhere), ``models.py`` (what takes a checkpoint) and ``analysis.py`` (what is done with results);
``parser.py`` says what each takes, ``values.py`` what values may be. Errors of the project end with
a message and a status, never with a traceback: 2 for mistakes in what was given, 1 for what went
wrong later.
"""

from orchestrator.cli.main import main

__all__ = ["main"]
