"""The command that shows which expert speaks when."""

import json
import re
import warnings

import pytest
import torch

from fused_mos import experts, train
from fused_mos.training import Trainer
from fused_mos.training.experts import read
from fused_mos.training.run import load_run


@pytest.fixture
def trained(small_flags, corpus_folder, tmp_path):
    """A run on a text with a word that HTML and mathematical typesetting would take for markup."""
    for path in corpus_folder.iterdir():
        path.write_text(path.read_text().replace("w7 ", "<b>$x_$ "))
    folder = tmp_path / "run"
    Trainer(train.parse([*small_flags, "--epochs", "1", "--out", str(folder)])).run()
    return folder


def test_the_page_the_plot_and_the_numbers(trained, capsys):
    assert experts.main([str(trained), "--words", "50", "--nearest", "w3", "<b>$x_$"]) == 0
    out = capsys.readouterr().out
    report = json.loads((trained / "experts" / "experts.json").read_text())
    assert report["ppl"] == pytest.approx(json.loads((trained / "result.json").read_text())["valid_ppl"], rel=0.2), (
        "as columns, or as one"
    )
    for share in ("prior", "responsibility"):
        assert sum(expert[share] for expert in report["experts"]) == pytest.approx(1, abs=1e-5)
    assert 1 <= report["effective_experts"] <= 3 == len(report["experts"])
    assert list(report["nearest"]) == ["w3", "<b>$x_$"] and "w3" not in report["nearest"]["w3"]
    assert (trained / "experts" / "experts.png").read_bytes().startswith(b"\x89PNG")
    page = (trained / "experts" / "index.html").read_text()
    assert len(re.findall("<span style=", page)) == 50 + 3, "words, and the key of colours"
    assert "<b>" not in page and "&lt;b&gt;$x_$" in page
    assert str(trained / "experts" / "index.html") in out and f"ppl {report['ppl']:.2f}" in out


def test_words_do_not_command_the_terminal(small_flags, corpus_folder, tmp_path, capsys):
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e"
    for path in corpus_folder.iterdir():
        path.write_text(path.read_text().replace("w7 ", f"w7{evil} "), encoding="utf-8")
    Trainer(train.parse([*small_flags, "--epochs", "1", "--out", str(tmp_path / "run")])).run()
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")  # matplotlib names characters as they are
        assert experts.main([str(tmp_path / "run"), "--nearest", f"w7{evil}"]) == 0
    text, error = capsys.readouterr()
    assert r"w7\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e: " in text
    assert all(line.isprintable() for line in (text + error).split("\n"))


def test_reading_is_the_text_in_its_order(trained):
    run = load_run(trained)
    reading = read(run, run.text("valid"))
    assert torch.equal(reading.tokens, run.text("valid")[1:])
    whole = run.model.log_prob(run.text("valid")[:-1, None]).squeeze(1)
    assert torch.allclose(
        reading.shares.log_likelihood, whole.gather(1, run.text("valid")[1:, None]).squeeze(1), rtol=0, atol=1e-4
    )


def test_errors(trained, small_flags, tmp_path, capsys):
    other = tmp_path / "softmax"
    Trainer(train.parse([*small_flags, "--head", "softmax", "--epochs", "1", "--out", str(other)])).run()
    for flags, message in (
        ([str(trained), "--nearest", "zebra"], "nearest: 'zebra' is not one of the model's 42 words"),
        ([str(trained), "--words", "0"], "words must be positive, got 0"),
        ([str(other)], "head must be mos, the only one whose experts predict words, got softmax"),
    ):
        capsys.readouterr()
        assert experts.main(flags) == 2
        assert message in capsys.readouterr().err
    assert not (other / "experts").exists()
