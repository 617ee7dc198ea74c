"""Give GPT-2 a Mixture of Softmaxes as its head, train it with Hugging Face's Trainer, reload it and generate text:

    python -m examples.gpt2_trainer --model gpt2 --data TEXT_OR_FOLDER

Without flags, it trains a small GPT-2 from scratch on Python's own documentation, in a minute on two cores and without
any download. Requires `pip install "fused_mos[hf]" accelerate`.
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
    """Name of a model on the Hub, such as gpt2, or its folder; by default a small GPT-2 with random weights."""
    data: Path | None = None
    """Text file, or folder with train.txt and valid.txt; by default Python's own documentation."""
    out: Path = Path("runs/gpt2-mos")
    """Folder for the trained model and its tokenizer."""
    experts: int = 4
    """Number of experts in the head."""
    rank: int = 16
    """Rank of each expert's change to the hidden state."""
    steps: int = 500
    """Training steps with AdamW, Trainer's default."""
    batch: int = 8
    """Sequences per step."""
    lr: float = 1e-3
    """Peak learning rate. For a pretrained model choose a smaller one, such as 5e-5."""
    context: int = 128
    """Tokens per sequence."""
    prompt: str = "the value of"
    """Start of the generated text."""


def read(data: Path) -> tuple[str, str]:
    """Returns training and validation text. The last tenth of a single file is for validation."""
    if data.is_dir():
        return files.read_text(data / "train.txt"), files.read_text(data / "valid.txt")
    text = files.read_text(data)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def small_gpt2(text: str, context: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns a model with random weights, and a byte-pair tokenizer of 2,000 tokens learned from the text."""
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
    """Cuts the text into pieces of `context` tokens. The first token of a piece is not a label: nothing predicts it,
    but Trainer would count it in the loss's denominator."""
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
    # the new head computes the same as the old one; replace it before Trainer creates the optimizer
    replace_head(model, config.experts, rank=config.rank)

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
    print(f"perplexity per token before training {math.exp(trainer.evaluate()['eval_loss']):.1f}")
    trainer.train()  # never forms the (tokens, vocabulary) logits
    print(f"validation perplexity {math.exp(trainer.evaluate()['eval_loss']):.1f}")
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)

    # another program must first `import fused_mos.hf`
    model = AutoModelForCausalLM.from_pretrained(config.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    prompt = tokenizer(config.prompt, return_tensors="pt")
    tokens = model.generate(
        **prompt, max_length=config.context, do_sample=True, top_p=0.9, pad_token_id=tokenizer.eos_token_id
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
