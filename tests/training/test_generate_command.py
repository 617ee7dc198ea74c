"""The command that generates text."""

from fused_mos import generate as command
from fused_mos import train
from fused_mos.training import Trainer


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
        (["--temperature", "0"], "temperature must be positive, got 0.0"),
        (["--top-p", "1.5"], r"top_p must be in (0, 1], got 1.5"),
    ):
        assert command.main([str(folder), *flags]) == 2
        assert message in capsys.readouterr().err
