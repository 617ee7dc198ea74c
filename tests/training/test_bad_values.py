"""Values out of their ranges, damaged and unreadable files, in every command: one line on stderr, exit status 2."""

import hashlib
import json
import math

import pytest
from runs import refused

from fused_mos import convert, evaluate, experts, finetune, generate, reproduce, train, train_1b
from fused_mos.data import lm1b
from fused_mos.runtime import files
from fused_mos.training import dynamic_evaluation as dynamic_module

VALUES = [
    ("--clip nan", "clip must not be negative, got nan"),
    ("--lr inf", "lr must be finite, got inf"),
    ("--lr 1e38", "lr must be at most 1e+30, got 1e+38"),
    ("--seed 99999999999999999999", "seed must be in [0, 2**63), got 99999999999999999999"),
    ("--device meta", "device must be auto, cpu, cuda, cuda:1, …, got 'meta'"),
    ("--n-experts 100000000", "choose fewer experts or smaller sizes"),
    ("--n-experts 2000000000 --embedding-size 2000000000", "there is not enough memory"),
    ("--embedding-size 1000000000000000000", "embedding_size must be in [1, 2**31), got 1000000000000000000"),
    ("--hidden-sizes 3 1000000000000000000000", "hidden_sizes must be one or more widths in [1, 2**31)"),
    ("--rank 0", "rank must be in [1, 2**31), got 0"),
    ("--rank 9", "rank must be at most min(the last of hidden_sizes, embedding_size) = 8, got 9"),
    (
        "--rank 11 --embedding-size 20",
        "rank must be at most min(the last of hidden_sizes, embedding_size) = 10, got 11",
    ),
    ("--latent residual", "got 8 and 10; for example, pass --hidden-sizes 12 8"),
    ("--latent residual --embedding-size 10 --latent-norm", "latent_norm must be False for latent='residual'"),
    ("--head softmax --latent linear", "latent is for mixtures: it must be tanh where head is softmax, got linear"),
    ("--head softmax --latent-norm", "latent_norm is for mixtures: it must be False where head is softmax, got True"),
    ("--head softmax --rank 3", "rank is for mixtures: it must be None where head is softmax, got 3"),
    ("--batch-size 1000000000000", "too short for 1000000000000 columns"),
    ("--batch-size 9999999999999999999999", "too short for 9999999999999999999999 columns"),
]


@pytest.mark.parametrize(("flags", "message"), [*VALUES, ("--alpha nan", "alpha must not be negative, got nan")])
def test_values_of_train(flags, message, small_flags, tmp_path, capsys):
    refused(train, [*small_flags, *flags.split(), "--out", tmp_path / "run"], capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("value", "message"), VALUES)
def test_values_of_train_1b(value, message, flags, tmp_path, capsys):
    if "fewer experts" in message:
        message = "a rank needs"
    refused(train_1b, [*flags, *value.split(), "--out", tmp_path / "run"], capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.trains
@pytest.mark.parametrize(
    "flag", ["--seed 9223372036854775807", "--memory-gib 1e30", "--head-chunk 9999999999999999999999"]
)
def test_large_values_that_are_taken(flag, flags, tmp_path):
    assert train_1b.main([*flags, *flag.split(), "--max-steps", "2", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.trains
def test_values_of_commands_that_read_a_run(finished_run, corpus_folder, capsys):
    run = finished_run(1)
    for command, flags, message in (
        (generate, "--temperature 1e-320", "temperature must be at least 1e-30, got 1e-320"),
        (generate, "--temperature nan", "temperature must be at least 1e-30, got nan"),
        (generate, "--device meta", "device must be auto, cpu, cuda"),
        (evaluate, "--dynamic --lamb inf", "lamb must be finite, got inf"),
        (evaluate, "--dynamic --lr nan", "lr must be positive, got nan"),
        (evaluate, "--checkpoint-minutes nan", "checkpoint_minutes must not be negative, got nan"),
        (experts, "--words 0", "words must be positive, got 0"),
        (finetune, "--lr inf", "lr must be finite, got inf"),
        (reproduce, f"--data {corpus_folder} --time-limit nan", "time_limit must not be negative, got nan"),
    ):
        first = "demo" if command is reproduce else run
        refused(command, [first, *flags.split()], capsys, message)
    assert generate.main([str(run), "--words", "3", "--temperature", "1e-30"]) == 0


@pytest.mark.trains
def test_damaged_files_of_a_run(finished_run, capsys):
    run = finished_run(1)

    def with_content(name, content, *checks):
        path = run / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        for command, flags, message in checks:
            refused(command, [run, *flags.split()], capsys, path if "{" not in message else "", message.strip("{}"))
        path.unlink() if before is None else path.write_bytes(before)

    config = json.loads((run / "config.json").read_text())
    for content, message in (
        (b"\xff", "is not UTF-8 text"),
        (b"[3]", "must hold a dict, got a list"),
        (b"{", "it is not JSON"),
        (json.dumps(config | {"optim": 3}).encode(), "{the saved configuration does not fit this version}"),
        (json.dumps(config | {"seed": "x"}).encode(), "{seed must be a whole number, got 'x'}"),
        (json.dumps(config | {"optim": config["optim"] | {"bptt": 0}}).encode(), "{bptt must be positive, got 0}"),
    ):
        with_content("config.json", content, *((c, "", message) for c in (evaluate, generate, experts, finetune)))
    with_content("vocabulary.txt", b"w1\nw1\n", (generate, "", "is not a vocabulary: words must be distinct"))
    for command in (generate, evaluate, experts):
        with_content("vocabulary.txt", b"w1\nw2\n", (command, "", "is not a vocabulary: it lacks <eos>"))
    with_content("vocabulary.txt", b"w1\n\xff\n", (evaluate, "", "is not UTF-8 text (line 2"))
    with_content("evaluation.json", b"{}", (evaluate, "", "must hold a list, got a dict"))


@pytest.mark.trains
def test_a_damaged_search_and_damaged_statistics_are_told_before_the_work(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    run = finished_run(1)
    (run / "dynamic").mkdir()
    (run / "dynamic" / "tuning.json").write_text('{"tried": [')
    monkeypatch.setattr(dynamic_module.DynamicRun, "_work", lambda *_: pytest.fail("it began"))
    refused(evaluate, [run, "--dynamic", "--tune"], capsys, run / "dynamic" / "tuning.json", "it is not JSON")
    statistics = run / "dynamic" / "gradient-statistics.safetensors"
    statistics.write_bytes((run / "best.safetensors").read_bytes()[:-9])
    refused(evaluate, [run, "--dynamic"], capsys, statistics, "truncated or damaged", "delete it to recompute it")


@pytest.mark.trains
def test_an_evaluation_is_shown_before_it_is_kept(finished_run, monkeypatch, capsys):
    run = finished_run(1)
    monkeypatch.setattr(files, "append_json", lambda *_: pytest.fail(capsys.readouterr().out))
    with pytest.raises(pytest.fail.Exception, match=r"test, context 12: ppl"):
        evaluate.main([str(run)])


@pytest.mark.trains
def test_the_rule_is_that_of_the_run_and_not_of_the_corpus(finished_run, corpus_folder, tmp_path):
    """Where a config.json lies in the folder of the corpus."""
    run = finished_run(1)
    (corpus_folder / "config.json").write_text('{"recipe": "wikitext2"}')
    assert evaluate.parse(["--data", str(corpus_folder), str(run)]).rule.lamb == 0.075


def test_json_has_no_infinity(tmp_path):
    files.append_json(tmp_path / "list.json", {"ppl": math.inf, "rows": (1, math.nan)})
    text = (tmp_path / "list.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == [{"ppl": None, "rows": [1, None]}]


def test_a_seal_tells_of_every_change(tmp_path):
    path, value = tmp_path / "x.json", {"words": 3, "list": [0.1, None], "ppl": math.inf}
    files.write_sealed(path, value)
    assert files.read_sealed(path) == value | {"ppl": None}
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(files.FileError, match="does not match its digest"):
        files.read_sealed(path)
    files.write_json(path, {"words": 3})  # as versions before 0.2 wrote it
    assert files.read_sealed(path) == {"words": 3}


def test_a_manifest_that_lacks_something(prepared, flags, tmp_path, capsys):
    path = prepared / "manifest.json"
    before = path.read_bytes()
    words = (prepared / "vocabulary.txt").read_bytes()
    manifest = json.loads(before)
    del manifest["digest"]
    try:
        for harmed in (
            {key: value for key, value in manifest.items() if key != "train"},
            manifest | {"vocabulary": {}},
            manifest | {"train": [{"file": "x"}]},
            manifest | {"heldout": 3},
            manifest | {"heldout": []},
            manifest | {"train": [{"file": "x", "sha256": "", "tokens": 0}]},
            manifest | {"format": 7},
        ):
            path.write_text(json.dumps(harmed))
            refused(train_1b, [*flags, "--out", tmp_path / "run"], capsys, path, "prepare")
        path.write_bytes(before.replace(b'"words": 43', b'"words": 44'))
        refused(train_1b, [*flags, "--out", tmp_path / "run"], capsys, path, "digest")
        other = words.replace(b"<S>", b"<s>")
        (prepared / "vocabulary.txt").write_bytes(other)
        path.write_text(json.dumps(manifest | {"vocabulary": {"sha256": hashlib.sha256(other).hexdigest()}}))
        refused(train_1b, [*flags, "--out", tmp_path / "run"], capsys, "is not a vocabulary: it lacks <S>")
    finally:
        path.write_bytes(before)
        (prepared / "vocabulary.txt").write_bytes(words)


def test_models_that_convert_cannot_read(tmp_path, capsys):
    for content in (b"", b"\x80\x04.", b"\xff" * 99):
        (tmp_path / "model.pt").write_bytes(content)
        refused(convert, [tmp_path / "model.pt", tmp_path / "new"], capsys, tmp_path / "model.pt")
    refused(convert, [tmp_path / "none.pt", tmp_path / "new"], capsys, "there is no file")
    assert not (tmp_path / "new").exists()


def test_flags_of_prepare(prepared, tmp_path, capsys):
    source = prepared.parent / "source"
    for flags, message in (
        ("--top 3", "top must be at least 4, got 3"),
        ("--workers 0", "workers must be at least 1"),
        ("--vocabulary none", "vocabulary none does not exist"),
    ):
        arguments = ["prepare", "--source", source, "--out", tmp_path / "out", "--allow-missing", *flags.split()]
        refused(lm1b, arguments, capsys, message)
        assert not (tmp_path / "out").exists()
