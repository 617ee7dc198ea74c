"""Loads a model whose head is a mixture of softmaxes. This needs the package: pip install "fused_mos[hf]".

After `import fused_mos.hf` this file is not used, and no trust_remote_code is needed.
"""

from fused_mos.hf import MoSConfig

__all__ = ["MoSConfig"]
