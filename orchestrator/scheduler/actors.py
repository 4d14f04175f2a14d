"""Actors of a sweep that cost nothing: where they live, and calls that survive a lost connection.

Ray puts an actor that asks for no CPU on any node. There it would end with that node, and a sweep
must outlive each node that is not its driver's own; so such actors are put beside the driver.
"""

import secrets
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import ClusterError

UNAVAILABLE_SECONDS = 60.0
"""How long a call is tried again while its actor cannot be reached; Ray finds out which it is."""
RETRY_SECONDS = 0.5
HEAD = {"node:__internal_head__": 0.001}
"""What an actor asks for that is to live on the head: more than one driver needs it."""


def beside_driver(kind: type, *arguments: Any) -> ActorHandle:
    """An actor of no cost on the node of this process: it ends with it, and with no other."""
    here = ray.get_runtime_context().get_node_id()
    where = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(num_cpus=0)(kind).options(scheduling_strategy=where).remote(*arguments)


def ask(desk: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call a method at a desk; while the desk cannot be reached, the call is repeated.

    Raises:
        ClusterError: the desk is no more.
    """
    call, end = secrets.token_hex(8), time.monotonic() + UNAVAILABLE_SECONDS
    while True:
        try:
            return ray.get(desk.do.remote(call, method, *arguments))
        except RayActorError as error:
            if isinstance(error, ActorUnavailableError) and time.monotonic() < end:
                time.sleep(RETRY_SECONDS)
                continue
            raise ClusterError(
                f"the process that hands out this sweep's work is no more ({_line(error)}); run "
                "the sweep again: it goes on from what is finished"
            ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
