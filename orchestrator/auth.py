"""Ray's token authentication, settled before Ray is imported.

Ray decides once a process, from ``RAY_AUTH_MODE``, whether it shows a token; where the variable is
unset it goes by what lies in the home folder, and is refused with 401 by a cluster that thinks
otherwise. So it is always set explicitly: as the user says, else as the cluster answers.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from orchestrator.errors import ClusterError

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
PROBE_SECONDS = 10.0


def settle(address: str) -> str:
    """Set ``RAY_AUTH_MODE`` for a cluster whose jobs are taken at an address.

    Args:
        address: ``http://HOST:PORT`` of the cluster's dashboard.

    Returns:
        The mode: ``token`` or ``disabled``.

    Raises:
        ClusterError: nothing like Ray answers there, or it asks for a token that is not at hand.
    """
    asks = _asks_for_token(address)
    given = os.environ.get(MODE, "").lower()
    if asks and given not in ("", "token"):
        raise ClusterError(
            f"the Ray cluster at {address} asks for a token, and {MODE}={given} says to show none; "
            f"set {MODE}=token"
        )
    if asks and not has_token():
        raise ClusterError(
            f"the Ray cluster at {address} asks for a token and none is here; put the cluster's "
            f"into ~/.ray/auth_token, or name its file in {TOKEN_PATH} (on the head: "
            "ray get-auth-token)"
        )
    mode = given or ("token" if asks else "disabled")
    os.environ[MODE] = mode
    return mode


def settle_here() -> str:
    """The same for a cluster joined without its dashboard: a token is shown if there is one.

    A cluster that asks for none takes no offence.
    """
    mode = os.environ.get(MODE, "").lower() or ("token" if has_token() else "disabled")
    os.environ[MODE] = mode
    return mode


def has_token() -> bool:
    """Whether Ray would find a token; its contents are not read."""
    if os.environ.get(TOKEN):
        return True
    path = os.environ.get(TOKEN_PATH) or "~/.ray/auth_token"
    return Path(path).expanduser().is_file()


def _asks_for_token(address: str) -> bool:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"{address!r} is not the address of a Ray dashboard; allowed is http://HOST:8265 "
            "(ray:// and HOST:6379 take no jobs)"
        )
    try:
        with urllib.request.urlopen(
            f"{address.rstrip('/')}/api/version", timeout=PROBE_SECONDS
        ) as r:
            said = json.load(r)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return True
        said = None
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({getattr(error, 'reason', error)}); start one "
            "(`ray start --head`), or give the address of its dashboard"
        ) from error
    if not isinstance(said, dict) or "ray_version" not in said:
        raise ClusterError(
            f"what answers at {address} is not a Ray dashboard; give the address of one"
        )
    return False
