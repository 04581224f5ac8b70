"""A hub that is not there, does not answer, or answers that it is out of order: said within seconds, with what was to be fetched."""

import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import datasets
import pytest
import timm
from huggingface_hub import constants

from ssl_vit.data.sources import load_split
from ssl_vit.errors import Failure
from ssl_vit.weights.checkpoint import load_backbone


class Server(socketserver.ThreadingTCPServer):
    """Accepts every connection; answers with `text`, or never."""

    daemon_threads = True

    def __init__(self, text: str) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.text, self.closed = text.encode(), threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            assert isinstance(self.server, Server)
            self.request.recv(65536)
            if self.server.text:
                self.request.sendall(self.server.text)
            else:
                self.server.closed.wait(60)


@pytest.fixture(params=["nobody there", "", "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with Server(request.param) as server:
        port = 9 if request.param == "nobody there" else server.server_address[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.closed.set()
        server.shutdown()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("fetch", "what"),
    [
        (lambda: load_split("nobody/nothing", "train"), "the dataset 'nobody/nothing' cannot be fetched"),
        (lambda: load_backbone("timm:vit_tiny_patch16_224"), "cannot fetch the weights of timm:vit_tiny_patch16_224"),
    ],
)
def test_what_cannot_be_fetched_is_said_within_seconds(fetch: Callable[[], object], what: str) -> None:
    begun = time.monotonic()
    with pytest.raises(Failure, match=what):
        fetch()
    assert time.monotonic() - begun < 8  # 3 s are waited for an answer; the rest is for a busy machine


class ProxyError(Exception):
    """As of httpx, whose errors are none of the system's."""

    __module__ = "httpx"


def test_a_proxy_that_lets_the_hub_through_and_not_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def refused(name: str, pretrained: bool, **kwargs: object) -> object:
        if pretrained:
            raise ProxyError("403 Forbidden")
        return create(name, pretrained, **kwargs)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ssl_vit.weights.checkpoint.hub_answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", refused)
    with pytest.raises(Failure, match="the weights of timm:vit_tiny_patch16_224: 403 Forbidden; the cache is"):
        load_backbone("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("Unknown model"), Failure("ours")])
def test_what_is_no_fault_of_the_network_is_not_called_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ssl_vit.weights.checkpoint.hub_answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(type(error)) as raised:
        load_backbone("timm:vit_tiny_patch16_224")
    assert raised.value is error
