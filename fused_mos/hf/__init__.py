"""Mixtures of softmaxes in Hugging Face models."""
