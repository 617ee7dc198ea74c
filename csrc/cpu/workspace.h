// Memory of the kernels: one aligned allocation each, released with its scope. Released blocks of
// up to 208 MiB together are kept for the next call.
#pragma once

#include <cstddef>

namespace fused_mos {

void* allocate(std::size_t bytes);  // throws std::bad_alloc
void release(void* memory);

// The largest sum of live allocations since the last call of reset_peak_bytes, in bytes.
std::size_t peak_bytes();
void reset_peak_bytes();

namespace {

template <class T>
class Buffer {
 public:
  explicit Buffer(long long count) : data_(count > 0 ? static_cast<T*>(allocate(count * sizeof(T))) : nullptr) {}
  ~Buffer() {
    if (data_) release(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace fused_mos
