"""Fixtures of tests that read the data of strangers."""

import socket
import zipfile

import pytest
from helpers import png_cell


@pytest.fixture
def no_network(monkeypatch):
    """Fails if something connects."""

    def fail(*args, **kwargs):
        raise AssertionError(f"connects: {args} {kwargs}")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(png_cell(1)["bytes"])
    with zipfile.ZipFile(f"{path}.zip", "w") as file:
        file.write(path, "a.png")
    return path
