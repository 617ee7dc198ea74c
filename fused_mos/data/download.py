"""Downloads the archive of the One Billion Word benchmark; a command of `lm1b`."""

import dataclasses
import gzip
import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast
from urllib.parse import urlsplit

from ..runtime import files
from ..runtime.progress import bar
from ..runtime.text import show
from .corpus import CorpusError

BLOCK_BYTES = 2 << 20
"""Bytes to read at once, so that memory does not grow with the size of a file."""

FOLDER = "1-billion-word-language-modeling-benchmark-r13output"
URL = f"http://www.statmt.org/lm-benchmark/{FOLDER}.tar.gz"


@dataclasses.dataclass
class Download:
    """Download, verify and extract the benchmark's archive."""

    out: Path
    """Folder to write to."""
    url: str = URL
    """URL of the archive."""
    sha256: str | None = None
    """SHA-256 that the archive must have; without it, the actual one is only printed."""


def download(config: Download) -> Path:
    """Returns the folder of the extracted archive. Raises CorpusError, FileError or FolderInUse; calling it again
    continues the download."""
    name = PurePosixPath(urlsplit(config.url).path).name
    if urlsplit(config.url).scheme not in ("http", "https") or not name:
        raise CorpusError(f"url must be the http address of a file, got {config.url!r}")
    if config.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", config.sha256):
        raise CorpusError(f"sha256 must be 64 hexadecimal digits, got {config.sha256!r}")
    with files.FolderLock(config.out):
        return _download(config, name)


def _download(config: Download, name: str) -> Path:
    archive = fetched = config.out / name
    if not archive.is_file():
        fetched = config.out / f"{name}.partial"
        _fetch(config.url, fetched)
    digest = files.sha256(fetched)
    if config.sha256 is None:
        show(f"{name}: sha256 {digest}; to verify it, pass --sha256")
    elif digest != config.sha256.lower():
        raise CorpusError(
            f"{fetched}: its sha256 is {digest}, not {config.sha256}; delete it to download it again, or correct "
            "--sha256"
        )
    with files.explained(archive):
        files.rename(fetched, archive)
        _validator(fetched).unlink(missing_ok=True)
    return _extract(archive, config.out)


def _validator(partial: Path) -> Path:
    """File that records the version of a partial download, by the server's ETag or date."""
    return partial.with_name(f"{partial.name}.version")


def _fetch(url: str, path: Path) -> None:
    """Downloads the rest of the file, or all of it if the server has another version now."""
    size, version = path.stat().st_size if path.is_file() else 0, _validator(path)
    headers = {"Range": f"bytes={size}-"} if size else {}
    if size and version.is_file():
        headers["If-Range"] = files.read_text(version)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            size = size if response.status == 206 else 0
            if size and (first := _first_byte(response.headers["Content-Range"])) != size:
                raise CorpusError(
                    f"{url}: the server continues at byte {first}, not at {size}, where {path} ends; delete that file"
                )
            length = response.headers["Content-Length"]
            total = size + int(length) if length else None
            with (
                path.open("ab" if size else "wb", buffering=0) as file,
                bar(desc="download", total=total, initial=size, unit="bytes") as progress,
            ):
                if not size:  # after truncating, so that nothing of another version is left
                    _note_version(response.headers, version)
                while block := response.read1(BLOCK_BYTES):
                    with files.explained(path):
                        file.write(block)
                    size += len(block)
                    progress.update(len(block))
                with files.explained(path):
                    files.sync(file)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise CorpusError(
                f"{url}: the server answers {error.code} {error.reason}; try again later, or another --url"
            ) from None
        # the server has no bytes beyond those in `path`
        of = (error.headers["Content-Range"] or "").rpartition("/")[2]
        if of.isdecimal() and int(of) != size:
            raise CorpusError(f"{url} has {int(of):,} bytes, and {path} {size:,}; delete that file") from None
    except (files.FileError, CorpusError):
        raise
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(f"{url}: {error}; run the same command to continue") from None
    else:
        if total not in (None, size):
            raise CorpusError(
                f"{url}: the connection ended after {size:,} of {total:,} bytes; run the same command to continue"
            )


def _first_byte(content_range: str | None) -> int | None:
    """Offset of the first byte that the server sends."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range or "")
    return int(match[1]) if match else None


def _note_version(headers: Mapping[str, str], path: Path) -> None:
    etag = headers.get("ETag", "")
    name = headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag  # If-Range takes no weak tag
    if name:
        files.write_text(path, name)
    else:
        path.unlink(missing_ok=True)


def _extract(archive: Path, out: Path) -> Path:
    """Extracts the benchmark's regular files, except those that already exist in full size."""
    n_files = 0
    try:
        with gzip.open(archive) as file, tarfile.open(fileobj=file) as tar:
            for member in bar(tar, desc="extract", unit="files"):
                path = PurePosixPath(member.name)
                if not member.isfile() or path.parts[:1] != (FOLDER,) or ".." in path.parts:
                    continue
                n_files += 1
                if not (out / path).is_file() or (out / path).stat().st_size != member.size:
                    files.make_folder((out / path).parent)
                    content = cast(IO[bytes], tar.extractfile(member))  # never None for a regular file
                    with files.writing(out / path) as extracted:
                        shutil.copyfileobj(content, extracted, BLOCK_BYTES)
            while file.read(BLOCK_BYTES):  # gzip verifies its checksum at the end of the file
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorpusError(
            f"{archive} is damaged ({error}); delete it and {out / FOLDER}, and run the same command to download again"
        ) from None
    if not n_files:
        raise CorpusError(f"{archive} has no file in {FOLDER}; url must be that of the benchmark")
    show(f"{out / FOLDER}: {n_files} files; next: python -m fused_mos.data.lm1b prepare --source {out} --out …")
    return out / FOLDER
