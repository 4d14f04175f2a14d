"""Search: which ratios, layer by layer, and which method give the best models.

``space.py`` turns parameters into prunings and back, ``goals.py`` compares trials, ``starts.py``
knows what to try first, ``study.py`` keeps the study and asks Optuna (the only place that imports
it), ``search.py`` puts them together. Nothing here runs a trial: `orchestrator.scheduler` does.
"""
