"""Names that are no directory: the hub is asked where this machine reaches it, and only there."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http as http

from fips.app.sources import empty_model
from fips.config import DataConfig
from fips.data import load_batches
from fips.errors import FipsError
from fips.files.hub import hub_where_reached
from fips.storage.checkpoint import local_directory


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host has an address, and whoever asks one all the same waits in vain."""

    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(http.time, "sleep", lambda _: pytest.fail("the client tries again and again"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(
    "ask",
    [
        lambda: empty_model("nothere"),
        lambda: empty_model("owner/nothere"),
        lambda: empty_model("owner/nothere/model.gguf"),
        lambda: local_directory("owner/nothere"),
        lambda: load_batches(DataConfig(source="owner/nothere"), kind="text", purpose="calibration", processor=len),
    ],
    ids=["model", "repository", "gguf", "download", "data"],
)
def test_without_network_a_name_is_refused_at_once(ask: Callable[[], Any]) -> None:
    with pytest.raises(FipsError, match="nothere"):
        ask()
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("away")
def test_without_network_the_clients_read_what_they_have() -> None:
    with hub_where_reached():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("away")
def test_behind_a_proxy_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    with hub_where_reached():
        assert not constants.HF_HUB_OFFLINE


def test_where_the_hub_has_an_address_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [()])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_where_reached():
        assert not constants.HF_HUB_OFFLINE
