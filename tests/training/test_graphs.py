"""Replayed steps without a GPU: with a log of operations instead of a graph, they equal ordinary steps bit for bit."""

import pytest
import torch
from operation_log import LogRecorder
from runs import losses
from safetensors.torch import load_file

from fused_mos.runtime.signals import Stopped
from fused_mos.train import parse
from fused_mos.training import Trainer, graphs
from fused_mos.training.device import device_named
from fused_mos.training.errors import CaptureFailed
from fused_mos.training.evaluation import evaluate
from fused_mos.training.graphs import Replayed
from fused_mos.training.run import load_run


def accumulate(total):
    """A function of segments (T, 2): their sums, one after the other, in a tensor that stays."""
    return lambda x: total.mul_(10).add_(x.sum(0))


def test_a_length_runs_then_is_recorded_then_replayed():
    recorder, total, expected = LogRecorder(), torch.zeros(2), torch.zeros(2)
    step = Replayed(accumulate(total), recorder, longest=4)
    for n, length in enumerate([3, 4, 3, 3, 1, 4, 3]):
        x = torch.full((length, 2), float(n))
        step(x)
        accumulate(expected)(x)
        assert torch.equal(total, expected)
    assert (recorder.n_run, recorder.n_recorded, recorder.n_replayed) == (3, 2, 4)
    assert step.n_graphs == 2


def test_lengths_beyond_the_limit_run_as_they_are(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    recorder, total, expected = LogRecorder(), torch.zeros(2), torch.zeros(2)
    step = Replayed(accumulate(total), recorder, longest=4)
    for length in [1, 2, 3, 4] * 3:
        x = torch.randn(length, 2)
        step(x)
        accumulate(expected)(x)
    assert torch.equal(total, expected) and step.n_graphs == 2 and recorder.n_run == 4 + 2 * 2


class FailingRecorder(LogRecorder):
    def record(self, function):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with …")
        finally:
            raise RuntimeError("capture was invalidated")


def test_a_capture_that_fails_names_the_flag():
    step = Replayed(lambda x: None, FailingRecorder(), longest=4)
    step(torch.zeros(3, 2))
    message = "of 3 rows cannot be .*: operation not permitted when stream is capturing; train with --no-cuda-graphs"
    with pytest.raises(CaptureFailed, match=message):
        step(torch.zeros(3, 2))


def test_who_records(small_flags, monkeypatch):
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: "recorder")
    cuda = torch.device("cuda")
    assert graphs.recorder_for(parse(small_flags), device_named("cpu")) is None
    assert graphs.recorder_for(parse(small_flags), cuda) == "recorder"
    assert graphs.recorder_for(parse([*small_flags, "--no-cuda-graphs"]), cuda) is None
    assert graphs.recorder_for(parse([*small_flags, "--grad-filter-eps", "0.01"]), cuda) is None


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Code that reads values only on a CPU behaves as on a GPU."""
    monkeypatch.setattr("fused_mos._inputs.values_can_be_read", lambda *_: False)
    monkeypatch.setattr(
        "fused_mos._backends.from_rows.scaled", lambda gradients, factor, *_: [g * factor for g in gradients]
    )


@pytest.fixture
def recorder(as_on_a_gpu, monkeypatch):
    """Records the steps of runs with --cuda-graphs, the default."""
    recorder = LogRecorder()
    monkeypatch.setattr(
        "fused_mos.training.trainer.recorder_for", lambda config, _: recorder if config.cuda_graphs else None
    )
    return recorder


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    for name in ("best.safetensors", "last.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


VARIANTS = {
    "plain": "",
    "parts": "--micro-batches 2",
    "no clipping": "--clip 0 --lr 1",
    "no regularisers": "--alpha 0 --beta 0 --micro-batches 3",
    "bfloat16": "--precision bfloat16 --lr 1",
    "tiled": "--backend tiled",
    "softmax": "--head softmax",
    "norm and rank": "--latent-norm --rank 4",
}


@pytest.mark.trains
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replayed_run_has_the_bits_of_an_ordinary_one(variant, recorder, small_flags, tmp_path):
    """Losses, parameters, averages, hidden and random states: with dropout, lengths that come and go, and averaging."""
    flags = [*small_flags, *VARIANTS[variant].split(), "--dropoutl", "0.1"]
    Trainer(parse([*flags, "--no-cuda-graphs", "--out", str(tmp_path / "plain")])).run()
    assert recorder.n_run == 0
    trainer = Trainer(parse([*flags, "--out", str(tmp_path / "graphs")]))
    trainer.run()
    assert trainer.optimizer.averaging, "the averages have to be compared, too"
    assert 5 < trainer.graphs.n_graphs <= 18 and recorder.n_replayed > 60
    assert_same_run(tmp_path / "plain", tmp_path / "graphs")


@pytest.mark.trains
@pytest.mark.parametrize(
    ("first", "second"), [("--cuda-graphs", "--cuda-graphs"), ("--no-cuda-graphs", "--cuda-graphs")]
)
def test_a_run_resumed_in_an_epoch_has_the_bits_of_an_unbroken_one(
    first, second, recorder, small_flags, tmp_path, monkeypatch
):
    """The flag may change: the run may have begun without graphs."""
    Trainer(parse([*small_flags, "--no-cuda-graphs", "--out", str(tmp_path / "whole")])).run()
    broken, original = tmp_path / "broken", Trainer.train_step

    def stopping(self, length=None):
        if self.progress.step == 25:
            self._save_last()
            raise Stopped(15)
        return original(self, length)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(Stopped):
        Trainer(parse([*small_flags, first, "--out", str(broken)])).run()
    monkeypatch.setattr(Trainer, "train_step", original)
    Trainer(parse(["--resume", str(broken), second])).run()
    assert_same_run(tmp_path / "whole", broken)


def test_what_graphs_hold_stays(recorder, small_flags, tmp_path):
    """From the first step to the end, over checkpoints, averages and epochs."""
    trainer = Trainer(parse([*small_flags, "--checkpoint-minutes", "0", "--out", str(tmp_path / "run")]))
    parameters = list(trainer.model.parameters())

    def held():
        hidden = [tensor for part in trainer.hidden for state in part for tensor in state]
        return [x.data_ptr() for x in (*parameters, *(p.grad for p in parameters), *hidden, trainer.interval_loss)]

    trainer.model.train()
    trainer.train_step()
    before = held()
    trainer.run()
    assert held() == before


def test_evaluation_is_replayed(as_on_a_gpu, finished_run):
    run, recorder = load_run(finished_run(1)), LogRecorder()
    text = run.text("valid")
    expected = evaluate(run.model, text, 10, 7)
    assert evaluate(run.model, text, 10, 7, recorder=recorder) == expected
    rows = text.numel() // 10 - 1
    assert recorder.n_recorded == 1 and recorder.n_replayed == rows // 7 - 1


def test_a_profiled_run_is_not_replayed(recorder, small_flags, tmp_path):
    assert Trainer(parse([*small_flags, "--profile", "2", "--out", str(tmp_path / "run")])).graphs is None
