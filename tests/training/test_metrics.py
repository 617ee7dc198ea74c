"""What a run logs: the tags that TensorBoard sorts, and the learning curve."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fused_mos.training.metrics import MetricsLog, plot_learning_curves, read_metrics


def test_tensorboard_shows_loss_and_perplexity_first(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", 3, epoch=1, loss=2.0, ppl=7.4, lr=10.0, words_per_second=5.0, words_per_second_per_rank=5.0)
    log.write("valid", 4, epoch=1, loss=3.0, ppl=20.1, averaging=False, words=9)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    assert tags[:4] == ["loss/train", "loss/valid", "perplexity/train", "perplexity/valid"]
    assert tags[4:] and all(tag.startswith("run/") for tag in tags[4:])
    shown = [(event.step, event.value) for tag in tags[:2] for event in events.Scalars(tag)]
    assert shown == [(3, 2.0), (4, 3.0)]
    numbers = [(kind, name) for kind, record in zip(("train", "valid"), read_metrics(tmp_path)) for name in record]
    assert len(tags) == len([name for _, name in numbers if name not in ("kind", "step")])


def test_a_learning_curve_of_two_runs(tmp_path):
    """A run of one epoch without averaging, and one that averages from its second epoch."""
    for head, epochs in (("softmax", 1), ("mos", 3)):
        lines = [{"kind": "train", "step": 1, "ppl": 90.0, "epoch_fraction": 0.5}]
        lines += [
            {"kind": "valid", "step": i, "ppl": 100.0 / i, "epoch": i, "averaging": i > 1} for i in range(1, epochs + 1)
        ]
        (tmp_path / head).mkdir()
        (tmp_path / head / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot_learning_curves({head: tmp_path / head for head in ("softmax", "mos")}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
