"""python -m benchmarks.report: what it records of a run, and what it reports as slower."""

import json
import shutil
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


def record_anew(tmp_path, monkeypatch, rows):
    """The name of a machine that has these rows alone."""
    folder = tmp_path / "machines"
    for module in (report, plots, tables):
        monkeypatch.setattr(module, "MACHINES", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return report.record(run_file(tmp_path / "a.json", rows)).stem


def test_what_was_not_measured_is_left_out(tmp_path, monkeypatch):
    """A run of one case, of failed peers, of nothing of ours: tables and the plot are made all the same."""
    figures = [
        {"figure": "experts"},
        {"figure": "vocabulary"},
        {"figure": "operations", "operation": "forward"},
        {"figure": "tokens"},
        {"figure": "options", "times the mean loss": [1, 1, 1], "by products": 1.0},
        {"figure": "training", "words a second": [1, 1, 1]},
        {"figure": "generation", "words a second": [1, 1, 1]},
    ]
    for kept in ([], [row()], [row("published code", **about) for about in figures]):
        machine = record_anew(tmp_path, monkeypatch, kept)
        for name, block in tables.OF_A_MACHINE.items():
            asked = sum(r["figure"] == {"head": "shapes"}.get(name, name) for r in kept)
            lines = [line for line in block(machine).splitlines() if line.startswith("|")]
            assert len(lines) == (2 + asked if asked else 0), name
        plots.head_axes(machine)
        plots.step_bars(machine).draw_without_rendering()
        assert (tables.MACHINES / f"{machine}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "figure", ["shapes", "experts", "vocabulary", "operations", "options", "training", "generation"]
)
def test_what_could_not_run_is_named_below_the_table(figure, tmp_path, monkeypatch):
    """Without a row of its own, and with the cases where it failed, unless it failed in all."""
    about = {"figure": figure, "words a second": [1, 1, 1], "times the mean loss": [1, 1, 1], "by products": 1.0}
    kept = [
        row(**about),
        row("peer", ours=2.0, **about),
        row("another", failed="needs a GPU", figure=figure),
        row(case="wikitext2", **about),
        row("peer", case="wikitext2", failed="too slow", figure=figure),
        row("another", case="wikitext2", failed="needs a GPU", figure=figure),
    ]
    shown = tables.OF_A_MACHINE[{"shapes": "head"}.get(figure, figure)](record_anew(tmp_path, monkeypatch, kept))
    table, note, names = shown.split("\n\n")
    assert "another" not in table and "GPU" not in table and "slow" not in table
    assert all(any(character.isdigit() for character in line) for line in table.splitlines()[2:])
    assert note == "Not measured here:"
    assert names.splitlines() == ["- *another*: needs a GPU", "- *peer* (WikiText-2, float32): too slow"]


def unwrapped(text: str) -> str:
    assert all(len(line) <= 120 for line in text.splitlines())
    return text.replace("\n", " ")


def test_comparisons_that_are_lost_are_named(tmp_path, monkeypatch):
    memory, shape = {"peak MiB": 10.0}, "One Billion Words, float32"
    won = [row(**memory), row("peer", ours=1.5, **memory | {"peak MiB": 11.0}), row("another", failed="needs a GPU")]
    lost = [row(case="lm1b", **memory), row("peer", case="lm1b", ours=0.9, spread=(1, 1.1), **{"peak MiB": 9.0})]
    machine = record_anew(tmp_path, monkeypatch, won)
    assert tables.behind(machine) == "fused_mos is faster in all 1 comparisons."
    assert "Faster than fused_mos: no contender. Less memory: no contender." in unwrapped(tables.chart(machine))
    machine = record_anew(tmp_path, monkeypatch, won + lost)
    assert tables.behind(machine).split("\n\n") == [
        "fused_mos is faster in 1 of 2 comparisons, but not in:",
        f"- *peer*, {shape}, training step: 0.90 (0.90–0.99)",
        f"Less memory than fused_mos takes: *peer* ({shape}).",
    ]
    assert f"Faster than fused_mos: *peer* ({shape}). Less memory: *peer* ({shape})." in unwrapped(
        tables.chart(machine)
    )


def test_a_machine_is_described(tmp_path, monkeypatch):
    assert tables.about(record_anew(tmp_path, monkeypatch, [row()])) == (
        "some CPU, 2 threads, native kernels for avx2; torch 2.13.0, Python 3.11; measured on 2026-01-02, "
        "commit 0123456."
    )


def bars_of(axes):
    """(dtype's offset, contender) -> what is written at the end of its bar."""
    return {(round(text.get_position()[1], 1)): text.get_text().strip() for text in axes.texts}


def test_bars_of_a_training_step(tmp_path, monkeypatch):
    """Each panel shows its case's median times and memory, ours behind a peer or not; what is missing has a dash and a
    reason; a bar much longer than the others is cut, and its number is right all the same."""
    for module in (report, plots, tables):
        monkeypatch.setattr(module, "MACHINES", tmp_path)
    names = list(plots.CONTENDERS)
    rows = [row(name, floor=10.0 * (i + 1)) | {"peak MiB": 100.0 - i} for i, name in enumerate(names[:3])]
    rows += [row(names[3], failed="out of memory"), row("another peer", floor=7e6)]
    rows += [row(name, floor=ms, dtype="bfloat16") for name, ms in ((names[0], 3.0), (names[1], 2.0), (names[2], 4e6))]
    file = report.record(run_file(tmp_path / "a.json", rows))
    figure = plots.step_bars(file.stem)
    figure.draw_without_rendering()
    time, memory = figure.axes[0], figure.axes[len(plots.SHAPES)]
    assert [label.get_text() for label in time.get_yticklabels()] == list(plots.CONTENDERS.values())
    assert bars_of(time) == {
        **{-0.2: "10", 0.8: "20", 1.8: "30", 2.8: "–", 3.8: "–"},
        **{0.2: "3", 1.2: "2", 2.2: "» 4,000,000", 3.2: "–", 4.2: "–"},
    }
    assert bars_of(memory) == {
        **{-0.2: "100", 0.8: "99", 1.8: "98", 2.8: "–", 3.8: "–"},
        **{0.2: "–", 1.2: "–", 2.2: "–", 3.2: "–", 4.2: "–"},
    }
    widths = {round(bar.get_y() + bar.get_height() / 2, 1): bar.get_width() for bar in time.patches if bar.get_width()}
    assert widths == pytest.approx({-0.2: 10, 0.8: 20, 1.8: 30, 0.2: 3, 1.2: 2, 2.2: 50})
    notes = figure.get_supxlabel()
    assert "– log-sum-exp, torch.compile (Penn Treebank float32): out of memory." in notes
    assert "– the paper's published code (Penn Treebank float32, Penn Treebank bfloat16, " in notes
    assert "– fused_mos; cut-cross-entropy, five lines; " in notes and "One Billion Words bfloat16): not meas" in notes


def test_bars_of_the_machine_in_the_readme():
    """Its contenders are those that were measured, by the names of the tables, and it shows the JSON's numbers."""
    cases = tables.rows_of(plots.README_MACHINE, "shapes")
    figure = plots.step_bars(plots.README_MACHINE)
    for axes, case in zip(figure.axes, plots.SHAPES):
        rows = {dtype: cases[case, dtype, "training step"] for dtype in plots.DTYPES}
        for i, name in enumerate(plots.CONTENDERS):
            for offset, dtype in ((-0.2, "float32"), (0.2, "bfloat16")):
                found = rows[dtype].get(name, {})
                shown = bars_of(axes)[round(i + offset, 1)]
                assert shown.removeprefix("» ") == (f"{found['ms'][0]:,.0f}" if "ms" in found else "–")
    measured = {name for rows in cases.values() for name, found in rows.items() if "ms" in found}
    assert set(plots.CONTENDERS) <= measured


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
