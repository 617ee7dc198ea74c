"""Checkpoints that cannot be used, and command lines that cannot be run: one clear line, nothing overwritten."""

import dataclasses
import pickle
import resource

import pytest
import torch

from fused_mos.runtime.files import FileError
from fused_mos.train import main
from fused_mos.training import RECIPES, CheckpointError, ConfigError, ModelConfig, OptimConfig, TrainConfig
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def finished(finished_run):
    """A finished run without its previous checkpoint, to which it would fall back."""
    folder = finished_run(1)
    (folder / "last.safetensors.previous").unlink()
    return folder


def assert_refused(flags, capsys, *parts):
    """The command fails with exactly one line, which says all of `parts`."""
    capsys.readouterr()
    assert main(flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0], lines[0]


def test_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(4), "c": torch.randn(4, 4).t()}
    save_checkpoint(tmp_path / "x", tensors, {"n": [1, 0.1]})
    loaded, meta = load_checkpoint(tmp_path / "x")
    assert meta == {"n": [1, 0.1]} and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_parts_are_the_plain_checkpoint(tmp_path):
    """Split files are of the size asked for, give the same, joined are the plain file, and leave nothing behind."""
    tensors, path = {"a": torch.randn(900, 1000), "b": torch.tensor(4)}, tmp_path / "x.safetensors"
    save_checkpoint(tmp_path / "plain", tensors, {"n": 1})
    save_checkpoint(path, {"a": torch.zeros(400, 1000)}, {"n": 0}, max_mib=1)
    save_checkpoint(path, tensors, {"n": 1}, max_mib=1)
    parts = sorted(tmp_path.glob("x.safetensors.*"))
    assert len(parts) == 4 and max(part.stat().st_size for part in parts) == 1 << 20 and path.stat().st_size < 1000
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "plain").read_bytes()
    loaded, meta = load_checkpoint(path)
    assert meta == {"n": 1} and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    save_checkpoint(path, {"b": tensors["b"]}, {"n": 2}, max_mib=1)
    assert {file.name for file in tmp_path.iterdir()} == {"plain", "x.safetensors"}


@pytest.mark.parametrize("max_mib", [0, 1], ids=["whole", "in parts"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(max_mib, tmp_path):
    """The process may write 1,000 kB of a file, so that the system refuses the rest, as a full disk would."""
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(path, {"a": torch.ones(4)}, {"n": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(FileError, match=f"^{path}[0-9a-f.]*: File too large$"):
            save_checkpoint(path, {"a": torch.zeros(400, 1000)}, {"n": 1}, max_mib)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path)[1] == {"n": 0} and [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    "damage", [lambda part: part.unlink(), lambda part: part.write_bytes(bytes(part.stat().st_size))]
)
def test_damaged_parts_are_refused(damage, tmp_path):
    path = tmp_path / "x"
    save_checkpoint(path, {"a": torch.randn(900, 1000)}, {}, max_mib=1)
    damage(sorted(tmp_path.glob("x.*"))[1])
    with pytest.raises(CheckpointError, match="lacks its part|its parts do not match its digest"):
        load_checkpoint(path)


@pytest.mark.parametrize("length", [0, 4, 100, -10])
def test_truncated_checkpoint(length, finished, capsys):
    path = finished / "last.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    before = contents(finished)
    assert_refused(["--resume", str(finished), "--epochs", "2"], capsys, path, "truncated or damaged")
    assert contents(finished) == before


def test_a_pickle_is_refused_and_not_executed(tmp_path, finished, capsys):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (finished / "last.safetensors").write_bytes(pickle.dumps(Malicious()))
    assert_refused(["--resume", str(finished)], capsys, "truncated or damaged")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_model(finished, capsys):
    path = finished / "last.safetensors"
    tensors, meta = load_checkpoint(path)
    save_checkpoint(path, tensors | {"model.head.prior.weight": torch.zeros(2, 10)}, meta)
    assert_refused(["--resume", str(finished)], capsys, "head.prior.weight", "(2, 10)", "(3, 10)")
    save_checkpoint(path, tensors | {"model.extra": torch.zeros(1)}, meta)
    assert_refused(["--resume", str(finished)], capsys, "extra is only in the checkpoint")


def test_no_checkpoint_to_resume(tmp_path, capsys):
    assert_refused(["--resume", str(tmp_path / "nowhere")], capsys, "there is no checkpoint", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_resuming_as_another_run(finished, capsys):
    before = contents(finished)
    for flags, parts in (
        (["--n-experts", "7"], ("n_experts", "was 3, got 7")),
        (["--lr", "3"], ("lr", "was 10.0, got 3")),
        (["--seed", "5"], ("seed", "was 28, got 5")),
    ):
        assert_refused(["--resume", str(finished), *flags], capsys, *parts)
    assert contents(finished) == before


def test_resuming_on_another_text(finished, corpus_folder, capsys):
    text = corpus_folder / "train.txt"
    text.write_text(text.read_text() + "unheard\n")
    before = contents(finished)
    assert_refused(["--resume", str(finished)], capsys, "vocabulary", finished)
    assert contents(finished) == before


def test_resuming_on_the_same_words_in_another_order(finished, corpus_folder, capsys):
    lines = (corpus_folder / "train.txt").read_text().splitlines()
    (corpus_folder / "train.txt").write_text("\n".join([*lines[:-3], lines[-2], lines[-3], lines[-1]]) + "\n")
    assert_refused(["--resume", str(finished), "--epochs", "2"], capsys, "another train.txt", corpus_folder)


def test_an_occupied_folder_is_not_overwritten(finished, small_flags, capsys):
    before = contents(finished)
    (finished / "last.safetensors").unlink()
    before.pop(finished / "last.safetensors")
    assert_refused([*small_flags, "--out", str(finished)], capsys, finished, "is not empty and holds no checkpoint")
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--recipe", "imagenet"], ("recipe must be one of", "'imagenet'")),
        (["--dropouti", "1.5"], ("dropouti must be in [0, 1), got 1.5",)),
        (["--batch-size", "0"], ("batch_size must be positive, got 0",)),
        (["--lr", "nan"], ("lr must be positive, got nan",)),
        (["--small-batch-size", "4"], ("small_batch_size must divide batch_size = 6, got 4",)),
        (["--time-limit", "-1"], ("time_limit must not be negative, got -1",)),
        (["--precision", "tf32", "--device", "cpu"], ("precision tf32 needs an NVIDIA GPU, got device cpu",)),
        (["--backend", "fast"], ("backend must be one of", "'fast'")),
        (["--backend", "cuda"], ("backend 'cuda' is not available",)),
        (["--device", "abacus"], ("device 'abacus' cannot be used",)),
        (["--data", "/no/such/folder"], ("/no/such/folder does not exist", "train.txt")),
        (["--batch-size", "1200"], ("too short", "1200")),
        (["--seed", "9" * 20], ("seed must be in [0, 2**63), got 99999999999999999999",)),
    ],
)
def test_bad_flags(flags, parts, small_flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert_refused([*small_flags, *flags, "--out", str(out)], capsys, *parts)
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_named(small_flags, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_refused(
        [*small_flags, "--out", str(tmp_path / "file" / "run")], capsys, tmp_path / "file" / "run", "Not a directory"
    )


def test_bad_texts(small_flags, corpus_folder, tmp_path, capsys):
    flags = [*small_flags, "--out", str(tmp_path / "run")]
    valid = corpus_folder / "valid.txt"
    text = valid.read_text()
    valid.write_text(text + "w1 unheard w2\n")
    assert_refused(flags, capsys, f"{valid}:41", "'unheard'", "--map-unknown")
    valid.write_text("")
    assert_refused(flags, capsys, valid, "is empty")
    valid.write_bytes(b"\xff\xfe words")
    assert_refused(flags, capsys, valid, "UTF-8")
    valid.unlink()
    assert_refused(flags, capsys, corpus_folder, "lacks valid.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_survives_json(name):
    config = RECIPES[name]()
    config.check()
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="does not fit this version"):
        TrainConfig.from_json(config.to_json() | {"unheard": 1})


def test_the_papers_recipes():
    """Every hyperparameter of the published runs."""
    assert RECIPES["ptb"]().model == ModelConfig(
        head="mos",
        n_experts=15,
        embedding_size=280,
        hidden_sizes=(960, 960, 620),
        dropoute=0.1,
        dropouti=0.4,
        dropouth=0.225,
        dropout=0.4,
        dropoutl=0.29,
        wdrop=0.5,
        tied=True,
    )
    assert RECIPES["ptb"]().optim == OptimConfig(
        lr=20,
        finetune_lr=25,
        batch_size=12,
        micro_batches=1,
        epochs=1000,
        bptt=70,
        bptt_delta=40,
        clip=0.25,
        weight_decay=1.2e-6,
        alpha=2,
        beta=1,
        nonmono=5,
    )
    assert RECIPES["wikitext2"]().model == ModelConfig(
        head="mos",
        n_experts=15,
        embedding_size=300,
        hidden_sizes=(1150, 1150, 650),
        dropoute=0.1,
        dropouti=0.55,
        dropouth=0.2,
        dropout=0.4,
        dropoutl=0.29,
        wdrop=0.5,
        tied=True,
    )
    assert RECIPES["wikitext2"]().optim == OptimConfig(
        lr=15,
        finetune_lr=20,
        batch_size=15,
        micro_batches=3,
        epochs=1000,
        bptt=70,
        bptt_delta=20,
        clip=0.25,
        weight_decay=1.2e-6,
        alpha=2,
        beta=1,
        nonmono=5,
    )
    assert (RECIPES["ptb"]().seed, RECIPES["wikitext2"]().seed) == (28, 1882)
    for name in ("ptb", "wikitext2"):
        assert (RECIPES[name]().valid_batch_size, RECIPES[name]().test_batch_size) == (10, 1)


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in (TrainConfig, ModelConfig, OptimConfig):
        for field in dataclasses.fields(part):
            if field.name not in ("model", "optim"):
                assert "--" + field.name.replace("_", "-") in text


def test_help_says_whose_defaults_it_shows(finished_run, capsys):
    run = finished_run(1)
    for flags, origin in (
        ([], "the recipe ptb-small"),
        (["--recipe", "ptb"], "the recipe ptb"),
        (["--resume", str(run)], f"the run in {run}"),
    ):
        with pytest.raises(SystemExit):
            main([*flags, "--help"])
        assert f"The defaults shown here are those of {origin}." in capsys.readouterr().out.replace("\n", " ")


def test_unreadable_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "x")
