"""Runs whose bias starts at the words' frequencies. (On many ranks: test_train_1b_ranks.py.)"""

import numpy
import pytest
import torch
from runs import losses, refused

from fused_mos import finetune, train, train_1b
from fused_mos.data import Corpus
from fused_mos.data import token_stream as stream
from fused_mos.training import Trainer
from fused_mos.training.lm1b import LM1BTrainer
from fused_mos.training.lm1b.ranks import Ranks


def log_frequencies(counts):
    return ((counts.double() + 1) / (counts.sum() + len(counts))).log().float()


@pytest.fixture
def first(small_flags, tmp_path):
    """A run that has not begun, its folder, and its flags."""
    flags = [*small_flags, "--init-bias", "--out", str(tmp_path / "run")]
    return Trainer(train.parse(flags)), tmp_path / "run", flags


def test_train_begins_with_the_frequencies(first, small_flags, corpus_folder, tmp_path):
    trainer, _, _ = first
    corpus = Corpus(corpus_folder)
    expected = log_frequencies(torch.bincount(corpus.train))
    assert torch.equal(trainer.model.head.decoder.bias, expected)
    without = Trainer(train.parse([*small_flags, "--no-init-bias", "--out", str(tmp_path / "without")]))
    for (name, p), q in zip(trainer.model.named_parameters(), without.model.parameters()):
        assert torch.equal(p, q) == (name != "head.decoder.bias"), name
    assert not without.model.head.decoder.bias.any()


def test_it_acts_at_the_start_alone(first, small_flags, tmp_path, capsys):
    trainer, folder, flags = first
    trainer.run()
    pieces = tmp_path / "pieces"
    assert train.main([*flags, "--out", str(pieces), "--time-limit", "1e-9"]) == 0
    assert train.main([*flags, "--out", str(pieces)]) == 0
    assert losses(pieces) == losses(folder)
    trained = Trainer(finetune.parse([str(folder)]))
    assert trained.config.init_bias and trained.config.start
    moved = trained.model.head.decoder.bias.detach() - trainer.model.head.decoder.bias
    assert not moved.any(), "fine-tuning starts from the trained bias"
    other = [*small_flags, "--no-init-bias", "--out", folder]
    refused(train, other, capsys, "init_bias cannot change", "it was True, got False")


@pytest.mark.parametrize("at_once", [1 << 22, 100])
def test_train_1b_begins_with_the_frequencies_and_goes_on(at_once, flags, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "COUNTED_AT_ONCE", at_once)
    corpus = stream.PreparedCorpus(prepared)
    counts = sum(torch.bincount(torch.from_numpy(numpy.array(f.open())), minlength=43) for f in corpus.train)
    assert counts[corpus.bos] > 0
    counts[corpus.bos] = 0  # it is no target
    assert torch.equal(corpus.count_targets(), counts)
    assert torch.equal(corpus.count_targets(0, 2) + corpus.count_targets(1, 2), counts)

    flags = [*flags, "--init-bias", "--max-steps", "9"]
    config = train_1b.parse([*flags, "--out", str(tmp_path / "run")])
    ranks = Ranks(config.device, config.vocab_parallel)
    try:
        bias = LM1BTrainer(config, ranks).model.head.decoder.bias
    finally:
        ranks.close()
    assert torch.equal(bias, log_frequencies(counts))
    whole, pieces = ([*flags, "--out", str(tmp_path / name)] for name in ("whole", "pieces"))
    for arguments in (whole, [*pieces, "--time-limit", "1e-9"], pieces):
        assert train_1b.main(arguments) == 0
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
