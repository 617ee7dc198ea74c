"""A small text and small runs on it."""

import random
import shutil

import pytest
from runs import write_benchmark

from fused_mos import train_1b
from fused_mos.data import lm1b
from fused_mos.train import parse
from fused_mos.training import Trainer


def _write(path, sentences):
    path.write_text("\n".join(" ".join(words) for words in sentences) + "\n")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def corpus_folder(text_folder):
    """Train: cyclic sentences of 40 words. Valid and test: half as much of random words, so that validation soon gets
    worse and averaging starts. Written for each test, which may change it, to the folder that finished runs name."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    shutil.rmtree(text_folder, ignore_errors=True)
    text_folder.mkdir()
    starts = [draw.randrange(40) for _ in range(250)]
    _write(text_folder / "train.txt", [[words[(s + i) % 40] for i in range(8)] for s in starts] + [words])
    for split in ("valid", "test"):
        _write(text_folder / f"{split}.txt", [[draw.choice(words) for _ in range(8)] for _ in range(40)])
    return text_folder


@pytest.fixture
def small_flags(corpus_folder):
    """Command-line flags of a run that takes a second."""
    return [
        "--data",
        str(corpus_folder),
        *"--recipe demo --embedding-size 8 --hidden-sizes 12 10 --n-experts 3 "
        "--batch-size 6 --bptt 12 --bptt-delta 6 --epochs 3 --log-interval 1 --nonmono 0 --lr 10".split(),
    ]


@pytest.fixture(scope="session")
def made_runs():
    """Folders of finished runs by their number of epochs."""
    return {}


@pytest.fixture
def finished_run(made_runs, small_flags, tmp_path_factory, tmp_path):
    """Copies a finished run of so many epochs, trained once, to a folder of the test's own."""

    def copied(epochs: int):
        if epochs not in made_runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            Trainer(parse([*small_flags, "--epochs", str(epochs), "--out", str(folder)])).run()
            made_runs[epochs] = folder
        return shutil.copytree(made_runs[epochs], tmp_path / "run")

    return copied


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small corpus in the benchmark's form."""
    folder = tmp_path_factory.mktemp("lm1b")
    write_benchmark(folder / "source")
    lm1b.prepare(lm1b.Prepare(folder / "source", folder / "prepared", workers=1, allow_missing=True))
    return folder / "prepared"


@pytest.fixture
def flags(prepared):
    """Of a One Billion Word run that takes a second or two."""
    return [
        "--data",
        str(prepared),
        *"--recipe lm1b-tiny --embedding-size 8 --hidden-sizes 12 10 --batch-size 6 "
        "--bptt 9 --eval-batch-size 4 --eval-interval 20 --log-interval 1 --epochs 2 --optimizer adam --lr 0.01 "
        "--warmup-steps 5 --clip 1".split(),
    ]


@pytest.fixture
def two_checkpoints(flags, tmp_path):
    """A run of train_1b with checkpoints of steps 3 and 5, and its flags."""
    flags = [*flags, "--dropout", "0.2", "--decay", "none", "--out", str(tmp_path / "run")]
    for steps in ("3", "5"):
        assert train_1b.main([*flags, "--max-steps", steps]) == 0
    return tmp_path / "run", flags
