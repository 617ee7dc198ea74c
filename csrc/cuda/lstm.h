// A layer of an LSTM over a whole sequence in one launch: what crosses the border to Python. Shape letters: T steps, B
// rows of the batch, H units, P = H rounded up to a multiple of 8. Gates come in torch's order: input, forget, cell, output.
#pragma once
#include <cstdint>

namespace fused_mos {

struct LstmShape {
  int n_steps;  // T
  int n_rows;   // B
  int width;    // H, even
  int padded;   // P, which the plan writes
};

struct LstmForward {
  LstmShape shape;
  const uint16_t* recurrent;  // (4H, P), bfloat16, zeros beyond H
  const float* bias_ih;       // (4H,)
  const float* bias_hh;       // (4H,)
  const float* h0;            // (B, H)
  const float* c0;            // (B, H)
  float* gates;               // (T, B, 4H): the input's products; the activated gates take their place
  uint16_t* states;           // (T, B, P), bfloat16, written: the h that each step begins with, zeros beyond H
  float* cells;               // (T, B, H), written
  float* output;              // (T, B, H), written
  float* last_cell;           // (B, H), written
};

struct LstmBackward {
  LstmShape shape;
  const uint16_t* recurrent;    // (H, 4H), bfloat16
  const float* gates;           // (T, B, 4H), activated
  const float* cells;           // (T, B, H)
  const float* c0;              // (B, H)
  const float* grad_output;     // (T, B, H), or null for zeros
  const float* grad_last_cell;  // (B, H), or null for zeros
  uint16_t* grad_gates;         // (T, B, 4H), bfloat16, written: of the gates before their activation
  float* grad_h0;               // (B, H), written, or null where nobody wants it
  float* grad_c0;               // (B, H), written
};

// How a layer is cut up: each block owns some units.
struct LstmPlan {
  int forward_units, forward_blocks, forward_shared_bytes;
  int backward_blocks, backward_shared_bytes;
};

// Null where the plan exists, else what is in its way. `shared_limit`: bytes that a block may use.
const char* plan_lstm(LstmShape& shape, int n_multiprocessors, int shared_limit, LstmPlan& plan);

// Queue the kernels on a stream. A cudaError_t, 0 for success.
int launch_lstm(const LstmForward& arguments, const LstmPlan& plan, void* stream);
int launch_lstm(const LstmBackward& arguments, const LstmPlan& plan, void* stream);

}  // namespace fused_mos
