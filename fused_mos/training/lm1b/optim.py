"""The optimizer of a One Billion Word run, and its learning rate schedule."""

import math

import torch

from ...lm import AWDLSTM
from .config import LM1BConfig


def make_optimizer(config: LM1BConfig, model: AWDLSTM, device: torch.device) -> torch.optim.Optimizer:
    parameters, lr, decay = model.parameters(), config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, weight_decay=decay, fused=True)
    if config.optimizer == "adam":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True)
    start, fused = config.initial_accumulator, device.type == "cpu"  # torch has a fused Adagrad only for CPUs
    return torch.optim.Adagrad(parameters, lr, weight_decay=decay, initial_accumulator_value=start, fused=fused)


def learning_rate(config: LM1BConfig, step: int, total_steps: int) -> float:
    """Learning rate at `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    share = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr * (1 - share if config.decay == "linear" else (1 + math.cos(math.pi * share)) / 2)
