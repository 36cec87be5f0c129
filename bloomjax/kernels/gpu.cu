// One token through the whole of BLOOM in one launch, for a batch of one on NVIDIA GPUs from Hopper.
//
// At batch 1 a step reads every weight once and does next to nothing with it, so its bound is the
// memory's rate; a program of many kernels stays far from it, since the memory idles where one ends
// and the next begins (1.3 to 5 us each, 400 a token in XLA's program of bloom-560m). Here the
// kernel stays. Every warp has rows of its own of every product, and places of its own of the cache,
// and streams them through a ring in shared memory by bulk copies; as what it will read does not
// depend on what is computed, the ring fills while the grid waits for its slowest at the five places
// of a layer where everything depends on everything. (Persistent kernels that overlap so: Hazy
// Research, "Look Ma, No Bubbles!", 2025.)
//
// Compiled for one kind of model: BLOOMJAX_WEIGHT is bf16 or int8_t, BLOOMJAX_VECTORS D / 1,024,
// rounded up.
//
// Letters: D width, N heads, H head dim, F ffn width, V vocabulary, S places of the cache; J outputs
// of a product, I inputs. Weights [J, I] are bfloat16, or int8 with a scale for each output; sums
// and the residual stream are float32; what a product with bfloat16 weights reads is rounded to it.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "hopper.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using bf16 = __nv_bfloat16;
using hopper::fresh;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSlot = 4096;      // bytes of the ring that a copy fills at most
constexpr int kMaxStages = 6;    // slots of a warp: 24 KiB in flight
constexpr int kMaxLayers = 128;  // 240 bytes each, of the 32,764 that parameters may take
constexpr int kMaxHead = 128;    // H at most
constexpr int kPlaces = 8;       // of a copy of the cache, that a lane shares in at most
constexpr float kNone = -1e30f;  // a score that counts for nothing

struct Matrix {
  const char* w;       // [J, I]
  const float* scale;  // [J], of int8
  const bf16* bias;    // [J], or null
};

// The products of a layer, in their order; those of a token are these of every layer, and the
// logits.
enum Kind { kQkv, kOut, kUp, kDown, kKinds, kLogits = kKinds };

// What becomes of a product's outputs.
enum Fate { kStore, kGelu, kAdd };

struct Product {
  Matrix m;
  int J, I, tile;  // outputs, inputs, and bytes of a copy of a row
  Fate fate;
  float* y;
};

struct Layer {
  const bf16 *ln1_w, *ln1_b, *ln2_w, *ln2_b;
  bf16 *keys, *values;  // [N, S, H]
};

struct Params {
  int layers, D, N, H, F, V, S;
  float epsilon;
  int shares;  // blocks that share a head
  int stages;  // slots of each warp's ring
  const int *token, *position;
  const float* slopes;  // [N]
  const bf16 *embed_ln_w, *embed_ln_b, *ln_w, *ln_b;
  Matrix embed;
  float *x, *qkv, *act, *parts, *logits;  // [D] [N 3 H] [F] [N shares H] [V]
  float2* softmax;    // [N shares]: the largest score of a share, and the sum of its weights
  unsigned* arrived;  // blocks at the barriers so far
  Layer layer[kMaxLayers];
  Product product[kKinds * kMaxLayers + 1];
};
static_assert(sizeof(Params) <= 32764, "more than a kernel's parameters may take");

__device__ Kind kind_of(const Params& p, int step) {
  return step < kKinds * p.layers ? Kind(step % kKinds) : kLogits;
}

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

__device__ float max_of_warp(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ uint32_t rounded(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Lanes that have a place of the cache together, eight dims each.
__device__ int lanes_of_place(int H) { return H <= 64 ? 8 : 16; }

// What a warp reads of weights and cache, in the order in which it needs it: copies are started
// `stages` ahead of their use, whatever the grid waits for.
template <typename W>
class Stream {
 public:
  int warp, warps;  // of this in the grid, and of the grid

  __device__ Stream(const Params& p, char* rings, uint64_t* full)
      : warp(blockIdx.x * kWarps + threadIdx.x / 32),
        warps(gridDim.x * kWarps),
        head(blockIdx.x / p.shares),
        share(blockIdx.x % p.shares),
        tile_places(min(32 / lanes_of_place(p.H) * kPlaces, kSlot / (2 * p.H))),
        p_(p),
        position_(*p.position) {
    const int mine = threadIdx.x / 32, sharers = p.shares * kWarps;
    const int64_t tiles = (position_ + tile_places - 1) / tile_places;
    const int place = share * kWarps + mine;
    first_tile = head < p.N ? int(tiles * place / sharers) : 0;
    last_tile = head < p.N ? int(tiles * (place + 1) / sharers) : 0;
    ring_ = rings + mine * p.stages * kSlot;
    full_ = hopper::shared(full + mine * p.stages);
    if (threadIdx.x % 32 == 0) hopper::make_barriers(full_, p.stages);
    __syncwarp();
    enter();
    for (int i = 0; i < p.stages; ++i) start(i);
  }

  // The next bytes, once they are here.
  __device__ const char* take() {
    while (!hopper::is_over(full_ + 8 * slot_, parity_)) {
    }
    return ring_ + slot_ * kSlot;
  }

  // Lets what `take` gave be overwritten.
  __device__ void release() {
    __syncwarp();
    start(slot_);
    if (++slot_ == p_.stages) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }

  int head, share;         // of which this block attends to places
  int tile_places;         // of the cache, that a copy brings
  int first_tile, last_tile;  // that are this warp's

 private:
  // Before `kOut` come this warp's places of the cache.
  __device__ void enter() {
    part_ = 0;
    attends_ = kind_of(p_, step_) == kOut && !attends_;
    if (attends_) {
      item_ = first_tile, end_ = last_tile;
      return;
    }
    const Product& product = p_.product[step_];
    base_ = product.m.w;
    item_ = warp, end_ = product.J;
    row_ = product.I * int(sizeof(W));
    tile_ = product.tile;
  }

  // Starts the next copy, into a slot that nobody reads any more.
  __device__ void start(int slot) {
    while (item_ >= end_) {
      if (step_ == kKinds * p_.layers) return;  // all is asked for
      if (!attends_) ++step_;
      enter();
    }
    const char* source;
    int bytes;
    if (attends_) {
      const int first = item_ * tile_places, each = 2 * p_.H;
      const Layer& layer = p_.layer[step_ / kKinds];
      const bf16* held = part_ ? layer.values : layer.keys;
      const int64_t place = int64_t(head) * p_.S + first;
      source = reinterpret_cast<const char*>(held) + place * each;
      bytes = min(tile_places, position_ - first) * each;
      if (++part_ == 2) {
        part_ = 0;
        ++item_;
      }
    } else {
      source = base_ + int64_t(item_) * row_ + part_;
      bytes = tile_;
      if ((part_ += tile_) == row_) {
        part_ = 0;
        item_ += warps;
      }
    }
    if (threadIdx.x % 32 == 0)
      hopper::copy(ring_ + slot * kSlot, source, bytes, full_ + 8 * slot);
  }

  const Params& p_;
  const int position_;
  char* ring_;
  uint32_t full_;
  int slot_ = 0;
  uint32_t parity_ = 0;
  // What is copied next.
  int step_ = 0, item_ = 0, end_ = 0, part_ = 0, row_ = 0, tile_ = 0;
  bool attends_ = false;
  const char* base_ = nullptr;
};

// Every block has come so far, and sees what the others wrote before.
__device__ void meet(const Params& p, unsigned& times) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned all = ++times * gridDim.x;
    hopper::arrive(p.arrived);
    while (hopper::count(p.arrived) < all) {
    }
  }
  __syncthreads();
}

// Numbers of a vector [D]: a thread has four of each 1,024.
template <int kVectors>
struct Values {
  float v[kVectors][4];
  static __device__ int place(int i) { return 4 * (i * kThreads + int(threadIdx.x)); }
};

template <int kVectors>
struct Norm {
  uint2 w[kVectors], b[kVectors];
  __device__ void load(const bf16* weights, const bf16* biases, int D) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = Values<kVectors>::place(i);
      w[i] = at < D ? *reinterpret_cast<const uint2*>(weights + at) : uint2{};
      b[i] = at < D ? *reinterpret_cast<const uint2*>(biases + at) : uint2{};
    }
  }
  // x becomes its layer norm. Each warp takes mean and squared distances of its own numbers, and
  // those are merged (Chan et al. 1979): as exact as two passes, and one wait.
  __device__ void apply(Values<kVectors>& x, int D, float epsilon, float* scratch) const {
    float sum = 0, squares = 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool is_in = Values<kVectors>::place(i) < D;
      count += 4 * __popc(__ballot_sync(~0u, is_in));
      if (is_in) sum += x.v[i][0] + x.v[i][1] + (x.v[i][2] + x.v[i][3]);
    }
    const float mean_here = count ? sum_of_warp(sum) / count : 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (Values<kVectors>::place(i) < D)
#pragma unroll
        for (int j = 0; j < 4; ++j) squares += (x.v[i][j] - mean_here) * (x.v[i][j] - mean_here);
    squares = sum_of_warp(squares);
    float3* of_warps = reinterpret_cast<float3*>(scratch);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = {float(count), mean_here, squares};
    __syncthreads();
    float mean = 0, variance = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) mean += of_warps[i].x * of_warps[i].y;
    mean /= D;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float off = of_warps[i].y - mean;
      variance += of_warps[i].z + of_warps[i].x * off * off;
    }
    const float scale = rsqrtf(variance / D + epsilon);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x.v[i][0] = fmaf((x.v[i][0] - mean) * scale, low(w[i].x), low(b[i].x));
      x.v[i][1] = fmaf((x.v[i][1] - mean) * scale, high(w[i].x), high(b[i].x));
      x.v[i][2] = fmaf((x.v[i][2] - mean) * scale, low(w[i].y), low(b[i].y));
      x.v[i][3] = fmaf((x.v[i][3] - mean) * scale, high(w[i].y), high(b[i].y));
    }
  }
};

template <int kVectors>
__device__ void load(Values<kVectors>& x, const float* from, int D) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = Values<kVectors>::place(i);
    const float4 v = at < D ? fresh(reinterpret_cast<const float4*>(from + at)) : float4{};
    x.v[i][0] = v.x, x.v[i][1] = v.y, x.v[i][2] = v.z, x.v[i][3] = v.w;
  }
}

// What a product reads, in shared memory, and its sums with rows of weights.
template <typename W>
struct Inputs;

// Of bfloat16 weights: bfloat16.
template <>
struct Inputs<bf16> {
  bf16* h;
  struct Sum {
    float part[4] = {};
  };
  static __host__ __device__ int bytes(int F) { return 2 * F; }

  template <int kVectors>
  __device__ void set(const Values<kVectors>& x, int D, float*) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = Values<kVectors>::place(i);
      if (at < D)
        *reinterpret_cast<uint2*>(h + at) = {rounded(x.v[i][0], x.v[i][1]),
                                             rounded(x.v[i][2], x.v[i][3])};
    }
    __syncthreads();
  }

  // Sixteen bytes of a row of weights, from input `at` on.
  __device__ void add(Sum& sum, const char* w, int at) const {
    const uint4 a = *reinterpret_cast<const uint4*>(w), b = *reinterpret_cast<const uint4*>(h + at);
    const uint32_t ws[4] = {a.x, a.y, a.z, a.w}, hs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum.part[i] = fmaf(low(ws[i]), low(hs[i]), sum.part[i]);
      sum.part[i] = fmaf(high(ws[i]), high(hs[i]), sum.part[i]);
    }
  }

  __device__ float value(const Sum& s) const {
    return s.part[0] + s.part[1] + (s.part[2] + s.part[3]);
  }
};

// Of int8 weights: 23 bits of what is the largest input 2^22, as three signed digits of eight bits,
// each in a plane of its own. Sums of products of bytes, four an instruction, are exact, where to
// widen every weight would take more instructions than the memory leaves time for.
template <>
struct Inputs<int8_t> {
  int8_t* h;
  int plane;
  float unit;
  struct Sum {
    int digit[3] = {};
  };
  static __host__ __device__ int bytes(int F) { return 3 * F; }

  template <int kVectors>
  __device__ void set(const Values<kVectors>& x, int D, float* scratch) {
    float most = 0;
    bool is_broken = false;  // no number: neither a maximum nor an integer would tell
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (Values<kVectors>::place(i) < D)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          most = fmaxf(most, fabsf(x.v[i][j]));
          is_broken |= !isfinite(x.v[i][j]);
        }
    most = max_of_warp(most);
    float* of_warps = scratch + 4 * kWarps;  // beyond what a norm has there
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
    is_broken = __syncthreads_or(is_broken);
#pragma unroll
    for (int i = 0; i < kWarps; ++i) most = fmaxf(most, of_warps[i]);
    most = fmaxf(most, 1e-30f);
    unit = is_broken ? nanf("") : most / 4194304.0f;
    const float units = 4194304.0f / most;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = Values<kVectors>::place(i);
      if (at >= D) continue;
      uint32_t planes[3] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int rest = __float2int_rn(x.v[i][j] * units);
#pragma unroll
        for (int k = 2; k >= 0; --k) {
          const int digit = k ? int8_t(rest) : rest;
          planes[k] |= uint32_t(digit & 255) << 8 * j;
          rest = (rest - digit) >> 8;
        }
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) *reinterpret_cast<uint32_t*>(h + k * plane + at) = planes[k];
    }
    __syncthreads();
  }

  __device__ void add(Sum& sum, const char* w, int at) const {
    const int4 a = *reinterpret_cast<const int4*>(w);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int4 b = *reinterpret_cast<const int4*>(h + k * plane + at);
      sum.digit[k] = __dp4a(a.x, b.x, sum.digit[k]);
      sum.digit[k] = __dp4a(a.y, b.y, sum.digit[k]);
      sum.digit[k] = __dp4a(a.z, b.z, sum.digit[k]);
      sum.digit[k] = __dp4a(a.w, b.w, sum.digit[k]);
    }
  }

  __device__ float value(const Sum& s) const {
    return unit * fmaf(fmaf(float(s.digit[0]), 256.0f, float(s.digit[1])), 256.0f,
                       float(s.digit[2]));
  }
};

// What ends a sum: lane i has that of this warp's i-th output. Loaded ahead, for 32 outputs at once:
// to wait for memory once for each would cost more than the product.
struct Ends {
  float scale, bias;
};

template <typename W>
__device__ Ends ends_of(const Stream<W>& stream, const Matrix& m, int J, int first = 0) {
  const int j = stream.warp + (first + threadIdx.x % 32) * stream.warps;
  return {sizeof(W) == 1 && j < J ? m.scale[j] : 1.0f,
          m.bias && j < J ? __bfloat162float(m.bias[j]) : 0.0f};
}

__device__ float gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456f * x * (1.0f + 0.044715f * x * x)));
}

// This warp's outputs of a product; a lane has one of 32 of them at the end. `here` is what the
// residual stream is at lane i's output, of a product that adds to it.
template <typename W>
__device__ void multiply(Stream<W>& stream, const Product& product, Ends ends,
                         const Inputs<W>& inputs, float& here) {
  constexpr int kSums = 4;  // are added up over lanes at once, for the sake of their latency
  const int lane = threadIdx.x % 32, each = sizeof(W);
  const int J = product.J, I = product.I, tile = product.tile;
  const int outputs = stream.warp < J ? (J - stream.warp - 1) / stream.warps + 1 : 0;
  for (int first = 0; first < outputs; first += 32) {
    if (first) ends = ends_of(stream, product.m, J, first);
    const int count = min(32, outputs - first);
    float mine = 0, sums[kSums] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      typename Inputs<W>::Sum sum;
#pragma unroll 1
      for (int input = 0; input < I; input += tile / each) {
        const char* w = stream.take();
#pragma unroll 4
        for (int at = 16 * lane; at < tile; at += 512) inputs.add(sum, w + at, input + at / each);
        stream.release();
      }
#pragma unroll
      for (int k = kSums - 1; k; --k) sums[k] = sums[k - 1];
      sums[0] = inputs.value(sum);
      if (i % kSums == kSums - 1 || i == count - 1) {
        float y[kSums];
#pragma unroll
        for (int k = 0; k < kSums; ++k) y[k] = sums[k];
#pragma unroll
        for (int d = 16; d; d /= 2)
#pragma unroll
          for (int k = 0; k < kSums; ++k) y[k] += __shfl_xor_sync(~0u, y[k], d);
#pragma unroll
        for (int k = 0; k < kSums; ++k)
          if (lane == i - k) mine = y[k];
      }
    }
    if (lane < count) {
      float y = fmaf(mine, ends.scale, ends.bias);
      if (product.fate == kGelu) y = gelu(y);
      if (product.fate == kAdd) y = here += y;
      product.y[stream.warp + (first + lane) * stream.warps] = y;
    }
  }
}

// Eight numbers as attention takes them: bfloat16 of the cache, float32 of the products.
__device__ float dot(const float (&x)[8], uint4 y) {
  const uint32_t ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(x[2 * i], low(ys[i]), sum);
    sum = fmaf(x[2 * i + 1], high(ys[i]), sum);
  }
  return sum;
}

__device__ void add(float (&sum)[8], float x, uint4 y) {
  const uint32_t ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(x, low(ys[i]), sum[2 * i]);
    sum[2 * i + 1] = fmaf(x, high(ys[i]), sum[2 * i + 1]);
  }
}

__device__ void load_eight(float (&x)[8], const float* from) {
  const float4 a = fresh(reinterpret_cast<const float4*>(from));
  const float4 b = fresh(reinterpret_cast<const float4*>(from) + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ void load_places(uint4 (&x)[kPlaces], const char* from, int stride) {
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) x[i] = *reinterpret_cast<const uint4*>(from + i * stride);
}

__device__ uint4 rounded(const float* from) {
  float x[8];
  load_eight(x, from);
  return {rounded(x[0], x[1]), rounded(x[2], x[3]), rounded(x[4], x[5]), rounded(x[6], x[7])};
}

// This block's share of a head, whose new key and value go to the cache: sums, not divided yet.
template <typename W>
__device__ void attend(const Params& p, Stream<W>& stream, const Layer& layer, float* scratch) {
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32;
  const int head = stream.head, share = stream.share, H = p.H;
  if (head >= p.N) return;
  const int position = *p.position;
  const float slope = p.slopes[head], root = rsqrtf(float(H));
  const int lanes = lanes_of_place(H), places = 32 / lanes;
  const int first = lane / lanes, d = 8 * (lane % lanes);  // of this lane: a place, and dims
  const float* qkv = p.qkv + int64_t(head) * 3 * H + d;
  const bool has_dims = d < H, has_new = share == 0 && mine == 0;  // the token's key and value
  float q[8] = {}, out[8] = {};
  if (has_dims) load_eight(q, qkv);
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] *= root;
  float largest = kNone, total = 0;
  if (has_new) {
    uint4 key{}, value{};
    if (has_dims && first == 0) {
      key = rounded(qkv + H), value = rounded(qkv + 2 * H);
      const int64_t at = (int64_t(head) * p.S + position) * H + d;
      *reinterpret_cast<uint4*>(layer.keys + at) = key;
      *reinterpret_cast<uint4*>(layer.values + at) = value;
    }
    largest = sum_of_warp(dot(q, key));
    total = first == 0;
    add(out, total, value);
  }
  for (int tile = stream.first_tile; tile < stream.last_tile; ++tile) {
    const int start = tile * stream.tile_places;
    const int here = min(stream.tile_places, position - start);
    float s[kPlaces];
    uint4 held[kPlaces];  // also beyond what came, but in the slot: loads do not wait for conditions
    load_places(held, stream.take() + 2 * (first * H + d), 2 * places * H);
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) s[i] = has_dims ? dot(q, held[i]) : 0;
    for (int w = 1; w < lanes; w *= 2)
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) s[i] += __shfl_xor_sync(~0u, s[i], w);
    stream.release();
    float most = largest;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int place = i * places + first;
      s[i] = place < here ? s[i] + slope * (start + place - position) : kNone;
      most = fmaxf(most, s[i]);
    }
    most = max_of_warp(most);
    const float old = __expf(largest - most);
    largest = most;
    total *= old;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] *= old;
    load_places(held, stream.take() + 2 * (first * H + d), 2 * places * H);
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const bool is_in = i * places + first < here;
      const float weight = is_in ? __expf(s[i] - most) : 0;
      total += weight;
      add(out, weight, is_in ? held[i] : uint4{});
    }
    stream.release();
  }
  for (int w = lanes; w < 32; w *= 2) {
    total += __shfl_xor_sync(~0u, total, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] += __shfl_xor_sync(~0u, out[i], w);
  }

  // The warps of the block together.
  float *maxima = scratch, *sums = scratch + kWarps, *outs = scratch + 2 * kWarps;
  if (lane == 0) maxima[mine] = largest, sums[mine] = total;
  if (has_dims && first == 0)
#pragma unroll
    for (int i = 0; i < 8; ++i) outs[mine * H + d + i] = out[i];
  __syncthreads();
  float most = kNone, all = 0, sum = 0;
  for (int i = 0; i < kWarps; ++i) most = fmaxf(most, maxima[i]);
  for (int i = 0; i < kWarps; ++i) {
    const float of = __expf(maxima[i] - most);
    all += of * sums[i];
    if (threadIdx.x < H) sum += of * outs[i * H + threadIdx.x];
  }
  const int part = head * p.shares + share;
  if (threadIdx.x < H) p.parts[int64_t(part) * H + threadIdx.x] = sum;
  if (threadIdx.x == 0) p.softmax[part] = {most, all};
}

// The shares of every head together, each thread those of its own dims.
template <int kVectors>
__device__ void join(const Params& p, Values<kVectors>& x) {
  constexpr int kAtOnce = kVectors == 1 ? 8 : 4;  // are asked for before any is used
  float largest[kVectors], total[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    largest[i] = kNone, total[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) x.v[i][j] = 0;
  }
#pragma unroll 1
  for (int first = 0; first < p.shares; first += kAtOnce) {
    float4 parts[kVectors][kAtOnce];
    float2 softmax[kVectors][kAtOnce];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int d = Values<kVectors>::place(i), head = d / p.H, part = head * p.shares + first;
      const float* from = p.parts + int64_t(part) * p.H + (d - head * p.H);
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        const bool is_in = d < p.D && first + s < p.shares;
        softmax[i][s] = is_in ? fresh(p.softmax + part + s) : float2{kNone, 0};
        parts[i][s] = is_in ? fresh(reinterpret_cast<const float4*>(from + s * p.H)) : float4{};
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float most = largest[i];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) most = fmaxf(most, softmax[i][s].x);
      const float old = __expf(largest[i] - most);
      largest[i] = most;
      total[i] *= old;
#pragma unroll
      for (int j = 0; j < 4; ++j) x.v[i][j] *= old;
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        const float of = __expf(softmax[i][s].x - most);
        const float4 v = parts[i][s];
        total[i] = fmaf(of, softmax[i][s].y, total[i]);
        x.v[i][0] = fmaf(of, v.x, x.v[i][0]), x.v[i][1] = fmaf(of, v.y, x.v[i][1]);
        x.v[i][2] = fmaf(of, v.z, x.v[i][2]), x.v[i][3] = fmaf(of, v.w, x.v[i][3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float scale = 1.0f / total[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) x.v[i][j] *= scale;
  }
}

// Of attention, of which norms and inputs take less: the warps' largest scores, totals and sums.
int scratch_floats(const Params& p) { return kWarps * (2 + p.H); }

template <typename W, int kVectors>
__global__ void __launch_bounds__(kThreads, 1) step(const __grid_constant__ Params p) {
  char* rings = hopper::memory_of_block();
  uint64_t* full = reinterpret_cast<uint64_t*>(rings + kWarps * p.stages * kSlot);
  Inputs<W> inputs;
  inputs.h = reinterpret_cast<decltype(inputs.h)>(full + kWarps * p.stages);
  if constexpr (sizeof(W) == 1) inputs.plane = p.F;
  float* scratch = reinterpret_cast<float*>(reinterpret_cast<char*>(inputs.h) + inputs.bytes(p.F));

  Stream<W> stream(p, rings, full);
  unsigned times = 0;
  Values<kVectors> x;
  Norm<kVectors> norm;
  float here = 0;  // the residual stream at this warp's i-th output of D, in lane i

  norm.load(p.embed_ln_w, p.embed_ln_b, p.D);
  const int token = *p.token;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = Values<kVectors>::place(i);
    for (int j = 0; j < 4; ++j) {
      x.v[i][j] = 0;
      if (at >= p.D) continue;
      const W w = reinterpret_cast<const W*>(p.embed.w)[int64_t(token) * p.D + at + j];
      x.v[i][j] = sizeof(W) == 1 ? float(w) * p.embed.scale[token] : float(w);
    }
  }
  norm.apply(x, p.D, p.epsilon, scratch);
  __syncthreads();
  if (blockIdx.x == 0)
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = Values<kVectors>::place(i);
      if (at < p.D)
        *reinterpret_cast<float4*>(p.x + at) = {x.v[i][0], x.v[i][1], x.v[i][2], x.v[i][3]};
    }

  // All products in one place: the code of a layer, five times as long, would not stay in the cache
  // of instructions.
#pragma unroll 1
  for (int step = 0; step <= kKinds * p.layers; ++step) {
    const Kind kind = kind_of(p, step);
    const Layer& layer = p.layer[kind == kLogits ? 0 : step / kKinds];
    const Product& product = p.product[step];
    const Ends ends = ends_of(stream, product.m, product.J);
    const bool is_normed = kind == kQkv || kind == kUp || kind == kLogits;
    if (is_normed)
      norm.load(kind == kLogits ? p.ln_w : kind == kUp ? layer.ln2_w : layer.ln1_w,
                kind == kLogits ? p.ln_b : kind == kUp ? layer.ln2_b : layer.ln1_b, p.D);
    if (step) meet(p, times);
    if (kind == kOut) {
      attend(p, stream, layer, scratch);
      const int own = stream.warp + threadIdx.x % 32 * stream.warps;
      if (step == kOut && own < p.D) here = fresh(p.x + own);
      meet(p, times);
      join(p, x);
    } else if (is_normed) {
      if (step) load(x, p.x, p.D);
      norm.apply(x, p.D, p.epsilon, scratch);
    }
    if (kind == kDown) {
      Values<4 * kVectors> wide;
      load(wide, p.act, p.F);
      inputs.set(wide, p.F, scratch);
    } else {
      inputs.set(x, p.D, scratch);
    }
    multiply(stream, product, ends, inputs, here);
  }
}

// Bytes of a copy: the most that divide a row, and fit a slot.
int tile_of(int64_t row) {
  for (int tile = kSlot; tile >= 16; tile -= 16)
    if (row % tile == 0) return tile;
  return 0;
}

ffi::Error failed(const char* what, cudaError_t error) {
  return ffi::Error::Internal(std::string("bloomjax: ") + what + ": " + cudaGetErrorString(error));
}

ffi::Error launch(cudaStream_t stream, Params& p, int blocks, int most) {
  const int rest = Inputs<BLOOMJAX_WEIGHT>::bytes(p.F) + 4 * scratch_floats(p) + 64;
  p.stages = (most - rest) / (kWarps * (kSlot + 8));
  p.stages = p.stages > kMaxStages ? kMaxStages : p.stages;
  if (p.stages < 2) return ffi::Error::InvalidArgument("bloomjax: too wide for shared memory");
  const int bytes = kWarps * p.stages * (kSlot + 8) + rest;
  const auto kernel = step<BLOOMJAX_WEIGHT, BLOOMJAX_VECTORS>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return failed("shared memory", error);
  if ((error = cudaMemsetAsync(p.arrived, 0, sizeof(unsigned), stream)) != cudaSuccess)
    return failed("memset", error);
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;  // all blocks run at once, or none does
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, p);
  return error == cudaSuccess ? ffi::Error::Success() : failed("launch", error);
}

// Arguments: token, position, slopes, embedding's layer norm, last layer norm, embedding and its
// scales; of each layer two layer norms, the matrices of `Kind`, in its order, each as values,
// scales, bias, and keys and values. Results: logits, room to work in; of each layer keys and
// values, in place.
ffi::Error run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               int64_t layers, float epsilon) {
  constexpr int kFirst = 9, kEach = 18;
  if (layers < 1 || layers > kMaxLayers || int64_t(args.size()) != kFirst + kEach * layers)
    return ffi::Error::InvalidArgument("bloomjax: expected other arguments");
  int device = 0, blocks = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return failed("device", error);

  const auto size = [&](int of, int axis) {
    return int(args.get<ffi::AnyBuffer>(of)->dimensions()[axis]);
  };
  constexpr int kTable = 7, kUpWeights = kFirst + 10, kKeys = kFirst + 16;
  Params p{};
  p.layers = layers;
  p.epsilon = epsilon;
  p.V = size(kTable, 0), p.D = size(kTable, 1), p.F = size(kUpWeights, 0);
  p.N = size(kKeys, 1), p.S = size(kKeys, 2), p.H = size(kKeys, 3);
  p.shares = blocks / p.N;
  constexpr int each = sizeof(BLOOMJAX_WEIGHT);
  const int tile_D = tile_of(int64_t(p.D) * each), tile_F = tile_of(int64_t(p.F) * each);
  if (p.shares < 1 || p.H > kMaxHead || p.H % 8 || p.D > 1024 * BLOOMJAX_VECTORS ||
      p.F > 4096 * BLOOMJAX_VECTORS || p.D > 32 * kWarps * blocks || !tile_D || !tile_F)
    return ffi::Error::InvalidArgument("bloomjax: no kernel for these sizes on this GPU");

  p.logits = static_cast<float*>((*rets.get<ffi::AnyBuffer>(0))->untyped_data());
  ffi::Result<ffi::AnyBuffer> room = *rets.get<ffi::AnyBuffer>(1);
  char* at = static_cast<char*>(room->untyped_data());
  const char* end = at + room->size_bytes();
  const auto take = [&](int64_t bytes) {
    char* here = at;
    at += (bytes + 127) / 128 * 128;
    return here;
  };
  p.arrived = reinterpret_cast<unsigned*>(take(4));
  p.x = reinterpret_cast<float*>(take(4 * p.D));
  p.qkv = reinterpret_cast<float*>(take(12 * p.D));
  p.act = reinterpret_cast<float*>(take(4 * p.F));
  p.parts = reinterpret_cast<float*>(take(int64_t(4) * p.N * p.shares * p.H));
  p.softmax = reinterpret_cast<float2*>(take(8 * p.N * p.shares));
  if (at > end) return ffi::Error::InvalidArgument("bloomjax: too little room to work in");

  int next = 0;
  const auto data = [&] { return args.get<ffi::AnyBuffer>(next++)->untyped_data(); };
  const auto vector = [&] { return static_cast<const bf16*>(data()); };
  const auto matrix = [&](bool biased) {
    Matrix m{};
    m.w = static_cast<const char*>(data());
    m.scale = static_cast<const float*>(data());
    m.bias = biased ? vector() : nullptr;
    return m;
  };
  p.token = static_cast<const int*>(data());
  p.position = static_cast<const int*>(data());
  p.slopes = static_cast<const float*>(data());
  p.embed_ln_w = vector(), p.embed_ln_b = vector(), p.ln_w = vector(), p.ln_b = vector();
  p.embed = matrix(false);
  for (int l = 0; l < layers; ++l) {
    Layer& layer = p.layer[l];
    Product* product = p.product + kKinds * l;
    layer.ln1_w = vector(), layer.ln1_b = vector();
    layer.ln2_w = vector(), layer.ln2_b = vector();
    product[kQkv] = {matrix(true), 3 * p.D, p.D, tile_D, kStore, p.qkv};
    product[kOut] = {matrix(true), p.D, p.D, tile_D, kAdd, p.x};
    product[kUp] = {matrix(true), p.F, p.D, tile_D, kGelu, p.act};
    product[kDown] = {matrix(true), p.D, p.F, tile_F, kAdd, p.x};
    layer.keys = static_cast<bf16*>(data()), layer.values = static_cast<bf16*>(data());
  }
  p.product[kKinds * layers] = {p.embed, p.V, p.D, tile_D, kStore, p.logits};
  return launch(stream, p, blocks, most);
}

}  // namespace

// Whether this runtime and this kernel can run here: 0, or the error of CUDA that says why not.
extern "C" int BloomjaxRuns() {
  int device;
  cudaFuncAttributes found;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaFuncGetAttributes(&found, step<BLOOMJAX_WEIGHT, BLOOMJAX_VECTORS>);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(BloomjaxStep, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layers")
                                  .Attr<float>("epsilon"),
                              {ffi::Traits::kCmdBufferCompatible});
