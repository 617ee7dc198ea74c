"""benchmarks.gpu without a GPU: its cases, a file that is continued, processes that end, times and tables."""

import sys
import types
from pathlib import Path

import pytest
import torch
from backends import triton

if not triton:
    pytest.skip("triton is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import (
    gpu,
    gpu_cases,
    gpu_compare,
    gpu_head,
    gpu_report,
    gpu_results,
    gpu_run,
    gpu_sweep,
    harness,
    peers,
)
from benchmarks import gpu_timing as timing
from fused_mos import functional as F
from fused_mos._backends.triton_kernels.configurations import Tile

FACTS = {"gpu": "G", "python": "3", "torch": "2", "triton": "3", "cuda": "13", "source": "abc", "commit": "1234567"}


# ---------------------------------------------------------------------------------------------------------- the cases


def test_cases_are_distinct_and_begin_with_what_is_asked_for_first():
    cases = gpu_cases.cases((*gpu_cases.STEPS, "sweep"))
    assert len({case.key for case in cases}) == len(cases)
    first = next(i for i, case in enumerate(cases) if case.step == "training")
    assert {case.parts[1] for case in cases[:first]} >= {"bfloat16", "float32"}
    assert {case.parts[0] for case in cases[:first]} == {"ptb"}
    assert {case.parts[2] for case in cases[:first]} == set(gpu_cases.OPERATIONS)


def test_every_peer_that_is_named_exists():
    for names, losses in ((gpu_cases.MIXTURE_PEERS, peers.MIXTURE), (gpu_cases.SINGLE_PEERS, peers.SINGLE)):
        assert set(losses) <= {name.removesuffix(", compiled") for name in names}
        assert {name for name in names if name.removesuffix(", compiled") not in losses} == set()
        assert {name.removesuffix(", compiled") for name in names if "compiled" in name} <= peers.COMPILED.keys()


def test_a_shape_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--shapes", "ptb", "nowhere"])
    assert gpu.main() == 2
    assert "shapes must be among ptb, " in (text := capsys.readouterr().err) and text.endswith("got nowhere\n")


# ------------------------------------------------------------------------------------------- the file and the processes


def test_a_file_goes_on_for_the_same_source_alone(tmp_path):
    path = tmp_path / "gpu.json"
    results = gpu_results.Results(path, FACTS)
    results.begin("a", 10)
    assert gpu_results.read(path)["running"]["key"] == "a"
    results.finish("a", {"gpu ms": 1.0})
    results.finish("b", {"unavailable": "not installed"})
    assert "running" not in gpu_results.read(path)
    again = gpu_results.Results(path, FACTS)
    assert again.has("a") and not again.has("b") and not again.has("c")
    other = gpu_results.Results(path, FACTS | {"source": "def"})
    assert not other.has("a")
    assert gpu_results.read(tmp_path / "gpu-1234567.json")["rows"]["a"] == {"gpu ms": 1.0}


def test_the_digest_is_of_the_sources(tmp_path):
    (tmp_path / "fused_mos").mkdir()
    file = tmp_path / "fused_mos" / "a.py"
    file.write_text("1")
    first = gpu_results.source_digest(tmp_path)
    (tmp_path / "README.md").write_text("")
    assert gpu_results.source_digest(tmp_path) == first
    file.write_text("2")
    assert gpu_results.source_digest(tmp_path) != first


WORKER = """
import json, os, pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
content = json.loads(path.read_text()) if path.exists() else {"rows": {}, "starts": []}
content["starts"].append(sys.argv[2:])
for key in "abc":
    if key in content["rows"]:
        continue
    content["running"] = {"key": key, "since": time.time(), "limit": 0.5 if key == "b" else 60}
    path.write_text(json.dumps(content))
    if key == "b":
        END
    content["rows"][key] = {"gpu ms": 1.0}
    del content["running"]
    path.write_text(json.dumps(content))
"""


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with status -11"),
        ("time.sleep(60)", "took more than 0 s"),
        ("sys.exit(7)", "the process ended with status 7"),
    ],
    ids=["crash", "hang", "exit"],
)
def test_a_case_that_ends_its_process_is_a_row_and_the_rest_is_measured(tmp_path, end, why):
    worker, path = tmp_path / "worker.py", tmp_path / "gpu.json"
    worker.write_text(WORKER.replace("END", end))
    assert gpu.watch([sys.executable, str(worker), str(path), "--again"], path, 1.0, {}) == 0
    content = gpu_results.read(path)
    assert content["rows"] == {"a": {"gpu ms": 1.0}, "b": {"failed": why}, "c": {"gpu ms": 1.0}}
    assert [start[0] for start in content["starts"]] == ["--again", "--minutes"], "the second would repeat the first"


def test_a_case_that_the_time_limit_cuts_off_is_left_for_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    worker, path = tmp_path / "worker.py", tmp_path / "gpu.json"
    worker.write_text(WORKER.replace("END", "time.sleep(60)").replace("0.5", "60"))
    assert gpu.watch([sys.executable, str(worker), str(path)], path, 0.0, {}) == gpu.TIME_IS_UP
    assert gpu_results.read(path)["rows"].keys() == {"a"}


def test_an_error_is_one_line_of_its_row(monkeypatch):
    def fail(*parts):
        raise ValueError("first line\nsecond line")

    case = gpu_cases.Case("head", ("ptb", "bfloat16", "forward", "fused_mos", "eager"))
    monkeypatch.setattr(gpu_head, "measure", fail)
    assert gpu_run.row_of(case, gpu.Config())["failed"] == "ValueError: first line"


# ------------------------------------------------------------------------------------------------------------ the peers


@pytest.mark.parametrize("name", [*peers.MIXTURE, *peers.SINGLE])
def test_a_peer_computes_our_loss_and_gradients(name):
    if reason := peers.unavailable(name, "cpu"):
        pytest.skip(reason)
    single = name not in peers.MIXTURE
    arguments = harness.inputs(7, 1 if single else 3, 16, 50)
    expected = harness.inputs(7, 1 if single else 3, 16, 50)
    loss = (peers.SINGLE if single else peers.MIXTURE)[name](*arguments)
    exact = F.mos_nll_loss(*expected, backend="reference")
    loss.backward()
    exact.backward()
    assert abs(loss.item() - exact.item()) < 1e-4
    for mine, theirs in ((arguments[0], expected[0]), (arguments[2], expected[2])):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)


def test_a_peer_that_cannot_be_imported_is_a_row_that_says_so(monkeypatch):
    def circle(name):
        raise ImportError("cannot import name 'a' from partially initialized module 'b'")

    monkeypatch.setattr(peers.importlib, "import_module", circle)
    monkeypatch.setattr(gpu_head, "unavailable", lambda *_: None)
    head = gpu_head.Head.__new__(gpu_head.Head)
    head.sizes, head._calls = (4, 2, 8, 20), {}
    head.arguments = harness.inputs(*head.sizes)
    for _ in range(2):  # also the second time
        with pytest.raises(gpu_head.Unavailable, match="ImportError: cannot import name 'a' from partially"):
            head.call("step mean", "five lines, Liger", "eager")


def test_quack_says_which_vocabularies_it_is_for(monkeypatch):
    module = types.ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = lambda x, w, y: x.sum()
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    with pytest.raises(ValueError, match="a multiple of 128, not 50"):
        peers.quack(*harness.inputs(4, 1, 8, 50))
    assert peers.quack(*harness.inputs(4, 1, 8, 256)).dim() == 0


# ------------------------------------------------------------------------------------------------------------ the times


def test_the_gpu_is_busy_where_any_kernel_runs():
    events = [timing.Event("a", 0, 10), timing.Event("Memcpy DtoD", 5, 12), timing.Event("a", 20, 21)]
    assert timing.busy_microseconds(events) == 13
    row = timing.summary(events, 2)
    assert (row["gpu ms"], row["launches"]) == (0.0065, 1)
    assert row["kernels"] == [["a", 5.5, 1], ["Memcpy DtoD", 3.5, 0.5]]


def test_products_are_also_timed_with_padded_widths(monkeypatch):
    widths = []

    def mm_calls(n, k, d, v, dtype, device):
        widths.append((d, v))
        return {"mm": lambda: torch.ones(3).sum()}

    monkeypatch.setattr(timing, "mm_calls", mm_calls)
    monkeypatch.setattr(timing, "DRY_RUN", True)
    assert set(timing.products((2, 3, 300, 33_278), torch.bfloat16)) == {"mm", "mm, padded"}
    assert widths == [(300, 33_278), (320, 33_280)]
    assert set(timing.products((2, 3, 512, 1_024), torch.bfloat16)) == {"mm"}


def test_the_floor_of_a_gpu_has_aligned_widths(monkeypatch):
    seen = []
    monkeypatch.setattr(harness, "mm_calls", lambda n, k, d, v, dtype, device: seen.append((d, v)) or {"mm": None})
    floor = harness.Floor((1_050, 15, 300, 33_278), torch.bfloat16, "cuda")
    assert seen == [(304, 33_280)]
    assert floor.seconds_of_product({"mm": [304 * 33_280]}) == pytest.approx(300 * 33_278)
    harness.Floor((2_560, 7, 1_024, 100_000), torch.bfloat16, "cuda")
    assert seen[-1] == (1_024, 29_952)
    assert [harness.aligned_classes(v, 640) for v in (1, 64, 65, 10_000)] == [64, 64, 128, 640]


# ----------------------------------------------------------------------------------------------------------- the report


def head_row(contender="fused_mos", operation="step mean", mode="eager", **changed):
    case = ["ptb", "bfloat16", operation, contender, mode]
    measured = {
        "shape": [840, 15, 280, 10_000],
        "gpu ms": 0.5,
        "launches": 12,
        "wall ms": [1.0, 0.9, 1.2],
        "host ms": [0.4, 0.3, 0.5],
        "peak MiB": 100.0,
        "kept MiB": 30.0,
        "over mm": 4.0,
    }
    return {" | ".join(("head", *case)): {"case": case} | (changed if "failed" in changed else measured | changed)}


def test_goals_tell_what_is_met():
    rows = head_row() | head_row(operation="forward", **{"over mm": 1.5}) | head_row(mode="graph", failed="E: x")
    rows |= head_row("published code", **{"times ours": [4.0, 3.0, 5.0]})
    rows |= head_row("log-sum-exp", failed="out of memory")
    rows |= {"checks | tests": {"case": ["tests"], "passed": False, "summary": "1 failed"}}
    rows |= {"training | ptb | float32": {"step ms": [9.0, 8.0, 9.5], "graphs step ms": [5.0, 4.0, 6.0]}}
    rows |= {"training | ptb | tf32": {"step ms": [7.0, 6.5, 7.5]}}
    found = {goal["goal"]: goal["met"] for goal in gpu_report.goals(rows)}
    assert found == {
        "head | ptb | bfloat16 | step mean | fused_mos | eager, in mm": True,
        "head | ptb | bfloat16 | step mean | fused_mos | eager, MiB beside results": True,
        "head | ptb | bfloat16 | forward | fused_mos | eager, in mm": False,
        "head | ptb | bfloat16 | forward | fused_mos | eager, MiB beside results": True,
        "head | ptb | bfloat16 | step mean | fused_mos | graph": False,
        "ptb bfloat16: times as fast as published code": False,
        "ptb bfloat16: runs where log-sum-exp is out of memory": True,
        "tests": False,
        "training | ptb | float32, ms": True,
    }


def test_the_table_has_a_line_for_each_row_and_errors_in_their_place():
    text = gpu_report.head_table(head_row() | head_row("Liger", failed="ImportError: no"))
    assert "| ptb | bfloat16 | step mean | fused_mos | 0.500 | 4.000 | 1.000 | 0.400 | 12 | 100 |  |" in text
    assert "| ptb | bfloat16 | step mean | Liger | ImportError: no |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_the_table_of_a_sweep_is_that_of_configurations(capsys):
    row = {"key": "many 16-bit gradient narrow", "tile": [128, 64, 64, 4, 3, True], "tile before": [64] * 6}
    better, same = (
        {"ms": [1.0, 0.9, 1.1], "ms before": [2.0, 1.9, 2.1]},
        {"ms": [1.0, 0.9, 1.1], "ms before": [1.1] * 3},
    )
    gpu_sweep.table([row | better, row | same | {"key": "few ieee sample wide"}, {"failed": "x"}])
    entries = eval("{" + capsys.readouterr().out + "}", {"Tile": Tile})
    assert entries == {"many 16-bit gradient narrow": Tile(128, 64, 64, 4, 3, True)}


@pytest.mark.interpreted
def test_a_sweep_measures_the_tile_in_use_and_others():
    if torch.cuda.is_available():
        pytest.skip("on a GPU the script itself is to be run")
    row = gpu_sweep.measure("ptb", "bfloat16", "statistics")
    assert row["key"].endswith("16-bit statistics narrow") and row["candidates"][0] == 2 < row["candidates"][1]
    assert row["ms"][1] <= row["ms"][0] <= row["ms"][2] and row["ms"][0] <= row["ms before"][0]


# ------------------------------------------------------------------------------------------------------- the comparison


class Recorded:
    """A source whose times are known."""

    def __init__(self, *gpu_ms: float):
        self.times = iter(gpu_ms)

    def measure(self, *case):
        time = next(self.times)
        return {"gpu ms": time, "wall ms": 2 * time, "host ms": 1.0, "launches": 3, "peak MiB": 5, "over mm": time}


def test_a_comparison_is_by_turns_before_over_after():
    row = gpu_compare.compare(Recorded(9, 2, 6, 2), Recorded(9, 1, 2, 2), ("ptb",), rounds=3)
    assert row["ratios"]["gpu ms"] == row["ratios"]["wall ms"] == [2, 1, 3]
    assert row["medians"]["gpu ms"] == [2, 2] and row["launches"] == [3, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is to be run")
def test_each_process_measures_its_own_source(tmp_path):
    """This source's times, and the error of another whose fused_mos cannot be imported."""
    (tmp_path / "fused_mos").mkdir()
    (tmp_path / "fused_mos" / "__init__.py").write_text("raise SystemExit(9)")
    here, broken = gpu_compare.Source(gpu_compare.ROOT, True), gpu_compare.Source(tmp_path, True)
    try:
        case = "ptb", "bfloat16", "forward", "eager"
        assert here.measure(*case)["gpu ms"] > 0
        assert broken.measure(*case)["failed"].startswith("the process ended with status")
        assert gpu_compare.compare(here, broken, case, 1)["failed"].startswith("after: the process ended")
    finally:
        here.close()
        broken.close()
