"""AWD-LSTM (Merity et al. 2017) with a mixture head (Yang et al. 2018, section 3).

Shapes: T time steps, B batch columns, V words. Dropouts are named as in the papers' code.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .._latents import check_latents
from ..dropout import check_probability, embedding_dropout, locked_dropout
from ..head import Head
from ..module import MoC, MoS, Softmax
from .lstm import WeightDropLSTM

Hidden = list[tuple[Tensor, Tensor]]
"""One (h, c) per layer, (1, B, width of the layer) each."""

HEADS = ("mos", "moc", "softmax")


def check_head(
    head: str, embedding_size: int, hidden_sizes: tuple[int, ...], latent: str, latent_norm: bool, rank: int | None
) -> None:
    """Raise ValueError if a model of these sizes cannot have such latent vectors."""
    if head != "softmax":
        names = "the last of hidden_sizes", "embedding_size"
        check_latents(latent, hidden_sizes[-1], embedding_size, latent_norm, rank, names)
        return
    for name, value, default in (("latent", latent, "tanh"), ("latent_norm", latent_norm, False), ("rank", rank, None)):
        if value != default:
            raise ValueError(f"{name} is for mixtures: it must be {default} where head is softmax, got {value}")


class LMOutput(NamedTuple):
    log_likelihood: Tensor  # (T, B), of each target
    loss: Tensor  # (), mean negative log-likelihood in nats
    raw: Tensor  # (T, B, last width), output of the last layer before dropout, for TAR
    dropped: Tensor  # (T, B, last width), the same after dropout, for AR
    hidden: Hidden


class AWDLSTM(nn.Module):
    """A word-level language model: embedding, LSTM layers with weight drop, a head tied to the embedding.

    Args:
        n_words: V, size of the vocabulary.
        embedding_size: D, also the size of the head's latent vectors.
        hidden_sizes: width of each LSTM layer. With head="softmax" the last layer feeds the tied decoder directly and
            has the width of the embedding instead.
        head: "mos", "moc" or "softmax".
        n_experts: K; ignored by "softmax".
        dropoute: embedding dropout, which drops whole words.
        dropouti: locked dropout of the embeddings.
        dropouth: locked dropout between LSTM layers.
        dropout: locked dropout of the last layer's output.
        dropoutl: locked dropout of the latent vectors.
        wdrop: dropout of the recurrent weights.
        tied: whether the decoder shares the embedding's weight.
        backend: backend of the head, see `fused_mos.backends()`.
        grad_filter_eps: see `functional.mos_nll_loss`.
        latent, latent_norm, rank: kind of a mixture's latent vectors, see `fused_mos.MoS`. "residual" needs a last
            layer as wide as the embedding. "softmax" takes only the defaults.
        products: dtype of the LSTM layers' matrix products in training, see `WeightDropLSTM`.

    Raises:
        ValueError: an argument does not fit the description above.
    """

    def __init__(
        self,
        n_words: int,
        embedding_size: int = 280,
        hidden_sizes: tuple[int, ...] = (960, 960, 620),
        head: str = "mos",
        n_experts: int = 15,
        dropoute: float = 0.1,
        dropouti: float = 0.4,
        dropouth: float = 0.225,
        dropout: float = 0.4,
        dropoutl: float = 0.29,
        wdrop: float = 0.5,
        tied: bool = True,
        backend: str = "auto",
        grad_filter_eps: float = 0.0,
        latent: str = "tanh",
        latent_norm: bool = False,
        rank: int | None = None,
        products: torch.dtype | None = None,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if not hidden_sizes:
            raise ValueError("hidden_sizes must name at least one layer, got none")
        check_head(head, embedding_size, hidden_sizes, latent, latent_norm, rank)
        self.dropoute = check_probability("dropoute", dropoute)
        self.dropouti = check_probability("dropouti", dropouti)
        self.dropouth = check_probability("dropouth", dropouth)
        self.dropout = check_probability("dropout", dropout)
        self.grad_filter_eps = grad_filter_eps

        widths = [*hidden_sizes[:-1], embedding_size if head == "softmax" else hidden_sizes[-1]]
        self.encoder = nn.Embedding(n_words, embedding_size)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.rnns = nn.ModuleList(
            WeightDropLSTM(size, width, wdrop, products=products)
            for size, width in zip([embedding_size, *widths[:-1]], widths)
        )
        self.widths = widths
        weight = cast(nn.Parameter, self.encoder.weight) if tied else None  # torch's stubs call it a Tensor
        self.head: Head
        if head == "softmax":
            self.head = Softmax(embedding_size, n_words, weight=weight, backend=backend)
        else:
            mixture = {"mos": MoS, "moc": MoC}[head]
            self.head = mixture(
                widths[-1],
                n_words,
                n_experts,
                embedding_size,
                latent_dropout=dropoutl,
                weight=weight,
                backend=backend,
                latent=latent,
                latent_norm=latent_norm,
                rank=rank,
            )
        self.register_load_state_dict_pre_hook(_rename_published_keys)

    @classmethod
    def from_published(cls, state_dict: dict[str, Tensor], **options) -> "AWDLSTM":
        """Return a model with the weights of the paper's published code. Its sizes follow from their shapes.

        Args:
            state_dict: weights under the published names, such as `rnns.0.module.weight_hh_l0_raw`.
            options: dropouts (by default the paper's on Penn Treebank), backend, grad_filter_eps.

        Raises:
            ValueError: names are missing or left over, or shapes do not fit each other.
        """
        refused = "state_dict is not of the published code: "
        count = len({name.split(".")[1] for name in state_dict if name.startswith("rnns.")})
        of_layers = [
            [next((n for n in state_dict if n.startswith(f"rnns.{i}.") and what in n), "") for i in range(count)]
            for what in ("weight_ih_l0", "weight_hh_l0")
        ]
        missing = {"encoder.weight", "prior.weight", "latent.0.weight", "decoder.weight"} - set(state_dict)
        if missing or not count or not all(map(all, of_layers)):
            raise ValueError(f"{refused}it lacks {', '.join(sorted(missing)) or 'a weight of an LSTM'}")
        for name in ("encoder.weight", "prior.weight", *of_layers[1]):
            if state_dict[name].dim() != 2:
                raise ValueError(f"{refused}{name} must be a matrix, got {tuple(state_dict[name].shape)}")

        (n_words, size), n_experts = state_dict["encoder.weight"].shape, state_dict["prior.weight"].shape[0]
        widths = tuple(state_dict[name].shape[1] for name in of_layers[1])
        # check before making a model: sizes that do not fit each other could take any amount of memory
        expected = {
            "decoder.weight": (n_words, size),
            "prior.weight": (n_experts, widths[-1]),
            "latent.0.weight": (n_experts * size, widths[-1]),
        }
        for name_ih, name_hh, inner, width in zip(*of_layers, (size, *widths), widths):
            expected |= {name_ih: (4 * width, inner), name_hh: (4 * width, width)}
        for name, shape in expected.items():
            if tuple(state_dict[name].shape) != shape:
                raise ValueError(f"{refused}{name} must be {shape}, got {tuple(state_dict[name].shape)}")
        tied = torch.equal(state_dict["encoder.weight"], state_dict["decoder.weight"])
        model = cls(n_words, size, widths, "mos", n_experts, tied=tied, **options)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            faults = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise ValueError(f"{refused}{faults}") from None
        return model

    def initial_hidden(self, batch_size: int) -> Hidden:
        """A hidden state of zeros, for the start of an epoch."""
        weight = self.encoder.weight
        return [
            (weight.new_zeros(1, batch_size, width), weight.new_zeros(1, batch_size, width)) for width in self.widths
        ]

    def features(self, tokens: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Tensor, Hidden]:
        """tokens (T, B) -> the last layer's output before and after dropout, (T, B, width), and the new hidden
        state."""
        if hidden is None:
            hidden = self.initial_hidden(tokens.shape[1])
        if len(hidden) != len(self.rnns):
            raise ValueError(f"hidden must have an (h, c) for each of {len(self.rnns)} layers, got {len(hidden)}")
        x = embedding_dropout(self.encoder, tokens, self.dropoute, self.training)
        x = locked_dropout(x, self.dropouti, self.training)
        new_hidden = []
        for layer, rnn in enumerate(self.rnns):
            if layer > 0:
                x = locked_dropout(x, self.dropouth, self.training)
            x, state = rnn(x, hidden[layer])
            new_hidden.append(state)
        return x, locked_dropout(x, self.dropout, self.training), new_hidden

    def forward(self, tokens: Tensor, target: Tensor, hidden: Hidden | None = None) -> LMOutput:
        """Loss of target (T, B), the tokens (T, B) one step later. `hidden` is that of the previous segment, or
        None."""
        raw, dropped, hidden = self.features(tokens, hidden)
        output, loss = self.head(dropped, target, grad_filter_eps=self.grad_filter_eps)
        return LMOutput(output, loss, raw, dropped, hidden)

    def log_prob(self, tokens: Tensor, hidden: Hidden | None = None) -> Tensor:
        """Log-probabilities of each next word, (T, B, V), after tokens (T, B). `hidden` is the state before them, or
        None.

        To get the new hidden state too, call `features` and `head.log_prob`.
        """
        return self.head.log_prob(self.features(tokens, hidden)[1])


def activation_regularization(dropped: Tensor) -> Tensor:
    """AR: mean square () of the last layer's output after dropout (Merity et al. 2017, section 4.5)."""
    return dropped.pow(2).mean()


def temporal_activation_regularization(raw: Tensor) -> Tensor:
    """TAR: mean square () of the last layer's change between time steps; 0 for a single step."""
    if raw.shape[0] < 2:
        return raw.new_zeros(())
    return (raw[1:] - raw[:-1]).pow(2).mean()


def detach(hidden: Hidden) -> Hidden:
    """Cut backpropagation through time between segments."""
    return [(h.detach(), c.detach()) for h, c in hidden]


def carry_on(hidden: Hidden, new: Hidden) -> None:
    """Overwrite the hidden state before a segment by the one after it. Call it after the backward pass, which still
    reads the old one."""
    with torch.no_grad():
        torch._foreach_copy_([x for state in hidden for x in state], [x for state in new for x in state])


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of all parameters after a backward pass."""
    return [cast(Tensor, p.grad) for p in parameters]


def _rename_published_keys(module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Let load_state_dict read checkpoints of the paper's published code. There the head's modules are at the top
    level, and each LSTM is in a wrapper that calls its recurrent weight `weight_hh_l0_raw`."""
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        if name.startswith(("prior.", "latent.", "decoder.")):
            renamed = "head." + name
        elif name.startswith("rnns.") and ".module." in name:
            renamed = name.replace(".module.", ".").replace("weight_hh_l0_raw", "weight_hh_l0")
        else:
            continue
        state_dict[prefix + renamed] = state_dict.pop(key)
