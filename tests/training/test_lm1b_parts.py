"""The parts of a One Billion Word run: its stream of text and its loss."""

import dataclasses
import re
import shutil
import weakref

import pytest
import torch

from fused_mos import train_1b
from fused_mos.data.token_stream import Position, PreparedCorpus, TrainStream, evaluation_segments
from fused_mos.lm import AWDLSTM
from fused_mos.training.lm1b.loss import SummedLoss

# --------------------------------------------------------------------------------------------------------------- stream


def columns_read(corpus, n_columns, columns, bptt, position=None):
    """All targets of one epoch, by column, and the position after each segment."""
    stream = TrainStream(corpus.train, n_columns, columns, bptt, corpus.bos, seed=3, position=position or Position())
    read, positions = [], []
    for inputs, targets, _ in stream.segments():
        read.append(torch.stack([inputs, targets], 2))
        positions.append(dataclasses.replace(stream.position))
    return torch.cat(read), positions


def test_columns_do_not_depend_on_the_number_of_ranks(prepared):
    corpus = PreparedCorpus(prepared)
    whole, _ = columns_read(corpus, 6, range(6), 9)
    for columns in (range(0, 3), range(3, 6), range(5, 6)):
        part, _ = columns_read(corpus, 6, columns, 9)
        assert torch.equal(part, whole[:, columns.start : columns.stop])
    other_segments, _ = columns_read(corpus, 6, range(6), 4)
    assert torch.equal(other_segments, whole)
    assert len(whole) == TrainStream(corpus.train, 6, range(6), 9, corpus.bos, seed=3).rows_per_epoch


def test_a_stream_goes_on_from_any_position(prepared):
    corpus = PreparedCorpus(prepared)
    whole, positions = columns_read(corpus, 6, range(6), 9)
    assert positions[-1] == Position(epoch=1) and {p.shard for p in positions} == {0, 1, 2}
    for i in range(0, len(positions) - 1, 7):
        rest, after = columns_read(corpus, 6, range(6), 9, dataclasses.replace(positions[i]))
        assert torch.equal(rest, whole[len(whole) - len(rest) :]) and after == positions[i + 1 :]


def test_a_last_segment_of_one_row_is_read(prepared):
    """So an epoch has every row, for any bptt."""
    corpus = PreparedCorpus(prepared)
    for file in corpus.train:
        rows = file.n_tokens // 6 - 1
        stream = TrainStream([file], 6, range(6), rows - 1, corpus.bos, seed=3)
        assert [len(segment.inputs) for segment in stream.segments()] == [rows - 1, 1]


def test_each_rank_counts_the_words_of_all(prepared):
    """Each rank counts the words of all columns, so that it need not ask others before its backward pass."""
    corpus = PreparedCorpus(prepared)
    segments = [
        list(TrainStream(corpus.train, 6, columns, 9, corpus.bos, seed=3).segments())
        for columns in (range(6), range(0, 2), range(5, 6))
    ]
    for whole, *parts in zip(*segments, strict=True):
        assert whole.words == (whole.targets != corpus.bos).sum()
        assert all(part.words == whole.words for part in parts)
    assert any(whole.words < whole.targets.numel() for whole in segments[0])


def test_every_shard_is_read_in_an_order_that_changes(prepared):
    corpus = PreparedCorpus(prepared)
    stream = TrainStream(corpus.train, 6, range(6), 9, corpus.bos, seed=3)
    other_seed = TrainStream(corpus.train, 6, range(6), 9, corpus.bos, seed=4)
    orders = [tuple(stream.order(epoch)) for epoch in range(20)]
    assert all(sorted(order) == [0, 1, 2] for order in orders) and len(set(orders)) > 3
    assert orders != [tuple(other_seed.order(epoch)) for epoch in range(20)]
    texts = {tuple(file.open().tolist()) for file in corpus.train}
    whole, _ = columns_read(corpus, 1, range(1), 9)
    first = corpus.train[stream.order(0)[0]].open()
    assert whole[: len(first) - 1, 0, 0].tolist() == first[:-1].tolist() and len(texts) == 3


@pytest.mark.parametrize("n_columns", [1, 2, 5, 300])
def test_every_held_out_word_is_predicted_once(n_columns, prepared):
    """Also where there are more columns than sentences."""
    corpus = PreparedCorpus(prepared)
    for file in corpus.heldout:
        text = file.open()
        pairs = []
        for columns in (range(0, n_columns // 2), range(n_columns // 2, n_columns)):
            for inputs, targets in evaluation_segments(file, corpus.bos, n_columns, columns, 7):
                assert inputs.shape == targets.shape == (len(inputs), len(columns))
                pairs += [
                    pair for pair in zip(inputs.flatten().tolist(), targets.flatten().tolist()) if pair[1] != corpus.bos
                ]
        assert sorted(pairs) == sorted((int(a), int(b)) for a, b in zip(text, text[1:]) if b != corpus.bos)


def test_files_are_checked(prepared, tmp_path, flags, capsys):
    for damage, message in (
        (lambda file: file.path.unlink(), "is missing"),
        (lambda file: file.path.write_bytes(file.path.read_bytes()[:-4]), "bytes, .* in the manifest"),
        (lambda file: file.path.write_bytes(file.path.read_bytes()[:-4] + b"\3\0\0\0"), "is damaged: its sha256 is"),
        (
            lambda file: (tmp_path / "copy" / "vocabulary.txt").write_text("other\n"),
            "is not the vocabulary that the shards were prepared with",
        ),
        (
            lambda file: (tmp_path / "copy" / "vocabulary.txt").unlink(),
            "is not the vocabulary that the shards were prepared with",
        ),
        (
            lambda file: (tmp_path / "copy" / "manifest.json").unlink(),
            "first run python -m fused_mos.data.lm1b prepare",
        ),
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(prepared, tmp_path / "copy")
        damage(PreparedCorpus(tmp_path / "copy").train[1])
        assert train_1b.main([*flags, "--data", str(tmp_path / "copy"), "--out", str(tmp_path / "run")]) == 2
        assert re.search("error: .*" + message, capsys.readouterr().err)
        assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("head", "latents"), [("mos", {}), ("moc", {}), ("softmax", {}), ("mos", {"latent_norm": True, "rank": 4})]
)
def test_a_chunked_head_has_the_same_loss_and_gradients(head, latents):
    torch.manual_seed(0)
    without = dict.fromkeys(("dropoute", "dropouti", "dropouth", "dropout", "dropoutl", "wdrop"), 0.0)
    model = AWDLSTM(50, 8, (12, 10), head, 3, **without, **latents)
    tokens, hidden = torch.randint(50, (8, 7)), model.initial_hidden(7)
    results = []
    for chunk in (0, 1, 3 * 7, 10_000):
        model.zero_grad()
        loss, new = SummedLoss(model, ignored=0, head_chunk=chunk)(tokens[:-1], tokens[1:], hidden)
        (loss * 0.1).backward()
        results.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters()), *(t for state in new for t in state)]
        )
        with torch.no_grad():
            evaluated, _ = SummedLoss(model, ignored=0, head_chunk=chunk)(tokens[:-1], tokens[1:], hidden)
        assert evaluated == pytest.approx(loss.item(), rel=1e-6)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_chunked_head_keeps_one_chunk_of_vectors():
    """Numbers that autograd holds between forward and backward, by the head's (N, K, D)."""
    model = AWDLSTM(50, 8, (12, 10), "mos", 15, dropoute=0, dropouti=0, dropouth=0, dropout=0, dropoutl=0, wdrop=0)
    tokens, hidden = torch.randint(50, (41, 20)), model.initial_hidden(20)

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    held = []
    for chunk in (0, 80):
        alive = weakref.WeakSet()

        def pack(tensor, alive=alive):
            alive.add(kept := Held(tensor))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            loss, _ = SummedLoss(model, ignored=0, head_chunk=chunk)(tokens[:-1], tokens[1:], hidden)
        held.append(sum({kept.tensor.data_ptr(): kept.tensor.nbytes for kept in alive}.values()))
    vectors = 40 * 20 * 15 * 8 * 4
    assert held[0] > 2 * vectors and held[1] < held[0] - 2 * vectors
