"""The optimizer of a One Billion Word run, and its learning rate."""

import math

import torch

from ...lm import AWDLSTM
from .config import LM1BConfig


def make_optimizer(config: LM1BConfig, model: AWDLSTM, device: torch.device) -> torch.optim.Optimizer:
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adagrad":  # fused on a CPU only
        options |= {"fused": device.type == "cpu", "initial_accumulator_value": config.initial_accumulator}
        return torch.optim.Adagrad(model.parameters(), **options)
    return {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[config.optimizer](model.parameters(), **options)


def learning_rate(config: LM1BConfig, step: int, total_steps: int) -> float:
    """Of step 0, 1, …"""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    share = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr * (1 - share if config.decay == "linear" else (1 + math.cos(math.pi * share)) / 2)
