"""Entry point: parse, dispatch, turn errors into messages."""

import os
import sys
from collections.abc import Sequence

from orchestrator.signals import take_term_as_ctrl_c

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command.

    Args:
        arguments: command line without the program's name; that of the process by default.

    Returns:
        The exit status: 0 done, 1 something went wrong, 2 mistakes in what was given,
        130 interrupted.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return _complain(
            "interrupted; what was finished is kept, running again goes on from there",
            EXIT_INTERRUPTED,
        )


def _main(arguments: Sequence[str] | None) -> int:
    # Here, since they take seconds, in which Ctrl-C is pressed too.
    from orchestrator.cli.parser import build_parser
    from orchestrator.errors import PrunefieldError, SpecError
    from orchestrator.log import configure

    options = build_parser().parse_args(arguments)
    configure(options.verbose)
    take_term_as_ctrl_c()  # servers are stopped, runs are ended, training states are saved
    try:
        return int(options.command(options) or 0)
    except SpecError as error:
        return _complain(str(error), EXIT_BAD_INPUT)
    except PrunefieldError as error:
        return _complain(str(error), EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read our output has gone (``prunefield … | head``): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(str(error), EXIT_FAILED)


def _complain(message: str, status: int) -> int:
    print(f"prunefield: {message}", file=sys.stderr)
    return status
