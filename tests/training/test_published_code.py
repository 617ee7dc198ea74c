"""The trainer beside the paper's published code, which is no part of this repository: FUSED_MOS_PUBLISHED_CODE names a
checkout of https://github.com/zihangdai/mos, without which these tests are skipped."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not installed

from experiments import published, same_draws
from experiments.same_draws import CASES, Case, Pair, compare
from fused_mos.data.sample import write_corpus
from fused_mos.train import parse
from fused_mos.training import RECIPES, TrainConfig

CODE = Path(os.environ.get("FUSED_MOS_PUBLISHED_CODE", ""))
beside = pytest.mark.skipif(
    not (CODE / "weight_drop.py").is_file(), reason="FUSED_MOS_PUBLISHED_CODE names no checkout of the published code"
)


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "data")
    return TrainConfig(
        data=tmp_path / "data", out=tmp_path / "run", model=same_draws.MODEL, optim=same_draws.OPTIM, seed=1
    )


@beside
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_steps_from_the_same_draws_are_the_same(name, config):
    assert compare(CODE, config, CASES[name], steps=5) < 1e-13


@beside
def test_what_differs_on_purpose(config):
    """The rate of ASGD where lengths differ, the last word's lookup, and the 1e-8 of the published loss."""
    assert compare(CODE, config, Case(averaging=True), steps=3) > 1e-4

    unclipped = dataclasses.replace(config.optim, clip=1e6)  # one row's gradient would scale all others
    pair = Pair(CODE, dataclasses.replace(config, out=config.out / "last", optim=unclipped))
    last = len(pair.ours.corpus.vocabulary) - 1
    pair.ours.source[3, 0] = last
    pair.step(20, seed=0)
    ours, theirs = (model.encoder.weight.detach() for model in (pair.ours.model, pair.published.model))
    assert ((ours - theirs).abs().amax(1) > 1e-9).nonzero().flatten().tolist() == [last]

    pair = Pair(CODE, dataclasses.replace(config, out=config.out / "exact"))
    pair.published.exact = False
    pair.step(20, seed=0)
    assert max(pair.apart().values()) > 1e-9


@beside
def test_the_published_code_trains_on_after_an_evaluation(small_flags, tmp_path, monkeypatch):
    recipe = dataclasses.replace(parse(small_flags), init_bias=False)
    monkeypatch.setitem(RECIPES, "demo", lambda: recipe)
    config = published.Config(code=CODE, data=recipe.data, recipe="demo", epochs=2, runs=tmp_path / "runs")
    perplexities = published.train_published(config, seed=1)
    assert len(perplexities) == 2 and all(1 < value < 1000 for value in perplexities)
    assert perplexities[0] != perplexities[1]
    assert len(published.train_ours(config, seed=1)) == 2


def test_another_folder_is_no_published_code(tmp_path, config):
    with pytest.raises(FileNotFoundError, match=f"code must be a checkout of the published code.*, got {tmp_path}"):
        Pair(tmp_path, config)
    wide = dataclasses.replace(config.model, hidden_sizes=(128, 128, 64))
    with pytest.raises(ValueError, match="hidden_sizes must be less than 128 .*, got 128"):
        Pair(tmp_path, dataclasses.replace(config, model=wide))


def test_a_shortened_text_has_no_word_that_training_lacks(tmp_path):
    data = tmp_path / "data"
    write_corpus(data)
    folder = published.shortened(data, 40, tmp_path / "short")
    texts = {split: (folder / f"{split}.txt").read_text() for split in ("train", "valid", "test")}
    assert [text.count("\n") for text in texts.values()] == [40, 4, 4]
    assert texts["train"] == "".join(
        " ".join(line.split()) + "\n" for line in (data / "train.txt").read_text().split("\n")[:40]
    )
    words = {split: set(text.split()) for split, text in texts.items()}
    assert words["valid"] | words["test"] <= words["train"] | {"<unk>"}


def test_the_difference_over_seeds():
    """Two samples that are apart, and one in two orders."""
    seeds = tuple(range(8))
    one = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1 + 5

    def trainings(shift):
        ours, theirs = (one + shift).exp().tolist(), one.flip(0).exp().tolist()
        return {
            name: {str(seed): [1.0, value] for seed, value in zip(seeds, values)}
            for name, values in (("fused_mos", ours), ("published", theirs))
        }

    alike, apart = (published.difference(trainings(shift), seeds, epochs=2) for shift in (0.0, 0.5))
    assert (alike["mean"], apart["mean"]) == (0, 0.5)
    assert apart["standard error"] == alike["standard error"] == pytest.approx(one.std().item() / 2, abs=1e-4)
    assert alike["p, by permutation"] == 1 and apart["p, by permutation"] < 0.001
