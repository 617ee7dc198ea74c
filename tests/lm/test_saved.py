"""Hostile files in place of a model of the published code: nothing outside the file is changed, and no file takes more
memory or time than its size allows."""

import importlib
import io
import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile

import pytest
import torch

from fused_mos.lm.published import PublishedError, read_published
from fused_mos.lm.saved import _KNOWN, _MAX_BYTES

RNN = b"cmodel\nRNNModel\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def stream(body: bytes, keys: bytes = b"]", storages: bytes = b"") -> bytes:
    """A file as of PyTorch 0.4 around the opcodes of a value, without STOP."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + b"\x80\x02" + body + b".\x80\x02" + keys + b"." + storages


def archive(body: bytes, entries: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    body = body.replace(b"NtQ", b"tQ")  # of a storage, which here has one part less
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": b"\x80\x02" + body + b".", "version": b"3\n", **(entries or {})}.items():
            file.writestr(f"model/{name}", content)
    return buffer.getvalue()


def storage(numel: int) -> bytes:
    """The opcodes of a storage of floats."""
    name = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    return b"(" + name + b"J" + struct.pack("<i", numel) + b"NtQ"


def tensor(numel: int, size: int, stride: int = 1) -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + storage(numel) + b"K\x00J%b\x85K%c\x85\x89NtR" % (struct.pack("<i", size), stride)


def test_the_builders_make_what_is_read(tmp_path):
    """Otherwise everything below would be refused for another reason than its own."""
    values = struct.pack("<3f", 1, 2, 3)
    body = b"}" + text("x") + tensor(3, 3) + b"s"
    (tmp_path / "zip").write_bytes(archive(body, {"data/0": values}))
    (tmp_path / "stream").write_bytes(stream(body, b"]" + text("0") + b"a", struct.pack("<q", 3) + values))
    for name in ("zip", "stream"):
        tensors, _ = read_published(tmp_path / name)
        assert tensors["x"].tolist() == [1, 2, 3]
        assert torch.load(tmp_path / name)["x"].tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ what would be changed


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "FIFO", "file"])
def test_a_tar_archive_is_not_unpacked(kind, tmp_path):
    """torch.load unpacks it, by a tarfile that changes the mode, owner and time of what a hard link names."""
    victim, path = tmp_path / "victim", tmp_path / "model.pt"
    victim.write_text("mine")
    victim.chmod(0o600)
    before = victim.stat()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("storages")
        member.type = {
            "hard link": tarfile.LNKTYPE,
            "symbolic link": tarfile.SYMTYPE,
            "FIFO": tarfile.FIFOTYPE,
            "file": tarfile.REGTYPE,
        }[kind]
        member.linkname, member.mode, member.mtime = str(victim) if "link" in kind else "", 0o4777, 1
        file.addfile(member)
    with pytest.raises(PublishedError, match="it is a tar archive of PyTorch before 0.4"):
        read_published(path)
    after = victim.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, before.st_nlink)


@pytest.mark.parametrize("name", sorted(_KNOWN))
def test_a_pickle_sets_attributes_of_records_alone(name, tmp_path):
    """BUILD with a pair sets attributes of any object, such as a class that the pickle may name."""
    module, _, function = name.rpartition(".")
    body = f"c{module}\n{function}\n".encode() + b"N}" + text("__doc__") + text("changed") + b"s\x86b"
    for build in (stream, archive):
        (tmp_path / "model.pt").write_bytes(build(body))
        with pytest.raises(PublishedError, match="sets attributes of a Name"):
            read_published(tmp_path / "model.pt")
    assert getattr(importlib.import_module(module), function, None).__doc__ != "changed"


@pytest.mark.parametrize(
    "body",
    [
        b"(K\x01K\x02t}b",  # BUILD of a tuple
        b"]}b",
        RNN + b")\x81" + RNN + b")\x81b",  # a record for a dictionary
        b"ctorch\nSize\n(K\x01ta",  # APPEND to a class
        b"ctorch\nSize\n" + text("a") + b"Ns",  # SETITEM
        b"(ios\nsystem\n",  # INST
        b"(cos\nsystem\no",  # OBJ
        b"\x82\x01",  # an extension code
        RNN + b"}R",  # arguments that are none
        b"K\x01)R",
        b"\x85",
        b"t",
        b"",
    ],
)
def test_other_uses_of_a_pickle_are_refused(body, tmp_path):
    for build in (stream, archive):
        (tmp_path / "model.pt").write_bytes(build(body))
        with pytest.raises(PublishedError):
            read_published(tmp_path / "model.pt")


# ------------------------------------------------------------------------------------------------------ memory and time


def nested_modules(depth: int) -> bytes:
    """A module that holds the next one twice, and so on."""
    child = RNN + b")\x81"
    for level in range(depth):
        get = b"h%c" % level
        twice = b"}(" + text("a") + get + text("b") + get + b"u"
        child += b"q%c" % level + RNN + b")\x81}" + text("_modules") + twice + b"sb"
    return child


def shared_parameters(count: int, numel: int) -> bytes:
    """`count` names of one tensor."""
    named = b"".join(text(f"p{i}") + b"h\x00" for i in range(count))
    return b"}(" + text("p") + tensor(numel, numel) + b"q\x00" + named + b"u"


def overlapping(count: int, size: int) -> bytes:
    """An archive whose directory names one entry `count` times."""
    single = archive(b"}", {"data/0": bytes(size)})
    with zipfile.ZipFile(io.BytesIO(single)) as file:
        start = file.start_dir
    directory = single[start : single.rindex(b"PK\x05\x06")]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    names = b"".join(entry.replace(b"data/0", b"data/%x" % (i % 16)) for i in range(count))
    directory += names
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count + 2, count + 2, len(directory), start, 0)
    return single[:start] + directory + end


def many_entries(count: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for i in range(count):
            file.writestr(f"model/{i:0>200}", b"")
    return buffer.getvalue()


TUPLES = b"K\x01" + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(64))  # ((…), (…)): 2^64 of them
BOMBS = {
    "hash of a tuple": lambda: stream(b"}" + TUPLES + b"Ns"),
    "hash of a tuple in a set": lambda: stream(b"c__builtin__\nset\n(](" + TUPLES + b"etR"),
    "equal hashes": lambda: stream(
        b"}(" + b"".join(b"\x8a\x0a%bN" % (i * (2**61 - 1)).to_bytes(10, "little") for i in range(50_000)) + b"u"
    ),
    "opcodes": lambda: stream(b"](" + b"}" * 2_000_000 + b"e"),
    "opcodes in an archive": lambda: archive(b"](" + b"}" * 2_000_000 + b"e"),
    "a long pickle": lambda: archive(b"B" + struct.pack("<I", 2 * _MAX_BYTES) + bytes(2 * _MAX_BYTES)),
    "a large memo": lambda: stream(b"Nr\xff\xff\xff\x7f"),
    "a large bytearray": lambda: stream(b"\x96" + struct.pack("<Q", 1 << 34)),
    "large bytes": lambda: stream(b"\x8e" + struct.pack("<Q", 1 << 40)),
    "a large frame": lambda: stream(b"\x95" + struct.pack("<Q", 1 << 40)),
    "modules in modules": lambda: stream(nested_modules(60)),
    "a module in itself": lambda: stream(RNN + b")\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb"),
    "a large storage": lambda: stream(b"}" + text("x") + tensor(2**31 - 1, 8) + b"s", b"]" + text("0") + b"a"),
    "a large storage of which there is nothing": lambda: stream(
        b"}" + text("x") + tensor(2**31 - 1, 8) + b"s", b"]" + text("0") + b"a", struct.pack("<q", 2**31 - 1) + bytes(9)
    ),
    "an expanded tensor": lambda: archive(
        b"}" + text("x") + tensor(1, 2**31 - 1, stride=0) + b"s", {"data/0": bytes(4)}
    ),
    "sets of one list": lambda: stream(
        b"](" + text("a") * 60_000 + b"eq\x00" + b"c__builtin__\nset\nh\x00\x85R" * 40_000
    ),
    "sets of one string": lambda: stream(text("ab" * 1_000_000) + b"q\x00" + b"c__builtin__\nset\nh\x00\x85R" * 40_000),
    "records of one dictionary": lambda: stream(
        b"}(" + b"".join(text(f"{i}") + b"N" for i in range(40_000)) + b"uq\x00" + (RNN + b")\x81h\x00b") * 30_000
    ),
    "a long identity": lambda: stream(b"(" + text("storage") + b"N" * 60_000 + b"tq\x00" + b"h\x00Q" * 60_000),
    "a product of large numbers": lambda: archive(
        b"}"
        + text("x")
        + tensor(1, 1).replace(
            b"J\x01\x00\x00\x00\x85K\x01\x85", b"(\x8a\xff" + b"\x01" * 255 + b"q\x09" + b"h\x09" * 150_000 + b"t)"
        )
        + b"s",
        {"data/0": bytes(4)},
    ),
    "a shared tensor": lambda: archive(shared_parameters(900, 1_000_000), {"data/0": bytes(4_000_000)}),
    "a compressed storage": lambda: archive(
        b"}" + text("x") + tensor(2**28, 8) + b"s", {"data/0": bytes(2**30)}, zipfile.ZIP_DEFLATED
    ),
    "overlapping entries": lambda: overlapping(20_000, 1 << 20),
    "a large directory": lambda: many_entries(30_000),
    "nested lists": lambda: stream(b"]" * 100_000 + b"a" * 99_999),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_does_not_go_off(bomb, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(BOMBS[bomb]())
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(PublishedError) as error:
        read_published(path)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400 * 1024  # KiB
    assert len(str(error.value)) < 1000


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(PublishedError, match="there is no file"):
        read_published(tmp_path / "model.pt")


def test_flipped_bits_of_an_archive_are_found(tmp_path):
    """Or are where they change no number that is read."""
    path, generator = tmp_path / "model.pt", torch.Generator().manual_seed(0)
    torch.save({"x": torch.arange(300.0)}, path)
    content = path.read_bytes()
    for place in torch.randint(0, 8 * len(content), (300,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tensors, _ = read_published(path)
        except PublishedError:
            continue
        assert list(tensors) == ["x"] and torch.equal(tensors["x"], torch.arange(300.0))
