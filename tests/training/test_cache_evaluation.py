"""The command `evaluate` with a continuous cache."""

import functools
import json
import math
import os
import random
import signal

import pytest
import torch

from fused_mos import convert, evaluate, train
from fused_mos.lm import AWDLSTM
from fused_mos.lm.cache import ContinuousCache
from fused_mos.training import cache_evaluation as cache_module
from fused_mos.training.cache_evaluation import CacheRule, cache_evaluation
from fused_mos.training.evaluation import static_evaluation
from fused_mos.training.run import load_run

pytestmark = pytest.mark.trains

CACHE = "--cache --window 7 --theta 0.9 --lambdasm 0.2".split()


@pytest.fixture
def trained(finished_run):
    return finished_run(2)


def results(folder):
    return json.loads((folder / "evaluation.json").read_text())


@torch.no_grad()
def restated(run, split, rule):
    """Mean NLL of p = (1 − λ) p_model + λ p_cache, in float64, one word at a time, over the whole vocabulary."""
    model, tokens = run.model.double(), run.text(split)
    raw, features, _ = model.features(tokens[:-1, None])
    of_model, hidden, total = model.head.log_prob(features)[:, 0].exp(), raw[:, 0], 0.0
    for t in range(len(tokens) - 1):
        p = of_model[t]
        if t > 0:
            first = max(0, t - rule.window)
            weights = torch.softmax(rule.theta * (hidden[first:t] @ hidden[t]), 0)
            of_cache = torch.zeros_like(p).index_add_(0, tokens[first + 1 : t + 1], weights)
            p = (1 - rule.lambdasm) * p + rule.lambdasm * of_cache
        total -= math.log(p[tokens[t + 1]])
    model.float()
    return total / (len(tokens) - 1)


def test_the_record_and_what_is_printed(trained, capsys):
    for split in ("test", "valid"):
        assert evaluate.main([str(trained), *CACHE, "--split", split]) == 0
    rule = CacheRule(window=7, theta=0.9, lambdasm=0.2)
    printed = capsys.readouterr().out
    for split, record in zip(("test", "valid"), results(trained), strict=True):
        run = load_run(trained)
        loss, rows = record.pop("loss"), run.text(split).numel()
        assert loss == pytest.approx(restated(run, split, rule), abs=1e-6)
        assert record.pop("ppl") == pytest.approx(math.exp(loss), rel=1e-12)
        assert record.pop("ppl_published") == pytest.approx(math.exp(loss * (rows - 1) / rows), rel=1e-12)
        assert record == {
            **{"split": split, "dynamic": False, "cache": True, "window": 7, "theta": 0.9, "lambdasm": 0.2},
            **{"tuned": False, "eval_context": 12},
        }
        assert f"{split}, cache with window 7, theta 0.9, lambdasm 0.2: ppl {math.exp(loss):.2f} (" in printed


def test_segments_and_blocks_change_nothing(trained, monkeypatch):
    run, rule = load_run(trained), CacheRule(window=7, theta=0.9, lambdasm=0.2)
    expected = cache_evaluation(run, "test", rule)["loss"]
    for block, context in ((1, 0), (7, 1), (10**6, 7), (128, 10**6)):
        monkeypatch.setattr(cache_module, "ContinuousCache", functools.partial(ContinuousCache, block=block))
        assert cache_evaluation(run, "test", rule, context=context)["loss"] == pytest.approx(expected, abs=1e-6)


def test_without_a_share_the_cache_is_static_evaluation(trained):
    run = load_run(trained)
    record = cache_evaluation(run, "test", CacheRule(lambdasm=0.0))
    assert record["loss"] == pytest.approx(static_evaluation(run, "test")["loss"], rel=1e-14)  # the sum's order
    assert cache_evaluation(run, "test", CacheRule())["loss"] != pytest.approx(record["loss"], abs=1e-3)


@pytest.mark.parametrize("head", ["softmax", "moc", "mos"])
def test_heads_and_backends(head, small_flags, tmp_path):
    folder = tmp_path / "run"
    assert train.main([*small_flags, "--epochs", "1", "--head", head, "--out", str(folder)]) == 0
    for backend in ("reference", "tiled"):
        assert evaluate.main([str(folder), *CACHE, "--backend", backend]) == 0
    expected = restated(load_run(folder), "test", CacheRule(7, 0.9, 0.2))
    assert [record["loss"] for record in results(folder)] == pytest.approx([expected] * 2, abs=1e-6)


def test_a_converted_checkpoint(corpus_folder, tmp_path):
    words = len({*(corpus_folder / "train.txt").read_text().split(), "<eos>"})
    state = AWDLSTM(words, 6, (9, 8), "mos", 3).state_dict()
    published = {name.removeprefix("head."): tensor for name, tensor in state.items()}
    torch.save(published, tmp_path / "model.pt")
    folder = tmp_path / "run"
    assert convert.main([str(tmp_path / "model.pt"), str(folder), "--data", str(corpus_folder)]) == 0
    assert evaluate.main([str(folder), *CACHE]) == 0
    expected = restated(load_run(folder), "test", CacheRule(7, 0.9, 0.2))
    assert results(folder)[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_words_that_come_again_are_likelier(trained, corpus_folder, capsys):
    """A text of a few words in random order, of which the model knows nothing."""
    draw = random.Random(0)
    lines = [" ".join(draw.choice(("w3", "w17", "w31")) for _ in range(9)) for _ in range(30)]
    (corpus_folder / "test.txt").write_text("\n".join(lines) + "\n")
    for flags in ([], ["--cache", "--window", "1234567"], ["--cache", "--window", "1"]):
        assert evaluate.main([str(trained), *flags]) == 0
    assert "cache with window 1234567, theta 0.3, lambdasm 0.1: ppl" in capsys.readouterr().out
    static, cache, last_word = (record["ppl"] for record in results(trained))
    assert cache < 0.8 * static and cache < last_word


def test_the_search(trained, corpus_folder, monkeypatch, capsys):
    """The search finds the best pair among the grid and the given values, and reads the validation text once. Then the
    test text is read with that pair."""
    (corpus_folder / "valid.txt").write_text("w3 w17 w31 w17 w3 w31 w3 w3\n" * 12)
    monkeypatch.setattr(cache_module, "THETAS", (0.0, 0.5))
    monkeypatch.setattr(cache_module, "LAMBDAS", (0.0, 0.2))
    read, original = [], cache_module.read

    def reading(run, split, window, thetas, context):
        read.append((split, window, thetas))
        return original(run, split, window, thetas, context)

    monkeypatch.setattr(cache_module, "read", reading)
    flags = [str(trained), "--cache", "--window", "20", "--theta", "1.5", "--lambdasm", "0.01"]
    assert evaluate.main([*flags, "--tune"]) == 0
    run = load_run(trained)
    losses = {
        (theta, lambdasm): cache_evaluation(run, "valid", CacheRule(20, theta, lambdasm))["loss"]
        for theta in (0.0, 0.5, 1.5)
        for lambdasm in (0.0, 0.2, 0.01)
    }
    theta, lambdasm = min(losses, key=losses.get)
    assert lambdasm == 0.2, "it is the model alone, or what was given"
    record = results(trained)[-1]
    assert (record["window"], record["theta"], record["lambdasm"], record["tuned"]) == (20, theta, lambdasm, True)
    assert record["loss"] == cache_evaluation(run, "test", CacheRule(20, theta, lambdasm))["loss"]
    assert read[:2] == [("valid", 20, [0.0, 0.5, 1.5]), ("test", 20, [theta])]
    assert (
        f"valid: ppl {math.exp(losses[theta, lambdasm]):.2f} with theta {theta:g} and lambdasm {lambdasm:g}, the best "
        f"of 9 pairs; {math.exp(losses[0.0, 0.0]):.2f} without the cache\n"
    ) in capsys.readouterr().out


def test_a_missing_text_is_told_before_the_search(trained, corpus_folder, monkeypatch, capsys):
    (corpus_folder / "test.txt").unlink()
    monkeypatch.setattr(cache_module, "tune", lambda *_: pytest.fail("it began"))
    assert evaluate.main([str(trained), "--cache", "--tune"]) == 2
    assert "lacks test.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cache --window 0", "window must be in [1, 2**31), got 0"),
        ("--cache --theta -0.1", "theta must not be negative, got -0.1"),
        ("--cache --theta inf", "theta must be finite, got inf"),
        ("--cache --theta nan", "theta must not be negative, got nan"),
        ("--cache --lambdasm 1", "lambdasm must be in [0, 1), got 1.0"),
        ("--cache --lambdasm -0.5", "lambdasm must be in [0, 1), got -0.5"),
        ("--cache --lambdasm nan", "lambdasm must be in [0, 1), got nan"),
        ("--cache --dynamic", "--dynamic and --cache cannot be combined; pass only one of them"),
        ("--cache --bptt 7", "lr, lamb, epsilon and bptt are for --dynamic evaluation"),
        ("--theta 0.4", "window, theta and lambdasm are for --cache, got CacheRule(window=2000, theta=0.4"),
        ("--dynamic --window 9", "window, theta and lambdasm are for --cache, got CacheRule(window=9"),
    ],
)
def test_errors_name_the_flag(flags, message, trained, capsys):
    assert evaluate.main([str(trained), *flags.split()]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (trained / "evaluation.json").exists()


def test_a_signal_ends_it_and_leaves_nothing(trained, monkeypatch, capsys):
    original = ContinuousCache.log_likelihood

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(ContinuousCache, "log_likelihood", signalled)
    assert evaluate.main([str(trained), "--cache", "--tune"]) == 130
    assert capsys.readouterr().err.endswith("\nstopped\n") and not (trained / "evaluation.json").exists()


def test_help_says_it(capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "--cache [--tune]" in out and all(
        flag in out for flag in ("--window INT", "--theta FLOAT", "--lambdasm FLOAT")
    )
