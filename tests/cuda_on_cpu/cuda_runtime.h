// CUDA on one CPU thread, as much of it as kernels/gpu.cu takes: to run that kernel, as it stands,
// where no GPU is. Every thread of the grid is a fiber. Which warp goes on is drawn at random
// whenever one waits, and a bulk copy comes at any time until somebody has waited for it, its place
// in shared memory full of ones until then: so a barrier that is missing in the kernel shows in what
// it computes. What it does not show is the order in which memory that is not synchronised becomes
// visible: here it is the program's.
//
// EMULATED_CORES is the number of multiprocessors.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, gridDim;

// -------------------------------------------------------------------------------------- the machine

namespace on_cpu {

constexpr int kLanes = 32, kStack = 128 << 10;
constexpr int kAlign = 128, kBeyond = 256;  // of shared memory: bytes; and those after it

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

// Threads that wait for each other, and what each of them gave; twice, for the next time may begin
// before all have read the last.
struct Meeting {
  int threads, came = 0;
  unsigned times = 0;
  std::vector<uint64_t> given[2];
  explicit Meeting(int threads) : threads(threads) {
    for (auto& some : given) some.resize(threads);
  }
};

// A barrier in shared memory: bytes still to come, that one arrival is still to come, the phase.
struct Barrier {
  int32_t bytes;
  uint16_t awaits, phase;
};
static_assert(sizeof(Barrier) == 8);

struct Copy {
  char* to;
  const char* from;
  int bytes;
  Barrier* barrier;
};

struct Block {
  std::vector<char> memory;
  Meeting all;
  std::deque<Copy> copies;
  char* shared() {
    char* p = memory.data();
    return p + (kAlign - reinterpret_cast<uintptr_t>(p) % kAlign) % kAlign;
  }
};

struct Thread {
  dim3 thread, block;
  Block* home;
  Meeting* warp;
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool began = false, ended = false;
  const unsigned* waits = nullptr;  // while this is what it `sees`
  unsigned sees = 0;
};

inline Thread* here;
inline jmp_buf scheduler;
inline std::mt19937 chance{0};
inline uint64_t idle;  // turns since something happened

inline bool is_one_of(unsigned n) { return chance() % n == 0; }

// Lets others go on. (By setjmp, for swapcontext is a system call each time.)
inline void yield() {
  if (!_setjmp(here->at)) _longjmp(scheduler, 1);
}

// Lets a thread go on until it yields or ends.
inline void resume(Thread& thread) {
  here = &thread, threadIdx = thread.thread, blockIdx = thread.block;
  if (_setjmp(scheduler)) return;
  if (thread.began) _longjmp(thread.at, 1);
  thread.began = true;
  setcontext(&thread.start);
}

// All that every thread of a meeting gives.
inline const std::vector<uint64_t>& meet(Meeting& meeting, int mine, uint64_t gives) {
  auto& given = meeting.given[meeting.times % 2];
  given[mine] = gives;
  idle = 0;
  if (++meeting.came == meeting.threads) {
    meeting.came = 0;
    ++meeting.times;
  } else {
    here->waits = &meeting.times;
    here->sees = meeting.times;
    yield();
  }
  return given;
}

inline void advance(Barrier& b) {
  if (b.awaits || b.bytes) return;
  b.awaits = 1;
  b.phase ^= 1;
  idle = 0;
}

inline void bring(Block& block) {
  auto& copies = block.copies;
  const size_t i = chance() % copies.size();
  const Copy copy = copies[i];
  copies.erase(copies.begin() + i);
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  advance(*copy.barrier);
}

// Runs `body` on every thread of a grid.
template <typename Body>
void launch(dim3 blocks, dim3 threads, size_t bytes, Body body) {
  static std::mutex one;
  const std::lock_guard lock(one);
  static Body* running;
  running = &body;
  gridDim = blocks;
  std::deque<Block> all;
  std::deque<Meeting> warps;
  std::vector<std::unique_ptr<Thread>> fibers;
  if (threads.x % kLanes) fail("a warp is not full");
  for (unsigned b = 0; b < blocks.x; ++b) {
    all.push_back({std::vector<char>(kAlign + bytes + kBeyond, char(255)), Meeting(threads.x), {}});
    for (unsigned t = 0; t < threads.x; ++t) {
      if (t % kLanes == 0) warps.emplace_back(kLanes);
      auto fiber = std::make_unique<Thread>();
      fiber->thread = dim3(t, 0, 0), fiber->block = dim3(b, 0, 0);
      fiber->home = &all.back(), fiber->warp = &warps.back();
      fiber->stack.reset(new char[kStack]);
      getcontext(&fiber->start);
      fiber->start.uc_stack.ss_sp = fiber->stack.get();
      fiber->start.uc_stack.ss_size = kStack;
      fiber->start.uc_link = nullptr;
      makecontext(&fiber->start, reinterpret_cast<void (*)()>(+[] {
                    (*running)();
                    here->ended = true;
                    _longjmp(scheduler, 1);
                  }),
                  0);
      fibers.push_back(std::move(fiber));
    }
  }
  size_t left = fibers.size();
  idle = 0;
  while (left) {
    const size_t warp = chance() % warps.size();
    Block& block = *fibers[warp * kLanes]->home;
    if (!block.copies.empty() && is_one_of(2)) bring(block);
    bool goes = true;
    while (goes) {  // as far as it gets without others
      goes = false;
      for (int i = 0, first = chance() % kLanes; i < kLanes; ++i) {
        Thread& t = *fibers[warp * kLanes + (first + i) % kLanes];
        if (t.ended || (t.waits && *t.waits == t.sees)) continue;
        const bool met = t.waits;
        t.waits = nullptr;
        resume(t);
        left -= t.ended;
        goes |= t.waits || met;
      }
    }
    if (++idle > 10'000 * warps.size()) fail("nothing goes on any more: threads wait for ever");
  }
  for (auto& block : all) {
    if (!block.copies.empty()) fail("a copy was on its way when the kernel ended");
    const char* end = block.shared() + bytes;
    if (std::any_of(end, end + kBeyond, [](char c) { return c != char(255); }))
      fail("writing past shared memory");
  }
}

inline int lane() { return threadIdx.x % kLanes; }

template <typename T>
uint64_t bits(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  std::memcpy(&u, &x, sizeof(T));
  return u;
}

template <typename T>
T from_bits(uint64_t u) {
  T x;
  std::memcpy(&x, &u, sizeof(T));
  return x;
}

}  // namespace on_cpu

// ------------------------------------------------------------------------------------- instructions

template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  using namespace on_cpu;
  return from_bits<T>(meet(*here->warp, on_cpu::lane(), bits(x))[lane % kLanes]);
}

template <typename T>
T __shfl_xor_sync(unsigned, T x, int with) {
  using namespace on_cpu;
  return from_bits<T>(meet(*here->warp, lane(), bits(x))[lane() ^ with]);
}

inline unsigned __ballot_sync(unsigned, bool is) {
  using namespace on_cpu;
  unsigned votes = 0;
  const auto& given = meet(*here->warp, lane(), is);
  for (int i = 0; i < kLanes; ++i) votes |= unsigned(given[i]) << i;
  return votes;
}

inline void __syncwarp() { on_cpu::meet(*on_cpu::here->warp, on_cpu::lane(), 0); }

inline bool __syncthreads_or(bool is) {
  bool any = false;
  for (uint64_t of : on_cpu::meet(on_cpu::here->home->all, threadIdx.x, is)) any |= of;
  return any;
}

inline void __syncthreads() { __syncthreads_or(false); }

inline float __uint_as_float(uint32_t u) { return on_cpu::from_bits<float>(u); }
inline int __float2int_rn(float x) { return std::lrintf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
using std::isfinite;

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += int(int8_t(a >> i)) * int8_t(b >> i);
  return sum;
}

// ------------------------------------------------------------------------------------------ the host

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {};
enum { cudaSuccess, cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeCooperative };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
  *value = asked == cudaDevAttrMultiProcessorCount ? EMULATED_CORES : 227 << 10;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes > 227 << 10;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <typename Kernel, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel,
                               const Args&... args) {
  on_cpu::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                 [&] { kernel(args...); });
  return cudaSuccess;
}

template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};
