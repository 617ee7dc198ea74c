// How a decode is divided: host-only arithmetic, the same for the device and its emulation.
#include <algorithm>

#include "decode.h"
#include "shape.h"

namespace fused_mos {
namespace {

constexpr const char* TOO_LARGE = "latent does not fit in shared memory";

template <class T>
T aligned(T bytes) {
  return (bytes + 15) / 16 * 16;
}

int copy_bytes(const DecodeArguments& a) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(a.weight) | 2ull * a.n_features | 16;
  return static_cast<int>(bits & (~bits + 1));  // the largest power of two that divides all of them
}

}  // namespace

const char* plan_decode(const DecodeArguments& a, int n_multiprocessors, int shared_limit, DecodePlan& plan) {
  const int64_t rows = int64_t{a.n_tokens} * a.n_experts;
  if (rows < 1 || rows > MAX_ROWS) return "n_tokens * n_experts must be from 1 to 128";
  if (a.n_features < 2 || a.n_features % 2) return "latent_features must be even";
  if (a.n_features > shared_limit) return TOO_LARGE;
  if (a.n_classes < 1 || a.n_classes > INT32_MAX - 32) return "n_classes must be from 1 to 2**31 - 33";
  if (a.mode == DecodeMode::TopK && (a.k < 1 || a.k > MAX_K)) return "k must be from 1 to 64";
  plan = {};
  plan.copy_bytes = copy_bytes(a);
  if (plan.copy_bytes < 4) return "weight must be aligned to 4 bytes";
  plan.row_tiles = rows <= 16 ? 2 : rows <= 64 ? 8 : 16;
  const int tile = 16 * halves_of_tile(plan.row_tiles);
  plan.n_tiles = (a.n_classes + tile - 1) / tile;
  plan.n_blocks = static_cast<int>(std::min<int64_t>({n_multiprocessors, plan.n_tiles, THREADS}));

  const int padded_rows = static_cast<int>(rows + 7) / 8 * 8;
  plan.latent_stride = (a.n_features + 15) / 16 * 16 + 8;  // rows start 4 banks apart
  const int64_t latent_bytes = aligned(int64_t{padded_rows} * plan.latent_stride * 2);
  if (latent_bytes > shared_limit) return TOO_LARGE;
  plan.ring_at = static_cast<int>(latent_bytes);
  plan.statistics_at = plan.ring_at + WARPS * RING_BYTES;
  plan.logits_at = aligned(plan.statistics_at + 2 * WARPS * 8 * plan.row_tiles * 4);
  const int64_t classes = (plan.n_tiles + plan.n_blocks - 1) / plan.n_blocks * tile;  // in the longest span
  const int64_t logits_bytes = rows * (classes + 1) * 4;  // an odd stride puts the lanes' rows in different banks
  plan.logits_stride = static_cast<int>(classes + 1);
  plan.logits_in_shared = plan.logits_at + logits_bytes <= shared_limit;
  plan.shared_limit = shared_limit;
  plan.shared_bytes = plan.logits_at + (plan.logits_in_shared ? static_cast<int>(logits_bytes) : 0);
  if (plan.shared_bytes > shared_limit) return TOO_LARGE;

  int64_t at = 0;
  auto reserve = [&](int64_t bytes) {
    const int64_t start = at;
    at += aligned(bytes);
    return start;
  };
  plan.maxima_at = reserve(rows * plan.n_blocks * 4);
  plan.sums_at = reserve(rows * plan.n_blocks * 4);
  const int64_t candidates = int64_t{plan.n_blocks} * a.n_tokens * (a.mode == DecodeMode::TopK ? a.k : 1);
  plan.candidates_at = reserve(candidates * 4);
  plan.candidate_classes_at = reserve(candidates * 4);
  plan.scratch_at = reserve(plan.logits_in_shared ? 0 : plan.n_blocks * logits_bytes);
  plan.workspace_bytes = at;
  return nullptr;
}

}  // namespace fused_mos
