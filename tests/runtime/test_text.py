"""Text that is safe for a terminal."""

import ast
from pathlib import Path

import pytest

import fused_mos
from fused_mos.runtime import UserError, command, progress
from fused_mos.runtime.text import printable, show

EVIL = {
    "ESC": "\x1b[2J",
    "the clipboard, by OSC": "\x1b]52;c;ZXZpbA==\x07",
    "C1": "\x9b2J",
    "return": "a\rb",
    "backspace": "a\bb",
    "delete": "a\x7fb",
    "bidi override": "\u202eabc",
    "bidi isolate": "\u2067abc",
    "bidi mark": "\u200fabc",
    "line separator": "a\u2028b",
    "zero width space": "a\u200bb",
    "byte order mark": "a\ufeffb",
    "tags": "a\U000e0041b",
    "surrogate": "a\ud800b",
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_a_terminal_is_not_commanded(text, capsys):
    """Nothing sends such text to the terminal unescaped: prints, errors, lines above a bar, and bars' descriptions."""

    def fails(arguments):
        raise UserError(f"the word {text}")

    show(f"word {text}")
    progress.say(f"line {text}")
    with progress.bar(desc=f"bar {text}", unit="words", total=1) as bar:
        bar.update(1)
    assert command.run(fails, []) == 2
    shown = capsys.readouterr()
    visible = text.encode("unicode_escape").decode()
    assert printable(text) == visible
    assert shown.out == f"word {visible}\nline {visible}\n"
    assert shown.err.startswith(f"bar {visible}: 100%") and shown.err.endswith(f"\nerror: the word {visible}\n")


def test_words_stay_as_they_are():
    for word in ("naïve", "日本語", "نمی\u200cخواهم", "e\u0301", "👩🏽", "a b", "<eos>", "\\x1b"):
        assert printable(word) == word


def test_lines_stay_lines(capsys):
    show("a table\nof two lines", end="")
    show()
    assert capsys.readouterr().out == "a table\nof two lines\n"


def test_nothing_else_prints():
    """Calls of print would show a file's control characters unescaped."""
    package = Path(fused_mos.__file__).parent
    exempt = {package / "runtime" / "text.py", package / "__main__.py"}  # the one that prints, and a list of commands
    for path in set(package.rglob("*.py")) - exempt:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert name != "print", f"{path}:{node.lineno}: use runtime.text.show"
