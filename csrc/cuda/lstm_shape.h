// Sizes shared by the LSTM's kernels and their plan.
#pragma once

namespace fused_mos {

constexpr int LSTM_WARPS = 12, LSTM_THREADS = 32 * LSTM_WARPS;  // with 384 threads, each may have 168 registers
constexpr int LSTM_ROWS = 16;                            // of the padded batch: those of a product's left operand
constexpr int LSTM_CHUNK = 32;                           // features that a warp multiplies at once
constexpr int FORWARD_CHUNKS = 3, BACKWARD_CHUNKS = 12;  // most chunks of a warp
constexpr int BACKWARD_IN_FLIGHT = 3;                    // chunks loading at once: four would spill registers on sm_80
constexpr int MAX_WIDTH = FORWARD_CHUNKS * LSTM_WARPS * LSTM_CHUNK;
constexpr int BACKWARD_UNITS = 16;  // units per block

// Floats between rows of a warp's sums: 8 banks apart, so lanes of four rows write without conflicts.
template <int COLUMNS>
constexpr int SUMS_STRIDE = COLUMNS + 8;
// Floats of the sums of all warps. There are two buffers: one is read while the next step writes the other.
template <int COLUMNS>
constexpr int SUMS = LSTM_WARPS * LSTM_ROWS * SUMS_STRIDE<COLUMNS>;
// Floats of shared memory: the sums twice, and NUMBERS of each thread.
template <int COLUMNS, int NUMBERS>
constexpr int SHARED = 2 * SUMS<COLUMNS> + NUMBERS * LSTM_THREADS;
constexpr int FORWARD_NUMBERS = 9, BACKWARD_NUMBERS = 8;

}  // namespace fused_mos
