"""The Triton kernels of `_backends/triton.py`, their launch configurations and the proof that they compile.

tiles.py           one tile of logits, its operands, and what all kernels do with it
rows.py            log-sum-exp and samples of single rows
gradients.py       dl of the NLL: in the forward pass, or recomputed
mixture.py         log-probabilities of the mixture and their dl
forward.py         calls of the kernels that need no gradient
configurations.py  tile sizes by architecture and shape class
operands.py        operands as the kernels want them
launch.py          how kernels are called, and how calls are recorded instead
shapes.py          shapes and products that are proven and tuned
proof.py           compiles what the backend would call, without a GPU
tuning.py          measures tiles on a GPU
"""
