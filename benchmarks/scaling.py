"""Predict the time and memory of `lm1b-full` on 1, 8 and 64 GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling

Nothing is measured here. The rates below are assumptions, each with its source; replace them with your machine's.
"""

import dataclasses

from fused_mos.training.lm1b import RECIPES, memory

WORDS = 793_471
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links."""

    product_flops: float = 500e12
    """bfloat16 products at the head's shapes: half of an H100 SXM's 989 TFLOP/s. Other projects report 600 to 745 for
    fused cross-entropies."""
    memory_bytes: float = 2.7e12
    """Memory bandwidth in bytes per second; the data sheet has 3.35e12."""
    node_link: float = 300e9
    """Bytes per second that a GPU sends in an all-reduce within a node of eight; NVLink has 450e9."""
    network_link: float = 40e9
    """Bytes per second between nodes; the links have 50e9 (400 Gbit/s per GPU)."""
    lstm_step: float = 60e-6
    """Seconds of one time step of one layer, forward and backward: two small products and their launches."""


MACHINE = Machine()


@dataclasses.dataclass(frozen=True)
class Plan:
    n_data: int
    n_vocab: int

    @property
    def n_gpus(self) -> int:
        return self.n_data * self.n_vocab

    def row(self) -> str:
        """The table row of a step with 128 columns per data rank."""
        config = dataclasses.replace(RECIPES["lm1b-full"](), vocab_parallel=self.n_vocab)
        config = dataclasses.replace(config, batch_size=config.batch_size * self.n_data)
        model, tokens = config.model, config.bptt * config.batch_size // self.n_data
        d, k = model.embedding_size, model.n_experts
        needed = memory.table(config, WORDS, self.n_data, "cuda")
        gradients = needed["gradients"]

        # four products: a shard recomputes its logits, and so does a whole decoder of this size
        head = 4 * 2 * tokens * k * d * (WORDS / self.n_vocab) / MACHINE.product_flops
        lstm = config.bptt * len(model.hidden_sizes) * MACHINE.lstm_step * 3
        # torch's foreach Adagrad, the norm, clipping, and the sum of the tied matrix's two gradients take about 20
        # passes over P numbers
        optimizer = 20 * gradients / MACHINE.memory_bytes
        rest = gradients - 4 * (WORDS // self.n_vocab) * (d + 1)
        shared = tokens * (2 * k * d + 4 * d + 12 * k) + (
            rest if self.n_vocab > 1 else 0
        )  # bfloat16 gradients of the latent vectors
        vocabulary = self._all_reduce(shared, self.n_vocab, within_node=True)
        data = self._all_reduce(gradients, self.n_data, within_node=self.n_gpus <= 8)
        step = head + lstm + optimizer + vocabulary + data
        words = tokens * self.n_data / step
        times = " | ".join(f"{1e3 * t:,.1f}" for t in (head, lstm, optimizer, vocabulary, data, step))
        sent = shared * _share(self.n_vocab) + gradients * _share(self.n_data)
        return (
            f"| {self.n_gpus} | {self.n_data} × {self.n_vocab} | {sum(needed.values()) / GIB:.1f} | {sent / GIB:.2f} "
            f"| {times} | "
            f"{words / 1e3:,.0f} | {829_250_940 / words / 3600:,.1f} |"
        )

    def _all_reduce(self, n_bytes: float, ranks: int, within_node: bool) -> float:
        return n_bytes * _share(ranks) / (MACHINE.node_link if within_node else MACHINE.network_link)


def _share(ranks: int) -> float:
    """Share of its bytes that a rank sends in a ring all-reduce."""
    return 2 * (ranks - 1) / ranks


PLANS = [Plan(1, 1), Plan(8, 1), Plan(2, 4), Plan(1, 8), Plan(64, 1), Plan(8, 8)]


def main() -> None:
    print(
        "| GPUs | data × vocabulary | memory, GiB | sent, GiB | head, ms | LSTM | optimizer | vocabulary | gradients "
        "| step | 1,000 words/s | hours an epoch |"
    )
    print("|---" * 12 + "|")
    for plan in PLANS:
        print(plan.row())


if __name__ == "__main__":
    main()
