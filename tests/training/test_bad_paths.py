"""Names and symbolic links that a command cannot use: one line on stderr, exit status 2, and nothing written."""

import os
import shutil

import pytest
from runs import refused

from fused_mos import convert, demo, evaluate, experts, finetune, generate, reproduce, train, train_1b

NOT_UTF8 = os.fsdecode(b"caf\xe9")
"""A name in Latin-1."""


def test_a_folder_with_a_name_that_is_not_utf8(small_flags, flags, corpus_folder, tmp_path, monkeypatch, capsys):
    """TensorBoard cannot write to such a folder. A corpus may be in one."""
    monkeypatch.chdir(tmp_path)
    for command, arguments in (
        (train, [*small_flags, "--out", NOT_UTF8]),
        (train_1b, [*flags, "--out", NOT_UTF8]),
        (train_1b, [*flags, "--out", NOT_UTF8, "--evaluate"]),
        (demo, ["--out", NOT_UTF8]),
        (reproduce, ["demo", "--data", corpus_folder, "--out", NOT_UTF8]),
    ):
        refused(command, arguments, capsys, r"out must be a folder with a name in UTF-8, got 'caf\udce9")
    refused(convert, ["model.pt", NOT_UTF8], capsys, "new must be a folder with a name in UTF-8")
    assert not list(tmp_path.iterdir())
    corpus = shutil.copytree(corpus_folder, tmp_path / NOT_UTF8)
    (tmp_path / "link").symlink_to(corpus)  # names the default folder of a run
    refused(train, [*small_flags, "--data", "link"], capsys, "out must be a folder with a name in UTF-8, got 'runs/caf")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NOT_UTF8, "link"])


@pytest.mark.trains
def test_a_run_whose_name_is_not_utf8(finished_run, corpus_folder, tmp_path, capsys):
    run = finished_run(1).rename(tmp_path / NOT_UTF8)
    for command in (evaluate, generate, experts, finetune):
        refused(command, [run], capsys, "run must be a folder with a name in UTF-8")
    refused(train, ["--resume", run], capsys, "resume must be a folder with a name in UTF-8")
    run = run.rename(tmp_path / "run")
    corpus = shutil.copytree(corpus_folder, tmp_path / NOT_UTF8)
    assert evaluate.main([str(run), "--data", str(corpus)]) == 0


def test_a_corpus_behind_symbolic_links_in_a_circle(small_flags, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    for out in ([], ["--out", "run"]):
        for data in ("circle", "circle/x"):
            refused(train, [*small_flags, "--data", data, *out], capsys, f"data folder {data} does not exist")
            refused(train_1b, [*flags, "--data", data, *out], capsys, f"there is no {data}/manifest.json")
            refused(reproduce, ["demo", "--data", data, *out], capsys, f"data folder {data} does not exist")
    assert [path.name for path in tmp_path.iterdir()] == ["circle"]
