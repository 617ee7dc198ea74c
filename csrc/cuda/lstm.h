// An LSTM layer over a whole sequence in one launch: the interface to Python. Shapes: T steps, B rows of the batch,
// H units, P = H rounded up to a multiple of 8. Gates are in torch's order: input, forget, cell, output.
#pragma once
#include <cstdint>

namespace fused_mos {

struct LstmShape {
  int n_steps;  // T
  int n_rows;   // B
  int width;    // H, even
  int padded;   // P, set by plan_lstm
};

struct LstmForward {
  LstmShape shape;
  const uint16_t* recurrent;  // (4H, P), bfloat16, zeros beyond H
  const float* bias_ih;       // (4H,)
  const float* bias_hh;       // (4H,)
  const float* h0;            // (B, H)
  const float* c0;            // (B, H)
  float* gates;               // (T, B, 4H): the input's products, overwritten by the activated gates
  uint16_t* states;           // (T, B, P), bfloat16, written: h at the start of each step, zeros beyond H
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
  uint16_t* grad_gates;         // (T, B, 4H), bfloat16, written: gradients of the gates before activation
  float* grad_h0;               // (B, H), written, or null if not needed
  float* grad_c0;               // (B, H), written
};

// How a layer is divided: each block owns some units.
struct LstmPlan {
  int forward_units, forward_blocks, forward_shared_bytes;
  int backward_blocks, backward_shared_bytes;
};

// Null if there is a plan, else the reason why not. `shared_limit`: bytes of shared memory that a block may use.
const char* plan_lstm(LstmShape& shape, int n_multiprocessors, int shared_limit, LstmPlan& plan);

// Queue the kernels on a stream. Return a cudaError_t, 0 for success.
int launch_lstm(const LstmForward& arguments, const LstmPlan& plan, void* stream);
int launch_lstm(const LstmBackward& arguments, const LstmPlan& plan, void* stream);

}  // namespace fused_mos
