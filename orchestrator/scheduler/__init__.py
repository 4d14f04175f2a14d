"""Ray: the only part of the project that imports it.

``cluster.py`` finds or starts Ray, ``queue.py`` says what may run next, ``worker.py`` runs one
stage in an actor that stays alive between trials, ``exchange.py`` shares calibration statistics
through the object store, ``execute.py`` puts them together.
"""

from orchestrator.scheduler.execute import Listener, Outcome, execute

__all__ = ["Listener", "Outcome", "execute"]
