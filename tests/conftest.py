"""One thread per worker, no network, no progress bars: set before anything imports torch or transformers."""

import gc
import os

import pytest
from xdist.scheduler import LoadScopeScheduling


os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_finish():
    """Trainer collects garbage in every run: what the imports made, nearly all objects, need not be looked at then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def process_with_a_hub(tmp_path_factory):
    """One for all tests: it imports as much as they do."""
    from hub_client import TOKEN, client_of
    from hub_server import HubServer

    hub = HubServer(TOKEN)
    with client_of(hub, tmp_path_factory.mktemp("home")) as client:
        yield client
    hub.close()


@pytest.fixture
def client(process_with_a_hub):
    """A process whose Hub is a server on this machine, empty yet."""
    process_with_a_hub.hub.clear()
    return process_with_a_hub


class OneLaunch(LoadScopeScheduling):
    """Tests go to whichever worker is free, but those of test_ddp.py, which share a launch, to one, and first of all.

    As `--dist loadgroup` would have it, which pytest-xdist 3.8 does without effect under pytest 9.2.
    """

    def _split_scope(self, nodeid):
        file, _, _ = nodeid.partition("::")
        return file if file.endswith("test_ddp.py") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return OneLaunch(config, log)
