"""Find the Ray cluster this process stands on, or start one here."""

import gc
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray._private import ray_constants, services
from ray._private.state import state as ray_state

from orchestrator.auth import settle_here
from orchestrator.errors import ClusterError
from orchestrator.log import logger
from orchestrator.scheduler.queue import LANE
from orchestrator.signals import term_is_ctrl_c
from orchestrator.spec import Resources, StageResources

MANY_NODES = 64  # for an autoscaler without a limit
AUTO_GPUS = {"train": 1.0, "prune": 0.25}
# Ray prints much at start-up that no user of a sweep can act on.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# Ray reads this variable (meant for Windows and macOS) as "this machine is no cluster": every
# process of a local cluster then listens on 127.0.0.1 only. It looks it up in the constant as well.
LOOPBACK_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


@contextmanager
def connected() -> Iterator[bool]:
    """Ray for the time of a block; gives whether other sweeps may be there too.

    A process that is already connected stays so. Otherwise ``RAY_ADDRESS``, or the cluster that
    ``ray start`` made this machine part of, is joined; where there is none, one is started on
    loopback for this process alone and ended with it.

    Raises:
        ClusterError: an address was given and no cluster answers there.
    """
    if ray.is_initialized():
        yield True
        return
    with environment(QUIET):
        if _join():
            try:
                with term_is_ctrl_c():
                    yield True
            finally:
                _leave()
        else:
            with _private_cluster():
                yield False


def _join() -> bool:
    address = os.environ.get("RAY_ADDRESS")
    if address == "local" or not (address or _started_here()):
        return False
    settle_here()
    try:
        ray.init(address="auto", logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        if address:
            raise ClusterError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start one there, "
                "unset RAY_ADDRESS to run on this machine, or set RAY_AUTH_MODE to the cluster's"
            ) from error
        return False
    logger.info("joined the Ray cluster at %s", ray.get_runtime_context().gcs_address)
    return True


def _started_here() -> bool:
    """Whether `ray start` made this machine part of a cluster that still runs.

    Ray itself would join any cluster here, also the private one of another sweep, which ends with
    that sweep.
    """
    return services.find_bootstrap_address(None) in services.find_gcs_addresses()


@contextmanager
def _private_cluster() -> Iterator[None]:
    """A cluster on loopback for this process alone.

    It needs no token, and must not leave one in the home folder that would lock later clusters
    (Ray turns authentication on where it finds the file).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    settings = {
        "RAY_AUTH_MODE": mode,
        LOOPBACK_VARIABLE: "0",
        # By default Ray's workers yield to everything else on the machine (nice 15).
        "RAY_worker_niceness": "0",
    }
    with environment(settings):
        try:
            with _no_api_server():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                )
            with term_is_ctrl_c():
                yield
        except (ConnectionError, RuntimeError, OSError) as error:
            if ray.is_initialized():
                raise
            raise ClusterError(f"Ray could not be started on this machine: {error}") from error
        finally:
            _leave()
            ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _no_api_server() -> Iterator[None]:
    """Ray without its API server, as if that had failed to start.

    Without a dashboard it serves nothing but usage statistics, yet Ray waits until it is up before
    it starts anything else.
    """
    start = services.start_api_server
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = start


def _leave() -> None:
    """Disconnect from Ray.

    Ray ends the whole process if a reference to one of its objects is dropped just after it has
    shut down, and the garbage collector runs in whichever thread allocates (the tracking logger's,
    say). So all garbage is collected before, and none while Ray shuts down.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        gc.collect()
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def requests(resources: Resources) -> dict[str, dict[str, float]]:
    """What each stage asks Ray for, once it is known what the cluster has.

    Raises:
        ClusterError: no node of the cluster can give what a stage asks for.
    """
    wanted = {
        "train": _request("train", resources.train),
        LANE: _request("prune", resources.prune),
    }
    nodes = _nodes()
    for stage, request in wanted.items():
        if not any(all(node.get(k, 0.0) >= v for k, v in request.items()) for node in nodes):
            have = [{k: node.get(k, 0.0) for k in ("CPU", "GPU")} for node in nodes]
            raise ClusterError(
                f"`resources.{'train' if stage == 'train' else 'prune'}` asks for {request}, which "
                f"no node of the cluster has (nodes: {have}); ask for less, use `gpus: auto` to "
                "run without GPUs, or add a node"
            )
    return wanted


def capacity(request: Mapping[str, float]) -> int:
    """How many workers of a kind the whole cluster can hold at once."""
    return max(1, sum(int(min(n.get(k, 0.0) / v for k, v in request.items())) for n in _nodes()))


def _nodes() -> list[Mapping[str, float]]:
    """What each node has: those that are there, and those that the autoscaler may add."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return there + [
        resources
        for resources, most in node_groups()
        for _ in range(most - sum(_alike(node, resources) for node in there))
    ]


def _alike(node: Mapping[str, float], group: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) == group.get(name, 0.0) for name in ("CPU", "GPU"))


def node_groups() -> list[tuple[dict[str, float], int]]:
    """The kinds of nodes that the cluster's autoscaler may start, and how many of each."""
    config = ray_state.get_cluster_config()
    if config is None:
        return []
    return [
        (
            {name: float(value) for name, value in group.resources.items()},
            MANY_NODES if group.max_count < 0 else int(group.max_count),
        )
        for group in config.node_group_configs
    ]


def _request(stage: str, resources: StageResources) -> dict[str, float]:
    nodes = _nodes()
    has_gpu = any(node.get("GPU", 0.0) > 0 for node in nodes)
    gpus = resources.gpus
    if gpus is None:
        gpus = AUTO_GPUS[stage] if has_gpu else 0.0
    if gpus > 0 and not has_gpu:
        raise ClusterError(
            f"`resources.{stage}.gpus` asks for {gpus:g}, but Ray sees no GPU here; use "
            "`gpus: auto` or `gpus: 0` to run on CPUs, or start the cluster with its GPUs"
        )
    total = max((n.get("CPU", 0.0) for n in nodes if n.get("GPU", 0.0) >= gpus), default=0.0)
    # A default that is larger than a small machine must not stop it.
    cpus = min(resources.cpus, total) if total else resources.cpus
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
