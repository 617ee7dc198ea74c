"""The command that generates text."""

import shlex

from runs import refused

from fused_mos import generate as command
from fused_mos import train
from fused_mos.training import Trainer
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint


def test_the_command(small_flags, tmp_path, capsys):
    folder = tmp_path / "run"
    Trainer(train.parse([*small_flags, "--epochs", "1", "--out", str(folder)])).run()
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert command.main([str(folder), "--prompt", "w3 w4", "--words", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("w3 w4 ")
    for flags, message in (
        (["--prompt", "w3 zebra"], "prompt: 'zebra' is not one of the model's 41 words"),
        (["--temperature", "0"], "temperature must be at least 1e-30, got 0.0"),
        (["--top-p", "1.5"], r"top_p must be in (0, 1], got 1.5"),
    ):
        assert command.main([str(folder), *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_run_without_a_best_model_yet(small_flags, tmp_path, capsys):
    """Cut off in its first epoch. Its own advice then leads to the best model."""
    folder = tmp_path / "a run"
    assert train.main([*small_flags, "--out", str(folder), "--epochs", "1", "--time-limit", "1e-9"]) == 0
    advice = f"python -m fused_mos.train --resume '{folder}'"
    refused(command, [folder], capsys, f"{folder} has no best model yet", advice)
    assert train.main(shlex.split(advice)[3:]) == 0 and command.main([str(folder), "--words", "3"]) == 0


def test_words_do_not_command_the_terminal(finished_run, capsys):
    """Escape sequences in a foreign vocabulary are not printed: OSC 52 would write to the clipboard."""
    folder, evil = finished_run(3), "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e"
    path = folder / "vocabulary.txt"
    words = [word if word == "<eos>" else word + evil for word in path.read_text().splitlines()]
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    tensors, meta = load_checkpoint(folder / "best.safetensors")
    del meta["vocabulary"]  # the digest of the words that it was trained on
    save_checkpoint(folder / "best.safetensors", tensors, meta)
    capsys.readouterr()
    assert command.main([str(folder), "--prompt", words[0], "--words", "30", "--seed", "1"]) == 0
    assert command.main([str(folder), "--prompt", evil]) == 2
    text, error = capsys.readouterr()
    assert text.count(r"\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e") > 5
    assert all(line.isprintable() for line in (text + error).split("\n"))
