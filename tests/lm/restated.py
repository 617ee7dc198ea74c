"""The model's equations (Merity et al. 2017; Yang et al. 2018, section 3), one time step and one gate at a time."""

from collections import namedtuple

import torch

Masks = namedtuple("Masks", "embedding input weights between output latent")
"""Scaled masks: (V, 1); (1, B, D); one (4H, H) a layer; (1, B, H) after each layer but the last; (1, B, H); (1, B,
K·D)."""

Restated = namedtuple("Restated", "probability raw dropped")


def restated(model, head, tokens, n_experts, masks=None):
    """Probabilities (T, B, V), and the last layer before and after dropout (T, B, H)."""
    p = dict(model.named_parameters())
    one = torch.ones(1, dtype=p["encoder.weight"].dtype)
    masks = masks or Masks(one, one, [one] * len(model.rnns), [one] * len(model.rnns), one, one)
    state = [(h[0], c[0]) for h, c in model.initial_hidden(tokens.shape[1])]
    rows, raw, dropped = [], [], []
    for token in tokens:
        x = (p["encoder.weight"] * masks.embedding)[token] * masks.input[0]
        for layer, (h, c) in enumerate(state):
            name = f"rnns.{layer}."
            recurrent = p[name + "weight_hh_l0"] * masks.weights[layer]
            gates = x @ p[name + "weight_ih_l0"].T + p[name + "bias_ih_l0"] + h @ recurrent.T + p[name + "bias_hh_l0"]
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            state[layer], x = (h, c), h
            if layer + 1 < len(state):
                x = x * masks.between[layer][0]
        raw.append(x)
        x = x * masks.output[0]
        dropped.append(x)
        decode = lambda z: torch.softmax(z @ p["encoder.weight"].T + p["head.decoder.bias"], -1)
        if head == "softmax":
            rows.append(decode(x))
            continue
        prior = torch.softmax(x @ p["head.prior.weight"].T, -1)
        latent = torch.tanh(x @ p["head.latent.0.weight"].T + p["head.latent.0.bias"]) * masks.latent[0]
        latent = latent.unflatten(-1, (n_experts, -1))
        rows.append(
            (prior[..., None] * decode(latent)).sum(1) if head == "mos" else decode((prior[..., None] * latent).sum(1))
        )
    return Restated(torch.stack(rows), torch.stack(raw), torch.stack(dropped))
