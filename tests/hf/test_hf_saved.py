"""Models with a mixture on disk: in fresh processes, with and without the package, and by classes that expect none."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from tiny import V, float64_loss, make, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fused_mos.hf import replace_head

SAVED = ("gpt2", "llama", "mixtral", "cohere")  # tied, untied, with weights that transformers converts, and a scale


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the fresh processes: on some processors torch's products have other bits with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, one_thread):
    """Saved models, each with logits.pt, those of `tokens()`, and model.pickle."""
    root = tmp_path_factory.mktemp("saved")
    for name in SAVED:
        model = replace_head(make(name), 3, noise=0.3, rank=4 if name == "llama" else None).eval()
        model.save_pretrained(root / name)
        torch.save(model(tokens()).logits.detach(), root / name / "logits.pt")
        (root / name / "model.pickle").write_bytes(pickle.dumps(model))
    return root


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(folder):
    return torch.load(folder / "logits.pt")


def in_a_fresh_process(program: str, root: Path) -> str:
    preamble = f"""
import pickle, sys, torch
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, LlamaModel
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import tokens
root = Path({str(root)!r})
def equal(model, folder):
    return torch.equal(model.eval()(tokens()).logits, torch.load(folder / "logits.pt"))
def error_of(load, *arguments, **options):
    try:
        load(*arguments, **options)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
"""
    environment = os.environ | {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", preamble + program]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_fresh_process_computes_the_same_bits(folders):
    program = f"""
import fused_mos.hf
assert equal(pickle.loads((root / "gpt2" / "model.pickle").read_bytes()), root / "gpt2")
for name in {SAVED}:
    model = AutoModelForCausalLM.from_pretrained(root / name)
    assert equal(model, root / name), name
    tied = model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings, name
    print(name, type(model).__name__)
"""
    expected = ["MoSGPT2LMHeadModel", "MoSLlamaForCausalLM", "MoSMixtralForCausalLM", "MoSCohereForCausalLM"]
    printed = in_a_fresh_process(program, folders).splitlines()
    assert [line.split()[1] for line in printed if line.startswith(SAVED)] == expected


def test_without_the_import_nothing_loads_a_random_head(folders):
    """Loud in each case, as docs/huggingface.md shows; with leave to run the folder's code, the model loads."""
    program = """
import io, logging
logging.getLogger("transformers").addHandler(logging.StreamHandler(log := io.StringIO()))
for kind in (AutoModelForCausalLM, AutoModel):
    assert "trust_remote_code=True" in error_of(kind.from_pretrained, root / "gpt2")
def check_concrete_classes():
    for kind, name in ((GPT2LMHeadModel, "gpt2"), (LlamaForCausalLM, "llama")):
        log.seek(log.truncate(0))
        assert "ignore_mismatched_sizes" in error_of(kind.from_pretrained, root / name), name
        for part in ("model of type", "fused_mos", "lm_head.prior.weight", "UNEXPECTED", "MISMATCH", "torch.Size([0])"):
            assert part in log.getvalue(), (part, log.getvalue())
check_concrete_classes()
assert "fused_mos" not in sys.modules
assert type(LlamaModel.from_pretrained(root / "llama")) is LlamaModel
assert type(AutoModel.from_pretrained(root / "llama", trust_remote_code=True)) is LlamaModel
assert equal(AutoModelForCausalLM.from_pretrained(root / "gpt2", trust_remote_code=True), root / "gpt2")
assert "fused_mos" in sys.modules
check_concrete_classes()
print("done")
"""
    assert "done" in in_a_fresh_process(program, folders)


def test_without_the_package_the_error_names_it(folders):
    program = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fused_mos":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
print(error_of(AutoModelForCausalLM.from_pretrained, root / "gpt2", trust_remote_code=True))
"""
    assert "ImportError: " in (printed := in_a_fresh_process(program, folders))
    assert "pip install fused_mos" in printed


def test_auto_model_loads_the_body(folders):
    body = AutoModel.from_pretrained(folders / "llama").eval()
    assert type(body) is transformers.LlamaModel
    hidden = load(folders / "llama").model(tokens()).last_hidden_state
    assert torch.equal(body(tokens()).last_hidden_state, hidden)


def test_the_configuration(folders):
    config = AutoConfig.from_pretrained(folders / "cohere")
    assert isinstance(config, transformers.CohereConfig) and config.model_type == "cohere"
    assert config.mos == {"n_experts": 3, "rank": None, "scale": 0.25, "softcap": None} and config.logit_scale == 1
    assert not config.auto_map  # which TRL asks for, where it loads a reference model
    on_disk = json.loads((folders / "cohere" / "config.json").read_text())
    assert (on_disk["model_type"], on_disk["base_model_type"]) == ("fused_mos", "cohere")
    broken = {key: value for key, value in on_disk.items() if key != "base_model_type"}
    for wrong, message in (
        (broken, "must have base_model_type and mos"),
        (on_disk | {"base_model_type": "of-tomorrow"}, "one that this transformers knows, got 'of-tomorrow'"),
        (on_disk | {"base_model_type": "clip"}, "CLIPConfig must be of a model that AutoModelForCausalLM knows"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(_written(wrong, folders))


def _written(config, root):
    folder = root / "wrong"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_shards_and_a_second_save(folders, tmp_path):
    model = load(folders / "gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(load(tmp_path / "shards")(tokens()).logits, logits_of(folders / "gpt2"))


def test_bfloat16(folders, tmp_path):
    model = load(folders / "llama", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    x = tokens()
    output = model(x, labels=x)
    assert output.logits.dtype == torch.float32
    assert (output.logits - logits_of(folders / "llama")).abs().max() < 0.1
    model.train()(x, labels=x).loss.backward()
    assert model.lm_head.prior.weight.grad.dtype == torch.bfloat16
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(x).logits, output.logits)


# -------------------------------------------------------------------------------------------------- new and missing


def test_a_model_from_a_configuration_alone(folders):
    """Its experts differ from the start: transformers initialises them as the rest of the model."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders / "mixtral"))
    head = model.lm_head
    for parameter in (head.latent[0].weight, head.prior.weight, head.decoder.weight):
        assert 0.01 < parameter.std() < 0.03
    x = tokens()
    assert abs(model(x, labels=x).loss - torch.tensor(float(V)).log()) < 0.3


def test_weights_that_a_file_lacks_are_initialised(folders, tmp_path):
    """As those of any other layer, and not left as the memory was."""
    model = load(folders / "llama")
    kept = model.state_dict()
    del kept["lm_head.prior.weight"], kept["lm_head.latent.0.up"]
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(3)
    loaded = load(tmp_path)
    for parameter in (loaded.lm_head.prior.weight, loaded.lm_head.latent[0].up):
        assert 0.01 < parameter.std() < 0.03
    assert torch.equal(loaded.lm_head.decoder.weight, model.lm_head.decoder.weight)


# --------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("size", [V + 7, V - 7])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_resizing_the_vocabulary(folders, tmp_path, name, size):
    model, x = load(folders / name), tokens().clamp(max=V - 8)
    before, head = model.lm_head.decoder.weight.detach().clone(), model.lm_head
    model.resize_token_embeddings(size)
    assert model.lm_head is head and head.decoder.weight.shape == (size, 32)
    assert torch.equal(head.decoder.weight[: min(size, V)], before[: min(size, V)])
    assert (head.n_classes, head.decoder.out_features, model.config.vocab_size) == (size, size, size)
    assert (head.decoder.weight is model.get_input_embeddings().weight) == (name == "gpt2")
    logits = model(x).logits
    assert logits.shape[-1] == size
    assert abs(model.train()(x, labels=x).loss - float64_loss(logits, x)) < 1e-5
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(x).logits, logits)


def test_output_embeddings_are_the_decoder(folders):
    model = load(folders / "gpt2")
    assert model.get_output_embeddings() is model.lm_head.decoder
    with pytest.raises(TypeError, match="must be an nn.Linear, got Embedding"):
        model.set_output_embeddings(torch.nn.Embedding(V, 32))
