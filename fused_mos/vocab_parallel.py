"""Vocabulary parallelism: shards a head's classes over the ranks of a process group, for decoders too large for one
device.

Each rank holds a span of the decoder's rows and computes the log-sum-exps and target logits of its own classes with
the kernels of an unsharded head. All ranks of the group see the same tokens. In the forward pass they exchange only
tensors of (N, K); in the backward pass they sum the gradient of `latent`, (N, K, D). The decoder's gradients stay on
their rank.

Rows are split like DTensor's Shard(0). Checkpoints written through `VocabShard.as_dtensor` can be read by any number of
ranks.
"""

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from ._backends.reference import log_softmax_prior
from ._inputs import Operands
from ._local import new_seed, reduced_loss
from ._losses import NLL
from ._plain import addition
from ._sharded import ELSEWHERE, IGNORED, RanksSum, ShardedExperts, ShardedNLL, ShardedSum, combined_statistics
from ._vocabulary import Normalisers, TopK, Vocabulary, WithSum, chosen_columns
from .head import Head

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class VocabShard(Vocabulary):
    """One rank's span of the classes, and the functions of `fused_mos.functional` over all spans.

    All ranks of the group must call the functions in the same order, with the same `latent`, `prior_logits` and
    `target` and with their own rows of `weight` and `bias`. They all get the same results. Every backend works but
    "reference".

    Args:
        n_classes: V of the whole vocabulary.
        group: the process group to split them over; by default all ranks.

    Raises:
        RuntimeError: torch.distributed has not been initialised.
        ValueError: a rank would have no classes.
    """

    def __init__(self, n_classes: int, group: dist.ProcessGroup | None = None):
        if not dist.is_initialized():
            raise RuntimeError(
                "vocab_parallel needs torch.distributed: call torch.distributed.init_process_group, or start with "
                "torchrun"
            )
        self.n_classes = n_classes
        self.group = group if group is not None else cast(dist.ProcessGroup, dist.group.WORLD)
        self.n_ranks = dist.get_world_size(self.group)
        size = -(-n_classes // self.n_ranks)
        if size * (self.n_ranks - 1) >= n_classes:
            raise ValueError(
                f"n_classes = {n_classes} in spans of {size} leaves one of {self.n_ranks} ranks without a class"
            )
        self.start = size * dist.get_rank(self.group)
        self.stop = min(self.start + size, n_classes)
        self._largest = size

    def __deepcopy__(self, memo: dict) -> "VocabShard":
        """Return the shard itself: a copy of the model is sharded over the same processes."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model sharded by vocab_parallel cannot be pickled, since its process group cannot; save each rank's "
            "state_dict, or one for all ranks with as_dtensor"
        )

    def __repr__(self) -> str:
        return f"classes {self.start} to {self.stop - 1} of {self.n_classes}"

    def rows(self, whole: Tensor) -> Tensor:
        """(V, …) -> this rank's rows, as a view. Raises ValueError unless there are n_classes rows."""
        if whole.shape[0] != self.n_classes:
            raise ValueError(f"the tensor must have n_classes = {self.n_classes} rows, got shape {tuple(whole.shape)}")
        return whole[self.start : self.stop]

    def as_dtensor(self, rows: Tensor, mesh: "DeviceMesh") -> "DTensor":
        """The whole tensor (V, …) as a DTensor that shares the memory of this rank's `rows`. `mesh` has one dimension,
        the shard's group."""
        from torch.distributed.tensor import DTensor, Shard  # importing it takes half as long as torch

        shape = torch.Size((self.n_classes, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def embedding(self, tokens: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
        """Look tokens up in the whole embedding, of which `weight` (V of this rank, D) is this rank's part:
        tokens (…) -> (…, D). The row `padding_idx` gets no gradient. A token that is no class fails as in nn.Embedding.
        """
        own = (tokens >= self.start) & (tokens < self.stop)
        elsewhere = torch.where((tokens >= 0) & (tokens < self.n_classes), 0, -1)  # the lookup refuses -1
        if padding_idx is not None:
            padding_idx = padding_idx - self.start if self.start <= padding_idx < self.stop else None
        found = nn.functional.embedding(torch.where(own, tokens - self.start, elsewhere), weight, padding_idx)
        return RanksSum.apply(torch.where(own[..., None], found, 0), self.group)

    def count_classes(self, operands: Operands) -> int:
        if operands.weight.shape[0] != self.stop - self.start:
            raise ValueError(
                f"weight must have the {self.stop - self.start} rows of {self}, got {tuple(operands.weight.shape)}"
            )
        if operands.backend == "reference":
            raise ValueError("backend 'reference' cannot be sharded; 'tiled' computes every dtype")
        return self.n_classes

    def of_backend(self, operands: Operands) -> "VocabShard":
        return self

    def loss(
        self,
        operands: Operands,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        filter_eps: float,
        loss_weights: Tensor | None,
        with_lse: bool,
    ) -> NLL:
        """The backward pass recomputes the logits (four products in all): they cannot be weighted before the sums of
        all ranks are known."""
        local = torch.where(target == ignore_index, IGNORED, self._own(target))
        options = filter_eps, operands.backend, operands.softcap
        nll, lse = ShardedNLL.apply(*operands.tensors, local, self.group, options)
        is_none = (target != ignore_index) & ((target < 0) | (target >= self.n_classes))
        nll = torch.where(is_none, torch.nan, nll)  # as without shards, if the targets were not checked
        return reduced_loss(nll, lse, operands, target, ignore_index, reduction, loss_weights, with_lse)

    def _own(self, index: Tensor) -> Tensor:
        """Renumber classes from this rank's first one; other ranks' classes become ELSEWHERE."""
        own = (index >= self.start) & (index < self.stop)
        return torch.where(own, index - self.start, ELSEWHERE)

    def experts(self, operands: Operands, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        latent, _, weight, bias, backend, softcap = operands
        options = backend, softcap, temperature
        log_prob, lse = ShardedExperts.apply(latent, weight, bias, self._own(index), self.group, options)
        is_none = (index < 0) | (index >= self.n_classes)
        return torch.where(is_none[:, None], torch.nan, log_prob), lse

    def sum_of_logits(self, operands: Operands, class_weight: Tensor | None) -> None:
        return None

    def with_sum(
        self,
        operands: Operands,
        target: Tensor,
        kind: str,
        class_weight: Tensor | None = None,
        mixture_temperature: float = 1.0,
        temperature: float = 1.0,
    ) -> WithSum:
        own_weight = None if class_weight is None else self.rows(class_weight)
        of_sum = kind, own_weight, mixture_temperature
        options = operands.backend, operands.softcap, temperature
        inputs = *operands.tensors, self._own(target)
        log_likelihood, lse, value, is_top1 = ShardedSum.apply(*inputs, self.group, of_sum, options)
        is_none = (target < 0) | (target >= self.n_classes)  # as without shards
        return WithSum(torch.where(is_none, torch.nan, log_likelihood), lse, value, is_top1)

    @torch.no_grad()
    def distribution(self, operands: Operands, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of all classes, (N, V) on every rank. For evaluation only: not differentiable."""
        given = self._given_normalisers(operands, temperature)
        log_p = ops.mixture_log_prob(*given, operands.backend, operands.softcap, temperature)
        own = nn.functional.pad(log_p, (0, self._largest - log_p.shape[1]))
        return torch.cat(self._gathered(own), 1)[:, : self.n_classes]

    def normalisers(self, operands: Operands, temperature: float = 1.0) -> Normalisers:
        latent, prior_logits, weight, bias, backend, softcap = operands
        options = backend, softcap, temperature
        maximum, log_total = combined_statistics(latent, weight, bias, None, self.group, options)
        return Normalisers(log_softmax_prior(prior_logits).to(maximum.dtype), maximum, log_total)

    def best(self, operands: Operands) -> Tensor:
        return self.candidates(operands, 1).indices.squeeze(1)

    def candidates(self, operands: Operands, k: int, temperature: float = 1.0) -> TopK:
        """The k best of all ranks' candidates, which every rank gathers."""
        given = self._given_normalisers(operands, temperature)
        own = TopK(*ops.mixture_topk(*given, k, operands.backend, operands.softcap, temperature))
        filled = k - own.values.shape[1]  # padding, if this rank has fewer than k classes
        values = torch.cat(self._gathered(nn.functional.pad(own.values, (0, filled), value=-torch.inf)), 1)
        indices = torch.cat(self._gathered(nn.functional.pad(own.indices + self.start, (0, filled), value=-1)), 1)
        # a class of probability 0 ranks before the padding
        order = values.clamp_min(torch.finfo(values.dtype).min).masked_fill(indices < 0, -torch.inf)
        chosen = order.topk(k).indices
        return TopK(values.gather(1, chosen), indices.gather(1, chosen))

    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Draw the expert, then the rank, then a class of that rank. Only the chosen rank's draw counts."""
        latent, prior_logits, weight, bias, backend, softcap = operands
        n = latent.shape[0]
        if n == 0:  # torch.multinomial refuses an empty batch
            return torch.empty(0, dtype=torch.int64, device=latent.device)
        expert = self.choose(log_softmax_prior(prior_logits).exp(), generator).clamp_min(0)
        chosen = latent[torch.arange(n, device=latent.device), expert][:, None]  # a mixture of one expert
        maximum, log_total, _ = ops.row_statistics(chosen, weight, bias, None, backend, softcap, temperature)
        shares = torch.cat(self._gathered(maximum + log_total), 1)
        rank = self.choose(torch.softmax(shares, 1), generator)
        seed = new_seed(generator, latent.device)
        no_prior = prior_logits.new_zeros(n, 1)
        own = ops.sample(chosen, no_prior, weight, bias, temperature, seed, backend, softcap)
        own = torch.where(own >= 0, own + self.start, own)
        # if no rank has a class to draw, the first rank's −1 is the result
        result = torch.where(rank.clamp_min(0) == dist.get_rank(self.group), own, 0)
        dist.all_reduce(result, group=self.group)
        return result

    def choose(self, probability: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw columns on the group's first rank and broadcast them."""
        choice = chosen_columns(probability, generator)
        dist.broadcast(choice, group=self.group, group_src=0)
        return choice

    def _gathered(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.n_ranks)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return parts


class VocabParallelEmbedding(nn.Module):
    """nn.Embedding of which each rank holds the rows of its shard."""

    def __init__(self, shard: VocabShard, weight: nn.Parameter, padding_idx: int | None = None):
        super().__init__()
        self.shard = shard
        self.weight = weight
        self.num_embeddings, self.embedding_dim = shard.n_classes, weight.shape[1]
        self.padding_idx = padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        return self.shard.embedding(tokens, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self.shard}"


def parallelize(model: nn.Module, group: dist.ProcessGroup | None = None) -> VocabShard:
    """Shard the decoder of the only head in `model` (a `fused_mos.MoS`, `MoC` or `Softmax`, or a model that holds one)
    in place: keep this rank's rows and drop the others. An nn.Embedding tied to the decoder is sharded with it.

    Make optimizers afterwards. The parameters must be equal on all ranks of the group, for example from one seed.

    Returns:
        The shard, which is also the new `Head.vocabulary`.

    Raises:
        ValueError: `model` does not hold exactly one head; or another tensor of the model shares the decoder's
            parameters and is not the weight of a plain nn.Embedding (without max_norm, hooks or scaling); or the tied
            embedding is outside `model`. The model is then unchanged.
        RuntimeError: torch.distributed has not been initialised, or the ranks' GPUs are of different models.
    """
    heads = [module for module in model.modules() if isinstance(module, Head)]
    if len(heads) != 1:
        raise ValueError(f"model must hold one fused_mos head, got {len(heads)}")
    (head,) = heads
    shard = VocabShard(head.n_classes, group)
    whole, bias = head.decoder.weight, head.decoder.bias
    embeddings = _tied_embeddings(model, head)
    if whole.device.type == "cuda":
        _check_equal_gpus(whole.device, shard.group)
    rows = nn.Parameter(shard.rows(whole.detach()).clone(), whole.requires_grad)
    head.vocabulary = shard
    head.decoder.weight = rows
    head.decoder.out_features = rows.shape[0]
    if bias is not None:
        head.decoder.bias = nn.Parameter(shard.rows(bias.detach()).clone(), bias.requires_grad)
    for embedding in embeddings:
        sharded = VocabParallelEmbedding(shard, rows, embedding.padding_idx).train(embedding.training)
        for parent in list(model.modules()):
            for name, module in parent._modules.items():  # named_children skips repeated modules
                if module is embedding:
                    parent._modules[name] = sharded
    return shard


def _tied_embeddings(model: nn.Module, head: Head) -> list[nn.Embedding]:
    """The embeddings that share the decoder's weight. Raises ValueError if sharding the decoder would change what the
    model computes."""
    decoder = head.decoder
    if more := addition(decoder, nn.Linear):
        raise ValueError(f"the head's decoder must be a plain nn.Linear, and it {more}")
    if set(decoder._parameters) != {"weight", "bias"}:
        raise ValueError(f"the head's decoder must have weight and bias, got {', '.join(decoder.state_dict())}")
    for name, parameter in decoder.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(f"the decoder's {name} has a hook, which sharding would lose; register it afterwards")
    tied: list[nn.Embedding] = []
    for path, module in model.named_modules():
        for name, tensor in {**module.__dict__, **module._buffers, **module._parameters}.items():
            shared = [of for of, parameter in decoder.named_parameters() if _share_memory(tensor, parameter)]
            if not shared or module is decoder:
                continue
            what = f"{path}.{name}".lstrip(".") + f" is the decoder's {shared[0]}"
            if tensor is not decoder.weight or not isinstance(module, nn.Embedding) or name != "weight":
                raise ValueError(f"{what}, and not the weight of an nn.Embedding; vocab_parallel shards nothing else")
            if more := _beyond_lookup(module):
                raise ValueError(
                    f"{what}, and its module {more}, which vocab_parallel does not keep; use a plain nn.Embedding and "
                    "do the rest outside of it"
                )
            tied.append(module)
    if head.tied and not tied:
        raise ValueError("the head is tied to an embedding outside model; pass the model that holds both")
    return tied


def _share_memory(tensor: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return False
    if tensor.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        return False
    starts, ends = zip(*((t.storage_offset(), t.storage_offset() + t.numel()) for t in (tensor, parameter)))
    return max(starts) < min(ends)


def _beyond_lookup(embedding: nn.Embedding) -> str:
    """Describe what an nn.Embedding does besides looking rows up, as a phrase to follow "it"; "" if nothing."""
    if type(embedding) is not nn.Embedding:
        return f"is a {type(embedding).__qualname__}"
    for name in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, name):
            return f"has {name}"
    for attached in (embedding._modules, embedding._buffers, {**embedding._parameters, "weight": None}):
        for name, value in attached.items():
            if value is not None:
                return f"has {name}"
    return addition(embedding, nn.Embedding)


def _check_equal_gpus(device: torch.device, group: dist.ProcessGroup) -> None:
    """Raise RuntimeError unless all ranks have GPUs of one model. Each rank draws the dropout masks itself, and what
    torch draws from a seed depends on the GPU's number of multiprocessors."""
    models: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(models, _gpu_model(device), group)
    for rank, model in enumerate(models):
        if model != models[0]:
            raise RuntimeError(
                "vocab_parallel needs GPUs of one model, since its ranks have to draw the same dropout masks; rank 0 "
                f"has {models[0]}, rank {rank} {model}"
            )


def _gpu_model(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} with {properties.multi_processor_count} multiprocessors"
