"""Downloads: what is refused, and what is said when the network or the disk fails."""

import hashlib
import io
import socket
import threading

import pytest
import requests

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.download import fetch

HELLO = hashlib.sha256(b"hello").hexdigest()


def test_fault_114_downloads_are_https_of_bounded_size_with_the_pinned_sha256(server):
    url, files = server
    files |= {"/x": b"hello", "/away": "ftp://127.0.0.1/x"}
    file = io.BytesIO()
    fetch(f"{url}/x", file, HELLO, limit=5)
    assert file.getvalue() == b"hello"
    with pytest.raises(IntegrityError, match="more than the 4 bytes"):
        fetch(f"{url}/x", io.BytesIO(), HELLO, limit=4)
    with pytest.raises(IntegrityError, match="sha256 mismatch"):
        fetch(f"{url}/x", io.BytesIO(), "0" * 64, limit=5)
    for refused in ("http://example.com/x", "file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(InputError, match="not an https address"):
            fetch(refused, io.BytesIO(), HELLO, 5)
    for path in ("absent", "away"):
        with pytest.raises(ResourceError, match=f"download failed: {url}/{path}"):
            fetch(f"{url}/{path}", io.BytesIO(), HELLO, 5)


@pytest.mark.parametrize(
    "url",
    [
        "https://[x",
        "https://example.com:port/x",
        "https://a b/x",
        "https://..com/x",
        f"https://{'a' * 64}.com/x",
        "https:///x",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError) as refusal:
        fetch(url, io.BytesIO(), HELLO, 5)
    assert str(refusal.value).startswith(f"download: {url}: ")
    assert str(refusal.value).endswith("; check the URL")


CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.mark.parametrize("number", range(4))
def test_certificates_are_those_that_the_first_variable_names(number, monkeypatch):
    for name in CERTIFICATES:
        monkeypatch.delenv(name, raising=False)
    for name in CERTIFICATES[number:]:
        monkeypatch.setenv(name, f"{name}.pem")
    used = []

    def send(*_, verify, **__):
        used.append(verify)
        raise requests.ConnectionError

    monkeypatch.setattr("requests.Session.send", send)
    with pytest.raises(ResourceError):
        fetch("https://example.com/x", io.BytesIO(), HELLO, 5)
    assert used == [f"{CERTIFICATES[number]}.pem" if number < 3 else True]


def test_a_file_of_certificates_that_does_not_exist_is_named(monkeypatch):
    for name in CERTIFICATES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "absent.pem")
    with pytest.raises(ResourceError, match=r"absent\.pem"):
        fetch("https://localhost/x", io.BytesIO(), HELLO, 5)


def test_a_redirect_to_an_address_that_is_not_https_is_refused(server, monkeypatch):
    url, files = server
    files |= {"/away": f"{url}/x", "/x": b"hello"}
    monkeypatch.setattr("gpt.text.download.LOOPBACK", ())
    monkeypatch.setattr("gpt.text.download.connect", lambda _: requests.get(f"{url}/away", stream=True))
    with pytest.raises(InputError, match="not an https address"):
        fetch("https://example.com/x", io.BytesIO(), HELLO, 5)


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
            fetch(url, io.BytesIO(), HELLO, 5)


def test_a_refused_connection_is_told_in_the_systems_words():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        ResourceError, match=rf"download failed: http://127.0.0.1:{port}/x: \[Errno \d+\] .*refused; go online"
    ):
        fetch(f"http://127.0.0.1:{port}/x", io.BytesIO(), HELLO, 5)


def test_a_full_disk_is_not_called_a_failed_fetch(server):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    url, files = server
    files["/x"] = b"hello"
    with pytest.raises(OSError, match="No space left"):
        fetch(f"{url}/x", Full(), HELLO, 5)
