"""Downloads: https only, with a time limit, a size cap and a pinned sha256."""

import contextlib
import hashlib
import http.client
import threading
import urllib.error
import urllib.parse
import urllib.request

from gpt.errors import InputError, IntegrityError, ResourceError

CONNECT_SECONDS = 9  # for name look-up, connection and the first answer together
READ_SECONDS = 5  # for each further block
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def download(url, file, sha256=None, limit=1 << 30):
    """Write what `url` answers to the binary `file`, at most `limit` bytes.

    Raises InputError for a URL that is not https (http is for this machine alone), ResourceError when the network or
    the server fails, IntegrityError for more than `limit` bytes or another sha256 than the pinned one."""
    check_url(url)
    digest, size = hashlib.sha256(), 0
    with contextlib.closing(blocks_of(url)) as blocks:
        for block in blocks:
            size += len(block)
            if size > limit:
                raise IntegrityError(f"download: {url}: more than the {limit} bytes expected; check the URL")
            digest.update(block)
            file.write(block)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise IntegrityError(
            f"download: {url}: sha256 mismatch (expected {sha256}, got {digest.hexdigest()}); check the URL"
        )


def blocks_of(url):
    """The blocks of bytes that `url` answers."""
    try:
        with connect(url) as answer:
            check_url(answer.url)  # where redirects have led
            while block := answer.read(1 << 20):
                yield block
    except (OSError, http.client.HTTPException) as error:  # of the network: what is done with a block happens outside
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ResourceError(f"download failed: {url}: {reason}; go online, or fetch it by hand") from None


def check_url(url):
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InputError(f"download: {url}: {error}; check the URL") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise InputError(f"download: {url}: not an https address; give one that begins with https://")


def connect(url):
    """The open answer. In a thread of its own, because a name look-up that hangs heeds no time-out."""
    found = []

    def open_url():
        try:
            found.append(urllib.request.urlopen(url, timeout=READ_SECONDS))
        except (OSError, ValueError, http.client.HTTPException) as error:
            found.append(error)

    thread = threading.Thread(target=open_url, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    answer = found[0] if found else TimeoutError(f"no answer in {CONNECT_SECONDS} s")
    if isinstance(answer, (ValueError, http.client.InvalidURL)):
        raise InputError(f"download: {url}: {answer}; check the URL") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer
