"""One writer a folder, and any number of readers."""

import contextlib
import shutil
import subprocess
import sys

import pytest

from fused_mos import demo, evaluate, experts, finetune, generate, reproduce, train, train_1b
from fused_mos.data import lm1b
from fused_mos.runtime import files
from fused_mos.training import RECIPES, Trainer, stages
from fused_mos.training import dynamic_evaluation as dynamic_module
from fused_mos.training import folder as folder_module
from fused_mos.training.lm1b import LM1BTrainer
from fused_mos.training.run import load_run

pytestmark = pytest.mark.trains

HOLD = """
import sys
from pathlib import Path
from fused_mos.runtime import files
lock = files.FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def written_by_another(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.communicate()


@pytest.fixture
def trained(finished_run, monkeypatch):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    return finished_run(1)


@pytest.mark.processes
def test_a_second_writer_is_refused(trained, small_flags, flags, prepared, tmp_path, capsys):
    for folder, command, arguments in (
        (trained, train, [*small_flags, "--epochs", "2", "--out", str(trained)]),
        (trained / "finetune", finetune, [str(trained)]),
        (trained / "dynamic", evaluate, [str(trained), "--dynamic"]),
        (tmp_path / "demo", demo, ["--out", str(tmp_path / "demo")]),
        (tmp_path / "1b", train_1b, [*flags, "--out", str(tmp_path / "1b")]),
        (
            tmp_path / "prepared",
            lm1b,
            [
                "prepare",
                "--source",
                str(prepared.parent / "source"),
                "--out",
                str(tmp_path / "prepared"),
                "--allow-missing",
            ],
        ),
        (tmp_path / "all", reproduce, ["demo", "--data", str(load_run(trained).data), "--out", str(tmp_path / "all")]),
    ):
        with written_by_another(folder) as other:
            assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert f"error: {folder} is being written by process {other.pid}" in error, error
        assert [path.name for path in folder.iterdir() if path.suffix != ".safetensors"].count(files.LOCK) == 1


@pytest.mark.processes
def test_readers_are_never_refused(trained, capsys):
    with written_by_another(trained):
        assert evaluate.main([str(trained)]) == 0
        assert generate.main([str(trained), "--words", "3"]) == 0
        assert experts.main([str(trained), "--words", "3"]) == 0


@pytest.mark.processes
def test_a_folder_is_locked_until_its_result_is_written(flags, tmp_path, monkeypatch, small_flags, corpus_folder):
    """The lock is also held while the best model is evaluated, and between the stages of a reproduction."""
    held = []

    def look(owner, name, folder):
        original = getattr(owner, name)

        def method(*arguments, **options):
            process = subprocess.run(
                [sys.executable, "-c", HOLD, str(folder)], input="", capture_output=True, text=True
            )
            held.append("FolderInUse" in process.stderr)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, method)

    look(LM1BTrainer, "final_evaluation", tmp_path / "1b")
    assert train_1b.main([*flags, "--max-steps", "2", "--out", str(tmp_path / "1b")]) == 0
    config = train.parse([*small_flags, "--epochs", "1"])
    monkeypatch.setitem(RECIPES, "demo", lambda: config)
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    look(stages, "finetuning_config", tmp_path / "all")
    assert reproduce.main(["demo", "--data", str(corpus_folder), "--out", str(tmp_path / "all")]) == 0
    assert held == [True, True]


def test_of_two_that_begin_at_once_one_is_refused(small_flags, finished_run, tmp_path, monkeypatch):
    """The other process writes its first checkpoint just after this one has looked for one."""
    out, claim, other = tmp_path / "late", folder_module.claim, finished_run(1)

    def late(folder, belongs):
        shutil.copytree(other, folder)
        return claim(folder, belongs)

    monkeypatch.setattr(folder_module, "claim", late)
    with pytest.raises(files.FolderInUse, match=f"another process has begun a run in {out}"):
        Trainer(train.parse([*small_flags, "--out", str(out)]))
    assert (out / "last.safetensors").read_bytes() == (other / "last.safetensors").read_bytes()
