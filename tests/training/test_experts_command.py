"""The command that shows which expert speaks when."""

import json
import re
import warnings
from html.parser import HTMLParser

import pytest
import torch

from fused_mos import experts, train
from fused_mos.lm.experts import ExpertShares
from fused_mos.runtime import plots
from fused_mos.training import Trainer
from fused_mos.training.experts import read
from fused_mos.training.experts_page import HATCHES, LINES, colour_of, page, plot_experts, round_of
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
    for kinds in (report["kinds"], *(expert["kinds"] for expert in report["experts"])):
        assert sum(kinds.values()) == pytest.approx(1, abs=1e-5)
    assert report["kinds"]["function"] == 0 < report["kinds"]["content"] < 1, "w0 … w39, and <eos>"
    assert all("<eos>" not in expert["frequent_content"] for expert in report["experts"])
    page = (trained / "experts" / "index.html").read_text()
    words = words_of(page)
    assert len(words) == 50
    assert [int(word["tabindex"]) for word in words] == [0] + 49 * [-1], "one stop of the tab key"
    assert {word["style"].split(":")[1][:7] for word in words} <= {colour_of(e) for e in range(3)}
    for word in words:
        best = int(re.search(r"expert (\d+) ", word["title"])[1]) - 1
        assert f"r{best}" in word["class"].split() and word["style"].startswith(f"--r:{colour_of(best)}")
    assert "<b>" not in page and "&lt;b&gt;$x_$" in page
    assert not re.search("https?:|//[a-z]", page), "it needs no network"
    assert str(trained / "experts" / "index.html") in out and f"ppl {report['ppl']:.2f}" in out


def words_of(page):
    """Attributes of the text's words."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "span" and "tabindex" in dict(attributes):
                found.append(dict(attributes))

    Parser().feed(page)
    return found


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


def shares_of(n, k):
    """Of n words, each spoken by the next expert."""
    share = torch.nn.functional.one_hot(torch.arange(n) % k, k) * 0.9 + 0.1 / k
    return ExpertShares(share, share.roll(1, 1), torch.full((n,), -2.0))


def report_of(k, function, of_text=0.3):
    kinds = [{"function": share, "content": 1 - share, "other": 0.0} for share in function]
    words = {"frequent": ["the"], "frequent_content": ["cat"], "characteristic": []}
    experts = [{"prior": 1 / k, "responsibility": 1 / k, "kinds": of, **words} for of in kinds]
    text = {"function": of_text, "content": 1 - of_text, "other": 0.0}
    return {"ppl": 7.0, "effective_experts": 2.0, "kinds": text, "experts": experts, "nearest": {"cat": ["dog"]}}


@pytest.mark.parametrize(
    ("k", "told"), [(8, ""), (15, "from expert 9 on dashed."), (33, "from expert 25 on double. Beyond")]
)
def test_more_experts_than_colours(k, told, tmp_path):
    """They differ in the line, on the page, and in the hatch, in the plot; the page says so."""
    text = page(shares_of(40, k), ["cat"] * 40, report_of(k, [0.3] * k), "run, valid")
    assert (told in text) if told else ("more experts than colours" not in text)
    styles = re.findall(r"^\.r(\d+), .* --c: (#\w{6}); --line: (\w+) ", text, re.MULTILINE)
    assert [int(expert) for expert, _, _ in styles] == list(range(k))
    assert len({(colour, line) for _, colour, line in styles}) == min(k, len(plots.COLOURS) * len(LINES))
    for styles in (LINES, HATCHES):
        assert len({(colour_of(e), round_of(e, styles)) for e in range(k)}) == min(k, 32)
    plot_experts(shares_of(40, k), ["cat"] * 9, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_names_experts_that_favour_function_words():
    text = page(shares_of(4, 3), ["the", "cat", "N", "."], report_of(3, [0.1, 0.36, 0.8]), "run, valid")
    favoured = "Function words: 30% of the text, favoured by expert 3 (80% of what it speaks), expert 2 (36%"
    assert favoured in text and "Punctuation and numbers: 0% of the text, favoured by no expert." in text
    assert [word["class"].split()[1] for word in words_of(text)] == ["function", "content", "other", "other"]


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
