"""What every test file shares: hypothesis profiles, the device, the backend's name, a clean Dynamo."""

import faulthandler
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers.suite_time import SuiteTime

# ``ci`` is what the claims rest on: no randomness, so that a red run is red again. ``dev`` looks elsewhere each time.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
# What fails inside the backend is a failure here, not a site that stays dense; see errors.py.
os.environ.setdefault("OMNISPARSE_RAISE_BUGS", "1")
#: A test that takes so many seconds hangs: its process ends with every thread's stack, and the run goes on without it.
HANGS = 900
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    # Write it with =: a file that exists would else be taken for a test.
    parser.addoption("--results", metavar="FILE", help="write outcomes, times and versions there, as JSON")


def pytest_configure(config):
    """One thread, and ``backend="omnisparse"`` known in a bare checkout too, where no entry point says so."""
    from torch._dynamo import list_backends, register_backend

    # Thousands of tiny operators: more threads only wait for one another (minutes on two busy cores).
    torch.set_num_threads(1)
    if "omnisparse" not in list_backends(exclude_tags=()):
        from omnisparse_flex.backend import omnisparse_backend

        register_backend(omnisparse_backend, name="omnisparse")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SuiteTime(config), "suite_time")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    faulthandler.dump_traceback_later(HANGS, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run that do not care: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def eager_inner(monkeypatch):
    """What models compile in this test runs as it is: no wait for Inductor where only results count."""
    monkeypatch.setattr("omnisparse_flex.backend.Backend.inner_for", lambda *_: "eager")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No test sees another's compiled code, recompile counters or cached guards."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
