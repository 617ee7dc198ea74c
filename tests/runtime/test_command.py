"""Every command ends as a user expects, whatever its streams and arguments are."""

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import fused_mos
from fused_mos import __main__ as package_command
from fused_mos import info
from fused_mos.runtime import UserError, command, signals

PRINTS = "import sys; from fused_mos.runtime import command\ndef work(_): {}\nsys.exit(command.run(work, []))"


def outcome(error):
    def work(arguments):
        raise error

    return command.run(work, [], "run the same command to continue")


def test_errors_and_stops_have_their_status_and_line(capsys):
    assert command.run(lambda arguments: None, []) == 0 and command.run(lambda arguments: 3, []) == 3
    for error, status, text in (
        (UserError("lr must be positive, got 0"), 2, "error: lr must be positive, got 0\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (KeyboardInterrupt(), 130, "\nstopped; run the same command to continue\n"),
        (signals.Stopped(signal.SIGTERM), 143, "\nstopped; run the same command to continue\n"),
        (signals.Stopped(signal.SIGINT), 130, "\nstopped; run the same command to continue\n"),
    ):
        assert outcome(error) == status
        assert capsys.readouterr().err == text
    assert outcome(signals.TimeLimitReached()) == 0
    assert capsys.readouterr().out == "time limit reached; run the same command to continue\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        outcome(ZeroDivisionError())


def test_another_rank_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    outcome(UserError("no memory"))
    assert capsys.readouterr().err == "error on rank 3: no memory\n"
    assert outcome(KeyboardInterrupt()) == 130 and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("work", "shell", "status", "out"),
    [
        ("[print('x' * 1000) for _ in range(1000)]", "{} | head -c 5", 141, "xxxxx"),
        ("print('Σ log π')", "PYTHONIOENCODING=ascii {}", 0, "? log ?\n"),
        ("print('text'); print('log', file=sys.stderr)", "{} 2>&-", 0, "text\n"),
        ("print('text'); print('log', file=sys.stderr)", "{} >&-", 0, ""),
    ],
)
def test_streams(work, shell, status, out, tmp_path):
    """A reader that goes away, an encoding without Greek, closed streams: no traceback."""
    (tmp_path / "prints.py").write_text(PRINTS.format(work))
    line = shell.format(f"{sys.executable} {tmp_path / 'prints.py'}")
    environment = os.environ | {"PYTHONPATH": str(fused_mos.__path__[0]).removesuffix("fused_mos")}
    script = f"set -o pipefail; {line}; exit $?"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (status, out)
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_flags_seen_before_the_others_are_known():
    assert command.peek(["--a-b=1", "x", "--c", "2", "--d"], "a_b", "c", "e") == {"a_b": "1", "c": "2", "e": None}


# --------------------------------------------------------------------------------------------------------- all commands


def test_every_module_with_a_main_is_a_command():
    modules = {module for module, _ in package_command.COMMANDS.values()}
    doors = set()
    for found in pkgutil.iter_modules(fused_mos.__path__):
        if not found.ispkg and not found.name.startswith("_"):
            source = importlib.import_module(f"fused_mos.{found.name}")
            doors |= {found.name} if hasattr(source, "main") else set()
    assert doors <= modules
    for module in modules:
        assert callable(importlib.import_module(f"fused_mos.{module}").main)


def test_the_list_of_commands(capsys):
    assert package_command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, what) in package_command.COMMANDS.items():
        assert f"  {name:<11}{what}" in lines
    assert all(len(line) <= 100 for line in lines)
    assert package_command.main(["trian"]) == 2
    assert "error: COMMAND must be one of demo, train," in capsys.readouterr().err


def test_a_command_is_the_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "program", "")
    assert package_command.main(["evaluate", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    for name in package_command.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            package_command.main([name, "--help"])
        assert stop.value.code == 0 and f"usage: fused-mos {name} " in capsys.readouterr().out


def test_the_shell_completes_commands_flags_and_choices(tmp_path, capsys):
    assert package_command.main(["--print-completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    complete = """
    source "$0"; COMP_WORDS=(fused-mos "$@"); COMP_CWORD=$#
    $(complete -p fused-mos | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo "${COMPREPLY[*]}"
    """
    for words, expected in (
        (["tr"], "train train-1b"),
        (["train", "--micro"], "--micro-batches"),
        (["train", "--head", ""], "mos moc softmax"),
        (["train-1b", "--vocab"], "--vocab-parallel"),
        (["lm1b", "pre"], "prepare"),
    ):
        arguments = ["bash", "-c", complete, str(tmp_path / "completion"), *words]
        assert subprocess.run(arguments, capture_output=True, text=True).stdout == f"{expected}\n"
    assert package_command.main(["--print-completion", "fish"]) == 2


@pytest.mark.processes
def test_where_there_is_no_triton(tmp_path):
    """Its command says so, and the shell completes all commands."""
    hidden = (
        "import sys; sys.modules['triton'] = None; from fused_mos.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", hidden, *arguments], capture_output=True, text=True)

    for arguments in (["tune"], ["tune", "--compile-only"]):
        result = run(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "error: tuning needs triton, which is not installed; pip install triton\n"
    completion = run("--print-completion", "bash")
    assert completion.returncode == 0 and "--compile-only" in completion.stdout and "--micro" in completion.stdout


def test_info_tells_what_a_bug_report_needs(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_MOS_ISA", "avx2")
    assert package_command.main(["info"]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    assert told["fused_mos"].startswith(f"{fused_mos.__version__}, ")
    assert told["torch"] == metadata.version("torch") and told["FUSED_MOS_ISA"] == "avx2"
    assert {f"backend {name}": state for name, state in fused_mos.backends().items()}.items() <= told.items()
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert info.facts()["no-such-package"] == "not installed"
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert ", 1 thread, " in info.facts()["CPU"]
        torch.set_num_threads(2)
        assert ", 2 threads, " in info.facts()["CPU"]
    finally:
        torch.set_num_threads(n_threads)
