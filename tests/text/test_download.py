"""Downloads: what is refused, and what is said when the network or the disk fails."""

import hashlib
import io
import ssl

import pytest

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.download import download


def test_fault_114_downloads_are_https_of_bounded_size_with_the_pinned_sha256(server):
    url, files = server
    files |= {"/x": b"hello", "/away": "ftp://127.0.0.1/x"}
    file = io.BytesIO()
    download(f"{url}/x", file, hashlib.sha256(b"hello").hexdigest(), limit=5)
    assert file.getvalue() == b"hello"
    with pytest.raises(IntegrityError, match="more than the 4 bytes"):
        download(f"{url}/x", io.BytesIO(), limit=4)
    with pytest.raises(IntegrityError, match="sha256 mismatch"):
        download(f"{url}/x", io.BytesIO(), sha256="0" * 64)
    for refused in ("http://example.com/x", "file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(InputError, match="not an https address"):
            download(refused, io.BytesIO())
    for path in ("absent", "away"):
        with pytest.raises(ResourceError, match=f"download failed: {url}/{path}"):
            download(f"{url}/{path}", io.BytesIO())


@pytest.mark.parametrize("url", ["https://[x", "https://example.com:port/x"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError) as refusal:
        download(url, io.BytesIO())
    assert str(refusal.value).startswith(f"download: {url}: ")


class Answer(io.BytesIO):
    """An answer whose connection fails after its first block."""

    url = "https://example.com/x"

    def __init__(self, failure):
        super().__init__(b"hello")
        self.failure = failure

    def read(self, size=-1):
        block = super().read(size)
        if not block:
            raise self.failure
        return block


@pytest.mark.parametrize("failure", [ssl.SSLError(1, "record layer failure"), OSError(113, "No route to host")])
def test_a_connection_that_fails_in_the_middle_is_called_a_failed_download(monkeypatch, failure):
    monkeypatch.setattr("gpt.text.download.connect", lambda _: Answer(failure))
    with pytest.raises(ResourceError, match=f"download failed: https://example.com/x: .*{failure.strerror}; go online"):
        download("https://example.com/x", io.BytesIO())


def test_a_full_disk_is_not_called_a_failed_download(server):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    url, files = server
    files["/x"] = b"hello"
    with pytest.raises(OSError, match="No space left"):
        download(f"{url}/x", Full())
