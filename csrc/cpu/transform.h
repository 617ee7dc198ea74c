// Transforms logits before their softmax: l' = c·tanh(l/c) / T, with dl'/dl = (1 − (T l'/c)²) / T.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

class LogitTransform {
 public:
  explicit LogitTransform(const fused_mos::Transform& t = {0, 1})
      : inverse_temperature_(t.inverse_temperature),
        inverse_softcap_(t.softcap > 0 ? 1 / t.softcap : 0),
        bound_(t.softcap * t.inverse_temperature),
        inverse_bound_(t.softcap > 0 ? 1 / bound_ : 0) {}

  bool is_identity() const { return !caps() && inverse_temperature_ == 1; }
  bool caps() const { return inverse_softcap_ > 0; }

  ALWAYS_INLINE Vector apply(Vector logit) const {
    return caps() ? tanh_of(logit * inverse_softcap_) * bound_ : logit * inverse_temperature_;
  }

  // Returns dl'/dl, given l', without the factor 1/T: the row factors of the gradients include it.
  ALWAYS_INLINE Vector slope(Vector transformed) const {
    const Vector t = transformed * inverse_bound_;
    return 1.0f - t * t;
  }

 private:
  float inverse_temperature_, inverse_softcap_;
  float bound_, inverse_bound_;  // c / T, which bounds |l'|, and T / c
};

}  // namespace
