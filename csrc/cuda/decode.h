// Decoding few tokens in one pass over the embedding: the interface to Python. Shapes: N tokens, K experts,
// R = N·K rows of latent vectors, D features, V classes.
#pragma once
#include <cstdint>

namespace fused_mos {

enum class DecodeMode : int { LogProb, TopK, Sample };

struct DecodeArguments {
  DecodeMode mode;
  bool bf16;                  // dtype of latent, weight and bias; false for fp16
  int n_tokens;               // N
  int n_experts;              // K; 1 for Sample, whose rows belong to the experts drawn before
  int n_features;             // D, even
  int64_t n_classes;          // V
  int k;                      // for TopK
  float inverse_temperature;  // for Sample
  const void* latent;         // (R, D)
  const float* log_prior;     // (N, K); not for Sample
  const void* weight;         // (V, D)
  const void* bias;           // (V,) or null
  const int64_t* seed;        // one number on the device, for Sample
  float* log_prob;            // (N, V), for LogProb
  float* values;              // (N, k), descending, for TopK
  int64_t* indices;           // (N, k) for TopK, (N,) for Sample
  void* workspace;            // plan_decode(…).workspace_bytes, aligned to 16 bytes
};

// How a launch is divided. A *tile* is 16 or 32 classes, which one warp reads. A block has a span of tiles and keeps
// their logits.
struct DecodePlan {
  int n_blocks;
  int row_tiles;          // tiles of 8 rows that the kernel is compiled for
  int64_t n_tiles;        // tiles of classes
  int copy_bytes;         // of one asynchronous copy: 16, 8 or 4, depending on the alignment of the rows
  int latent_stride;      // elements between rows of latent in shared memory
  int logits_stride;      // floats between rows of logits
  bool logits_in_shared;  // false if they do not fit and are in the workspace
  int shared_bytes, shared_limit;
  int64_t workspace_bytes;
  // offsets in bytes: of shared memory …
  int ring_at, statistics_at, logits_at;
  // … and of the workspace
  int64_t maxima_at, sums_at, candidates_at, candidate_classes_at, scratch_at;
};

constexpr int MAX_ROWS = 128;
constexpr int MAX_K = 64;

// Null if there is a plan, else the reason why not. `shared_limit`: bytes of shared memory that a block may use.
const char* plan_decode(const DecodeArguments& arguments, int n_multiprocessors, int shared_limit, DecodePlan& plan);

// Queues the kernel on a stream. Returns a cudaError_t, 0 for success.
int launch_decode(const DecodeArguments& arguments, const DecodePlan& plan, void* stream);
const char* error_text(int error);

// The versions of the CUDA runtime that is built in and of the newest one that the driver supports, as
// 1000·major + 10·minor, or 0 for none.
void cuda_versions(int& runtime, int& driver);

}  // namespace fused_mos
