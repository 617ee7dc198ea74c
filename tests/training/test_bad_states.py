"""JSON of a One Billion Word run with wrong values and a correct digest: one line and exit status 2. Also ranks without
torchrun."""

import contextlib
import datetime
import json
import math
import shutil
import socket
import threading

import pytest
from runs import refused

from fused_mos import train_1b
from fused_mos.runtime import files
from fused_mos.training.lm1b import ranks


@pytest.fixture
def edited(two_checkpoints, monkeypatch):
    """Rewrites state.json of a folder's last checkpoint with other values; NaN is kept."""
    out, flags = two_checkpoints
    shutil.rmtree(out / "checkpoints" / "step-00000003")
    monkeypatch.setattr(files, "to_json", lambda value, **options: json.dumps(value, **options))

    def edit(folder, **values):
        (path,) = (out / folder).glob("*/state.json")
        whole = path.with_name("whole")
        if not whole.exists():
            shutil.copy(path, whole)
        state = json.loads(whole.read_text())
        del state["digest"]
        files.write_sealed(path, state | values)
        return state

    edit.flags = [*flags, "--max-steps", "7"]
    return edit


@pytest.mark.trains
def test_wrong_progress(edited, capsys):
    progress = edited("checkpoints")["progress"]
    wrong = "is of another version: "
    for name, before in progress.items():
        if name == "position":
            continue
        values = ["x", True, [1], {}, *([None] if name != "best" else [])]
        values += [-5, 10**30] if type(before) is int else [10**400, math.nan]
        for value in values:
            edited("checkpoints", progress=progress | {name: value})
            refused(train_1b, edited.flags, capsys, wrong, name)
    for value in (3, None, "x", [], {}):
        edited("checkpoints", progress=value)
        refused(train_1b, edited.flags, capsys, wrong)
        edited("checkpoints", progress=progress | {"position": value})
        refused(train_1b, edited.flags, capsys, wrong, "position")


@pytest.mark.trains
def test_a_position_outside_of_the_text(edited, capsys):
    """The segments of a missing shard would be awaited forever."""
    progress = edited("checkpoints")["progress"]
    for name in ("epoch", "shard", "row"):
        numbers, others = (-1, 10**9) if name != "epoch" else (-1, 10**400), ("x", None, 1.5)
        for value in (*numbers, *others):
            edited("checkpoints", progress=progress | {"position": progress["position"] | {name: value}})
            message = "position must be in" if value in numbers else f"{name} must be a whole number"
            refused(train_1b, edited.flags, capsys, f"is of another version: {message}")


@pytest.mark.trains
def test_wrong_configurations_and_files(edited, capsys):
    for value in (3, None, "x", []):
        edited("checkpoints", config=value)
        for flags in (edited.flags, ["--resume", edited.flags[edited.flags.index("--out") + 1]]):
            refused(train_1b, flags, capsys, "it must be an object with named values")
        edited("checkpoints", files=value)
        refused(train_1b, edited.flags, capsys, "is of another version: files must be an object")
    for names in ({"a\0b": "x"}, {"x" * 5000: "x"}, {"none": "x"}, {"state.json": 3}, {"": None}):
        edited("checkpoints", files=names)
        refused(train_1b, edited.flags, capsys, "checkpoint ")
    edited("checkpoints", config={"model": {"head": "x"}})
    refused(train_1b, edited.flags, capsys, "head must be one of mos, moc, softmax, got 'x'")


@pytest.mark.trains
def test_a_wrong_best_model(edited, capsys):
    for name, values in (("step", ("x", None, -1, True)), ("loss", ("x", None, math.nan, [], 10**400))):
        for value in values:
            edited("best", **{name: value})
            refused(train_1b, [*edited.flags, "--evaluate"], capsys, f"is of another version: {name} must")


# ------------------------------------------------------------------------------------------------------------- torchrun


def hang_up(server):
    """Hangs up on every caller, until the socket is closed or nobody has called for a while."""
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


@pytest.mark.parametrize("torchrun", ["is gone", "goes"])
def test_ranks_without_torchrun_end(torchrun, flags, tmp_path, monkeypatch, capfd):
    """torchrun was killed before the ranks reached its store, or while they look for each other there."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        environment = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1]}
        for name, value in {**environment, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(ranks, "COLLECTIVE_TIMEOUT", datetime.timedelta(seconds=2))
        if torchrun == "goes":
            server.settimeout(10)
            server.listen()
            threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        message = f"torchrun at 127.0.0.1:{server.getsockname()[1]}, or a rank, is gone or silent for"
        refused(train_1b, [*flags, "--out", tmp_path / "run"], capfd, message)
    assert not (tmp_path / "run").exists()
