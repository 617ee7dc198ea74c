// The sizes that the LSTM's kernels and their plan share.
#pragma once

namespace fused_mos {

constexpr int LSTM_WARPS = 12, LSTM_THREADS = 32 * LSTM_WARPS;  // a thread of 384 may have 168 registers
constexpr int LSTM_ROWS = 16;                            // of the batch, padded: those of a product's left operand
constexpr int LSTM_CHUNK = 32;                           // features that a warp multiplies at once
constexpr int FORWARD_CHUNKS = 3, BACKWARD_CHUNKS = 12;  // of a warp at most
constexpr int BACKWARD_IN_FLIGHT = 3;  // of these, while they are on their way: four would spill on sm_80
constexpr int MAX_WIDTH = FORWARD_CHUNKS * LSTM_WARPS * LSTM_CHUNK;
constexpr int BACKWARD_UNITS = 16;  // of a block

// Floats between rows of a warp's sums: 8 banks apart, so that lanes of four rows write without conflicts.
template <int COLUMNS>
constexpr int SUMS_STRIDE = COLUMNS + 8;
// Floats of the sums of all warps. There are two such places: one is read while the next step's sums are written.
template <int COLUMNS>
constexpr int SUMS = LSTM_WARPS * LSTM_ROWS * SUMS_STRIDE<COLUMNS>;
// Floats of shared memory: those sums twice, and so many numbers of each thread.
template <int COLUMNS, int NUMBERS>
constexpr int SHARED = 2 * SUMS<COLUMNS> + NUMBERS * LSTM_THREADS;
constexpr int FORWARD_NUMBERS = 9, BACKWARD_NUMBERS = 8;

}  // namespace fused_mos
