// How an LSTM layer is divided: host-only arithmetic, the same for the device and its emulation.
#include "lstm.h"
#include "lstm_shape.h"

namespace fused_mos {

const char* plan_lstm(LstmShape& shape, int n_multiprocessors, int shared_limit, LstmPlan& plan) {
  const int width = shape.width;
  if (shape.n_rows < 1 || shape.n_rows > LSTM_ROWS) return "the batch must have from 1 to 16 rows";
  if (width < 2 || width % 2 || width > MAX_WIDTH) return "the width must be even, from 2 to 1152";
  if (shape.n_steps < 1 || int64_t{4} * shape.n_steps * shape.n_rows * (width + 8) > INT32_MAX)
    return "there must be from 1 step to 2**31 gates";
  shape.padded = (width + 7) / 8 * 8;
  const auto blocks = [&](int units) { return (shape.padded + units - 1) / units; };
  plan.forward_units = blocks(8) <= n_multiprocessors ? 8 : 12;
  plan.forward_blocks = blocks(plan.forward_units);
  plan.backward_blocks = blocks(BACKWARD_UNITS);
  plan.forward_shared_bytes = 4 * (plan.forward_units == 8 ? SHARED<32, FORWARD_NUMBERS> : SHARED<48, FORWARD_NUMBERS>);
  plan.backward_shared_bytes = 4 * SHARED<BACKWARD_UNITS, BACKWARD_NUMBERS>;
  if (plan.forward_blocks > n_multiprocessors) return "the width needs more blocks than there are multiprocessors";
  if (plan.forward_shared_bytes > shared_limit) return "the sums do not fit in shared memory";
  return nullptr;
}

}  // namespace fused_mos
