"""Downloading checkpoints: https only, proved by their whole sha256, never half a file in the cache.

The cache is the one of ``torch.hub``. A manifest beside each file holds its sha256 and the URL it came from, and the
reader verifies it on every use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import torch

from mmvmamba.checkpoints.atomic import replacing
from mmvmamba.checkpoints.manifest import Manifest, read_manifest, sha256_of, write_manifest
from mmvmamba.errors import CheckpointError, HashMismatch
from mmvmamba.version import __version__

#: Bytes. The largest detector of the field has a tenth of it; a server that never stops sending fills no disk.
MAX_SIZE = 16 << 30
_TIMEOUT = 60.0
#: Of the 255 bytes that a file name may have; the rest is for the endings of manifests and unfinished files.
_MAX_NAME = 200
_CHUNK = 1 << 20


def fetch(url: str, sha256: str | None = None) -> Path:
    """Return the file of a URL in the cache, downloaded if it is not there.

    Where several processes ask at once, one downloads and the others wait for it: a lock on the folder, which a killed
    process leaves open, decides, so it holds for the ranks of a training and for two trainings alike.

    Args:
        url: An https URL; ``#sha256=<64 hexadecimal digits>`` at its end is what the file must hash to.
        sha256: The same, for URLs that come without.

    Raises:
        CheckpointError: If it is no https URL, leads to one, is too large or cannot be downloaded.
        HashMismatch: If the file is another one. Nothing of it stays in the cache.
    """
    wanted = known_hash(url, sha256)
    parts = _split(url)
    if parts.scheme != "https" or not parts.netloc:
        raise CheckpointError(
            f"checkpoint {url!r} is not fetched, expected an https URL or a file: what comes over other roads can be "
            "changed on its way. Download it by a way you trust and name the file."
        )
    plain_url = urlunsplit(parts._replace(fragment=""))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    with _alone(folder) as writable:
        path = _place(folder, parts, plain_url)
        manifest = read_manifest(path) if path.is_file() else None
        kept = path.is_file()
        if not kept and not writable:
            raise CheckpointError(
                f"checkpoint {url!r} is not in {str(folder)!r}, which cannot be written to, expected one or the other. "
                "Let TORCH_HOME name a folder of yours, or name a file instead of the URL."
            )
        if not kept:
            found, size = _download(plain_url, path, wanted)
        elif manifest is None:
            with path.open("rb") as file:
                found, size = sha256_of(file)
        else:
            found, size = manifest.sha256, manifest.size
        if wanted and found != wanted:
            raise HashMismatch(
                f"checkpoint {str(path)!r} of {plain_url!r} has sha256 {found}, expected {wanted}. Delete the file to "
                "download it again, or correct the hash."
            )
        if manifest is None and writable:
            write_manifest(path, Manifest(found, size, versions={"mmvmamba": __version__}, source={"url": plain_url}))
        if manifest is None and not wanted:
            came = "is trusted as it came"
            if kept:
                came = f"{str(path)!r} was there already, of whichever URL; it is trusted to be this one's"
            warnings.warn(
                f"checkpoint {plain_url!r} has no known sha256 and {came}; to prove it from now on, "
                f"write {plain_url}#sha256={found}",
                stacklevel=3,
            )
    return path


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {url!r} is no URL ({error}), expected an https one. Correct it.") from error


def known_hash(url: str, sha256: str | None = None) -> str | None:
    """Return what the file of a URL must hash to, or None where neither the URL nor ``sha256`` says.

    Raises:
        HashMismatch: If the two differ, are no sha256, or something else than ``sha256=`` stands behind a ``#``.
    """
    _, mark, fragment = url.partition("#")
    given = fragment.removeprefix("sha256=")
    if mark and given == fragment:
        raise HashMismatch(
            f"checkpoint {url!r} ends with {mark + fragment!r}, expected #sha256= and 64 hexadecimal digits, or none. "
            "A misspelt hash would prove nothing: correct it."
        )
    known = {text.lower() for text in ([given] if mark else []) + ([sha256] if sha256 is not None else [])}
    for text in known:
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise HashMismatch(f"sha256 is {text!r}, expected 64 hexadecimal digits. A shortened hash proves nothing.")
    if len(known) > 1:
        raise HashMismatch(f"sha256 of {url!r} is given twice, as {sorted(known)}. Give one.")
    return known.pop() if known else None


def _place(folder: Path, parts: SplitResult, url: str) -> Path:
    """Return where the file of a URL belongs; two URLs that end alike get two files."""
    name = Path(unquote(parts.path)).name
    if len(name.encode()) > _MAX_NAME or not name or name.startswith(".") or name.endswith(".json") or "\0" in name:
        # A manifest is called so: a download must not take the place of another file's.
        raise CheckpointError(
            f"checkpoint {url!r} names no file of weights, expected one of at most {_MAX_NAME} bytes at its end."
        )
    path = folder / name
    manifest = read_manifest(path) if path.is_file() else None
    if manifest is not None and (manifest.source or {}).get("url", url) != url:
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        return path.with_name(f"{path.stem}-{digest}{path.suffix}")
    return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the lock of the cache; yield False where it is of others, who keep files there that may be read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".mmvmamba.lock").open("w")
    except OSError:
        yield False
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise CheckpointError(
                f"checkpoint {req.full_url!r} leads to {newurl!r}, expected https all the way. Download it by a way "
                "you trust and name the file."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str) -> Any:
    """Open an https URL; the answer has ``headers`` and is read like a file."""
    opener = urllib.request.build_opener(_HttpsOnly)
    request = urllib.request.Request(url, headers={"User-Agent": f"mmvmamba/{__version__}"})  # noqa: S310
    return opener.open(request, timeout=_TIMEOUT)


def _download(url: str, path: Path, wanted: str | None) -> tuple[str, int]:
    try:
        with open_url(url) as answer, replacing(path) as temporary, temporary.open("wb") as file:
            expected = answer.headers.get("Content-Length")
            found, size = _copy(answer, file, url, int(expected) if expected else None)
            file.flush()
            if wanted and found != wanted:
                raise HashMismatch(
                    f"checkpoint {url!r} came with sha256 {found}, expected {wanted}. It was not kept: the server has "
                    "another file than the one that was published, or the hash is wrong."
                )
            return found, size
    except (OSError, urllib.error.URLError, http.client.HTTPException, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {url!r} could not be downloaded to {str(path)!r}: {error}. Download it elsewhere and put it "
            "there, or name the file instead of the URL: --weights FILE of a demo, --cfg-options "
            "model.backbone.init_cfg.checkpoint=FILE of a training (init_cfg=None there begins from random weights)."
        ) from error


def _copy(answer: BinaryIO, file: BinaryIO, url: str, expected: int | None) -> tuple[str, int]:
    digest, size, shown = hashlib.sha256(), 0, -1
    limit = MAX_SIZE
    if expected is not None and expected > shutil.disk_usage(Path(file.name).parent).free:
        raise OSError(f"the disk has no room for its {expected} bytes")
    while chunk := answer.read(_CHUNK):
        size += len(chunk)
        if size > limit or (expected or 0) > limit:
            raise OSError(f"it has more than {limit} bytes, the largest size that is downloaded")
        digest.update(chunk)
        file.write(chunk)
        shown = _show(url, size, expected, shown)
    if expected is not None and size != expected:
        raise OSError(f"the connection ended after {size} of {expected} bytes")
    return digest.hexdigest(), size


def _show(url: str, size: int, expected: int | None, shown: int) -> int:
    """Print a line for every tenth of the file, or every 100 MB of one of unknown length."""
    tenth = size * 10 // expected if expected else size // 100_000_000
    if tenth > shown:
        of = f" of {expected / 1e6:.0f}" if expected else ""
        print(f"downloading {url}: {size / 1e6:.0f}{of} MB", file=sys.stderr, flush=True)
    return max(tenth, shown)
