"""Ray: the only part of the project that imports it.

``execute.py`` runs a plan: start there. ``cluster.py`` finds or starts Ray, ``queue.py`` says what
may run next, ``worker.py`` runs one stage in an actor that stays alive between trials,
``dispatch.py`` gives it its work out of ``table.py``, ``exchange.py`` shares calibration statistics
through the object store.

Nothing is imported here: what lives beside the driver (``desk.py``) would import it too.
"""
