"""Connect to Ray for ``--engine ray``."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynadapter.cli.errors import Failed, Mistake

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0, Ray takes loopback for the address of this machine, on Linux too. Otherwise it replaces 127.0.0.1 by the
address in the network, and listens on all interfaces without a password."""


@contextmanager
def ray_session() -> Iterator[Any]:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine, listening on loopback alone.

    A session that was open before stays open.
    """
    if alone := "RAY_ADDRESS" not in os.environ:
        os.environ[LOOPBACK] = "0"  # read when ray is imported, in this process and in those that it starts
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise Mistake("--engine ray needs Ray; install it with: pip install 'dynadapter[ray]'") from error
    own = not ray.is_initialized()
    if own:
        local: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if alone else {}
        if not alone:
            _check_address(os.environ["RAY_ADDRESS"])
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        if own and alone and (address := ray.util.get_node_ip_address()) != "127.0.0.1":
            raise Failed(f"Ray listens on {address}, not on loopback alone; set {LOOPBACK}=0 before ray is imported")
        yield ray
    finally:
        if own:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nothing answers; Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise Mistake(f"RAY_ADDRESS={address}: no Ray cluster answers there; start one, or unset it") from error
