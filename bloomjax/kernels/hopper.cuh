// What gpu.cu takes of a GPU below CUDA C++: shared memory, bulk copies into it, and what blocks
// tell each other. (PTX ISA 9.0, "Data Movement and Conversion", "Parallel Synchronization".)
// tests/cuda_on_cpu has the same functions for a machine without a GPU.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hopper {

// The shared memory that the launch asked for.
__device__ inline char* memory_of_block() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// The address of p as the instructions of shared memory take it.
__device__ inline uint32_t shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Memory that other blocks write while the kernel runs is read past the first cache.
template <typename T>
__device__ T fresh(const T* p) {
  return __ldcg(p);
}

// Barriers of eight bytes in shared memory, at which one thread and the bytes of a copy arrive.
__device__ inline void make_barriers(uint32_t first, int count) {
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(first + 8 * i) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts a copy into shared memory: a multiple of 16 bytes, between addresses that are too.
__device__ inline void copy(char* to, const char* from, int bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(shared(to)), "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Whether the phase of this parity is over; it may wait a while before it says no.
__device__ inline bool is_over(uint32_t barrier, uint32_t parity) {
  uint32_t over = 0;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over;
}

// Adds one; whoever sees it with `count` sees what this block wrote before its last __syncthreads.
__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline unsigned count(const unsigned* counter) {
  unsigned seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}

}  // namespace hopper
