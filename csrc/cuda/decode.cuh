// Decoding few tokens in one pass over the embedding. The logits of a block's own classes stay on the chip, the blocks
// exchange log-sum-exps across the grid, and each block writes the results for its classes. All blocks must be resident
// at once (a cooperative launch).
//
// The embedding is the left operand of the products: 16 classes × 16 features times 8 rows of latent vectors. A warp
// reads each class once, from its own ring buffer that it fills by asynchronous copies. Between the arrival of the
// latent vectors and the exchange it waits for no other warp.
//
// The same source runs on a GPU (device.cuh) and, thread by thread, on a CPU (emulation.h) to test it without a GPU.
#pragma once
#include "decode.h"
#include "shape.h"

namespace fused_mos {
namespace {

constexpr float LOWEST = -INFINITY;

// A class and its value. Ordered by value, then by class, so results do not depend on the order of candidates.
struct Candidate {
  float value;
  int index;

  FUSED_MOS_DEVICE bool beats(const Candidate& other) const {
    return key() > other.key() || (key() == other.key() && index < other.index);
  }
  FUSED_MOS_DEVICE float key() const { return value == value ? value : INFINITY; }  // NaN ranks first, to be seen
};
FUSED_MOS_DEVICE Candidate nobody() { return {LOWEST, INT32_MAX}; }

FUSED_MOS_DEVICE Candidate best_of_warp(Candidate best) {
  for (int mask = 16; mask; mask /= 2) {
    const Candidate other = {device::shuffle_xor(best.value, mask), device::shuffle_xor(best.index, mask)};
    if (other.beats(best)) best = other;
  }
  return best;
}

// A sum of exponentials relative to the largest one.
struct LogSum {
  float maximum = LOWEST, sum = 0;

  FUSED_MOS_DEVICE void add(const LogSum& other) {
    const float larger = fmaxf(maximum, other.maximum);
    if (larger == LOWEST && sum == 0 && other.sum == 0) return;  // without unmasked classes, −∞ − −∞ would be NaN
    sum = (sum == 0 ? 0 : sum * device::exp(maximum - larger)) +
          (other.sum == 0 ? 0 : other.sum * device::exp(other.maximum - larger));
    maximum = larger;
  }
};

// Philox 4×32-10 (Salmon et al. 2011): the first word for a counter.
FUSED_MOS_DEVICE uint32_t random_word(uint64_t seed, uint32_t token, uint32_t index) {
  uint32_t x0 = index, x1 = token, x2 = 0, x3 = 0, k0 = static_cast<uint32_t>(seed),
           k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = device::high_product(0xD2511F53u, x0), l0 = 0xD2511F53u * x0;
    const uint32_t h1 = device::high_product(0xCD9E8D57u, x2), l1 = 0xCD9E8D57u * x2;
    x0 = h1 ^ x1 ^ k0, x1 = l1, x2 = h0 ^ x3 ^ k1, x3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return x0;
}

template <class T, int ROW_TILES>
struct Decoder {
  static constexpr int HALVES = halves_of_tile(ROW_TILES), TILE = 16 * HALVES, STAGES = stages_of_ring(ROW_TILES);
  using Accumulators = float[HALVES][ROW_TILES][4];

  const DecodeArguments& a;
  const DecodePlan& p;
  char* shared;
  const int thread = device::thread(), warp = thread / 32, lane = thread % 32, group = lane / 4, pair = 2 * (lane % 4);
  const int rows = a.n_tokens * a.n_experts;
  const int64_t first_tile = p.n_tiles * device::block() / p.n_blocks,
                last_tile = p.n_tiles * (device::block() + 1) / p.n_blocks;
  const int n_classes = static_cast<int>((last_tile * TILE < a.n_classes ? last_tile * TILE : a.n_classes) -
                                         first_tile * TILE);  // of this block
  uint16_t* const latent = reinterpret_cast<uint16_t*>(shared);
  float* const statistics = reinterpret_cast<float*>(shared + p.statistics_at);
  float* const logits = p.logits_in_shared
                            ? reinterpret_cast<float*>(shared + p.logits_at)
                            : in_workspace<float>(p.scratch_at) + int64_t{device::block()} * rows * p.logits_stride;

  template <class Number>
  FUSED_MOS_DEVICE Number* in_workspace(int64_t at) const {
    return reinterpret_cast<Number*>(static_cast<char*>(a.workspace) + at);
  }
  // A warp's sums, which are in shared memory because the products need the registers. A lane has those of rows lane,
  // lane + 32, …
  FUSED_MOS_DEVICE LogSum of_warp(int w, int row) const {
    return {statistics[2 * w * 8 * ROW_TILES + row], statistics[(2 * w + 1) * 8 * ROW_TILES + row]};
  }
  FUSED_MOS_DEVICE void keep(const LogSum& sum, int row) const {
    statistics[2 * warp * 8 * ROW_TILES + row] = sum.maximum,
                                          statistics[(2 * warp + 1) * 8 * ROW_TILES + row] = sum.sum;
  }
  FUSED_MOS_DEVICE int class_of(int i) const { return static_cast<int>(first_tile * TILE) + i; }

  FUSED_MOS_DEVICE void run() {
    stream();
    device::sync_block();
    if (a.mode == DecodeMode::Sample) return sample();
    exchange();
    emit();
    if (a.mode == DecodeMode::TopK) topk();
  }

  // Loads the latent vectors, padded with zeros to multiples of 8 rows and 16 features.
  FUSED_MOS_DEVICE void load_latent() {
    const auto* from = static_cast<const uint16_t*>(a.latent);
    for (int row = warp; row < (rows + 7) / 8 * 8; row += WARPS)
      for (int i = lane; i < p.latent_stride; i += 32)
        latent[row * p.latent_stride + i] = row < rows && i < a.n_features ? from[row * a.n_features + i] : uint16_t{0};
  }

  // ------------------------------------------------------------------------------------------------------ the one pass

  // Computes the logits of the warp's tiles, and the sums of their exponentials.
  FUSED_MOS_DEVICE void stream() {
    const int n_chunks = (a.n_features + CHUNK - 1) / CHUNK;
    const int n_tiles = static_cast<int>(last_tile - first_tile),
              own_tiles = warp < n_tiles ? (n_tiles - warp - 1) / WARPS + 1 : 0;
    const int n_steps = own_tiles * n_chunks;
    auto* ring = reinterpret_cast<uint16_t*>(shared + p.ring_at + warp * RING_BYTES);
    auto fetch = [&](int step) {
      if (step < n_steps) {
        uint16_t* to = ring + step % STAGES * TILE * STAGE_STRIDE;
        const int tile = warp + step / n_chunks * WARPS, chunk = step % n_chunks;
        if (p.copy_bytes == 16)
          copy<16>(to, tile, chunk);
        else if (p.copy_bytes == 8)
          copy<8>(to, tile, chunk);
        else
          copy<4>(to, tile, chunk);
      }
      device::commit_copies();  // one group per step, even if empty: the number of groups tells the step
    };
    Accumulators c;
    for (int row = lane; row < rows; row += 32) keep({}, row);
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    load_latent();
    device::sync_block();  // the latent rows that all warps loaded
    for (int step = 0; step < n_steps; ++step) {
      device::wait_for_copies<STAGES - 2>();
      device::sync_warp();  // all lanes' copies have arrived, and all lanes have read the previous stage
      fetch(step + STAGES - 1);
      const int chunk = step % n_chunks;
      if (chunk == 0)
        for (auto& of_half : c)
          for (auto& of_tile : of_half)
            for (float& number : of_tile) number = 0;
      multiply_chunk(c, ring + step % STAGES * TILE * STAGE_STRIDE, chunk * CHUNK);
      if (chunk == n_chunks - 1) {
        const int start = (warp + step / n_chunks * WARPS) * TILE;
        store_logits(c, start);
        if (a.mode == DecodeMode::Sample) continue;
        device::sync_warp();
        for (int row = lane; row < rows; row += 32) {
          LogSum sum = of_warp(warp, row);
          sum.add(sum_of_tile(logits + int64_t{row} * p.logits_stride + start));
          keep(sum, row);
        }
      }
    }
  }

  // Copies features chunk·64 … of the tile's classes, with zeros beyond the block's classes or the features.
  template <int BYTES>
  FUSED_MOS_DEVICE void copy(uint16_t* to, int tile, int chunk) const {
    constexpr int ELEMENTS = BYTES / 2, COPIES = CHUNK / ELEMENTS;  // per class
    const auto* weight = static_cast<const uint16_t*>(a.weight);
#pragma unroll(ROW_TILES > 8 ? 1 : 4)
    for (int i = lane; i < TILE * COPIES; i += 32) {
      const int in_tile = i / COPIES, feature = i % COPIES * ELEMENTS, local = tile * TILE + in_tile;
      const bool there = local < n_classes && chunk * CHUNK + feature < a.n_features;
      const uint16_t* from =
          there ? weight + int64_t{class_of(local)} * a.n_features + chunk * CHUNK + feature : weight;
      device::copy_async<BYTES>(to + in_tile * STAGE_STRIDE + feature, from, there);
    }
  }

  FUSED_MOS_DEVICE static uint32_t two(const uint16_t* at) { return *reinterpret_cast<const uint32_t*>(at); }

  FUSED_MOS_DEVICE void multiply_chunk(Accumulators& c, const uint16_t* stage, int feature) const {
    const int n_products =
        (a.n_features - feature + 15) / 16 < CHUNK / 16 ? (a.n_features - feature + 15) / 16 : CHUNK / 16;
#pragma unroll(ROW_TILES > 2 ? 1 : CHUNK / 16)  // with many accumulators there are no registers for more
    for (int product = 0; product < n_products; ++product) {
      uint32_t left[HALVES][4];
      for (int half = 0; half < HALVES; ++half) {
        const uint16_t* at = stage + (16 * half + group) * STAGE_STRIDE + 16 * product + pair;
        left[half][0] = two(at), left[half][1] = two(at + 8 * STAGE_STRIDE);
        left[half][2] = two(at + 8), left[half][3] = two(at + 8 * STAGE_STRIDE + 8);
      }
      const uint16_t* at = latent + group * p.latent_stride + feature + 16 * product + pair;
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; ++tile, at += 8 * p.latent_stride) {
        if (8 * tile >= rows) break;
        const uint32_t right[2] = {two(at), two(at + 8)};
        for (int half = 0; half < HALVES; ++half) device::multiply(c[half][tile], left[half], right, T{});
      }
    }
  }

  FUSED_MOS_DEVICE void store_logits(const Accumulators& c, int start) const {
    const auto* bias = static_cast<const uint16_t*>(a.bias);
    for (int i = 0; i < 2 * HALVES; ++i) {
      const int local = start + 8 * i + group;
      const bool there = local < n_classes;
      const float added = bias && there ? device::as_float(bias[class_of(local)], T{}) : 0;
      float* at = logits + int64_t{pair} * p.logits_stride + local;
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; ++tile, at += 8 * int64_t{p.logits_stride})
        for (int j = 0; j < 2; ++j)
          if (8 * tile + pair + j < rows)
            at[j * int64_t{p.logits_stride}] = there ? c[i / 2][tile][2 * (i % 2) + j] + added : LOWEST;
    }
  }

  FUSED_MOS_DEVICE static LogSum sum_of_tile(const float* of_row) {
    LogSum result;
    for (int i = 0; i < TILE; ++i) result.maximum = fmaxf(result.maximum, of_row[i]);
    for (int i = 0; i < TILE; ++i)
      if (of_row[i] != LOWEST) result.sum += device::exp(of_row[i] - result.maximum);
    return result;
  }

  // ------------------------------------------------------------------------------------------------------ the exchange

  // Merges all blocks' sums into each row's maximum logit and log π − log Σ exp(l − maximum), which overwrite the first
  // warp's sums.
  FUSED_MOS_DEVICE void exchange() {
    auto *maxima = in_workspace<float>(p.maxima_at), *sums = in_workspace<float>(p.sums_at);
    if (thread < rows) {
      LogSum own;
      for (int w = 0; w < WARPS; ++w) own.add(of_warp(w, thread));
      maxima[thread * p.n_blocks + device::block()] = own.maximum;
      sums[thread * p.n_blocks + device::block()] = own.sum;
    }
    device::sync_grid();
    for (int row = warp; row < rows; row += WARPS) {
      LogSum all;
      for (int i = lane; i < p.n_blocks; i += 32) all.add({maxima[row * p.n_blocks + i], sums[row * p.n_blocks + i]});
      for (int mask = 16; mask; mask /= 2)
        all.add({device::shuffle_xor(all.maximum, mask), device::shuffle_xor(all.sum, mask)});
      if (lane == 0) {
        statistics[row] = all.maximum;
        statistics[8 * ROW_TILES + row] = a.log_prior[row] - device::log(all.sum);
      }
    }
    device::sync_block();
  }

  // ------------------------------------------------------------------------------------------------------- the results

  // Writes log p of this block's classes to the result, or over the first expert's logits. All exponents are ≤ 0.
  FUSED_MOS_DEVICE void emit() {
    for (int token = 0; token < a.n_tokens; ++token) {
      const int row = token * a.n_experts;
      const float *maximum = statistics + row, *shift = statistics + 8 * ROW_TILES + row;
      for (int i = thread; i < n_classes; i += THREADS) {
        float* of_class = logits + int64_t{row} * p.logits_stride + i;
        float total = 0;
        for (int k = 0; k < a.n_experts; ++k)
          total += device::exp(of_class[int64_t{k} * p.logits_stride] - maximum[k] + shift[k]);
        float log_p = device::log(total);
        if (total < 1e-30f) {  // nearly or exactly 0: sum relative to the largest exponential instead
          LogSum sum;
          for (int k = 0; k < a.n_experts; ++k) {
            const float exponent = of_class[int64_t{k} * p.logits_stride] - maximum[k] + shift[k];
            sum.add({exponent, exponent == LOWEST ? 0.f : 1.f});
          }
          log_p = sum.sum == 0 ? LOWEST : sum.maximum + device::log(sum.sum);
        }
        if (a.mode == DecodeMode::LogProb)
          a.log_prob[token * a.n_classes + class_of(i)] = log_p;
        else
          *of_class = log_p;
      }
    }
  }

  // Finds the k best of this block, with one warp per token, then the k best of all blocks, with one block per token.
  FUSED_MOS_DEVICE void topk() {
    auto* values = in_workspace<float>(p.candidates_at);
    auto* classes = in_workspace<int>(p.candidate_classes_at);
    device::sync_block();
    for (int token = warp; token < a.n_tokens; token += WARPS) {
      const float* log_p = logits + int64_t{token} * a.n_experts * p.logits_stride;
      Candidate last = {INFINITY, -1};
      for (int j = 0; j < a.k; ++j) {
        Candidate best = nobody();
        for (int i = lane; i < n_classes; i += 32)
          if (const Candidate other = {log_p[i], class_of(i)}; last.beats(other) && other.beats(best)) best = other;
        last = best_of_warp(best);
        if (lane == 0) {
          values[(device::block() * a.n_tokens + token) * a.k + j] = last.value;
          classes[(device::block() * a.n_tokens + token) * a.k + j] = last.index;
        }
      }
    }
    device::sync_grid();
    for (int token = device::block(); token < a.n_tokens; token += p.n_blocks) {
      const int list = (thread * a.n_tokens + token) *
                       a.k;  // thread i reads the candidates of block i; there are at least as many threads as blocks
      int taken = 0;
      for (int j = 0; j < a.k; ++j) {
        const bool any = thread < p.n_blocks && taken < a.k;
        const Candidate own = any ? Candidate{values[list + taken], classes[list + taken]} : nobody(),
                        best = best_of_block(own);
        if (any && own.index == best.index) ++taken;
        if (thread == 0) {
          a.values[token * a.k + j] = best.value;
          a.indices[token * a.k + j] = best.index;
        }
      }
    }
  }

  FUSED_MOS_DEVICE Candidate best_of_block(Candidate best) const {
    auto* indices = reinterpret_cast<int*>(statistics + WARPS);
    best = best_of_warp(best);
    device::sync_block();  // all threads have read the statistics or the results of the previous call
    if (lane == 0) statistics[warp] = best.value, indices[warp] = best.index;
    device::sync_block();
    for (int w = 0; w < WARPS; ++w)
      if (const Candidate other = {statistics[w], indices[w]}; other.beats(best)) best = other;
    return best;
  }

  // Draws by Gumbel-max. The random number is 1 − u, which keeps −log(−log u) exact to the last bit where it is large,
  // near u = 1.
  FUSED_MOS_DEVICE void sample() {
    auto* values = in_workspace<float>(p.candidates_at);
    auto* classes = in_workspace<int>(p.candidate_classes_at);
    const auto seed = static_cast<uint64_t>(*a.seed);
    for (int token = 0; token < a.n_tokens; ++token) {
      Candidate best = nobody();
      for (int i = thread; i < n_classes; i += THREADS) {
        const float logit = logits[int64_t{token} * p.logits_stride + i] * a.inverse_temperature;
        const float rest = (random_word(seed, token, class_of(i)) + 0.5f) * 0x1p-32f;
        const Candidate other = {logit - device::log(-device::log1p(-rest)), class_of(i)};
        if (logit != LOWEST && other.beats(best)) best = other;
      }
      best = best_of_block(best);
      if (thread == 0) {
        values[device::block() * a.n_tokens + token] = best.value;
        classes[device::block() * a.n_tokens + token] = best.index;
      }
    }
    device::sync_grid();
    for (int token = device::block(); token < a.n_tokens; token += p.n_blocks) {
      const int at = thread * a.n_tokens + token;
      const Candidate best = best_of_block(thread < p.n_blocks ? Candidate{values[at], classes[at]} : nobody());
      // if all logits are −∞, there is no distribution to draw from, and no candidate
      if (thread == 0) a.indices[token] = best.index == INT32_MAX ? 0 : best.index;
    }
  }
};

}  // namespace
}  // namespace fused_mos
