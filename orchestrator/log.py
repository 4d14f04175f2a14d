"""The project's logger; nothing in it is configured until the console command asks for it."""

import logging

logger = logging.getLogger("prunefield")


def configure(verbosity: int = 0) -> None:
    """Show warnings (0), progress notes (1) or everything (2) on standard error."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("prunefield: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
