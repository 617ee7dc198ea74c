// The sizes that the kernel and its plan share.
#pragma once

namespace fused_mos {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int CHUNK = 64;  // features of a stage
constexpr int STAGE_STRIDE =
    CHUNK + 8;  // elements; rows begin 4 banks apart, so that fragments are read without conflicts

// A warp's tile is one or two times 16 classes: two need twice the accumulators, for which many rows leave no room.
constexpr int halves_of_tile(int row_tiles) { return row_tiles > 8 ? 1 : 2; }
// Stages of a warp's ring: while one is computed with, the others arrive, 64 KiB or more of them in a block, thrice
// what the memory's latency asks for.
constexpr int stages_of_ring(int row_tiles) { return 6 / halves_of_tile(row_tiles); }
constexpr int RING_BYTES = 6 * 16 * STAGE_STRIDE * 2;

}  // namespace fused_mos
