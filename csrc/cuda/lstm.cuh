// An LSTM layer over a whole sequence, forward and backward. A block owns some units. It keeps their cell states, and
// their recurrent weights in registers, from the first step to the last. The blocks exchange h, or the gradients of the
// gates, through global memory in bfloat16. All blocks must be resident (a cooperative launch).
//
// The steps need no grid barrier. Each step exchanges data in its own memory, which is filled with ABSENT before the
// launch, and a reader polls a word until it has arrived. A word is two numbers, written at once, and shows by itself
// that it has arrived. Nothing else is read because of it, so relaxed loads and stores are enough.
//
// Sums have a fixed order: over a warp's features, then over the warps. So every run gives the same results.
//
// The same source runs on a GPU (device.cuh) and, thread by thread, on a CPU (emulation.h).
#pragma once
#include "lstm.h"
#include "lstm_shape.h"

namespace fused_mos {
namespace {

constexpr uint32_t ABSENT = 0xffffffffu;  // two NaNs that never occur: device::rounded gives 0x7fff for NaN

FUSED_MOS_DEVICE float sigmoid(float x) { return device::reciprocal(1 + device::exp(-x)); }
FUSED_MOS_DEVICE float hyperbolic_tangent(float x) { return 1 - 2 * sigmoid(-2 * x); }

// Publishes the values of a pair of lanes, which have neighbouring units, as one word.
FUSED_MOS_DEVICE void publish(uint16_t* at, float value, bool wanted) {
  const uint32_t own = device::rounded(value), other = device::shuffle_xor(own, 1);
  if (wanted && device::thread() % 2 == 0) device::store_word(at, own | other << 16);
}

// N neighbouring numbers of shared memory, read at once.
template <int N>
struct alignas(4 * N) Vector {
  float at[N] = {};
};

// The products of the exchanged data, (B, features), with the block's weights, (8·TILES columns, features). The
// features are distributed over the warps in chunks of 32. Lane 4·g + t has features 8·t to 8·t + 7 of a chunk, 16
// neighbouring bytes: of rows g and g + 8 on the left, and of column g of each tile on the right. The products take the
// features in another order, the same on both sides.
template <int CHUNKS, int TILES, int IN_FLIGHT>
struct Product {
  using Chunk = uint32_t[2][4];
  static constexpr int SPACING = LSTM_WARPS * LSTM_CHUNK;  // features between a warp's chunks
  const int warp = device::thread() / 32, lane = device::thread() % 32, group = lane / 4,
            first = warp * LSTM_CHUNK + 8 * (lane % 4);  // first of the lane's features
  const int n_rows, left;                                // features from `first` on
  uint32_t weights[CHUNKS][TILES][4];

  FUSED_MOS_DEVICE Product(int n_rows, int n_features)  // n_features is a multiple of 8
      : n_rows(n_rows), left(n_features - first) {}

  // row(tile): the weights (features,) of the lane's column `group` in that tile; null for zeros
  template <class Row>
  FUSED_MOS_DEVICE void load(const Row& row) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const uint16_t* of_column = row(tile);
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk)
        if (of_column && chunk * SPACING < left)
          device::load_words(weights[chunk][tile], of_column + first + chunk * SPACING);
        else
          for (uint32_t& word : weights[chunk][tile]) word = 0;
    }
  }

  // `at`: the lane's first features of the first row
  FUSED_MOS_DEVICE void fetch(Chunk& to, const uint16_t* at, int stride, int chunk) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (group + 8 * half < n_rows && chunk * SPACING < left)
        device::load_words(to[half], at + 8 * half * stride + chunk * SPACING);
      else
        for (uint32_t& word : to[half]) word = 0;
  }

  FUSED_MOS_DEVICE static bool arrived(const Chunk& chunk) {
    bool all = true;
#pragma unroll
    for (int word = 0; word < 8; ++word) all &= chunk[word / 4][word % 4] != ABSENT;
    return device::all_of_warp(all);
  }

  // Writes the warp's part of the sums to sums[row][column] in shared memory.
  FUSED_MOS_DEVICE void multiply(float* sums, const uint16_t* from, int stride) const {
    Chunk chunks[IN_FLIGHT];
    float c[TILES][4] = {};
    from += group * stride + first;
    fetch(chunks[0], from, stride, 0);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (chunk * SPACING >= left + 8 * (lane % 4)) break;  // the same for the whole warp
      Chunk& present = chunks[chunk % IN_FLIGHT];
      while (!arrived(present)) {
        device::pause();
        fetch(present, from, stride, chunk);
      }
      if (chunk == 0) {  // fetch the others only now: a waiting warp must not slow down the writers
#pragma unroll
        for (int next = 1; next < IN_FLIGHT; ++next) fetch(chunks[next], from, stride, next);
      }
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t left[4] = {present[0][k], present[1][k], present[0][k + 1], present[1][k + 1]};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const uint32_t right[2] = {weights[chunk][tile][k], weights[chunk][tile][k + 1]};
          device::multiply(c[tile], left, right, BFloat16{});
        }
      }
      if (chunk + IN_FLIGHT < CHUNKS) fetch(present, from, stride, chunk + IN_FLIGHT);
    }
    constexpr int STRIDE = SUMS_STRIDE<8 * TILES>;
    float* at = sums + (warp * LSTM_ROWS + group) * STRIDE + 2 * (lane % 4);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile, at += 8) {
      *reinterpret_cast<Vector<2>*>(at) = {c[tile][0], c[tile][1]};
      *reinterpret_cast<Vector<2>*>(at + 8 * STRIDE) = {c[tile][2], c[tile][3]};
    }
  }
};

// Sums over the warps for N neighbouring columns of a row.
template <int COLUMNS, int N>
FUSED_MOS_DEVICE Vector<N> total(const float* sums, int row, int column) {
  constexpr int STRIDE = SUMS_STRIDE<COLUMNS>;
  Vector<N> result;
#pragma unroll
  for (int warp = 0; warp < LSTM_WARPS; ++warp) {
    const auto part = *reinterpret_cast<const Vector<N>*>(sums + (warp * LSTM_ROWS + row) * STRIDE + column);
    for (int i = 0; i < N; ++i) result.at[i] += part.at[i];
  }
  return result;
}

// The part of a thread in a block of UNITS units: the first threads have one unit of one row of the batch each.
template <int UNITS>
struct Owner {
  const LstmShape& shape;
  const int row = device::thread() / UNITS, in_block = device::thread() % UNITS,
            unit = device::block() * UNITS + in_block;
  const bool warp_takes_part = device::thread() / 32 * 32 < shape.n_rows * UNITS;
  const bool in_batch = row < shape.n_rows, owns = in_batch && unit < shape.width;

  // index into (T, B, H), and into (T, B, 4H), which has less than 2³¹ elements
  FUSED_MOS_DEVICE int at(int step) const { return (step * shape.n_rows + row) * shape.width + unit; }
  FUSED_MOS_DEVICE int gate_at(int step, int gate) const {
    return ((step * shape.n_rows + row) * 4 + gate) * shape.width + unit;
  }
};

// A thread's numbers in shared memory, since the weights take the registers. Some arrive while the thread waits for
// other blocks' words.
struct Numbers {
  float* const first;

  FUSED_MOS_DEVICE explicit Numbers(float* shared) : first(shared + device::thread()) {}
  FUSED_MOS_DEVICE float& operator[](int i) const { return first[i * LSTM_THREADS]; }
  FUSED_MOS_DEVICE void ask(int i, const float* from, bool there) const {
    device::copy_async<4>(&(*this)[i], from, there);
  }
};

template <int UNITS>
FUSED_MOS_DEVICE void lstm_forward(const LstmForward& a, float* shared) {
  constexpr int COLUMNS = 4 * UNITS;
  const int width = a.shape.width, stride = a.shape.padded;
  const Owner<UNITS> own{a.shape};
  const Numbers numbers(shared + 2 * SUMS<COLUMNS>);  // the input's part of the gates, the biases, the cell
  Product<FORWARD_CHUNKS, UNITS / 2, FORWARD_CHUNKS> product(a.shape.n_rows, stride);
  product.load([&](int tile) {  // a unit's four gates are neighbouring columns
    const int gate = product.group % 4, unit = device::block() * UNITS + 2 * tile + product.group / 4;
    return unit < width ? a.recurrent + (gate * width + unit) * stride : nullptr;
  });
  // a pair writes its word even if its units are padding
  auto publish_state = [&](int step, float h) {
    publish(a.states + (step * a.shape.n_rows + own.row) * stride + own.unit, h, own.in_batch && own.unit < stride);
  };
  for (int gate = 0; gate < 4; ++gate)
    numbers[4 + gate] = own.owns ? a.bias_ih[gate * width + own.unit] + a.bias_hh[gate * width + own.unit] : 0;
  numbers[8] = own.owns ? a.c0[own.at(0)] : 0;
  if (own.warp_takes_part) publish_state(0, own.owns ? a.h0[own.at(0)] : 0);

  for (int step = 0; step < a.shape.n_steps; ++step) {
    if (own.warp_takes_part) {
      for (int gate = 0; gate < 4; ++gate) numbers.ask(gate, a.gates + own.gate_at(step, gate), own.owns);
      device::commit_copies();
    }
    float* sums = shared + step % 2 * SUMS<COLUMNS>;
    product.multiply(sums, a.states + step * a.shape.n_rows * stride, stride);
    device::sync_block();  // one barrier per step is enough: the next step uses the other sums
    if (!own.warp_takes_part) continue;
    device::wait_for_copies<0>();
    auto gates = total<COLUMNS, 4>(sums, own.row, 4 * own.in_block);
    for (int gate = 0; gate < 4; ++gate) gates.at[gate] += numbers[gate] + numbers[4 + gate];
    const float input = sigmoid(gates.at[0]), forget = sigmoid(gates.at[1]),
                candidate = hyperbolic_tangent(gates.at[2]), out = sigmoid(gates.at[3]);
    const float cell = numbers[8] = forget * numbers[8] + input * candidate;
    const float h = own.owns ? out * hyperbolic_tangent(cell) : 0;
    if (step + 1 < a.shape.n_steps) publish_state(step + 1, h);  // first, since other blocks wait for it
    if (own.owns) {
      a.gates[own.gate_at(step, 0)] = input, a.gates[own.gate_at(step, 1)] = forget;
      a.gates[own.gate_at(step, 2)] = candidate, a.gates[own.gate_at(step, 3)] = out;
      a.cells[own.at(step)] = cell, a.output[own.at(step)] = h;
    }
  }
  if (own.owns) a.last_cell[own.at(0)] = numbers[8];
}

FUSED_MOS_DEVICE void lstm_backward(const LstmBackward& a, float* shared) {
  const int width = a.shape.width, last = a.shape.n_steps - 1;
  const Owner<BACKWARD_UNITS> own{a.shape};
  const Numbers numbers(shared + 2 * SUMS<BACKWARD_UNITS>);  // from the forward pass, and the cell's gradient
  Product<BACKWARD_CHUNKS, BACKWARD_UNITS / 8, BACKWARD_IN_FLIGHT> product(a.shape.n_rows, 4 * width);
  product.load([&](int tile) {
    const int unit = device::block() * BACKWARD_UNITS + 8 * tile + product.group;
    return unit < width ? a.recurrent + unit * 4 * width : nullptr;
  });
  // the gradient of this step's h from later steps
  auto from_later = [&](int step) {
    float* sums = shared + (step & 1) * SUMS<BACKWARD_UNITS>;
    product.multiply(sums, a.grad_gates + (step + 1) * a.shape.n_rows * 4 * width, 4 * width);
    device::sync_block();  // one barrier per step is enough: the next step uses the other sums
    return own.in_batch ? total<BACKWARD_UNITS, 1>(sums, own.row, own.in_block).at[0] : 0.f;
  };
  numbers[7] = own.owns && a.grad_last_cell ? a.grad_last_cell[own.at(0)] : 0;

  for (int step = last; step >= (a.grad_h0 ? -1 : 0); --step) {
    if (step >= 0 && own.warp_takes_part) {
      for (int gate = 0; gate < 4; ++gate) numbers.ask(gate, a.gates + own.gate_at(step, gate), own.owns);
      numbers.ask(4, a.cells + own.at(step), own.owns);
      numbers.ask(5, step ? a.cells + own.at(step - 1) : a.c0 + own.at(0), own.owns);
      numbers.ask(6, a.grad_output + own.at(step), own.owns && a.grad_output);
      device::commit_copies();
    }
    const float later = step < last ? from_later(step) : 0;
    if (step < 0) {
      if (own.owns) a.grad_h0[own.at(0)] = later;
      break;
    }
    if (!own.warp_takes_part) continue;
    device::wait_for_copies<0>();
    const float input = numbers[0], forget = numbers[1], candidate = numbers[2], out = numbers[3],
                squashed = hyperbolic_tangent(numbers[4]), before = numbers[5], grad = numbers[6] + later;
    const float grad_cell = numbers[7] + grad * out * (1 - squashed * squashed);
    const float of_gates[4] = {grad_cell * candidate * input * (1 - input), grad_cell * before * forget * (1 - forget),
                               grad_cell * input * (1 - candidate * candidate), grad * squashed * out * (1 - out)};
    for (int gate = 0; gate < 4; ++gate) publish(a.grad_gates + own.gate_at(step, gate), of_gates[gate], own.owns);
    numbers[7] = grad_cell * forget;
  }
  if (own.owns) a.grad_c0[own.at(0)] = numbers[7];
}

}  // namespace
}  // namespace fused_mos
