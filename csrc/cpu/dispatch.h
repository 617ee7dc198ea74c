// The choice between the instruction sets.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fused_mos {

// Sets that are compiled in and that this processor can run, slowest first.
std::vector<const Kernels*> available_kernels();

// The fastest, or the one that the environment variable FUSED_MOS_ISA names, which is read at each call.
// Throws std::invalid_argument where that is none of the available.
const Kernels& chosen_kernels();

// Those for operands of this dtype: what multiplies bfloat16 alone, tile registers, leaves float32 to another set.
const Kernels& kernels_for(bool bf16);

}  // namespace fused_mos
