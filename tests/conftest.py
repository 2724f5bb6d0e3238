"""What every test runs under: no network, caches of its own, one thread a worker, the same random numbers each time.

The environment is set before anything imports torch or transformers, and reaches the processes that tests start.
"""

import atexit
import ipaddress
import os
import random
import shutil
import socket
import tempfile
import time

_HOME = tempfile.mkdtemp(prefix="unit-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
# What others forget goes with it too (gradio_client leaves an empty folder behind each file that it fetches);
# `tmp_path` stays where it was, for a look at what failed.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
os.environ["TMPDIR"] = tempfile.tempdir = os.path.join(_HOME, "tmp")
os.mkdir(tempfile.tempdir)
os.environ.update(
    HF_HOME=os.path.join(_HOME, "hub"),  # remote code and cached models of an earlier run must not decide a test
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=_HOME,
)
for _name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, in whatever order and worker it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _is_local(address) -> bool:
    """Whether a socket address stays on this machine: a path, localhost or a loopback address."""
    if not isinstance(address, tuple):
        return True
    try:
        return address[0] in ("", "localhost") or ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that connects to another machine fails, and says where it went."""
    connect = socket.socket.connect

    def refuse(self, address):
        if not _is_local(address):
            raise RuntimeError(f"a test tried to reach the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub(tmp_path):
    """A Hub of the test's own on loopback (hub_server.py); `hub.python(...)` and `hub.run(...)` are its clients."""
    from hub_server import HubServer

    with HubServer(tmp_path / "hub") as server:
        yield server
    if calls := os.environ.get("UNIT_HUB_CALLS"):  # a file that gathers the Hub calls of all tests, one a line
        with open(calls, "a") as file:
            file.writelines(f"{method} {route}\n" for method, route in server.calls())
    assert not server.errors, "\n".join(server.errors)


@pytest.fixture
def online(hub, monkeypatch):
    """huggingface_hub of this process, awake, with the Hub on loopback, by LFS, and no waiting between attempts."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hub.root / "no-token"))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
