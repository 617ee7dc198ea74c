"""The One Billion Word benchmark: its words as files of token ids, whatever stops the work."""

import functools
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fused_mos.data import CorpusError, lm1b
from fused_mos.data.lm1b import FOLDER, FOLDERS, SHARDS, Prepare, prepare
from fused_mos.data.manifest import read_manifest

TRAIN = (b"the cat sat\nthe dog sat on the cat\n", "a cat \u00a0 é\n\n<S> the </S> \t\r<UNK>\n".encode())
HELDOUT = (b"the zebra sat\n",)


@pytest.fixture
def source(tmp_path):
    return write_shards(tmp_path / "source")


@pytest.fixture
def run(source, tmp_path):
    """Calls `prepare` on the source."""
    return functools.partial(prepare_with, source, tmp_path / "out")


def write_shards(folder, train=TRAIN, heldout=HELDOUT):
    for split, texts in (("train", train), ("heldout", heldout)):
        (folder / FOLDERS[split]).mkdir(parents=True, exist_ok=True)
        for name, text in zip(SHARDS[split], texts):
            (folder / FOLDERS[split] / name).write_bytes(text)
    return folder


def prepare_with(source, out, **options):
    return prepare(Prepare(source, out, **({"workers": 1, "allow_missing": True} | options)))


def shard(folder, split, i):
    return folder / FOLDERS[split] / SHARDS[split][i]


def vocabulary(out):
    return (out / "vocabulary.txt").read_bytes().decode().removesuffix("\n").split("\n")


def decoded(out, entry):
    words = vocabulary(out)
    return [words[i] for i in np.fromfile(out / entry["file"], "<i4")]


def files(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_a_small_corpus_to_the_last_byte(source, run, tmp_path):
    manifest, out = run(min_count=2), tmp_path / "out"
    assert vocabulary(out) == ["<S>", "</S>", "<UNK>", "the", "cat", "sat"]
    tokens = {path.name: np.fromfile(path, "<i4").tolist() for path in out.rglob("*.tokens")}
    assert tokens == {
        "news.en-00001-of-00100.tokens": [0, 3, 4, 5, 1, 0, 3, 2, 5, 2, 3, 4, 1],
        "news.en-00002-of-00100.tokens": [
            0,
            2,
            4,
            2,
            2,
            1,
            0,
            2,
            3,
            2,
            2,
            1,
        ],  # U+00A0 is a word, as for the benchmark's own tools
        "news.en.heldout-00000-of-00050.tokens": [0, 3, 2, 5, 1],
    }
    second = shard(source, "train", 1).read_bytes()
    assert (
        manifest == read_manifest(out)
        and manifest["vocabulary"]["sha256"] == hashlib.sha256((out / "vocabulary.txt").read_bytes()).hexdigest()
    )
    assert manifest["vocabulary"]["words"] == 6 and len(manifest["train"]) == 2 and len(manifest["heldout"]) == 1
    assert manifest["train"][1] == {
        "file": "train/news.en-00002-of-00100.tokens",
        "tokens": 12,
        "sentences": 2,
        "unknown": 6,
        "empty": 1,
        "sha256": hashlib.sha256((out / "train" / "news.en-00002-of-00100.tokens").read_bytes()).hexdigest(),
        "source": {
            "name": "news.en-00002-of-00100",
            "bytes": len(second),
            "sha256": hashlib.sha256(second).hexdigest(),
        },
    }


def test_the_command_sums_up(source, tmp_path, capsys):
    flags = [
        "prepare",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--min-count",
        "2",
        "--allow-missing",
        "--workers",
        "1",
    ]
    assert lm1b.main(flags) == 0
    output = capsys.readouterr().out
    assert "count 2 of 2 shards: 17 words in" in output and "tokenise 3 of 3 shards: 20 words in" in output
    assert "train: 25 tokens in 4 sentences, 47.06% of the words are <UNK>, 1 blank lines skipped" in output
    assert "heldout: 5 tokens in 1 sentences, 33.33% of the words are <UNK>, 0 blank lines skipped" in output


def test_vocabularies(run, tmp_path):
    out = tmp_path / "out"
    run(min_count=1)
    assert vocabulary(out)[3:] == ["the", "cat", "sat", "a", "dog", "on", "\u00a0", "é"]
    run(top=5)
    assert vocabulary(out)[3:] == ["the", "cat"]
    run()
    assert vocabulary(out)[3:] == ["the", "cat"], "words that are there three times"
    (tmp_path / "words.txt").write_bytes("zebra\n<UNK>\nthe\n\u2028\n</S>\n<S>".encode())
    manifest = run(vocabulary=tmp_path / "words.txt")
    assert vocabulary(out) == ["zebra", "<UNK>", "the", "\u2028", "</S>", "<S>"]
    assert decoded(out, manifest["heldout"][0]) == ["<S>", "the", "zebra", "<UNK>", "</S>"]


def test_the_folder_that_the_archive_is_extracted_to(tmp_path):
    write_shards(tmp_path / FOLDER)
    assert prepare_with(tmp_path, tmp_path / "out")["train"]


WORDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=" \t\n\r\v\f"), min_size=1
) | st.sampled_from(lm1b.MARKS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(WORDS, max_size=6), min_size=1), st.sampled_from([" ", "\t ", "\r", "\f\v"]), st.integers(1, 9)
)
@example([["a", "\u0085", "\x1c", "\u2028"], [], ["<S>", "</S>"]], " ", 1)
def test_round_trip(tmp_path, sentences, space, block_bytes):
    text = "".join(space.join(words) + "\n" for words in sentences) + "word\n"
    folder = tmp_path / hashlib.sha256(f"{text} {block_bytes}".encode()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm1b, "BLOCK_BYTES", block_bytes)
        entry = prepare_with(write_shards(folder, [text.encode()]), folder / "out", min_count=1)["train"][0]
    kept = [words for words in [*sentences, ["word"]] if words]
    assert decoded(folder / "out", entry) == [
        w for words in kept for w in ("<S>", *("<UNK>" if w in lm1b.MARKS else w for w in words), "</S>")
    ]
    assert entry["empty"] == len(sentences) + 1 - len(kept) and entry["sentences"] == len(kept)
    counts = Counter(word for words in kept for word in words if word not in lm1b.MARKS)
    assert vocabulary(folder / "out")[3:] == sorted(counts, key=lambda word: (-counts[word], word.encode()))


def test_what_is_finished_is_not_done_again(source, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run()
    before = files(out)
    (out / "train" / "news.en-00001-of-00100.tokens").write_bytes(b"half")
    (out / "train" / "news.en-00001-of-00100.tokens.partial").write_bytes(b"hal")
    (out / "heldout" / "news.en.heldout-00000-of-00050.json").write_text("{")
    (out / "counts" / "news.en-00002-of-00100.tsv.partial").write_bytes(b"news")
    with monkeypatch.context() as patch:
        done, tokenise = [], lm1b._tokenise
        patch.setattr(lm1b, "_count", None)
        patch.setattr(lm1b, "_tokenise", lambda shard, digest: done.append(shard.path.name) or tokenise(shard, digest))
        run()
    (out / "counts" / "news.en-00002-of-00100.tsv.partial").unlink()
    after = files(out)
    assert done == ["news.en-00001-of-00100", "news.en.heldout-00000-of-00050"]
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    kept = ["train/news.en-00002-of-00100.tokens", "counts/news.en-00001-of-00100.tsv", "vocabulary.txt"]
    assert all(before[name] == after[name] for name in kept)
    shard(source, "train", 0).write_bytes(b"the cat\n" * 3)
    assert run()["train"][0]["tokens"] == 12, "another source is counted and tokenised"


def test_tokens_of_another_vocabulary_are_never_taken_for_finished(run, tmp_path, monkeypatch):
    """Stopped between writing a shard's tokens and their description, with a vocabulary that changes back and forth."""
    first = run(min_count=1)
    with monkeypatch.context() as patch:
        patch.setattr(lm1b.files, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(top=5)
    assert run(min_count=1) == first
    for entry in read_manifest(tmp_path / "out")["train"]:
        assert hashlib.sha256((tmp_path / "out" / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_a_stop_between_two_vocabularies_leaves_no_manifest(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(min_count=2)
    with monkeypatch.context() as patch:
        patch.setattr(lm1b, "_count", None)  # another vocabulary counts nothing again
        patch.setattr(lm1b, "_tokenise", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(top=4)
    with pytest.raises(
        CorpusError, match="there is no .*manifest.json; first run python -m fused_mos.data.lm1b prepare"
    ):
        read_manifest(out)
    words = decoded(out, run(top=4)["train"][0])
    assert set(words) == {"<S>", "</S>", "<UNK>", "the"}


def test_ctrl_c_says_how_to_continue(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lm1b, "_count", interrupt)
    assert (
        lm1b.main(
            ["prepare", "--source", str(source), "--out", str(tmp_path / "out"), "--allow-missing", "--workers", "1"]
        )
        == 130
    )
    assert "run the same command to continue" in capsys.readouterr().err


def count_or_die(shard):
    if shard.path.name == SHARDS["train"][2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return lm1b._count(shard)


def count_or_sleep(shard):
    if shard.path.name == SHARDS["train"][2]:
        os.kill(multiprocessing.parent_process().pid, signal.SIGINT)
        time.sleep(600)
    return lm1b._count(shard)


@pytest.mark.processes
def test_a_worker_is_killed_and_the_next_run_continues(tmp_path, monkeypatch):
    source, out = write_shards(tmp_path / "source", TRAIN * 3), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(lm1b, "_count", count_or_die)
        with pytest.raises(CorpusError, match="a worker process was killed.*the same command to continue"):
            prepare_with(source, out, workers=2)
    finished = {name: value for name, value in files(out).items() if name.endswith("tsv")}
    assert 1 <= len(finished) < 6
    manifest = prepare_with(source, out, workers=2)
    assert finished.items() <= files(out).items() and not list(out.rglob("*.partial"))
    assert [entry["source"]["name"] for entry in manifest["train"]] == SHARDS["train"][:6]
    assert manifest == prepare_with(source, tmp_path / "alone")


def test_ctrl_c_ends_the_workers_at_once(tmp_path, monkeypatch):
    source = write_shards(tmp_path / "source", TRAIN * 3)
    monkeypatch.setattr(lm1b, "_count", count_or_sleep)
    start = time.monotonic()
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process in the background is started with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare_with(source, tmp_path / "out", workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 60 and not multiprocessing.active_children()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file on a full disk")
@pytest.mark.parametrize(
    "name", ["counts/news.en-00002-of-00100.tsv", "train/news.en-00002-of-00100.tokens", "manifest.json"]
)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.processes)])
def test_a_full_disk(name, workers, source, tmp_path, capsys):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".partial").symlink_to("/dev/full")
    flags = [
        "prepare",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--allow-missing",
        "--workers",
        str(workers),
    ]
    assert lm1b.main(flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [f"error: the disk that holds {path} is full; free space and run the same command to continue"]
    assert not path.exists() and not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".partial"]
    assert lm1b.main(flags) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 5, "top": 9}, "--min-count 5 and --top 9 both choose"),
        ({"top": 9, "vocabulary": "v"}, "--top 9 and --vocabulary v both choose"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"top": 3}, "top must be at least 4, got 3"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        (
            {"min_count": 6},
            "no word occurs 6 times in the training shards, the most frequent one occurs 4 times; lower min_count",
        ),
        ({"top": 12}, "top must be at most 11, .*, got 12"),
    ],
)
def test_options_that_do_not_fit(options, message, run):
    with pytest.raises(CorpusError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<S>\n</S>\nthe\n", "lacks <UNK>"),
        (b"<S>\n</S>\n<UNK>\nthe\nthe\n", ":5: the word 'the' is on line 4 already"),
        (b"<S>\nthe 12\n", ":2 must be one word of UTF-8 text, got 'the 12'"),
        (b"<S>\n\n</S>\n", ":2 must be one word"),
        (b"<S>\r\n</S>\r\n", r":1 must be one word of UTF-8 text, got '<S>\\r'"),
        (b"\xff\n", ":1 must be one word"),
        (None, "does not exist"),
    ],
)
def test_vocabulary_files_that_do_not_fit(content, message, run, tmp_path):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=f"words.txt.*{message}"):
        run(vocabulary=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"the cat\nsat", r"news.en-00002-of-00100 is truncated: its 11 bytes do not end with a newline"),
        (b"", "is truncated: its 0 bytes"),
        (b"a\nb\n\xff c\nd\n", r"news.en-00002-of-00100:3 is not UTF-8 text \(invalid start byte\)"),
        (b"\n \n", "has no sentence in its 2 lines, all blank"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 100])
def test_shards_that_are_damaged(text, message, block_bytes, source, run, monkeypatch, tmp_path):
    monkeypatch.setattr(lm1b, "BLOCK_BYTES", block_bytes)
    shard(source, "train", 1).write_bytes(text)
    with pytest.raises(CorpusError, match=message):
        run()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_shards_that_are_missing(source, run):
    with pytest.raises(
        CorpusError,
        match="has 2 of 99 shards and lacks news.en-00003-of-00100, .* news.en-00005-of-00100 …;.*--allow-missing",
    ):
        run(allow_missing=False)
    write_shards(source, TRAIN[:1] * 99, HELDOUT * 48)
    with pytest.raises(
        CorpusError,
        match="has 48 of 50 shards and lacks news.en.heldout-00048-of-00050, news.en.heldout-00049-of-00050;",
    ):
        run(allow_missing=False)
    for path in (source / FOLDERS["heldout"]).iterdir():
        path.unlink()
    with pytest.raises(
        CorpusError,
        match="heldout-monolingual.tokenized.shuffled has no shard such as news.en.heldout-00000-of-00050; --source",
    ):
        run()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "train": []}'])
def test_manifests_that_do_not_fit(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match="manifest.json is (damaged|not of format 1).*fused_mos.data.lm1b prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["counts/*.tsv", "train/*.tokens", "*/*.json", "source"])
def test_a_flipped_bit_of_what_an_earlier_run_left_is_noticed(name, source, run, tmp_path):
    """Damages counts, token ids, their description or the source: whatever is damaged is made again."""
    out, draw = tmp_path / "out", random.Random(0)
    manifest = run(min_count=1)
    before = {key: value[0] for key, value in files(out).items()}
    paths = [shard(source, "train", 0)] if name == "source" else sorted(out.glob(name))
    for path in paths * (40 // len(paths)):
        content = bytearray(path.read_bytes())
        good, place = bytes(content), draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(7)  # UTF-8 still, of a text in ASCII
        path.write_bytes(content)
        (out / "manifest.json").unlink(missing_ok=True)
        if name == "source":
            if content[place] in b" \n" or good[place] in b" \n":
                path.write_bytes(good)
                continue
            run(min_count=1)
            fresh = tmp_path / "fresh"
            prepare_with(source, fresh, min_count=1)
            assert (out / "vocabulary.txt").read_bytes() == (fresh / "vocabulary.txt").read_bytes()
            path.write_bytes(good)
        assert run(min_count=1) == manifest
        assert {key: value[0] for key, value in files(out).items()} == before


def test_a_byte_order_mark_is_no_part_of_the_first_word(source, run, tmp_path):
    run(min_count=1)
    words = vocabulary(tmp_path / "out")
    path = shard(source, "train", 0)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first = run(min_count=1)
    assert vocabulary(tmp_path / "out") == words and run(min_count=1) == first
    (tmp_path / "words").write_bytes(b"\xef\xbb\xbf" + "\n".join(words).encode())
    prepare_with(source, tmp_path / "other", vocabulary=tmp_path / "words")
    assert vocabulary(tmp_path / "other") == words
