"""Texts as the paper counts them, batches and segments. (Errors in texts: training/test_checkpoint_and_cli.py.)"""

import pytest
import torch

from fused_mos.data import Corpus, CorpusError, Vocabulary, batchify, random_bptt_length, segment
from fused_mos.data.sample import write_corpus


def write(folder, train="b a b\n\nc <unk>\n", valid="a b\n", test="c\n"):
    folder.mkdir(exist_ok=True)
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_words_and_line_ends_in_order_of_appearance(tmp_path):
    corpus = Corpus(write(tmp_path / "x"))
    assert corpus.vocabulary.words == ["b", "a", "<eos>", "c", "<unk>"]
    assert corpus.train.tolist() == [0, 1, 0, 2, 2, 3, 4, 2]
    assert corpus.valid.tolist() == [1, 0, 2] and corpus.test.tolist() == [3, 2]


def test_a_last_line_without_a_newline_and_other_spaces(tmp_path):
    assert Corpus(write(tmp_path / "x", train="a\t b  c", valid="a", test="b")).train.numel() == 4


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    folder = write(tmp_path / "x", train="\ufeffa b\nc \ufeff\n", valid="\ufeffa", test="\ufeffb")
    corpus = Corpus(folder)
    assert corpus.vocabulary.words == ["a", "b", "<eos>", "c", "\ufeff"] and corpus.test.tolist() == [1, 2]


def test_unknown_words_can_be_mapped(tmp_path):
    folder = write(tmp_path / "x", test="a zebra\n")
    with pytest.raises(CorpusError, match=r"test.txt:1: the word 'zebra' .* 5 words"):
        Corpus(folder)
    assert Corpus(folder, map_unknown=True).test.tolist() == [1, 4, 2]
    with pytest.raises(CorpusError, match="cannot map 'zebra' to <unk>"):
        Corpus(write(folder, train="a b c\n", test="zebra\n"), map_unknown=True)


def test_vocabulary_round_trip(tmp_path):
    vocabulary = Vocabulary(["a", "ü", "\u2028", "<eos>"])
    vocabulary.save(tmp_path / "v.txt")
    assert Vocabulary.load(tmp_path / "v.txt").words == vocabulary.words
    with pytest.raises(ValueError, match="distinct"):
        Vocabulary(["a", "a"])
    (tmp_path / "v.txt").write_text("a\na\n")
    with pytest.raises(CorpusError, match="v.txt is not a vocabulary: words must be distinct"):
        Vocabulary.load(tmp_path / "v.txt")


def test_batchify_cuts_columns():
    batch = batchify(torch.arange(11), 3)
    assert batch.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    with pytest.raises(CorpusError, match="11 tokens is too short for 6 columns"):
        batchify(torch.arange(11), 6)


def test_segments_predict_the_next_row_and_end_with_the_text():
    source = batchify(torch.arange(20), 2)
    inputs, targets = segment(source, 3, 4)
    assert torch.equal(targets, inputs + 1) and inputs[:, 0].tolist() == [3, 4, 5, 6]
    inputs, targets = segment(source, 8, 4)
    assert inputs[:, 0].tolist() == [8] and targets[:, 0].tolist() == [9]


def test_bptt_lengths_are_distributed_as_in_the_paper():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    lengths = torch.tensor([random_bptt_length(70, 110, generator) for _ in range(4000)]).float()
    assert lengths.min() >= 5 and lengths.max() <= 110
    long = lengths > 52.5  # 3.5 standard deviations from both 70 and 35
    assert abs(long.float().mean() - 0.95) < 5 * (0.95 * 0.05 / 4000) ** 0.5
    # int() takes half a row off the mean
    assert abs(lengths[long].mean() - 69.5) < 0.5 and abs(lengths[~long].mean() - 34.5) < 2
    assert abs(lengths[long].std() - 5) < 0.4
    generator.set_state(state)
    assert [random_bptt_length(70, 110, generator) for _ in range(9)] == lengths[:9].int().tolist()
    assert min(random_bptt_length(4, 200, generator) for _ in range(50)) == 5
    assert max(random_bptt_length(70, 60, generator) for _ in range(50)) == 60


def test_pydoc_corpus(tmp_path):
    write_corpus(tmp_path / "x")
    corpus = Corpus(tmp_path / "x")  # raises if valid or test had an unknown word
    assert corpus.train.numel() > 50_000 and min(corpus.valid.numel(), corpus.test.numel()) > 5_000
    assert {"<unk>", "N", "python", "."} <= set(corpus.vocabulary.words)
    counts = torch.bincount(corpus.train)
    assert counts.min() >= 3
