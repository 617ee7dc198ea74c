"""Pipes, devices, links and files of the wrong size among those of a run: told in one line, without waiting for a
writer and without filling the memory."""

import json
import os
import resource
import signal

import pytest
import torch
from runs import refused
from safetensors.torch import save

from fused_mos import evaluate, generate, train, train_1b
from fused_mos.runtime import files
from fused_mos.training import CheckpointError
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def soon_and_small():
    """A test that waits for a pipe is ended, and gets no memory for an endless file."""

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def name_parts(path, names, digest="0" * 64):
    path.write_bytes(save({}, {"parts": json.dumps(names), "sha256": digest}))


@pytest.mark.parametrize("special", ["pipe", "device", "twice", "hard links", "headless", "folder", "long header"])
def test_parts_that_are_none(special, tmp_path):
    path, names = tmp_path / "x.safetensors", ["part"]
    message = "part is not a regular file"
    if special == "pipe":
        os.mkfifo(tmp_path / "part")
    elif special == "device":
        (tmp_path / "part").symlink_to("/dev/zero")
    elif special == "twice":
        (tmp_path / "part").write_bytes(bytes(1 << 20))
        names, message = ["part"] * 2000, "it names a part twice"
    elif special == "hard links":  # each begins as a checkpoint does, of a few bytes
        (tmp_path / "part").write_bytes(save({"a": torch.zeros(1 << 19)}))
        names += [f"part {i}" for i in range(2000)]
        for name in names[1:]:
            (tmp_path / name).hardlink_to(tmp_path / "part")
        message = r"its parts have 4,196,\d*,\d* bytes, and its tensors need 2,097,"
    elif special == "headless":
        (tmp_path / "part").write_bytes(b"\xff" * 1000)
        message = "its parts do not begin with a header"
    elif special == "folder":
        (tmp_path / "part").mkdir()
        message = "Is a directory"
    else:
        (tmp_path / "part").write_bytes((90_000_000).to_bytes(8, "little") + b"[" * 1000)
        message = "is truncated or damaged"
    name_parts(path, names)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("names", [3, {"a": 1}, [3], [None], [""], [".."], ["/etc/passwd"], ["../x"], ["a\0b"], "part"])
def test_names_that_no_part_has(names, tmp_path):
    name_parts(tmp_path / "x.safetensors", names)
    with pytest.raises(CheckpointError, match="its parts must be a list of file names|null byte"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_deep_list_of_parts(tmp_path):
    (tmp_path / "x").write_bytes(save({}, {"parts": "[" * 100_000, "sha256": ""}))
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        load_checkpoint(tmp_path / "x")


def test_a_header_that_is_cut_over_parts(tmp_path):
    """A checkpoint of many tensors has a long header."""
    path, tensors = (
        tmp_path / "x.safetensors",
        {f"a tensor with a long name, {i}": torch.ones(60) for i in range(12_000)},
    )
    save_checkpoint(path, tensors, {}, max_mib=1)
    assert int.from_bytes((parts := sorted(tmp_path.glob("x.safetensors.*")))[0].read_bytes()[:8], "little") > 1 << 20
    assert len(parts) == 4 and load_checkpoint(path)[0].keys() == tensors.keys()


@pytest.mark.parametrize("previous", ["pipe", "[3]", "3", "[" * 100_000])
def test_parts_are_cleared_away_whatever_the_checkpoint_before_names(previous, tmp_path):
    path, before = tmp_path / "x.safetensors", tmp_path / "x.safetensors.previous"
    if previous == "pipe":
        os.mkfifo(before)
    else:
        before.write_bytes(save({}, {"parts": previous, "sha256": ""}))
    (tmp_path / "x.safetensors.0123456789ab.000").touch()
    save_checkpoint(path, {"a": torch.ones(3)}, {"n": 1})
    assert {each.name for each in tmp_path.iterdir()} == {path.name, before.name} and load_checkpoint(path)[1]["n"] == 1


@pytest.mark.trains
def test_pipes_in_place_of_a_runs_files(finished_run, corpus_folder, capsys):
    run = finished_run(1)
    for path, command, message in (
        (run / "best.safetensors", evaluate, "there is no checkpoint"),
        (run / "config.json", generate, "is not the folder of a run"),
        (corpus_folder / "test.txt", evaluate, "lacks test.txt"),
    ):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(command, [run], capsys, message)
        path.unlink()
        path.write_bytes(content)
    (run / "last.safetensors").unlink()
    (run / "last.safetensors.previous").unlink()
    os.mkfifo(run / "last.safetensors")
    refused(train, ["--resume", run], capsys, "there is no checkpoint")


@pytest.mark.parametrize("read", [files.read_text, files.sha256, files.read_json])
def test_files_without_an_end_are_not_read(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "pipe"):
        with pytest.raises(files.FileError, match=f"{name} is not a regular file"):
            read(tmp_path / name)
    with pytest.raises(files.FileError, match="No such file"):
        read(tmp_path / "none")
    with pytest.raises(files.FileError, match="Is a directory"):
        read(tmp_path)


@pytest.mark.trains
def test_pipes_among_the_files_of_ranks(two_checkpoints, capsys):
    """Includes a file that state.json does not name, since the reader opens all files."""
    out, flags = two_checkpoints
    (best,) = (out / "best").iterdir()
    os.mkfifo(best / "more.safetensors")
    refused(train_1b, [*flags, "--evaluate"], capsys, f"{best / 'more.safetensors'} is not a regular file")
    (best / "more.safetensors").unlink()
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
        os.mkfifo(checkpoint / "state.json")
    refused(train_1b, [*flags, "--max-steps", "9"], capsys, "state.json is not a regular file")
    refused(train_1b, ["--resume", out], capsys, "state.json is not a regular file")
