// Entry points of the kernels. Each source defines some of them, in the namespace of the instruction set it is compiled
// for.
#pragma once

#include "kernels.h"

namespace fused_mos::FUSED_MOS_NAMESPACE {

void row_statistics(const Head&, const StatisticsArguments&);
void rows_backward(const Head&, const RowsBackwardArguments&);
void nll_with_gradients(const Head&, const NllArguments&);
void mixture(const Head&, const MixtureArguments&);
void mixture_backward(const Head&, const MixtureArguments&);
void mixture_in_one_sweep(const Head&, const OneSweepArguments&);
void sample(const Head&, const SampleArguments&);
void lstm_forward(const LstmArguments&);
void lstm_backward(const LstmArguments&);
void matrix_product(const ProductArguments&);

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
