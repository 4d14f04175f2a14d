"""The Ray part of a sweep file: what of it reaches a shell, and must therefore be plain.

Ray puts some fields into command lines (``ssh``, ``rsync``, ``docker``) as they are. Commands are
meant to be commands (``setup_commands``, ``head_start_ray_commands``, ``auth.ssh_proxy_command``);
names, addresses and paths are not, and one that a shell would read otherwise is refused.
"""

import re
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Mistake

CLUSTER_KEYS = {"cluster_name", "provider", "auth", "available_node_types", "head_node_type"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}")
HOST = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_-]{0,254}")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
PATH = re.compile(r"[A-Za-z0-9~/._][A-Za-z0-9~/._@+=-]{0,1023}")
KINDS = {
    NAME: "letters, digits, `.`, `_` and `-`, a letter or digit first",
    USER: "a user name of letters, digits, `.`, `_` and `-`",
    HOST: "an IP address or a host name",
    IMAGE: "the name of an image",
    PATH: "a path of letters, digits and ~ / . _ @ + = -, which no shell reads otherwise",
}


def is_cluster_file(data: dict[str, Any]) -> bool:
    """Whether a file says where Ray runs."""
    return bool(CLUSTER_KEYS & set(data))


def cluster_mistakes(data: dict[str, Any]) -> list[Mistake]:
    """Fields that reach a shell and are not plain; Ray itself checks the rest.

    Args:
        data: the whole file.
    """
    return [
        Mistake(place, value, f"this reaches a shell; allowed is {KINDS[allowed]}")
        for place, value, allowed in _plain_fields(data)
        if not isinstance(value, str) or not allowed.fullmatch(value)
    ]


def _plain_fields(data: dict[str, Any]) -> Iterator[tuple[str, Any, re.Pattern[str]]]:
    def section(key: str) -> dict[str, Any]:
        value = data.get(key)
        return value if isinstance(value, dict) else {}

    def given(parent: str, key: str, allowed: re.Pattern[str]) -> Iterator[Any]:
        value = section(parent).get(key)
        if value is not None:
            yield f"{parent}.{key}", value, allowed

    for key in ("cluster_name", "head_node_type"):
        if data.get(key) is not None:
            yield key, data[key], NAME
    yield from given("auth", "ssh_user", USER)
    yield from given("auth", "ssh_private_key", PATH)
    yield from given("provider", "head_ip", HOST)
    yield from given("provider", "coordinator_address", HOST)
    workers = section("provider").get("worker_ips")
    for number, host in enumerate(workers if isinstance(workers, list) else []):
        yield f"provider.worker_ips[{number}]", host, HOST
    for key in ("image", "head_image", "worker_image"):
        yield from given("docker", key, IMAGE)
    yield from given("docker", "container_name", NAME)
    mounts = section("file_mounts")
    for remote, local in mounts.items():
        yield "file_mounts (on the cluster)", remote, PATH
        yield f"file_mounts.{remote}", local, PATH
