"""README.md and docs/: Python blocks run as they stand, commands name what exists with flags that it has, links lead
somewhere, and tables are those of the results."""

import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"""(?:\]\(|src=")(?!\w+:)([^)"#\s]*)(?:#([^)"\s]*))?""")
"""A relative link or picture: its path and its anchor."""


def blocks(language):
    return [
        (document, match[2])
        for document in DOCUMENTS
        for match in BLOCK.finditer(document.read_text(encoding="utf-8"))
        if match[1] == language
    ]


def commands():
    """Lines of the blocks without a language, and `quoted` ones in the text, that call Python, pytest, torchrun or
    make."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = [
            line for match in BLOCK.finditer(text) if not match[1] for line in match[2].replace("\\\n", "").splitlines()
        ]
        for line in lines + re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)):
            words = shlex.split(line.replace("…", ""), comments=True)
            if words and words[0] in ("python", "pytest", "torchrun", "make") and len(words) > 1:
                found.add((document.name, " ".join(words)))
    return sorted(found)


@pytest.mark.parametrize(("document", "block"), blocks("python"), ids=lambda x: x.name if isinstance(x, Path) else "")
def test_python_blocks_run(document, block, tmp_path, monkeypatch):
    if "transformers" in block:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(document), "exec"), {})


class Parsed(Exception):
    pass


@pytest.fixture
def only_parse(monkeypatch, tmp_path):
    """tyro.cli stops the program once it has understood the command line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cli = tyro.cli

    def stop(settings, **options):
        if inspect.isfunction(settings):  # which tyro would call

            @functools.wraps(settings)
            def parsed(*arguments, **values):
                raise Parsed

            settings = parsed
        cli(settings, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(("document", "command"), commands())
def test_commands_are_understood(document, command, only_parse, monkeypatch, capsys):
    words = command.split()
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    if words[0] == "pytest":
        assert (ROOT / words[1]).exists() or words[1].startswith("-")
        return
    assert words[1] == "-m", f"{command} must be of the form python -m MODULE"
    if words[2] == "benchmarks.cuda_kernels":
        pytest.importorskip("fused_mos._cuda", reason="built where nvcc is found", exc_type=ImportError)
    module = importlib.import_module(words[2])
    monkeypatch.setattr(sys, "argv", words[2:])
    try:
        status = module.main()
    except Parsed:
        return
    except SystemExit as exit:
        assert exit.code == 0 and "--help" in words, f"{command} ends with status {exit.code}"
    else:  # the flags of a resumed run are those of its folder, which is not there
        folder = next(word for word in words if word.startswith("runs/"))
        assert status == 2 and folder in capsys.readouterr().err


def anchors(document):
    """The headings' anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    """On GitHub; `make docs` says so of the site."""
    for path, anchor in LINK.findall(BLOCK.sub("", document.read_text(encoding="utf-8"))):
        target = document.parent / path if path else document
        assert target.is_file(), f"{document.name} links to {path}, which is not there"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {path}#{anchor}, no heading there"


def test_tables_are_those_of_the_results():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--verify"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
