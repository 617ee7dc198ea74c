"""One Billion Word runs in one process: what a run leaves, resuming, and refusals. (Ranks: test_train_1b_ranks.py; the
stream and the loss: test_lm1b_parts.py.)"""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from operation_log import LogRecorder
from runs import losses, write_benchmark

from fused_mos import train_1b
from fused_mos.data import lm1b
from fused_mos.data.token_stream import PreparedCorpus
from fused_mos.lm import AWDLSTM
from fused_mos.training import ConfigError, TrainingDiverged
from fused_mos.training.lm1b import RECIPES, LM1BTrainer, memory
from fused_mos.training.lm1b.optim import learning_rate, make_optimizer
from fused_mos.training.lm1b.ranks import Ranks


@pytest.fixture
def trainer_of():
    """Makes trainers of this process alone."""
    made = []

    def make(flags, out):
        config = train_1b.parse([*flags, "--out", str(out)])
        made.append(Ranks(config.device, config.vocab_parallel))
        return LM1BTrainer(config, made[-1])

    def close():
        if dist.is_initialized():
            dist.destroy_process_group()

    def again(flags, out):
        close()
        return make(flags, out)

    yield again
    close()


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.trains
def test_a_run_learns_and_leaves_its_folder(flags, prepared, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_1b.main([*flags, "--epochs", "8", "--lr", "0.03", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert (
        f"mos: held-out ppl {result['heldout_ppl']:.2f} over {result['heldout_words']:,} words" in printed
        and " MiB of " in printed
    )
    assert result["heldout_ppl"] < 12 and result["vocabulary"] == 43
    assert result["heldout_words"] == sum(int((file.open() != 0).sum()) for file in PreparedCorpus(prepared).heldout)
    names = {path.name for path in out.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "best",
        "learning-curve.png",
        "result.json",
    }
    assert len(list((out / "checkpoints").iterdir())) == 2
    assert (
        train_1b.main(
            [*flags, "--epochs", "8", "--lr", "0.03", "--evaluate", "--eval-batch-size", "3", "--out", str(out)]
        )
        == 0
    )
    again = json.loads((out / "result.json").read_text())
    assert (
        again["heldout_ppl"] == pytest.approx(result["heldout_ppl"], rel=0.05)
        and again["heldout_words"] == result["heldout_words"]
    )


@pytest.mark.trains
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_a_stopped_run_goes_on_bit_identically(optimizer, flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--optimizer", optimizer, "--dropout", "0.2", "--micro-batches", "2"]
    assert train_1b.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    out, original = tmp_path / "pieces", LM1BTrainer.train_step
    for at, number, status in ((7, signal.SIGTERM, 143), (33, signal.SIGINT, 130)):

        def stopping(self, segment, at=at, number=number):
            if self.progress.step == at:
                signal.raise_signal(number)
            return original(self, segment)

        monkeypatch.setattr(LM1BTrainer, "train_step", stopping)
        assert train_1b.main([*flags, "--out", str(out)]) == status
        assert "stopped; run the same command to continue" in capsys.readouterr().err
        assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == f"step-{at + 1:08}"
    monkeypatch.setattr(LM1BTrainer, "train_step", original)
    assert train_1b.main([*flags, "--out", str(out), "--time-limit", "1e-9"]) == 0
    assert train_1b.main([*flags, "--out", str(out)]) == 0
    assert losses(out) == losses(tmp_path / "whole")
    a, b = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "pieces"))
    assert a["heldout_ppl"] == b["heldout_ppl"] and a["words"] == b["words"]


@pytest.mark.trains
@pytest.mark.parametrize("variant", ["", "--micro-batches 2", "--head-chunk 18 --precision bfloat16 --optimizer sgd"])
def test_a_replayed_run_has_the_bits_of_an_ordinary_one(variant, flags, tmp_path, trainer_of, monkeypatch):
    """Replays the stand-in for CUDA graphs, with a stop in between, and shorter last segments of shards."""
    recorder = LogRecorder()
    monkeypatch.setattr("fused_mos._inputs.values_can_be_read", lambda *_: False)  # as on a GPU
    monkeypatch.setattr(
        "fused_mos._backends.from_rows.scaled", lambda gradients, factor, *_: [g * factor for g in gradients]
    )
    monkeypatch.setattr(
        "fused_mos.training.lm1b.trainer.recorder_for", lambda config, _: recorder if config.cuda_graphs else None
    )
    flags = [*flags, *variant.split(), "--dropout", "0.2", "--max-steps", "60", "--decay", "none"]
    trainer_of([*flags, "--no-cuda-graphs"], tmp_path / "plain").run()
    assert recorder.n_run == 0
    trainer_of([*flags, "--max-steps", "25"], tmp_path / "graphs").run()
    trainer = trainer_of(flags, tmp_path / "graphs")
    trainer.run()
    assert trainer.graphs.n_graphs >= 1 and recorder.n_replayed >= 45
    a, b = ([line for line in losses(tmp_path / name) if line[:2] != ("valid", 25)] for name in ("plain", "graphs"))
    assert a == b


@pytest.mark.trains
def test_a_kill_at_the_first_step_or_in_the_first_checkpoint_costs_nothing(flags, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    assert train_1b.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "broken"
    for what in ("fused_mos.training.lm1b.checkpoint._complete", "fused_mos.training.lm1b.LM1BTrainer.train_step"):
        with monkeypatch.context() as patch:
            patch.setattr(what, killed)
            assert train_1b.main([*flags, "--out", str(out)]) == 130
    assert train_1b.main([*flags, "--out", str(out)]) == 0
    assert losses(out) == losses(tmp_path / "whole")


def test_a_full_disk_leaves_the_last_checkpoint(flags, tmp_path, monkeypatch, capsys):
    """The disk is full in torch's writer, and in ours."""
    out, full = tmp_path / "run", OSError(errno.ENOSPC, "No space left on device")
    assert train_1b.main([*flags, "--max-steps", "3", "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}

    def fails(*_, **__):
        raise full

    def fails_for_the_state(descriptor, fsync=os.fsync):
        if "state.json" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise full
        fsync(descriptor)

    for what, failing in (("safetensors.torch.save", fails), ("os.fsync", fails_for_the_state)):
        with monkeypatch.context() as patch:
            patch.setattr(what, failing)
            assert train_1b.main([*flags, "--checkpoint-minutes", "0", "--out", str(out)]) == 2
        assert re.search(
            r"error: checkpoint \S* could not be written \(the disk is full\); the last complete one is unchanged\n",
            capsys.readouterr().err,
        )
        assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before


def test_the_first_update_is_that_of_plain_adam(flags, trainer_of, tmp_path):
    """The checkpoint before the first step, for which the optimizer's state is created, does not change it."""
    trainer = trainer_of([*flags, "--weight-decay", "0.1", "--warmup-steps", "0", "--clip", "0"], tmp_path / "run")
    trainer._save()
    plain = [p.detach().clone().requires_grad_() for p in trainer.model.parameters()]
    trainer.train_step(next(trainer.stream.segments()))
    optimizer = torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1)
    for p, q in zip(plain, trainer.model.parameters()):
        p.grad = q.grad.clone()
    optimizer.step()
    for p, q in zip(plain, trainer.model.parameters()):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)


def test_a_step_has_one_exchange(flags, trainer_of, tmp_path, monkeypatch):
    """The number of words, by which the loss is divided, is known before it."""
    trainer = trainer_of(flags, tmp_path / "run")
    exchanged, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *rest, **options: exchanged.append(t) or all_reduce(t))
    trainer.train_step(next(trainer.stream.segments()))
    (numbers,) = exchanged
    assert numbers.shape == (6,) and numbers.dtype == torch.float64


def test_the_learning_rate(flags, trainer_of, tmp_path):
    trainer = trainer_of([*flags, "--decay", "cosine"], tmp_path / "run")
    rates = [learning_rate(trainer.config, step, trainer.total_steps) for step in range(trainer.total_steps + 1)]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01]) and rates[5] == 0.01
    assert rates[-1] == pytest.approx(0) and all(a >= b for a, b in zip(rates[5:], rates[6:]))
    assert sum(1 for _ in trainer.stream.segments()) * 2 == trainer.total_steps


def test_adagrad_begins_as_that_of_jozefowicz_et_al():
    """Their losses are summed over the 20 rows of a segment and their sums of squares start with 1; lm1b-full's losses
    are means."""
    config = RECIPES["lm1b-full"]()
    model = AWDLSTM(30, embedding_size=6, hidden_sizes=(8, 6), n_experts=2)
    optimizer = make_optimizer(config, model, torch.device("cpu"))
    parameters = list(model.parameters())
    expected, squares = [p.detach().clone() for p in parameters], [torch.ones_like(p) for p in parameters]
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            squares[i] += (config.bptt * p.grad) ** 2
            expected[i] -= 0.2 * config.bptt * p.grad / squares[i].sqrt()
        optimizer.step()
    for p, q in zip(parameters, expected):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.trains
def test_a_segment_without_a_word_to_predict(flags, tmp_path):
    assert (
        train_1b.main(
            [
                *flags,
                "--batch-size",
                "1",
                "--bptt",
                "1",
                "--max-steps",
                "30",
                "--log-interval",
                "30",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )


def test_nothing_is_updated_by_a_gradient_that_is_not_finite(flags, trainer_of, tmp_path):
    trainer = trainer_of(flags, tmp_path / "run")
    segment = next(trainer.stream.segments())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.model.rnns[0].weight_hh_l0.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        TrainingDiverged, match="diverged at step 0: .* norm of the gradient (inf|nan); nothing was updated"
    ):
        trainer.train_step(segment)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters())) and trainer.progress.step == 0


@pytest.mark.trains
@pytest.mark.parametrize("where", ["the next step", "a checkpoint", "the evaluation"])
def test_a_run_that_diverges_ends_in_one_line_and_keeps_its_checkpoint(where, flags, tmp_path, monkeypatch, capsys):
    """A step that is finite itself may leave parameters that are not."""
    out, train_step = tmp_path / "run", LM1BTrainer.train_step
    flags = [*flags, *("--lr 1e30 --optimizer sgd --clip 0 --out".split()), str(out)]
    if where == "a checkpoint":
        flags += ["--checkpoint-minutes", "0"]
    elif where == "the evaluation":
        flags += ["--eval-interval", "1"]

    def spoilt(self, segment):
        decision = train_step(self, segment)
        self.model.encoder.weight.data.fill_(torch.inf)
        return decision

    monkeypatch.setattr(LM1BTrainer, "train_step", spoilt)
    assert train_1b.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: training diverged at step 1: model.encoder.weight is no longer finite; the checkp", error)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000000"]
    assert not (out / "best").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_configuration_or_corpus_is_refused(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_1b.main([*flags, "--max-steps", "3", "--out", str(out)]) == 0
    capsys.readouterr()
    write_benchmark(tmp_path / "source", seed=1)
    lm1b.prepare(lm1b.Prepare(tmp_path / "source", tmp_path / "other", workers=1, allow_missing=True))
    for changed, message in (
        (["--lr", "0.5"], "lr cannot change when a run continues: it was 0.01, got 0.5"),
        (
            ["--hidden-sizes", "12", "11"],
            "hidden_sizes cannot change when a run continues: it was (12, 10), got (12, 11)",
        ),
        (["--data", str(tmp_path / "other")], "is not the corpus that"),
    ):
        assert train_1b.main([*flags, *changed, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    newest = out / "checkpoints" / "step-00000003"
    state = json.loads((newest / "state.json").read_text())
    del state["config"]["initial_accumulator"], state["digest"], state["files"]  # as one of before those fields
    (newest / "state.json").write_text(json.dumps(state))
    # what kills in a save leave is not taken for a checkpoint
    for name in ("step-00000009.partial", "step-00000004.partial"):
        shutil.copytree(newest, newest.with_name(name))
    assert train_1b.main([*flags, "--max-steps", "4", "--out", str(out)]) == 0
    newest = out / "checkpoints" / "step-00000004"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000003", newest.name]
    for file in newest.parent.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert train_1b.main([*flags, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"warning: checkpoint {newest} is damaged (the content of " in error
    assert re.search("error: checkpoint .*step-00000003 is damaged or of another model .*; nothing was changed", error)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--recipe", "lm1b-huge"], "recipe must be one of lm1b-mos"),
        (
            ["--batch-size", "7", "--micro-batches", "2"],
            "batch_size must be a multiple of 2 (ranks that read other text × micro_batches = 1 × 2), got 7",
        ),
        (["--vocab-parallel", "2"], "vocab_parallel must divide the number of ranks, 1, got 2"),
        (["--lr", "0"], "lr must be positive, got 0.0"),
        (["--dropouti", "1"], "dropouti must be in [0, 1), got 1.0"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--batch-size", "4000"], "is too short for 4000 columns of at least 2; use a smaller batch_size"),
        (["--eval-batch-size", "1000000000000"], "eval_batch_size must be at most"),
        (["--backend", "cuda"], "backend 'cuda' is not available"),
        (["--memory-gib", "0.3"], "MiB but has 307.20 MiB:"),
        (["--evaluate"], "has no best model"),
    ],
)
def test_bad_flags(changed, message, flags, tmp_path, capsys):
    assert train_1b.main([*flags, *changed, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_not_overwritten(flags, tmp_path, capsys):
    (tmp_path / "precious").write_text("text")
    assert train_1b.main([*flags, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "n_words", "expected"), [("lm1b-mos", 100_000, 112_856_796), ("lm1b-softmax", 100_000, 119_293_600)]
)
def test_the_papers_models(name, n_words, expected):
    """113 and 119 million parameters."""
    parameters = memory.table(RECIPES[name](), n_words, 1, "cpu")["parameters"] / 4
    assert parameters == pytest.approx(expected, rel=1e-3)


MEASURED_RUN = """
import resource, sys
from fused_mos import train_1b
from fused_mos.training.lm1b import LM1BTrainer, memory
from fused_mos.training.lm1b.ranks import Ranks
config = train_1b.parse(sys.argv[1:])
trainer = LM1BTrainer(config, Ranks("cpu", 1))
for _, segment in zip(range(2), trainer.stream.segments()):
    trainer.train_step(segment)
trainer._save()
predicted = memory.table(config, len(trainer.corpus.vocabulary), 1, "cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(predicted.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_the_memory_table_is_near_what_a_run_takes(flags, tmp_path):
    """A decoder of 150 MB, so that what a process takes by itself does not hide the rest."""
    write_benchmark(tmp_path / "source")
    (tmp_path / "words").write_text("\n".join([*lm1b.MARKS, *(f"w{i}" for i in range(150_000))]) + "\n")
    lm1b.prepare(
        lm1b.Prepare(
            tmp_path / "source", tmp_path / "prepared", vocabulary=tmp_path / "words", workers=1, allow_missing=True
        )
    )
    flags = [*flags, "--data", str(tmp_path / "prepared"), "--embedding-size", "256", "--out", str(tmp_path / "run")]
    printed = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, *flags], capture_output=True, text=True, check=True
    ).stdout
    measured, estimated = map(int, printed.split())
    assert 0.8 < measured / estimated < 1.1, (measured, estimated)


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    class OneRank:
        device, n_ranks, n_data, n_local = torch.device("cpu"), 1, 1, 1

        @staticmethod
        def least(number):
            return number

    full = dataclasses.replace(RECIPES["lm1b-full"](), memory_gib=19.2)
    with pytest.raises(
        ConfigError, match=r"a rank needs \d+.\d\d GiB but has 19.20 GiB:(.|\n)*it would fit with --micro-batches \d+"
    ):
        memory.check(full, 793_471, OneRank)
    with pytest.raises(ConfigError, match="choose a smaller embedding or vocabulary"):
        memory.check(dataclasses.replace(full, memory_gib=4), 793_471, OneRank)
    text = memory.check(dataclasses.replace(full, memory_gib=80), 793_471, OneRank)
    assert "of 80.00 GiB" in text and "evaluation" not in text and " 0.00 GiB" not in text
    with pytest.raises(ConfigError, match="evaluation, beyond(.|\n)*it would fit with --eval-batch-size 128$"):
        memory.check(dataclasses.replace(full, memory_gib=80, eval_batch_size=100_000), 793_471, OneRank)
    monkeypatch.setattr(memory, "_head_workspace", lambda _: 288 << 20)  # without asking a GPU
    OneRank.device = torch.device("cuda")
    with pytest.raises(ConfigError, match="a segment beside graphs(.|\n)*it would fit with --no-cuda-graphs$"):
        memory.check(dataclasses.replace(full, memory_gib=22), 793_471, OneRank)
