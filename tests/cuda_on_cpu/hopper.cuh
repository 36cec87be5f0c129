// kernels/hopper.cuh on a CPU.

#pragma once

#include <cuda_runtime.h>

namespace hopper {

inline char* memory_of_block() { return on_cpu::here->home->shared(); }

inline uint32_t shared(const void* p) {
  return static_cast<const char*>(p) - memory_of_block();
}

inline on_cpu::Barrier& barrier_at(uint32_t barrier) {
  return *reinterpret_cast<on_cpu::Barrier*>(memory_of_block() + barrier);
}

template <typename T>
T fresh(const T* p) {
  return *p;
}

inline void make_barriers(uint32_t first, int count) {
  for (int i = 0; i < count; ++i) barrier_at(first + 8 * i) = {0, 1, 0};
}

inline void copy(char* to, const char* from, int bytes, uint32_t barrier) {
  const auto odd = [](auto x) { return uint64_t(x) % 16; };
  if (bytes <= 0 || odd(bytes) || odd(to) || odd(from)) on_cpu::fail("a copy of odd bytes");
  std::memset(to, 255, bytes);
  on_cpu::Barrier& b = barrier_at(barrier);
  if (!b.awaits) on_cpu::fail("a copy at a barrier that has one");
  b.awaits = 0;
  b.bytes += bytes;
  on_cpu::here->home->copies.push_back({to, from, bytes, &b});
}

inline bool is_over(uint32_t barrier, uint32_t parity) {
  if (barrier_at(barrier).phase != parity) return true;
  on_cpu::yield();
  return false;
}

inline void arrive(unsigned* counter) {
  ++*counter;
  on_cpu::idle = 0;
}

inline unsigned count(const unsigned* counter) {
  on_cpu::yield();
  return *counter;
}

}  // namespace hopper
