"""The stamp in every record."""

import getpass
import importlib.metadata
import json
import os
import socket

import pytest
import torch

from batchnorm.environment import PACKAGES, cpu_name, describe_environment, installed_version, usable_cpus


def test_the_stamp_is_json():
    record = describe_environment()
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_stamp_states_what_is_installed():
    packages = describe_environment()["packages"]
    assert set(packages) == set(PACKAGES)
    assert packages["torch"] == importlib.metadata.version("torch")
    assert installed_version("no-such-distribution") is None


def test_the_stamp_states_the_threads_of_now():
    assert describe_environment()["threads"] == torch.get_num_threads()


def test_usable_cores_are_those_of_this_process():
    assert usable_cpus() == describe_environment()["cpus"] >= 1


def test_usable_cores_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


def test_the_processor_has_a_name():
    assert cpu_name().strip() == cpu_name()
    assert cpu_name()


def test_the_stamp_names_neither_host_nor_home(monkeypatch: pytest.MonkeyPatch):
    text = json.dumps(describe_environment())
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text
    user = getpass.getuser()
    assert user == "root" or user not in text
