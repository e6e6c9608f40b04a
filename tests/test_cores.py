"""The cores of a process that may not use all of them."""

import os
import subprocess

import pytest

from dynadapter.cli import sweep_workers
from dynadapter.images.memory import usable_cores


@pytest.fixture
def two_of_eight(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5}, raising=False)


def test_cores_are_those_of_the_affinity(two_of_eight, monkeypatch):
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 8


def test_sweep_shares_the_usable_cores(two_of_eight, monkeypatch):
    found = []

    class Process:
        def __init__(self, command, env):
            found.append(env["OMP_NUM_THREADS"])

        def wait(self):
            return 0

        poll = wait

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(subprocess, "Popen", Process)
    sweep_workers.spread("sweep.yaml", 2)
    assert found == ["1", "1"]
