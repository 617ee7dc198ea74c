"""All stages in one command, in pieces, and its table."""

import dataclasses
import json
import shutil
import time

import pytest

from fused_mos import evaluate, reproduce
from fused_mos.lm.dynamic_evaluation import DynamicRule
from fused_mos.train import parse
from fused_mos.training import RECIPES, Trainer, forecast
from fused_mos.training import dynamic_evaluation as dynamic_module
from fused_mos.training.forecast import Forecast, Seconds, in_words

ESTIMATE = "expected time here, from a few timed steps of each kind:"


@pytest.fixture
def small_recipe(small_flags, monkeypatch):
    """`demo` made as small as the other tests' runs, with short samples for the estimate."""
    config = parse([*small_flags, "--epochs", "2"])
    monkeypatch.setitem(RECIPES, "demo", lambda: config)
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    monkeypatch.setattr(forecast, "STATISTICS_BATCH_SIZE", 20)
    monkeypatch.setattr(forecast, "SAMPLE_SECONDS", 0.05)


@pytest.mark.trains
def test_all_stages_in_pieces_are_those_of_one_go(small_recipe, corpus_folder, tmp_path, capsys):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert reproduce.main(["demo", "--data", str(corpus_folder), "--out", str(whole), "--no-estimate"]) == 0
    out = capsys.readouterr().out
    assert ESTIMATE not in out
    count = 0
    while not (pieces / "reproduction.md").exists():
        assert reproduce.main(["demo", "--data", str(corpus_folder), "--out", str(pieces), "--time-limit", "0.05"]) == 0
        count += 1
    told = capsys.readouterr().out
    assert count > 3 and "time limit reached; run the same command to continue" in told
    assert told.count(ESTIMATE) == 1 and told.startswith(ESTIMATE), "before the first piece alone"
    results = json.loads((whole / "reproduction.json").read_text())
    assert json.loads((pieces / "reproduction.json").read_text()) == results
    table = (whole / "reproduction.md").read_text()
    assert table in out and table == (pieces / "reproduction.md").read_text()
    for stage in reproduce.STAGES:
        valid, test = results[stage]["valid"], results[stage]["test"]
        assert (
            f"| {stage} | {valid['ppl']:.2f} / {test['ppl']:.2f} | {valid['ppl_published']:.2f} / "
            f"{test['ppl_published']:.2f} |" in table
        )
    assert (
        results["fine-tuned"]["valid"]["ppl"]
        == json.loads((whole / "finetune" / "result.json").read_text())["valid_ppl"]
    )
    assert not results["trained"]["test"]["dynamic"] and results["dynamic evaluation"]["test"]["dynamic"]


@pytest.mark.trains
def test_another_reproduction_is_refused_by_name(small_recipe, corpus_folder, tmp_path, monkeypatch, capsys):
    """While it trains, and when all is done."""
    config, out, corpus = RECIPES["demo"](), tmp_path / "run", str(corpus_folder)
    other = dataclasses.replace(config, recipe="other", optim=dataclasses.replace(config.optim, lr=3.0))
    monkeypatch.setattr(reproduce, "RECIPES", {"demo": lambda: config, "ptb": lambda: other})
    flags = ["--data", corpus, "--out", str(out), "--no-estimate"]
    texts = tmp_path / "texts"
    shutil.copytree(corpus_folder, texts)

    def interrupted(_):
        raise KeyboardInterrupt

    def refused(*arguments):
        assert reproduce.main([*arguments]) == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert reproduce.main(["demo", *flags]) == 130
    assert "recipe cannot change when a run continues: it was demo, got other" in refused("ptb", *flags)
    assert reproduce.main(["demo", *flags]) == 0
    results = (out / "reproduction.json").read_text()
    assert "recipe cannot change when a reproduction continues: it was demo, got ptb" in refused("ptb", *flags)
    tune = refused("demo", *flags, "--tune")
    assert "tune cannot change when a reproduction continues: it was False, got True" in tune
    assert "precision cannot change when a run continues: it was float32" in refused(
        "demo", *flags, "--precision", "bfloat16"
    )
    for name in ("train", "test"):
        lines = (texts / f"{name}.txt").read_text().splitlines()
        (texts / f"{name}.txt").write_text("\n".join([*lines[:-3], lines[-2], lines[-3], lines[-1]]) + "\n")
        error = refused("demo", "--data", str(texts), "--out", str(out))
        assert f"data: {texts} has another {name}.txt than" in error
        shutil.copy(corpus_folder / f"{name}.txt", texts)
    assert (out / "reproduction.json").read_text() == results
    assert reproduce.main(["demo", "--data", str(texts), "--out", str(out)]) == 0  # the same text elsewhere


@pytest.mark.trains
def test_the_estimate_is_about_what_it_then_takes(small_recipe, corpus_folder, tmp_path):
    """A few hundredths of a second each, so within a factor of ten: a wrong count of words or epochs is further off."""
    config = dataclasses.replace(RECIPES["demo"](), data=corpus_folder, out=tmp_path / "run")
    expected = forecast.forecast(config, DynamicRule())
    assert not config.out.exists()
    trainer = Trainer(config)
    began = time.monotonic()
    trainer.run()
    actual = time.monotonic() - began
    training = expected.training_epoch * config.optim.epochs
    assert training.low <= training.usual <= training.high
    assert actual / 10 < training.usual < actual * 10
    for part in (expected.finetuning_epoch, expected.evaluation, expected.dynamic):
        assert 0 < part.low <= part.usual <= part.high < 600


def test_what_the_estimate_adds_up():
    hour = Seconds(3600.0, 3000.0, 4000.0)
    expected = Forecast(100, 7, hour, hour * 2, hour * 0.1, hour * 3)
    assert expected.total.usual == pytest.approx((100 + 14 + 0.1 + 3) * 3600)
    assert expected.total.low == pytest.approx((100 + 14 + 0.1 + 3) * 3000)
    assert expected.total.high == pytest.approx((100 + 200 + 0.1 + 3) * 4000)
    lines = expected.report().splitlines()
    assert lines[0] == ESTIMATE
    assert lines[1] == "  training             100 epochs of 60 min (50 min to 67 min): 4.2 days (3.5 days to 4.6 days)"
    assert "7 to 100 epochs of 2.0 h" in lines[2] and lines[2].endswith("14 h to 8.3 days")
    assert lines[5].startswith("  in all               4.1 days to 14 days; 4.9 days if")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (119, "119 s"), (120, "2.0 min"), (7199, "120 min"), (7200, "2.0 h"), (30 * 86400, "30 days")],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


def test_the_table_of_the_paper():
    results = {
        stage: {split: {"ppl": 50.0, "ppl_published": 49.5} for split in ("valid", "test")}
        for stage in reproduce.STAGES
    }
    assert "| fine-tuned | 50.00 / 50.00 | 49.50 / 49.50 | 56.54 / 54.44 |" in reproduce.table("ptb", results)
    assert "| dynamic evaluation | 50.00 / 50.00 | 49.50 / 49.50 | 42.41 / 40.68 |" in reproduce.table(
        "wikitext2", results
    )


@pytest.mark.parametrize(
    ("recipe", "rule"),
    [("ptb", DynamicRule(0.002, 0.075, 0.001, 5)), ("wikitext2", DynamicRule(0.002, 0.02, 0.002, 5))],
)
def test_the_recipes_numbers_of_dynamic_evaluation(recipe, rule, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RECIPES[recipe]().to_json()))
    assert evaluate.parse([str(tmp_path), "--dynamic"]).rule == rule
    assert evaluate.parse(["--lamb", "0.5", str(tmp_path)]).rule == dataclasses.replace(rule, lamb=0.5)


def test_errors(tmp_path, capsys):
    assert reproduce.main(["demo", "--data", "nowhere", "--out", str(tmp_path / "x")]) == 2
    assert "data folder nowhere does not exist" in capsys.readouterr().err
    assert reproduce.main(["demo", "--data", "nowhere", "--time-limit", "-1"]) == 2
    assert "time_limit must not be negative, got -1.0" in capsys.readouterr().err
