"""Run a command of the package: python -m fused_mos COMMAND [flags], or fused-mos COMMAND [flags]."""

import contextlib
import importlib
import io
import sys

from .runtime import UserError, command

COMMANDS = {
    "demo": ("demo", "Train a softmax and a MoS of about equal size: about two minutes on two cores."),
    "train": ("train", "Train an AWD-LSTM with a MoS, MoC or softmax head on a corpus."),
    "finetune": ("finetune", "Fine-tune the best model of a run."),
    "evaluate": ("evaluate", "Evaluate the best model of a run, optionally with dynamic evaluation or a cache."),
    "generate": ("generate", "Generate text with the best model of a run."),
    "experts": ("experts", "Show which expert predicts which word: a page of coloured text and a plot."),
    "reproduce": ("reproduce", "Run all stages of the paper and print its results beside the measured ones."),
    "convert": ("convert", "Convert a checkpoint of the paper's code to a run of this package."),
    "lm1b": ("data.lm1b", "Download and prepare the One Billion Word benchmark."),
    "train-1b": ("train_1b", "Train on the One Billion Word benchmark, on one device or many."),
    "synthetic": ("data.synthetic", "Write texts of a language whose rank and entropy are known."),
    "info": ("info", "Print versions, machine and backends, for a bug report."),
    "tune": ("tune", "Tune the tile sizes of the Triton kernels for this GPU."),
}
"""Each command's module, relative to fused_mos, and a line about it."""

ALIASES = {"train_1b": "train-1b", "inspect": "experts", "prepare": "lm1b"}

COMPLETION = "--print-completion"
SHELLS = ("bash", "zsh", "tcsh")


def usage() -> str:
    lines = ["usage: fused-mos COMMAND [flags]      or: python -m fused_mos COMMAND [flags]", ""]
    lines += [f"  {name:<11}{what}" for name, (_, what) in COMMANDS.items()]
    lines += [
        "",
        "fused-mos COMMAND --help shows the flags of a command.",
        f'eval "$(fused-mos {COMPLETION} bash)" turns on tab completion (also for zsh and tcsh).',
    ]
    return "\n".join(lines)


def print_completion(shell: str) -> None:
    """Print the script that makes a shell complete commands and flags. Raises UserError for a shell that tyro does not
    support."""
    import tyro

    if shell not in SHELLS:
        raise UserError(f"{COMPLETION} takes one of {', '.join(SHELLS)}, got {shell!r}")
    # tyro completes one program, so all commands become its subcommands
    flags = {name: importlib.import_module(f".{module}", __package__).Flags for name, (module, _) in COMMANDS.items()}
    script = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.extras.subcommand_cli_from_dict(
            flags, prog="fused-mos", args=["--tyro-print-completion", shell], config=(tyro.conf.OmitArgPrefixes,)
        )
    for line in script.getvalue().splitlines():
        # bash would read a help text of two lines as two candidates
        print(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC") else line)


def work(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *flags = arguments
    if name == COMPLETION:
        print_completion(flags[0] if flags else "bash")
        return 0
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        raise UserError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {name!r}")
    command.program = f"fused-mos {name}"
    return importlib.import_module(f".{COMMANDS[name][0]}", __package__).main(flags)


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
