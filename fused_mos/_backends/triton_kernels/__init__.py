"""The Triton kernels of `_backends/triton.py`, their launch configurations and the proof that they compile.

tiles.py           one tile of logits and its operands, shared by all kernels
rows.py            kernels: log-sum-exp and samples of single rows
exponentials.py    kernels: stored exponentials of logits, for gradients formed in the forward pass
loss.py            kernels: the mixture's loss from sums of its rows, and each row's factor in the gradient
gradients.py       kernels: dl of the NLL from recomputed logits
mixture.py         kernels: log-probabilities of the mixture and their dl
finish.py          kernels around the matrix products: scale and pad operands, round results
forward.py         launches that need no gradient
backward.py        launches that recompute the logits for a gradient
workspace.py       the limit of extra memory
configurations.py  tile sizes by architecture and shape class
operands.py        alignment and padding of operands
launch.py          launching kernels, and recording launches
shapes.py          shapes and products to prove and tune
proof.py           compiles every kernel without a GPU
sass.py            reads the machine code of compiled kernels
tuning.py          measures tiles on a GPU
"""
