"""Files of a run that were damaged, exchanged or lost: each is noticed and reported in one line, and the run continues
if an older file is kept."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from runs import losses

from fused_mos import evaluate, finetune, train, train_1b
from fused_mos.runtime import files
from fused_mos.training import CheckpointError
from fused_mos.training.checkpoint import load_checkpoint, load_latest, save_checkpoint
from fused_mos.training.metrics import MetricsLog, read_metrics


def flip(path, draw, first=0):
    """Flips a bit of a file, after its first bytes."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(first, len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def the_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("max_mib", [0, 1], ids=["whole", "in parts"])
def test_every_flipped_bit_of_a_checkpoint_is_noticed(max_mib, tmp_path):
    """Flips bits of header, tensors and JSON. Flips in the digest's key go unnoticed, but do no harm."""
    draw, path = random.Random(0), tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(300, 1000), "b": torch.tensor(4), "c": torch.randn(7).bfloat16()}
    save_checkpoint(path, tensors, {"row": 12, "history": [0.5]}, max_mib)
    files = sorted(tmp_path.iterdir())
    assert len(files) == (3 if max_mib else 1)
    for i in range(60):
        file = files[i % len(files)]
        content = file.read_bytes()
        flip(file, draw) if i % 2 else flip(file, draw, first=min(1000, len(content) - 1))
        try:
            loaded, meta = load_checkpoint(path)
        except CheckpointError:
            pass
        else:
            assert all(torch.equal(loaded[name], tensors[name]) for name in tensors), i
            assert i % 2 and meta == {"row": 12, "history": [0.5]}
        file.write_bytes(content)


def test_a_checkpoint_without_a_digest_is_taken(tmp_path):
    """Versions before 0.2 wrote such checkpoints."""
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "x", {"fused_mos": '{"row": 3}'})
    assert load_checkpoint(tmp_path / "x", "row")[1] == {"row": 3}
    with pytest.raises(CheckpointError, match="is of another version or kind: it has no 'epoch'"):
        load_checkpoint(tmp_path / "x", "row", "epoch")


@pytest.mark.parametrize("max_mib", [0, 1], ids=["whole", "in parts"])
def test_the_checkpoint_before_the_last_one_is_kept(max_mib, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    for i in range(4):
        save_checkpoint(path, {"a": torch.full((300, 1000), float(i))}, {"n": i}, max_mib, keep_previous=True)
    assert len(list(tmp_path.iterdir())) == (2 if not max_mib else 2 + 2 * 2)
    assert load_latest(path).meta == {"n": 3} and not capsys.readouterr().err
    flip(path, random.Random(0), first=path.stat().st_size - 90)
    latest = load_latest(path)
    assert latest.meta == {"n": 2} and latest.tensors["a"][0, 0] == 2
    assert f"warning: checkpoint {path} " in (error := capsys.readouterr().err)
    assert f"continuing from the previous one, {latest.path}" in error
    flip(latest.path, random.Random(0), first=latest.path.stat().st_size - 90)
    with pytest.raises(CheckpointError, match=f"{path} (is truncated or damaged|lacks its part)"):
        load_latest(path)


@pytest.mark.trains
def test_a_save_that_fails_keeps_both_checkpoints(tmp_path, monkeypatch):
    """The previous checkpoint is replaced only when the new one is on disk."""
    path, previous = tmp_path / "last.safetensors", tmp_path / "last.safetensors.previous"
    for step in (1, 2):
        save_checkpoint(path, {"x": torch.full((4,), float(step))}, {"step": step}, keep_previous=True)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(files.FileError):
        save_checkpoint(path, {"x": torch.full((4,), 3.0)}, {"step": 3}, keep_previous=True)
    assert load_checkpoint(path)[1] == {"step": 2} and load_checkpoint(previous)[1] == {"step": 1}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RecursionError("too deep")])
def test_a_checkpoint_that_cannot_be_read_is_one_that_is_damaged(error, tmp_path, monkeypatch, capsys):
    path = tmp_path / "last.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {"x": torch.zeros(4)}, {"step": step}, keep_previous=True)
    read = type(path).read_bytes

    def fails(self):
        if self == path:
            raise error
        return read(self)

    monkeypatch.setattr(type(path), "read_bytes", fails)
    assert load_latest(path).meta == {"step": 1}
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_run_goes_on_from_the_checkpoint_before_the_last_one(harm, small_flags, tmp_path, capsys):
    flags, whole, out = [*small_flags, "--epochs", "4"], tmp_path / "whole", tmp_path / "run"
    assert train.main([*flags, "--out", str(whole)]) == 0
    assert train.main([*flags, "--epochs", "3", "--out", str(out)]) == 0
    last = out / "last.safetensors"
    last.unlink() if harm == "missing" else flip(last, random.Random(1), first=5000)
    capsys.readouterr()
    assert train.main(["--resume", str(out), "--epochs", "4"]) == 0
    assert capsys.readouterr().err.count("continuing from the previous one") == 1
    assert losses(out) == losses(whole)
    for name in ("best.safetensors", "last.safetensors"):
        a, b = load_checkpoint(whole / name)[0], load_checkpoint(out / name)[0]
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.trains
def test_the_best_model_must_be_that_of_the_run(finished_run, small_flags, tmp_path, capsys):
    """It may be of another run of equal shapes, older than the last checkpoint, of another dtype, or contain NaN."""
    run, other = finished_run(2), tmp_path / "other"
    assert train.main([*small_flags, "--seed", "5", "--epochs", "1", "--out", str(other)]) == 0
    best = run / "best.safetensors"
    tensors, meta = load_checkpoint(best)
    shutil.copy(other / "best.safetensors", best)
    for command, flags in ((evaluate, [str(run)]), (finetune, [str(run)]), (train, ["--resume", str(run)])):
        capsys.readouterr()
        assert command.main(flags) == 2
        assert f"{best} is of another run than {run}: its seed is 5, the run's 28" in the_line(capsys)
    assert not (run / "finetune").exists()

    save_checkpoint(best, tensors, meta | {"valid_loss": meta["valid_loss"] + 0.1})
    assert train.main(["--resume", str(run)]) == 2
    assert f"{best} is older than {run / 'last.safetensors'}" in the_line(capsys)

    save_checkpoint(best, {name: tensor.half() for name, tensor in tensors.items()}, meta)
    assert evaluate.main([str(run)]) == 2
    assert "must be torch.float32, got torch.float16" in the_line(capsys)

    save_checkpoint(best, tensors | {"encoder.weight": torch.full_like(tensors["encoder.weight"], torch.nan)}, meta)
    assert evaluate.main([str(run)]) == 2
    assert "cannot be used: numbers of encoder.weight are not finite" in the_line(capsys)

    save_checkpoint(best, tensors, meta)
    words = (run / "vocabulary.txt").read_text().split("\n")
    (run / "vocabulary.txt").write_text("\n".join([words[1], words[0], *words[2:]]))
    assert evaluate.main([str(run)]) == 2
    assert f"the words of {run / 'vocabulary.txt'} are not those that {best} was trained on" in the_line(capsys)


@pytest.mark.trains
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden.0.1.c", torch.zeros(1, 1, 10), "hidden.0.1.c must be (1, 6, 10), got (1, 1, 10)"),
        ("random.torch", torch.zeros(9, dtype=torch.uint8), "RNG state size to be 9"),
        ("optimizer.average.0", torch.zeros(2), "average.0 is (2,) there"),
    ],
)
def test_a_state_of_another_shape(name, value, message, finished_run, capsys):
    run = finished_run(4)
    tensors, meta = load_checkpoint(run / "last.safetensors")
    assert meta["optimizer"]["averaging"]
    save_checkpoint(run / "last.safetensors", tensors | {name: value}, meta)
    assert train.main(["--resume", str(run), "--epochs", "5"]) == 2
    assert message in the_line(capsys)


# --------------------------------------------------------------------------------------------------- kills and the disk

KILLED_IN_THE_FIRST_WRITE = """
import resource, signal, sys
from fused_mos import train
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
train.main(sys.argv[1:])
"""


@pytest.mark.processes
def test_a_kill_in_the_first_checkpoint_bars_nothing(small_flags, tmp_path):
    """The system ends the process in the middle of a write."""
    flags, out = [*small_flags, "--epochs", "1", "--out", str(tmp_path / "run")], tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED_IN_THE_FIRST_WRITE, *flags], capture_output=True)
    assert done.returncode < 0 and {path.name for path in out.iterdir()} == {".lock", "last.safetensors.partial"}
    (out / ".tmpA1b2C3").touch()  # as of a version before 0.2
    assert train.main(flags) == 0
    assert not list(out.glob("*.partial"))


@pytest.mark.trains
def test_checkpoints_follow_the_umask(small_flags, tmp_path):
    before = os.umask(0o027)
    try:
        assert train.main([*small_flags, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "run").glob("*.safetensors*")} == {"0o640"}


def test_a_log_with_fewer_bytes_than_recorded(tmp_path, capsys):
    """It keeps its complete lines, and is not extended to the recorded length."""
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.write("train", step, loss=torch.inf)
    size = log.sync()
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    log = MetricsLog(tmp_path, offset=10**10)
    log.write("train", 7, loss=1.0)
    log.close()
    assert "has lost 9,999,999," in capsys.readouterr().err and path.stat().st_size < size + 100
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 7]
    path.write_bytes(path.read_bytes() + b"\0\0\xff\n3\n")
    assert len(read_metrics(tmp_path)) == 3
    assert json.loads(path.read_bytes().splitlines()[0])["loss"] is None  # JSON has no infinity


# ------------------------------------------------------------------------------------------------- checkpoints of ranks


@pytest.mark.trains
@pytest.mark.parametrize("file", ["shard", "state.json"])
def test_train_1b_goes_on_from_the_checkpoint_before_the_last_one(file, two_checkpoints, flags, tmp_path, capsys):
    out, flags = two_checkpoints
    checkpoints = out / "checkpoints"
    draw = random.Random(2)
    whole = [*flags, "--out", str(tmp_path / "whole"), "--max-steps", "8"]
    assert train_1b.main(whole) == 0
    (damaged,) = (checkpoints / "step-00000005").glob(f"{file}*")
    flip(damaged, draw, first=damaged.stat().st_size // 2)
    capsys.readouterr()
    assert train_1b.main([*flags, "--max-steps", "8"]) == 0
    captured = capsys.readouterr()
    assert "continues at step 3 of 8" in captured.out
    assert f"warning: checkpoint {checkpoints / 'step-00000005'} is damaged" in captured.err
    assert [loss for loss in losses(out) if loss[0] == "train"] == [
        loss for loss in losses(tmp_path / "whole") if loss[0] == "train"
    ]
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000003", "step-00000008"}
    assert train_1b.main([*flags, "--max-steps", "8"]) == 0


@pytest.mark.trains
def test_every_flipped_bit_of_a_shard_is_noticed(two_checkpoints, capsys):
    out, flags = two_checkpoints
    shutil.rmtree(out / "checkpoints" / "step-00000003")
    draw = random.Random(3)
    best = next((out / "best").iterdir())
    for i in range(6):
        folder, arguments = ((out / "checkpoints" / "step-00000005", []), (best, ["--evaluate"]))[i % 2]
        (shard,) = folder.glob("*.safetensors")
        content = shard.read_bytes()
        flip(shard, draw)
        assert train_1b.main([*flags, "--max-steps", "5", *arguments]) == 2
        assert f"checkpoint {folder} is damaged (the content of {shard.name})" in the_line(capsys)
        shard.write_bytes(content)


@pytest.mark.trains
def test_a_state_json_that_lacks_something_and_a_best_model_of_another_run(two_checkpoints, tmp_path, capsys):
    out, flags = two_checkpoints
    other = tmp_path / "other"
    assert train_1b.main([*flags, "--seed", "4", "--max-steps", "5", "--out", str(other)]) == 0
    (best,) = (out / "best").iterdir()
    (others_best,) = (other / "best").iterdir()
    shutil.rmtree(best)
    shutil.copytree(others_best, out / "best" / others_best.name)
    assert train_1b.main([*flags, "--max-steps", "5", "--evaluate"]) == 2
    assert "seed cannot change when a run continues: it was 4, got 1" in the_line(capsys)
    for key in ("config", "progress", "vocabulary", "shards", "random"):
        for path in (out / "checkpoints").glob("*/state.json"):
            state = json.loads(path.read_text())
            (path.parent / "whole").write_text(json.dumps(state))
            del state["digest"], state[key]
            path.write_text(json.dumps(state))
        for arguments in (flags, ["--resume", str(out)]):
            assert train_1b.main([*arguments, "--max-steps", "6"]) == 2
            assert f"state.json has no {key!r}" in the_line(capsys)
        for path in (out / "checkpoints").glob("*/whole"):
            path.rename(path.with_name("state.json"))
