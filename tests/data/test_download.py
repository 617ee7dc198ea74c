"""The download of the One Billion Word benchmark: cut off, continued, of another digest, and refused."""

import hashlib
import http.server
import io
import os
import tarfile
import threading

import pytest

from fused_mos.data import lm1b
from fused_mos.data.lm1b import FOLDER, FOLDERS, SHARDS


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, with or without ranges, and can drop the connection after some bytes."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.sends, self.requests = content, True, len(content), []
        self.version, self.shift = "", 0  # its ETag; how far off the parts are that it sends


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.requests.append(asked)
        if self.headers["If-Range"] not in (None, server.version):
            asked = None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if self.path != "/archive.tar.gz":
            return self.send_error(404)
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            first, size = start + server.shift, len(server.content)
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        if server.version:
            self.send_header("ETag", server.version)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : start + server.sends])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        members = {f"{FOLDER}/{FOLDERS['train']}/{name}": name.encode() for name in SHARDS["train"][:3]}
        for name, content in {
            **members,
            "elsewhere": b"x",
            f"{FOLDER}/../above": b"x",
            f"./{FOLDER}/README": b"read me",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo(f"{FOLDER}/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    server = Server(buffer.getvalue())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def download(server, out, *flags, path="archive.tar.gz"):
    return lm1b.main(["download", "--out", str(out), "--url", f"http://127.0.0.1:{server.server_port}/{path}", *flags])


def test_download(server, tmp_path, capsys):
    digest = hashlib.sha256(server.content).hexdigest()
    assert download(server, tmp_path) == 0
    assert f"sha256 {digest}" in capsys.readouterr().out
    names = [f"{FOLDER}/{FOLDERS['train']}/{name}" for name in SHARDS["train"][:3]] + [f"{FOLDER}/README"]
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {".lock", "archive.tar.gz", *names}
    times = [(tmp_path / name).stat().st_mtime_ns for name in names]
    content = (tmp_path / names[0]).read_bytes()
    (tmp_path / names[0]).write_bytes(b"half")
    assert download(server, tmp_path, "--sha256", digest.upper()) == 0
    assert server.requests == [None] and (tmp_path / names[0]).read_bytes() == content
    assert [(tmp_path / name).stat().st_mtime_ns for name in names[1:]] == times[1:]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_continues(ranges, server, tmp_path, capsys):
    digest = hashlib.sha256(server.content).hexdigest()
    server.ranges, server.sends = ranges, 100
    assert download(server, tmp_path) == 2
    assert (
        f"the connection ended after 100 of {len(server.content)} bytes; run the same command to continue"
        in capsys.readouterr().err
    )
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "archive.tar.gz.partial"}
    server.sends = len(server.content)
    assert download(server, tmp_path, "--sha256", digest) == 0
    assert server.requests == [None, "bytes=100-"] and (tmp_path / "archive.tar.gz").read_bytes() == server.content


def test_a_download_of_another_version_begins_anew(server, tmp_path):
    server.sends, server.version = 100, '"1"'
    assert download(server, tmp_path) == 2
    assert (tmp_path / "archive.tar.gz.partial.version").read_text() == '"1"'
    server.sends, server.version = len(server.content), '"2"'
    server.content = server.content[:4] + b"time" + server.content[8:]  # gzip's header has one
    digest = hashlib.sha256(server.content).hexdigest()
    assert download(server, tmp_path, "--sha256", digest) == 0
    assert not list(tmp_path.glob("*.partial*"))


def test_a_part_that_does_not_fit_is_refused(server, tmp_path, capsys):
    server.sends = 100
    assert download(server, tmp_path) == 2
    server.shift = 7
    assert download(server, tmp_path) == 2
    partial = tmp_path / "archive.tar.gz.partial"
    assert f"the server continues at byte 107, not at 100, where {partial} ends; delete" in capsys.readouterr().err
    partial.write_bytes(server.content + b"more")
    assert download(server, tmp_path) == 2
    assert f"{len(server.content)} bytes, and {partial} {len(server.content) + 4}; delete" in capsys.readouterr().err


def test_a_download_with_another_digest(server, tmp_path, capsys):
    digest = hashlib.sha256(server.content).hexdigest()
    assert download(server, tmp_path, "--sha256", "0" * 64) == 2
    assert f"its sha256 is {digest}, not {'0' * 64}; delete it" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "archive.tar.gz.partial"}
    assert download(server, tmp_path, "--sha256", digest) == 0, "it is whole and needs only the check"
    assert server.requests == [None, f"bytes={len(server.content)}-"]


def test_downloads_that_fail(server, tmp_path, capsys):
    def error(*flags, **options):
        assert download(server, tmp_path, *flags, **options) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "the server answers 404 Not Found" in error(path="nothing.tar.gz")
    assert "url must be the http address of a file, got 'ftp://x/y'" in error("--url", "ftp://x/y")
    assert "sha256 must be 64 hexadecimal digits, got 'abc'" in error("--sha256", "abc")
    server.content = server.content[:-20]
    assert "archive.tar.gz is damaged" in error()
    (tmp_path / "archive.tar.gz").unlink()
    if os.path.exists("/dev/full"):
        (tmp_path / "archive.tar.gz.partial").symlink_to("/dev/full")
        assert f"the disk that holds {tmp_path / 'archive.tar.gz.partial'} is full" in error()
    server.server_close()
    assert error().endswith("run the same command to continue")
