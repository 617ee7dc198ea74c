// Memory of the kernels. Each buffer is one aligned allocation, released at the end of its scope. Released blocks are
// kept for the next call, up to 208 MiB in total.
#pragma once

#include <cstddef>

namespace fused_mos {

void* allocate(std::size_t bytes);  // throws std::bad_alloc
void release(void* memory);

// Returns the peak of live allocations, in bytes, since the last call of reset_peak_bytes.
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
