"""``--engine ray``: how commands start Ray, or find a cluster."""

import sys
from pathlib import Path

import pytest

from dynadapter.cli.errors import Failed, Mistake
from dynadapter.cli.ray_session import ray_session


def listening() -> set[tuple[str, str]]:
    """The table and the address of every listening socket of this machine that others can reach."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_ = line.split()
            host = address.partition(":")[0]
            loopback = host[-8:] == "0100007F" or host == "0" * 24 + "01000000"
            if state == "0A" and not loopback:
                found.add((table, address))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="lists sockets of Linux")
def test_ray_listens_on_loopback_alone(alone_on_ray: None) -> None:
    before = listening()
    with ray_session() as ray:
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
        assert listening() <= before
        with ray_session() as same:
            assert same.is_initialized()
        assert ray.is_initialized()
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_on_the_network_is_refused(alone_on_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    with pytest.raises(Failed, match=r"Ray listens on 192.0.2.7, not on loopback alone"), ray_session():
        raise AssertionError("it was accepted")
    assert not ray.is_initialized()


def test_no_cluster_at_the_address(alone_on_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(Mistake, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there"), ray_session():
        raise AssertionError("it was accepted")


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Mistake, match=r"pip install 'dynadapter\[ray\]'"), ray_session():
        raise AssertionError("it was accepted")
