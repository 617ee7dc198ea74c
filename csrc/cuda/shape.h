// Sizes shared by the kernel and its plan.
#pragma once

namespace fused_mos {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int CHUNK = 64;                // features per stage
constexpr int STAGE_STRIDE = CHUNK + 8;  // elements; rows start 4 banks apart, so fragments are read without conflicts

// A warp's tile is 16 or 32 classes: 32 need twice the accumulators, which do not fit with many rows.
constexpr int halves_of_tile(int row_tiles) { return row_tiles > 8 ? 1 : 2; }
// Stages of a warp's ring: while one is in use, the others load. A block has 64 KiB or more in flight, three times what
// the memory's latency requires.
constexpr int stages_of_ring(int row_tiles) { return 6 / halves_of_tile(row_tiles); }
constexpr int RING_BYTES = 6 * 16 * STAGE_STRIDE * 2;

}  // namespace fused_mos
