// Decoding with few tokens in one pass over the embedding: what crosses the border to Python. Shape letters: N tokens,
// K experts, R = N·K rows of latent vectors, D features, V classes.
#pragma once
#include <cstdint>

namespace fused_mos {

enum class DecodeMode : int { LogProb, TopK, Sample };

struct DecodeArguments {
  DecodeMode mode;
  bool bf16;                  // else fp16: the dtype of latent, weight and bias
  int n_tokens;               // N
  int n_experts;              // K; 1 for Sample, whose rows are those of the experts that were drawn
  int n_features;             // D, even
  int64_t n_classes;          // V
  int k;                      // of TopK
  float inverse_temperature;  // of Sample
  const void* latent;         // (R, D)
  const float* log_prior;     // (N, K); not for Sample
  const void* weight;         // (V, D)
  const void* bias;           // (V,) or null
  const int64_t* seed;        // one number, on the device, of Sample
  float* log_prob;            // (N, V), of LogProb
  float* values;              // (N, k), descending, of TopK
  int64_t* indices;           // (N, k) of TopK, (N,) of Sample
  void* workspace;            // plan_decode(…).workspace_bytes, aligned to 16 bytes
};

// How a launch is cut up. A *tile* is 16 or 32 classes, read by one warp; a block has a span of tiles, whose logits it
// keeps.
struct DecodePlan {
  int n_blocks;
  int row_tiles;          // tiles of 8 rows that the kernel is compiled for
  int64_t n_tiles;        // of classes
  int copy_bytes;         // of one asynchronous copy: 16, 8 or 4, whatever the rows' addresses are multiples of
  int latent_stride;      // elements between rows of latent in shared memory
  int logits_stride;      // floats between rows of logits
  bool logits_in_shared;  // else they are in the workspace: they do not fit
  int shared_bytes, shared_limit;
  int64_t workspace_bytes;
  // offsets in bytes: of shared memory …
  int ring_at, statistics_at, logits_at;
  // … and of the workspace
  int64_t maxima_at, sums_at, candidates_at, candidate_classes_at, scratch_at;
};

constexpr int MAX_ROWS = 128;
constexpr int MAX_K = 64;

// Null where the plan exists, else what is in its way. `shared_limit`: bytes that a block may use.
const char* plan_decode(const DecodeArguments& arguments, int n_multiprocessors, int shared_limit, DecodePlan& plan);

// Queues the kernel on a stream. A cudaError_t, 0 for success.
int launch_decode(const DecodeArguments& arguments, const DecodePlan& plan, void* stream);
const char* error_text(int error);

// Returns the versions of the CUDA runtime that is built in and of the newest that the driver can run:
// 1000·major + 10·minor, 0 for none.
void cuda_versions(int& runtime, int& driver);

}  // namespace fused_mos
