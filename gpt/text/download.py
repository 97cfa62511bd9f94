"""Downloads: https only, with a time limit, a size cap and a pinned sha256. Importing requests takes a quarter of a
second, so import this module where something is downloaded."""

import hashlib
import os
import threading
import urllib.parse
from concurrent.futures import Future, wait
from typing import IO

import requests
from urllib3.exceptions import LocationParseError

from gpt.errors import InputError, IntegrityError, ResourceError

CONNECT_SECONDS = 9  # for name look-up, connection, redirects and the first answer together
READ_SECONDS = 5  # for each further block
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def fetch(url: str, file: IO[bytes], sha256: str, limit: int) -> None:
    """Downloads `url` into the binary `file`.

    Raises InputError for a malformed URL or a URL that is not https (http is allowed to this machine alone),
    ResourceError if the network or the server fails, IntegrityError for more than `limit` bytes or another sha256 than
    `sha256`."""
    check_url(url)
    digest, size = hashlib.sha256(), 0
    try:
        with connect(url) as answer:
            for visited in (*answer.history, answer):  # the redirects
                check_url(visited.url)
            for block in answer.iter_content(1 << 20):
                size += len(block)
                if size > limit:
                    raise IntegrityError(f"download: {url}: more than the {limit} bytes expected; check the URL")
                digest.update(block)
                file.write(block)
    except (requests.exceptions.InvalidURL, UnicodeError, LocationParseError) as error:
        raise InputError(f"download: {url}: {error}; check the URL") from None
    except (requests.RequestException, ValueError) as error:
        raise ResourceError(f"download failed: {url}: {root_cause(error)}; go online, or fetch it by hand") from None
    if digest.hexdigest() != sha256:
        raise IntegrityError(
            f"download: {url}: sha256 mismatch (expected {sha256}, got {digest.hexdigest()}); check the URL"
        )


def check_url(url: str) -> None:
    """Raises InputError unless `url` is an https address, or an http address of this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises ValueError too
    except ValueError as error:
        raise InputError(f"download: {url}: {error}; check the URL") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise InputError(f"download: {url}: not an https address; give one that begins with https://")


def connect(url: str) -> requests.Response:
    """Returns the open response of `url`. Raises requests.RequestException or ValueError if there is none within
    CONNECT_SECONDS.

    The request runs in a thread of its own, because nothing else ends a name look-up that hangs."""
    future: Future[requests.Response] = Future()

    def request() -> None:
        try:
            headers = {"Accept-Encoding": "identity"}  # so that size and sha256 are of the bytes sent
            answer = requests.get(url, headers=headers, stream=True, timeout=READ_SECONDS, verify=certificates())
            answer.raise_for_status()
            future.set_result(answer)
        except (requests.RequestException, ValueError) as error:
            future.set_exception(error)
        except OSError as error:  # the file of certificates does not exist
            future.set_exception(requests.RequestException(error))

    threading.Thread(target=request, daemon=True).start()
    wait([future], CONNECT_SECONDS)
    if not future.done():
        raise requests.Timeout(f"no answer in {CONNECT_SECONDS} s")
    return future.result()


def certificates() -> str | bool:
    """Returns the file of trusted certificates that the environment names, by the variables of requests or else by
    OpenSSL's, which requests ignores; True for the certificates of requests."""
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    return next(filter(None, map(os.environ.get, names)), True)


def root_cause(error: BaseException) -> BaseException:
    """Returns the first error in a chain of errors. requests wraps the system's error several times."""
    while error.__context__ is not None:
        error = error.__context__
    return error
