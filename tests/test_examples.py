"""The programs of examples/, at a tiny size: they learn, what they save is what they trained, and they write."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.trains

TEXT = (
    "".join(
        f"the {animal} sees a {thing} in the {place}\n"
        for animal in ("cat", "dog", "owl", "fox")
        for thing in ("bird", "stone", "mouse")
        for place in ("house", "wood", "field")
    )
    * 8
)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example by its name. The sample text is put into a cache of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda name: importlib.import_module(f"examples.{name}")


@pytest.fixture
def gpt2_trainer(example, monkeypatch):
    """That example, whose trained model is kept in `model`."""
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("accelerate")  # Trainer's
    module = example("gpt2_trainer")
    _keep(monkeypatch, module, "replace_head")
    return module


def _keep(monkeypatch, module, name):
    """The first argument of a function of an example, once that has called it, is its attribute `model`."""
    function = getattr(module, name)

    def kept(model, *arguments, **options):
        monkeypatch.setattr(module, "model", model, raising=False)
        return function(model, *arguments, **options)

    monkeypatch.setattr(module, name, kept)


def perplexities(printed):
    """Before and after training."""
    before, after = map(float, re.findall(r"perplexity (?:per token before training )?([\d.]+)", printed))
    return before, after


# --------------------------------------------------------------------------------------------------- the Transformer


def test_a_transformer_learns_and_is_saved(example, tmp_path, monkeypatch, capsys):
    module, path = example("transformer"), tmp_path / "new" / "model.safetensors"
    _keep(monkeypatch, module, "save_model")
    module.main(f"--out {path} --steps 120 --context 32 --channels 64 --experts 2 --lr 0.004".split())
    printed = capsys.readouterr().out
    before, after = perplexities(printed)
    vocabulary, train, valid = module.read(module.sample.cached_corpus())
    counts = torch.bincount(train, minlength=len(vocabulary)).double() + 1
    frequencies = math.exp(-(counts / counts.sum()).log()[valid].mean())
    assert after < 0.8 * frequencies < before

    loaded, words = module.load(path)
    assert words.words == vocabulary.words
    assert loaded.head.decoder.weight is loaded.words.weight
    x = valid[None, :16]
    assert torch.equal(loaded.head.log_prob(loaded(x)), module.model.head.log_prob(module.model(x)))
    assert module.perplexity(loaded, valid) == pytest.approx(after, abs=0.06)
    written = printed.splitlines()[2:]
    assert len(" ".join(written).split()) > 20 and set(" ".join(written).split()) <= set(words.words)


def test_its_perplexity_is_that_of_the_definition(example, tmp_path):
    module = example("transformer")
    model = module.GPT(50, module.Config(context=8, channels=32)).eval()
    model.head.init_bias(torch.arange(50))
    text = torch.randint(50, (21,))
    log_prob = torch.cat([model.head.log_prob(model(piece[None]))[0].detach() for piece in text[:-1].split(8)])
    expected = math.exp(-log_prob.double().gather(1, text[1:, None]).mean())
    assert module.perplexity(model, text) == pytest.approx(expected, rel=1e-5)


def test_it_predicts_no_word_from_itself(example):
    """A hidden state does not depend on the words behind it."""
    module = example("transformer")
    model = module.GPT(50, module.Config(context=8, channels=32)).eval()
    text = torch.randint(1, 50, (1, 8))
    changed = text.clone()
    changed[0, 5:] = 0
    same = (model(text) - model(changed)).abs().amax(-1)[0] < 1e-6
    assert same.tolist() == [True] * 5 + [False] * 3


def test_it_reads_a_file_or_a_folder(example, tmp_path):
    module = example("transformer")
    (tmp_path / "train.txt").write_text("a b\na c\n")
    (tmp_path / "valid.txt").write_text("d a\n")
    vocabulary, train, valid = module.read(tmp_path)
    assert vocabulary.words == ["<eos>", "<unk>", "a", "b", "c"]
    assert train.tolist() == [2, 3, 0, 2, 4, 0] and valid.tolist() == [1, 2, 0]
    (tmp_path / "text").write_text("a b c d\n" * 4)
    vocabulary, train, valid = module.read(tmp_path / "text")
    assert (len(vocabulary), len(train), valid.tolist()) == (6, 18, [5, 0])


# ---------------------------------------------------------------------------------------------------- GPT-2 and Trainer


def test_gpt2_learns_and_is_saved(gpt2_trainer, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run"
    gpt2_trainer.main(f"--out {folder} --steps 12 --batch 4 --context 32 --experts 2 --lr 0.003".split())
    printed = capsys.readouterr().out
    before, after = perplexities(printed)
    assert after < before / 2
    assert len(printed.splitlines()[-1].removeprefix("the value of").split()) > 5

    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    valid = gpt2_trainer.read(gpt2_trainer.sample.cached_corpus())[1]
    x = torch.stack([piece["input_ids"] for piece in gpt2_trainer.sequences(tokenizer, valid, 32)])
    logits = loaded(x).logits
    assert torch.equal(logits[:2], gpt2_trainer.model.eval()(x[:2]).logits)
    assert perplexity(logits, x) == pytest.approx(after, abs=0.06)


def test_a_trained_gpt2_goes_on_from_its_softmax(gpt2_trainer, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    _, valid = gpt2_trainer.read(tmp_path / "text")
    model, tokenizer = gpt2_trainer.small_gpt2(TEXT, 16)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)  # logits that are not flat
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    x = torch.stack([piece["input_ids"] for piece in gpt2_trainer.sequences(tokenizer, valid, 16)])
    expected = perplexity(model.eval()(x).logits, x)

    options = f"--model {tmp_path / 'gpt2'} --data {tmp_path / 'text'} --out {tmp_path / 'run'} --prompt"
    gpt2_trainer.main([*f"{options} the --steps 10 --context 16 --experts 2".split()])
    printed = capsys.readouterr().out
    before, after = perplexities(printed)
    assert before == pytest.approx(expected, rel=1e-3) and after < before / 2
    assert printed.splitlines()[-1].startswith("the ")


def perplexity(logits, tokens):
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten()))
