"""The Triton kernels of `_backends/triton.py`, their launch configurations and the proof that they compile.

tiles.py           one tile of logits, its operands, and what all kernels do with it
rows.py            log-sum-exp and samples of single rows
exponentials.py    exponentials of logits that are kept, for gradients formed in the forward pass
loss.py            the mixture's loss of its rows' sums, and each row's part in its gradient
gradients.py       dl of the NLL, recomputed
mixture.py         log-probabilities of the mixture and their dl
finish.py          what is around the products: operands scaled and filled up, results rounded
forward.py         calls of the kernels that need no gradient
backward.py        calls of those that recompute the logits for one
workspace.py       how much memory may be taken
configurations.py  tile sizes by architecture and shape class
operands.py        operands as the kernels want them
launch.py          how kernels are called, and how calls are recorded instead
shapes.py          shapes and products that are proven and tuned
proof.py           compiles what the backend would call, without a GPU
sass.py            reads the machine code that came out
tuning.py          measures tiles on a GPU
"""
