"""python -m benchmarks.report: what it records of a run, and what it reports as slower."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import plots, report, tables


def row(contender="fused_mos", case="ptb", ours=1.0, floor=1.0, spread=(1, 1), **changed):
    about = {
        "figure": "shapes",
        "case": case,
        "dtype": "float32",
        "operation": "training step",
        "contender": contender,
        "commit": "0123456",
        "shape": [1, 2, 3, 4],
    }
    measured = (
        {}
        if "failed" in changed
        else {
            "ms": [floor, floor * spread[0], floor],
            "times ours": [ours, ours, ours * spread[1]],
            "over floor": floor,
        }
    )
    return about | measured | changed


def run_file(path, rows, **machine):
    machine = {
        "device": "some CPU",
        "device type": "cpu",
        "instruction set": "avx2",
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.11",
    } | machine
    benchmarks = [
        {"extra_info": machine | info, "fullname": "benchmarks/test_head.py::test_head[tokens N = 1 float32-fused_mos]"}
        for info in [*rows, {}]
    ]
    text = {"machine_info": machine | {"backends": {}}, "datetime": "2026-01-02T03:04:05", "benchmarks": benchmarks}
    path.write_text(json.dumps(text))
    return path


def test_a_run_replaces_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MACHINES", tmp_path)
    report.record(run_file(tmp_path / "a.json", [row(), row("peer", ours=2.0)]))
    file = report.record(run_file(tmp_path / "b.json", [row("peer", ours=3.0), row(case="wikitext2")]))
    assert file.name == "some-cpu-avx2-2-threads.json"
    found = json.loads(file.read_text())
    assert [(r["case"], r["contender"], r["times ours"][0]) for r in found["rows"]] == [
        ("ptb", "fused_mos", 1.0),
        ("ptb", "peer", 3.0),
        ("wikitext2", "fused_mos", 1.0),
    ]
    assert found["device"] == "some CPU" and "device" not in found["rows"][0]
    assert [found["rows"][0][name] for name in ("torch", "python", "commit", "date")] == [
        "2.13.0",
        "3.11",
        "0123456",
        "2026-01-02",
    ]
    gpu = report.record(run_file(tmp_path / "c.json", [row()], **{"device": "NVIDIA H100 80GB", "device type": "cuda"}))
    assert gpu.name == "nvidia-h100-80gb.json"
    assert (
        report.record(run_file(tmp_path / "d.json", [row()], **{"instruction set": "avx512_bf16"})).name
        == "some-cpu-avx512_bf16-2-threads.json"
    )
    assert (
        report.record(run_file(tmp_path / "e.json", [row()], threads=8, device="other CPU")).name
        == "other-cpu-avx2-8-threads.json"
    )


def test_what_was_not_measured_is_left_out(tmp_path, monkeypatch):
    """A run of one case, of failed peers, of nothing of ours: tables and the plot are made all the same."""
    for module in (report, plots, tables):
        monkeypatch.setattr(module, "MACHINES", tmp_path / "machines")
    (tmp_path / "machines").mkdir()
    figures = [
        {"figure": "experts"},
        {"figure": "vocabulary"},
        {"figure": "operations", "operation": "forward"},
        {"figure": "tokens"},
        {"figure": "training"},
    ]
    for kept in (
        [],
        [row()],
        [row("published code", **about) for about in figures],
        [row(failed="no", **about) for about in figures],
    ):
        kept = [r | {"words a second": [1, 1, 1]} if r["figure"] == "training" else r for r in kept]
        file = report.record(run_file(tmp_path / "a.json", kept))
        shown = {name: block(file.stem) for name, block in tables.OF_A_MACHINE.items()}
        rows = {name: text.count("\n") - 1 for name, text in shown.items()}
        assert rows == {name: sum(r["figure"] == {"head": "shapes"}.get(name, name) for r in kept) for name in rows}
        plots.head_axes(file.stem)
        assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        file.unlink()


@pytest.mark.parametrize(
    ("fresh", "fell", "named"),
    [
        ([row(floor=1.09), row("peer", ours=1.85)], False, []),
        (
            [row(floor=1.2), row("peer", ours=2.0)],
            True,
            ["time ÷ floor was 1.00 (at most 1.00) and is 1.20 (at least 1.20)"],
        ),
        (
            [row(floor=1.2, spread=(0.8, 1))],
            False,
            ["note: in rounds that overlap, shapes, ptb", "is 1.20 (at least 0.96)"],
        ),
        (
            [row(), row("peer", ours=1.7)],
            True,
            ["peer took 2.00 times as long as ours (at least 2.00) and takes 1.70 (at most 1.70)"],
        ),
        ([row(), row("peer", ours=1.7, spread=(1, 1.2))], False, ["takes 1.70 (at most 2.04)"]),
        ([row(floor=0.5), row("peer", ours=4.0)], False, []),
        ([row(failed="out of memory")], True, ["out of memory"]),
        ([row("peer", failed="not installed"), row(case="new", floor=9.0)], False, []),
    ],
)
def test_what_fell_is_named(fresh, fell, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "MACHINES", tmp_path)
    report.record(run_file(tmp_path / "a.json", [row(), row("peer", ours=2.0)]))
    capsys.readouterr()
    assert report.compare(run_file(tmp_path / "b.json", fresh, torch="2.14.0"), again=0) == fell
    out = capsys.readouterr().out
    assert "recorded with torch 2.13.0, this is 2.14.0" in out and all(text in out for text in named)
    assert fell or "no ratio of" in out
    assert named or "overlap" not in out
    assert ("did within them" in out) == (not fell and bool(named))


@pytest.mark.processes
@pytest.mark.parametrize(("floor", "fell"), [(0.01, True), (10_000, False)])
def test_what_fell_is_measured_again(floor, fell, tmp_path, monkeypatch, capsys):
    """One token's head really is: it took some ten times the floor, whatever the files say."""
    monkeypatch.delenv(
        "PYTEST_XDIST_WORKER", raising=False
    )  # by which pytest-benchmark knows that others run beside it
    monkeypatch.setattr(report, "MACHINES", tmp_path)
    about = {"figure": "tokens", "case": "N = 1"}
    report.record(run_file(tmp_path / "a.json", [row(floor=floor) | about]))
    assert report.compare(run_file(tmp_path / "b.json", [row(floor=2 * floor) | about]), again=1) == fell
    out = capsys.readouterr().out
    assert f"was {floor:.2f} (at most {floor:.2f}) and is {2 * floor:.2f}" in out and ("fell:" in out) == fell


def test_nothing_to_compare_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "MACHINES", tmp_path)
    assert report.compare(run_file(tmp_path / "b.json", [row()]), again=2) == 2
    assert "b.json keeps this run in" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"benchmarks": []}')
    for name in ("none.json", "other.json"):
        with pytest.raises(SystemExit, match=f"{name} must be a file that pytest benchmarks"):
            report.condensed(tmp_path / name)


def test_tables_are_spliced_in(monkeypatch):
    monkeypatch.setitem(report.BLOCKS, "some", lambda: "| new |")
    monkeypatch.setitem(report.OF_A_MACHINE, "times", lambda machine: f"| {machine} |")
    text = "before\n<!-- table: some -->\n| old |\n\n<!-- end -->\nafter <!-- table: some -->\n<!-- end -->\n"
    made = report.with_tables(text, "x.md")
    assert (
        made
        == "before\n<!-- table: some -->\n| new |\n<!-- end -->\nafter <!-- table: some -->\n| new |\n<!-- end -->\n"
    )
    assert report.with_tables(made, "x.md") == made
    with pytest.raises(SystemExit, match="x.md asks for table 'other'"):
        report.with_tables("<!-- table: other -->\n<!-- end -->", "x.md")
    machine = report.machines()[0]
    assert (
        report.with_tables(f"<!-- table: times {machine} -->\n<!-- end -->", "x.md")
        == f"<!-- table: times {machine} -->\n| {machine} |\n<!-- end -->"
    )
    for wrong in ("times", "times abacus", f"some {machine}", f"gpu-steps {machine}", "gpu-steps"):
        with pytest.raises(SystemExit, match=f"x.md asks for table '{wrong}'; .*times need one of .*{machine}"):
            report.with_tables(f"<!-- table: {wrong} -->\n<!-- end -->", "x.md")


def test_tables_of_a_machine_are_shown(capsys):
    assert report.show("abacus") == 2
    assert "--show must be one of" in capsys.readouterr().err
    for machine in report.machines():
        assert report.show(machine) == 0
        assert "five lines, cut-cross-entropy" in capsys.readouterr().out  # what all machines were asked for
