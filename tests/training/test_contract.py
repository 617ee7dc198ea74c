"""The contract of all long-running commands: the same command continues, another one is refused, signals save."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from runs import losses
from safetensors.torch import load_file

from fused_mos import demo, evaluate, experts, finetune, generate, reproduce, train, train_1b
from fused_mos.data import lm1b, sample, synthetic
from fused_mos.runtime import files, signals
from fused_mos.training import RECIPES, TrainConfig, Trainer
from fused_mos.training import dynamic_evaluation as dynamic_module
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint
from fused_mos.training.lm1b import LM1BConfig, LM1BTrainer

pytestmark = pytest.mark.trains


@pytest.fixture
def trained(small_flags, tmp_path, monkeypatch):
    """A finished run of one epoch."""
    folder = tmp_path / "run"
    assert train.main([*small_flags, "--epochs", "1", "--out", str(folder)]) == 0
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    return folder


def signalled(monkeypatch, number, after, owner=Trainer, name="train_step"):
    """Sends a signal to this process at call number `after` of a method, which then does its work."""
    original, calls = getattr(owner, name), []

    def method(self, *arguments, **options):
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, method)


# --------------------------------------------------------------------------------------------- the same command goes on


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(number, status, small_flags, tmp_path, monkeypatch, capsys):
    flags, out = [*small_flags, "--epochs", "2"], tmp_path / "run"
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        signalled(patch, number, after=7)
        assert train.main([*flags, "--out", str(out)]) == status
    assert "stopped; run the same command to continue" in capsys.readouterr().err
    assert load_checkpoint(out / "last.safetensors")[1]["progress"]["step"] == 7
    assert train.main([*flags, "--out", str(out)]) == 0
    assert losses(out) == losses(tmp_path / "whole")


def test_a_signal_in_the_validation_saves_the_epoch(small_flags, tmp_path, monkeypatch):
    """The signal comes while averages replace the parameters; the averages must not be saved."""
    flags, out, whole = [*small_flags, "--epochs", "4"], tmp_path / "run", tmp_path / "whole"
    assert train.main([*flags, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, after=3, name="_validate")
        assert train.main([*flags, "--out", str(out)]) == 143
    _, meta = load_checkpoint(out / "last.safetensors")
    assert meta["optimizer"]["averaging"] and meta["progress"]["epoch"] == 2
    assert train.main([*flags, "--out", str(out)]) == 0
    assert losses(out) == losses(whole)
    a, b = load_file(whole / "last.safetensors"), load_file(out / "last.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("model."))


def test_finetune_goes_on(trained, monkeypatch):
    flags, whole = [str(trained), "--epochs", "2", "--lr", "3"], trained / "whole"
    assert finetune.main([*flags, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, after=5)
        assert finetune.main(flags) == 143
    assert finetune.main(flags) == 0
    assert losses(trained / "finetune") == losses(whole)


def test_dynamic_evaluation_goes_on(trained, monkeypatch):
    flags = [str(trained), "--dynamic"]
    assert evaluate.main(flags) == 0
    for path in (trained / "dynamic").iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, after=9, owner=dynamic_module.DynamicEvaluation, name="_update")
        assert evaluate.main(flags) == 143
    assert any(path.name.startswith("test-") for path in (trained / "dynamic").iterdir())
    assert evaluate.main(flags) == 0
    first, second = json.loads((trained / "evaluation.json").read_text())
    assert first == second


def test_the_demo_goes_on(small_flags, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(train.parse(small_flags), out=None)
    monkeypatch.setitem(RECIPES, "demo", lambda: config)
    texts = {path.stem: path.read_text() for path in config.data.iterdir()}
    monkeypatch.setattr(sample, "texts", lambda: texts)
    flags, original = ["--out", str(tmp_path / "demo")], Trainer.train_step

    def stopped_in_the_second_run(self):
        if self.config.model.head == "mos" and self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped_in_the_second_run)
        assert demo.main(flags) == 130
    assert demo.main(flags) == 0
    out = capsys.readouterr().out
    assert "softmax: 3 epochs on Python's own documentation, backend cpu, of which 3 are done" in out
    softmax, mos = json.loads((tmp_path / "demo" / "result.json").read_text())
    for name, result in (("softmax", softmax), ("MoS", mos)):
        numbers = [
            f"{result['test_ppl']:.2f}",
            f"{result['parameters']:,}",
            r"\d+ s",
            f"{result['words_per_second']:,.0f}",
        ]
        row = " +".join([name, *numbers])
        assert re.search(row, out), row
    assert mos["parameters"] < 1.3 * softmax["parameters"]
    commands = re.findall(r"^  \S+ -m fused_mos\.(generate|experts) (\S+) +# ", out, re.MULTILINE)
    assert [name for name, _ in commands] == ["generate", "experts"]
    assert all({"generate": generate, "experts": experts}[name].main([run]) == 0 for name, run in commands)
    assert f"open {tmp_path / 'demo/mos/experts/index.html'}" in out
    assert (tmp_path / "demo/mos/experts/index.html").is_file()
    (tmp_path / "demo" / "demo.png").unlink()
    assert demo.main(flags) == 0 and (tmp_path / "demo" / "demo.png").exists()


def test_another_configuration_is_refused_by_name(trained, small_flags, tmp_path, capsys):
    flags = [*small_flags, "--epochs", "1", "--out", str(trained)]
    before = (trained / "last.safetensors").read_bytes()
    for changed, message in (
        (["--lr", "3"], "lr cannot change when a run continues: it was 10.0, got 3.0; name another --out"),
        (["--n-experts", "2"], "n_experts cannot change when a run continues: it was 3, got 2"),
        (["--micro-batches", "3"], "micro_batches cannot change when a run continues: it was 1, got 3"),
    ):
        assert train.main([*flags, *changed]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert (trained / "last.safetensors").read_bytes() == before
    assert train.main([*flags, "--log-interval", "7", "--checkpoint-minutes", "1"]) == 0


def test_the_default_folder_is_named_after_the_corpus(small_flags, flags):
    seed = ["--seed", "5"]
    folder = train.parse([*small_flags, *seed]).run_folder
    assert str(folder) == f"runs/{Path(small_flags[1]).name}-demo-mos-seed5"
    assert str(train_1b.parse([*flags, *seed]).run_folder) == "runs/prepared-lm1b-tiny-seed5"
    assert str(reproduce.Flags("ptb", Path("penn/.")).folder) == "runs/reproduce-penn-ptb"


def test_resume_is_short_for_the_command(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_1b.main([*flags, "--out", str(out), "--max-steps", "3"]) == 0
    assert train_1b.main(["--resume", str(out), "--max-steps", "5"]) == 0
    assert "continues at step 3 of 5" in capsys.readouterr().out
    assert train_1b.main(["--resume", str(out), "--lr", "0.5"]) == 2
    assert "lr cannot change when a run continues: it was 0.01, got 0.5" in capsys.readouterr().err
    assert train_1b.main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()


# --------------------------------------------------------------------------------------- what a run remembers and needs


def test_lost_lines_of_the_log_are_told(trained, small_flags, capsys):
    log = trained / "metrics.jsonl"
    size = log.stat().st_size
    log.unlink()
    assert train.main([*small_flags, "--epochs", "2", "--out", str(trained)]) == 0
    assert f"warning: {log} has lost {size:,} bytes of this run" in capsys.readouterr().err
    assert losses(trained)[-1][:2] == ("valid", losses(trained)[-2][1])


def test_a_run_remembers_its_corpus_from_anywhere(small_flags, corpus_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(corpus_folder.parent)
    relative = [flag if flag != str(corpus_folder) else corpus_folder.name for flag in small_flags]
    assert train.main([*relative, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(corpus_folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate.main([str(tmp_path / "run")]) == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0


def test_commands_need_only_the_files_they_read(trained, corpus_folder, capsys):
    (corpus_folder / "train.txt").unlink()
    (corpus_folder / "test.txt").unlink()
    assert evaluate.main([str(trained), "--split", "valid"]) == 0
    assert experts.main([str(trained), "--split", "valid", "--words", "3"]) == 0
    assert evaluate.main([str(trained)]) == 2
    assert "lacks test.txt; if the run's corpus has moved, name it with --data" in capsys.readouterr().err
    assert evaluate.main([str(trained), "--split", "valid", "--dynamic"]) == 2
    assert "lacks train.txt" in capsys.readouterr().err
    shutil.rmtree(corpus_folder)
    assert generate.main([str(trained), "--words", "3"]) == 0


# ----------------------------------------------------------------------------------------------------- earlier versions


def test_earlier_names_of_micro_batches_are_taken(small_flags, flags, capsys):
    assert train.parse([*small_flags, "--small-batch-size", "2"]).optim.micro_batches == 3
    assert train.parse([*small_flags, "--small_batch_size=0"]).optim.micro_batches == 1
    assert train_1b.parse([*flags, "--micro-batches", "3"]).micro_batches == 3
    assert train_1b.parse([*flags, "--micro-batches=2"]).micro_batches == 2
    old = RECIPES["wikitext2"]().to_json()
    del old["optim"]["micro_batches"]
    old["optim"]["small_batch_size"] = 5
    assert TrainConfig.from_json(old | {"resume": None}) == RECIPES["wikitext2"]()
    old = LM1BConfig().to_json()
    del old["micro_batches"], old["resume"]
    assert LM1BConfig.from_json(old | {"accumulate": 4}).micro_batches == 4


def test_a_checkpoint_of_an_earlier_version_goes_on(small_flags, tmp_path):
    """Its configuration has the old name, a relative path and no `resume`; the losses equal those of a new run."""
    flags, whole, old = [*small_flags, "--micro-batches", "2"], tmp_path / "whole", tmp_path / "old"
    assert train.main([*flags, "--epochs", "2", "--out", str(whole)]) == 0
    assert train.main([*flags, "--epochs", "1", "--out", str(old)]) == 0
    tensors, meta = load_checkpoint(old / "last.safetensors")
    del meta["config"]["optim"]["micro_batches"]
    meta["config"]["optim"]["small_batch_size"] = 3
    meta["config"]["resume"] = None
    save_checkpoint(old / "last.safetensors", tensors, meta)
    assert train.main([*flags, "--epochs", "2", "--out", str(old)]) == 0
    assert losses(old) == losses(whole)


# -------------------------------------------------------------------------------------------------------- nothing named


@pytest.fixture
def empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_train_alone_trains_on_the_sample_text(empty_place, capsys):
    assert train.main(["--epochs", "1", "--time-limit", "1e-9"]) == 0
    out = capsys.readouterr().out
    assert "training on the sample text, Python's own documentation" in out and "time limit reached" in out
    config = json.loads((empty_place / "runs" / "sample" / "config.json").read_text())
    assert config["recipe"] == "demo" and config["data"].startswith(str(empty_place / "cache"))
    # wherever the run is, the text is said to be the sample, and no other text is
    assert train.main(["--epochs", "1", "--time-limit", "1e-9", "--out", "elsewhere"]) == 0
    assert "the sample text" in capsys.readouterr().out
    shutil.copytree(config["data"], "text")
    flags = ["--recipe", "demo", "--data", "text", "--time-limit", "1e-9", "--out", "runs/sample"]
    assert train.main([*flags, "--epochs", "1"]) == 0
    assert "sample text" not in capsys.readouterr().out
    assert train.main(["--recipe", "ptb-small"]) == 2
    assert "data folder data does not exist; it must hold train.txt, valid.txt and test.txt" in capsys.readouterr().err


def test_train_1b_alone_trains_on_the_sample_text(empty_place, capsys):
    assert train_1b.main(["--max-steps", "2", "--eval-batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "training lm1b-tiny on the sample text, Python's own documentation" in out
        and "held-out ppl" in out
        and "python -m fused_mos.data.lm1b download" in out
    )
    assert (empty_place / "runs" / "sample-1b" / "result.json").is_file()
    for arguments in (["--recipe", "lm1b-tiny"], ["--data", "nowhere"]):
        assert train_1b.main(arguments) == 2
        assert "manifest.json; first run python -m fused_mos.data.lm1b prepare to its end" in capsys.readouterr().err


def test_prepare_ends_its_workers_at_a_signal(prepared, tmp_path, monkeypatch, capsys):
    arguments = [
        "prepare",
        "--source",
        str(prepared.parent / "source"),
        "--out",
        str(tmp_path / "out"),
        "--allow-missing",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(lm1b, "_tokenise", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert lm1b.main([*arguments, "--workers", "1"]) == 143
    assert "stopped; run the same command to continue" in capsys.readouterr().err
    assert lm1b.main(arguments) == 0
    assert not signals.noted()


def test_folders_that_hold_something_else_are_left_alone(tmp_path, small_flags, flags, capsys):
    """Also by commands that leave no checkpoint."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("my own text")
    for command, arguments in (
        (train, small_flags),
        (train_1b, flags),
        (demo, []),
        (synthetic, ["--n-words", "9", "--rank", "3", "--train", "500", "--heldout", "50"]),
    ):
        assert command.main([*arguments, "--out", str(tmp_path / "mine")]) == 2
        assert f"out: {tmp_path / 'mine'} is not empty and holds" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["train.txt"]
        assert (tmp_path / "mine" / "train.txt").read_text() == "my own text"
    for name in ("softmax", "mos", "data"):  # as those of a demo are called
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "train.txt").write_text("my own text")
        assert demo.main(["--out", str(tmp_path / name)]) == 2
        assert f"out: {tmp_path / name} is not empty and holds something else" in capsys.readouterr().err
        files_left = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert [path.read_text() for path in files_left] == ["my own text"]
    language = ["--n-words", "9", "--rank", "3", "--train", "500", "--heldout", "50", "--out", str(tmp_path / "new")]
    assert synthetic.main(language) == 0 and synthetic.main(language) == 0


def test_a_run_of_another_command_is_named(trained, flags, tmp_path, capsys):
    assert finetune.main(["--resume", str(trained)]) == 2
    assert f"resume: {trained} is a run of train, not of finetune" in capsys.readouterr().err
    other = tmp_path / "1b"
    assert train_1b.main([*flags, "--max-steps", "2", "--out", str(other)]) == 0
    for command, flags in ((evaluate, []), (generate, []), (experts, []), (finetune, []), (train, ["--resume"])):
        assert command.main([*flags, str(other)]) == 2
        assert f"{other} is a run of train_1b; evaluate it with python -m fused_mos.train_1b" in capsys.readouterr().err


def test_a_result_of_train_1b_that_cannot_be_kept_is_shown(flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert train_1b.main([*flags, "--max-steps", "2", "--out", str(out)]) == 0

    def refused(self, result):
        raise files.FileError(f"{out / 'result.json'}: Permission denied")

    monkeypatch.setattr(LM1BTrainer, "write_result", refused)
    capsys.readouterr()
    assert train_1b.main(["--resume", str(out), "--evaluate"]) == 2
    shown, error = capsys.readouterr()
    assert "held-out ppl" in shown and "Permission denied" in error


def test_a_longer_run_is_no_reproduction(small_flags, corpus_folder, tmp_path, monkeypatch, capsys):
    config = train.parse([*small_flags, "--epochs", "1"])
    monkeypatch.setitem(RECIPES, "demo", lambda: config)
    out = tmp_path / "all"
    assert train.main([*small_flags, "--epochs", "2", "--out", str(out)]) == 0
    assert reproduce.main(["demo", "--data", str(corpus_folder), "--out", str(out)]) == 2
    assert f"epochs must be 1, as in the recipe, but {out} has 2; name another --out" in capsys.readouterr().err
