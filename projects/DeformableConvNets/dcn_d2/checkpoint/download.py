# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Downloads weights into the cache. Nothing is written outside it, and no server can make the program wait forever.

Detectron2's own downloads (iopath) keep files by the path in their address, whatever the host, and follow ".." in it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from ..files import write_atomically
from .files import CorruptCheckpointError, digest_in_name, sha256_of

logger = logging.getLogger(__name__)

SCHEMES = ("http://", "https://", "ftp://")
TIMEOUT = 30.0  # seconds without a byte
WINDOW, LEAST = 60.0, 1 << 16  # a server that sends fewer than LEAST bytes in WINDOW seconds has stalled
LARGEST = 16 << 30  # bytes, where the server does not announce how many there are
ATTEMPTS = 2


def file_name(address: str) -> str:
    """Checks an address, and gives the name under which its file is kept.

    Raises:
        ValueError: It has parts that an address of a file does not need, and that could lead elsewhere.
    """
    if not address.isascii() or any(ord(c) <= 32 or ord(c) == 127 or c in "\\#" for c in address):
        raise ValueError(f"{address!r} is refused: spaces, backslashes, # and control characters do not belong there")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{address!r} is refused: {error}") from None
    if not address.startswith(SCHEMES) or not host:
        raise ValueError(f"{address!r} is refused: it needs http://, https:// or ftp:// and a host")
    if "@" in parts.netloc:
        raise ValueError(f"an address at {host} is refused: it has a user name; download the file by other means")
    for segment in parts.path.split("/")[1:] or [""]:
        plain = unquote(segment)
        if plain in ("", ".", "..") or any(ord(c) < 32 or c in "/\\\x7f" for c in plain):
            raise ValueError(
                f"{address!r} is refused: a part of its path is {segment!r}, which names no folder or file"
            )
    # The part after the last slash. Redirections and headers do not matter. Long names keep their digest.
    return re.sub(r"[^A-Za-z0-9._+-]", "_", plain)[-120:]


def fetch(address: str, cache: Path, force: bool = False) -> tuple[Path, bool]:
    """Gives the local copy of what an address names, and whether this call has downloaded it.

    The whole address is the key in the cache. A copy that has changed since it was downloaded is downloaded again.

    Args:
        address: of http, https or ftp.
        cache: the folder for all that is kept.
        force: downloads it even if there is a copy.

    Raises:
        ValueError: The address is refused.
        OSError: The file cannot be fetched or kept.
        CorruptCheckpointError: It does not have the digest that its name says.
    """
    name = file_name(address)
    file = cache / "dcn_d2" / "downloads" / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    with locked(file, cache):
        note = read_note(file)
        if not force and note.get("address") == address and file.is_file():
            if sha256_of(file) == note.get("sha256"):
                return file, False
            logger.warning(f"{file} has changed since it was downloaded: it is downloaded again")
        with write_atomically(file) as part:
            digest = _transfer(address, part)
            expected = digest_in_name(name)
            if expected is not None and not digest.startswith(expected):
                raise CorruptCheckpointError(
                    f"{file}: its SHA-256 digest begins with {digest[:8]}, but with {expected} according to its name. "
                    "It is truncated or corrupted and was deleted; the next attempt downloads it again"
                )
        write_note(file, {"address": address, "sha256": digest})
    return file, True


def locked(file: Path, cache: Path) -> Any:
    """Makes a file's folder below the cache, and waits until no other process works on the file.

    Raises:
        OSError: The cache cannot be written to.
        ValueError: The way to the file leaves the cache.
    """
    from iopath.common.file_io import file_lock

    for path in (file, Path(f"{file}.lock"), Path(f"{file}.json")):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache)):
            raise ValueError(
                f"{path} is refused: a link leads from the cache folder {cache} to {os.path.realpath(path)}; to keep "
                "the cache elsewhere, let the variable FVCORE_CACHE name the folder"
            )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{file}.lock").touch()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(
            f"the cache folder {cache} cannot be written to: {reason}; let the variable FVCORE_CACHE name another"
        ) from error
    return file_lock(str(file))


def read_note(file: Path) -> dict[str, Any]:
    """Reads what `write_note` has noted about a file of the cache; empty if there is no note."""
    try:
        note = json.loads(Path(f"{file}.json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(file: Path, note: dict[str, Any]) -> None:
    """Notes something about a file of the cache."""
    with write_atomically(f"{file}.json") as out:
        out.write(json.dumps(note).encode())


def _transfer(address: str, part: IO[bytes]) -> str:
    """Downloads into an open file; returns the SHA-256 digest."""
    for attempt in range(1, ATTEMPTS + 1):
        part.seek(0)
        part.truncate()
        logger.info(f"downloading {address}")
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "dcn_d2"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return _receive(response, address, part)
        except urllib.error.HTTPError as error:
            reason, again = str(error), error.code >= 500
        except (urllib.error.URLError, http.client.HTTPException, _NetworkError) as error:
            reason, again = str(getattr(error, "reason", error)) or type(error).__name__, True
        except TimeoutError:
            reason, again = f"the server sent nothing for {TIMEOUT:g} seconds", True
        except ConnectionError as error:
            reason, again = str(error), True
        if not again or attempt == ATTEMPTS:
            raise OSError(f"{reason} (attempt {attempt} of {ATTEMPTS})" if again else reason)
        logger.warning(f"{address}: {reason}; trying once more")
    raise AssertionError("unreachable")


class _NetworkError(Exception):
    pass


def _receive(response: Any, address: str, part: IO[bytes]) -> str:
    digest, received = hashlib.sha256(), 0
    announced = response.headers.get("Content-Length", "")
    total = int(announced) if announced.isdigit() else None
    read = getattr(response, "read1", response.read)  # not waiting for a full block shows how slow a server is
    window_start, window_bytes, told = time.monotonic(), 0, time.monotonic()
    while block := read(1 << 16):
        part.write(block)
        digest.update(block)
        received += len(block)
        window_bytes += len(block)
        now = time.monotonic()
        if now - window_start > WINDOW:
            if window_bytes < LEAST:
                raise _NetworkError(f"the server sent only {window_bytes} bytes in {WINDOW:g} seconds")
            window_start, window_bytes = now, 0
        if now - told > 10:
            told = now
            of = f" of {total / 1e6:.0f}" if total else ""
            logger.info(f"{address}: {received / 1e6:.0f}{of} MB")
        if received > (LARGEST if total is None else total):
            raise _NetworkError(f"the server sent more than {received - len(block)} bytes")
    if received == 0 or total is not None and received < total:
        raise _NetworkError(f"retrieval incomplete: got {received} of {total if total else 'some'} bytes")
    return digest.hexdigest()
