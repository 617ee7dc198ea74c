"""Give GPT-2 a mixture of softmaxes for its head, train it by Hugging Face's Trainer, load it again, and let it write:

    python -m examples.gpt2_trainer --model gpt2 --data TEXT_OR_FOLDER

Without --model it trains a small GPT-2 from scratch, and without --data on Python's own documentation: a minute on
two cores, and nothing is downloaded. Needs `pip install "fused_mos[hf]" accelerate`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fused_mos.data import sample
from fused_mos.hf import replace_head
from fused_mos.runtime import files

END = "<|endoftext|>"


@dataclass
class Config:
    model: str | None = None
    """A model's name on the Hub, such as gpt2, or the folder of one; by default a small GPT-2 with random weights."""
    data: Path | None = None
    """A text file, or a folder with train.txt and valid.txt; by default Python's own documentation."""
    out: Path = Path("runs/gpt2-mos")
    """Folder for the trained model and its tokenizer."""
    experts: int = 4
    """Softmaxes that the head mixes."""
    rank: int = 16
    """Rank of each expert's change to the hidden state."""
    steps: int = 500
    """Steps of AdamW, Trainer's default."""
    batch: int = 8
    """Sequences of a step."""
    lr: float = 1e-3
    """Highest learning rate. A trained model wants less, such as 5e-5."""
    context: int = 128
    """Tokens of a sequence."""
    prompt: str = "the value of"
    """Text that the written one begins with."""


def read(data: Path) -> tuple[str, str]:
    """Training and validation text; the last tenth of a file is for validation."""
    if data.is_dir():
        return files.read_text(data / "train.txt"), files.read_text(data / "valid.txt")
    text = files.read_text(data)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def small_gpt2(text: str, context: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model with random weights, and a tokenizer of 2,000 byte pairs learned from the text."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = bytes_, decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[END], initial_alphabet=bytes_.alphabet(), show_progress=False
    )
    pairs.train_from_iterator(text.splitlines(keepends=True), learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token=END, eos_token=END, pad_token=END)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def sequences(tokenizer, text: str, context: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of `context` tokens. A piece's first one is no label: nothing predicts it, but Trainer would
    count it in what it divides the loss by."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    pieces = tokens[: len(tokens) // context * context].view(-1, context)
    assert len(pieces), f"a text of {len(tokens)} tokens is too short for a context of {context}"
    labels = pieces.clone()
    labels[:, 0] = -100
    return [{"input_ids": piece, "labels": label} for piece, label in zip(pieces, labels)]


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, prog="python -m examples.gpt2_trainer", description=__doc__, args=arguments)
    torch.manual_seed(0)
    text, valid_text = read(config.data or sample.cached_corpus())
    if config.model is None:
        model, tokenizer = small_gpt2(text, config.context)
    else:
        model = AutoModelForCausalLM.from_pretrained(config.model)
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    replace_head(model, config.experts, rank=config.rank)  # computes what it did; before Trainer makes the optimizer

    options = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.steps // 10,
        prediction_loss_only=True,
        save_strategy="no",
        logging_steps=max(1, config.steps // 10),
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=sequences(tokenizer, text, config.context),
        eval_dataset=sequences(tokenizer, valid_text, config.context),
    )
    print(f"perplexity of a token {math.exp(trainer.evaluate()['eval_loss']):.1f}")
    trainer.train()  # forms no (tokens, vocabulary) logits
    print(f"validation perplexity {math.exp(trainer.evaluate()['eval_loss']):.1f}")
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)

    # in another program `import fused_mos.hf` comes first
    model = AutoModelForCausalLM.from_pretrained(config.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    prompt = tokenizer(config.prompt, return_tensors="pt")
    tokens = model.generate(
        **prompt, max_length=config.context, do_sample=True, top_p=0.9, pad_token_id=tokenizer.eos_token_id
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
