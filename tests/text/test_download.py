"""Downloads: what is refused, and what is said when the network or the disk fails."""

import hashlib
import io
import socket
import threading

import pytest
import requests

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.download import fetch


def test_fault_114_downloads_are_https_of_bounded_size_with_the_pinned_sha256(server):
    url, files = server
    files |= {"/x": b"hello", "/away": "ftp://127.0.0.1/x"}
    file = io.BytesIO()
    fetch(f"{url}/x", file, hashlib.sha256(b"hello").hexdigest(), limit=5)
    assert file.getvalue() == b"hello"
    with pytest.raises(IntegrityError, match="more than the 4 bytes"):
        fetch(f"{url}/x", io.BytesIO(), limit=4)
    with pytest.raises(IntegrityError, match="sha256 mismatch"):
        fetch(f"{url}/x", io.BytesIO(), sha256="0" * 64)
    for refused in ("http://example.com/x", "file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(InputError, match="not an https address"):
            fetch(refused, io.BytesIO())
    for path in ("absent", "away"):
        with pytest.raises(ResourceError, match=f"download failed: {url}/{path}"):
            fetch(f"{url}/{path}", io.BytesIO())


@pytest.mark.parametrize("url", ["https://[x", "https://example.com:port/x"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError) as refusal:
        fetch(url, io.BytesIO())
    assert str(refusal.value).startswith(f"download: {url}: ")


def test_a_redirect_to_an_address_that_is_not_https_is_refused(server, monkeypatch):
    url, files = server
    files |= {"/away": f"{url}/x", "/x": b"hello"}
    monkeypatch.setattr("gpt.text.download.LOOPBACK", ())
    monkeypatch.setattr("gpt.text.download.connect", lambda _: requests.get(f"{url}/away", stream=True))
    with pytest.raises(InputError, match="not an https address"):
        fetch("https://example.com/x", io.BytesIO())


def test_a_connection_that_ends_in_the_middle_is_called_a_failed_download():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        with pytest.raises(ResourceError, match=f"download failed: {url}: .*; go online"):
            fetch(url, io.BytesIO())


def test_a_refused_connection_is_told_in_the_systems_words():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        ResourceError, match=rf"download failed: http://127.0.0.1:{port}/x: \[Errno \d+\] .*refused; go online"
    ):
        fetch(f"http://127.0.0.1:{port}/x", io.BytesIO())


def test_a_full_disk_is_not_called_a_failed_fetch(server):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    url, files = server
    files["/x"] = b"hello"
    with pytest.raises(OSError, match="No space left"):
        fetch(f"{url}/x", Full())
