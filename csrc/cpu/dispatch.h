// Chooses between the instruction sets.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fused_mos {

// Returns the compiled sets that this processor can run, slowest first.
std::vector<const Kernels*> available_kernels();

// Returns the fastest set, or the one that the environment variable FUSED_MOS_ISA names. The variable is read at each
// call. Throws std::invalid_argument if that set is not available.
const Kernels& chosen_kernels();

// Returns the chosen set for operands of this dtype. Tile registers multiply only bfloat16, so the AMX set leaves
// float32 to AVX-512.
const Kernels& kernels_for(bool bf16);

}  // namespace fused_mos
