"""A hub on loopback that has nothing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


def hub_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """huggingface_hub asks whoever listens on a port of this machine."""
    constants, url = "huggingface_hub.constants", f"http://127.0.0.1:{port}"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", url)
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url + path)


@contextmanager
def hub_without(monkeypatch: pytest.MonkeyPatch, what: str) -> Iterator[None]:
    """huggingface_hub asks a server that answers 404 and `what` ("RepoNotFound")."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.send_header("X-Error-Code", what)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub_at(monkeypatch, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
