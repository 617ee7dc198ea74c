"""Exponentially distributed random numbers from a seed, for Gumbel-max: −log of one is a Gumbel variate."""

import torch
from torch import Tensor

USES = {"experts": 0, "classes": 1}
"""Uses of a seed. The numbers of one use are independent of those of the other."""


def generator_of(seed: Tensor, use: str) -> torch.Generator:
    """A generator for one use of a seed (1,), on the seed's device. The host waits to read the seed."""
    return torch.Generator(seed.device).manual_seed(int(seed) + USES[use])


def has_readable_seed(device: torch.device) -> bool:
    """True if the host may read a seed on this device. Elsewhere it would wait for the device, and the capture of a
    CUDA graph allows neither that nor a new generator."""
    return device.type == "cpu"


class Exponentials:
    """The random numbers for one use of a seed (1,). On a CPU they come from torch's generator, one after another; on
    other devices they are a hash of the seed, the row and the column, which the host need not wait for."""

    def __init__(self, seed: Tensor, use: str):
        self.generator, self.key = None, None
        if has_readable_seed(seed.device):
            self.generator = generator_of(seed, use)
        else:
            self.key = mixed_(2 * seed + USES[use])

    @property
    def n_copies(self) -> int:
        """Memory that `like` takes, in float32 copies of its tensor. Hashing holds two int64 tensors at a time."""
        return 1 if self.key is None else 5

    def like(self, tensor: Tensor, first_row: int = 0, first_column: int = 0) -> Tensor:  # (R, C)
        """Positive, finite random numbers with the tensor's shape and dtype."""
        if self.key is None:
            return torch.empty_like(tensor).exponential_(generator=self.generator)
        return hashed(self.key, tensor, first_row, first_column)


def hashed(key: Tensor, like: Tensor, first_row: int, first_column: int) -> Tensor:  # (1,), (R, C) -> (R, C)
    """−log(1 − u), u uniform in (0, 1): the 52 high bits of SplitMix64 (Steele et al. 2014) at row·2³² + column."""
    rows, columns = (torch.arange(n, device=like.device) for n in like.shape)
    counter = ((rows + first_row) << 32)[:, None] + (columns + first_column)
    bits = mixed_(counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key))
    bits.bitwise_right_shift_(12).bitwise_and_(2**52 - 1)
    uniform = bits.to(like.dtype).add_(0.5).mul_(2.0**-52)
    uniform.clamp_(max=1 - torch.finfo(like.dtype).eps / 2)  # float32 rounds some to 1
    return uniform.neg_().log1p_().neg_()


def mixed_(x: Tensor) -> Tensor:
    """SplitMix64's permutation of 64-bit numbers, in place. Products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        high = (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch shifts in copies of the sign bit
        x.bitwise_xor_(high)
        if factor != 1:
            x.mul_(_signed(factor))
    return x


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
