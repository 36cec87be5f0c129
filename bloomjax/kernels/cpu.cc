// What decoding does on CPU: products with packed weights, and attention over a cache.
//
// y[M, J] = x[M, I] times the transpose of w[J, I], for w in as few bits as it has; M rows of x, J
// outputs, I inputs, G scales of a row of w. Outputs are split over XLA's own threads. Few rows of
// x: every byte of w is read from memory once, fetched far ahead of its use, and becomes float32 in
// registers, whose lanes are inputs; a sum is kept in kLanes interleaved parts, in the same order
// whatever M is, so that a row of y is the same bit by bit for any other rows, up to kFew of them.
// Many rows: some of w become float32 in the first cache, and the lanes are rows of x. Either way a
// sum stays in a register while its inputs stay in a cache.
//
// Attention of one query for each of B slots and N heads reads of keys and values [B, N, S, H] what
// is filled, once.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BLOOMJAX_AVX2
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef BLOOMJAX_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kUnit = 32;  // inputs that may share a scale; I divides by it

// Few rows of x: up to four, and three of w, at a time, which are 12 sums in 16 registers.
constexpr int64_t kFew = 16, kTurns = 4;
constexpr int64_t kNear = 4096;  // values of x that stay in the first cache, 16 KiB
constexpr int64_t kDistance = 12288;  // bytes from what is read of w to what is fetched, or more

// Many rows of x: a tile, and 12 rows of w, at a time. The first cache, half of which is often
// another's, keeps a chunk of inputs of these, 12 KiB, and the second a panel of inputs of a batch.
constexpr int64_t kTile = 3 * kLanes, kBatch = 6 * kTile;
constexpr int kRows = 12;
constexpr int64_t kChunk = 256, kPanel = 1024;
constexpr int64_t kStride = kChunk + 16;  // of widened rows: were it a power of two, so would banks

template <typename T>
struct Of {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <typename T>
using Vector = typename Of<T>::type;
using Floats = Vector<float>;

template <typename T>
inline Vector<T> load(const void* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// c += a * b, rounded once where the processor can. Written out, since compilers contract at will,
// and on AVX2 as the instruction itself, since GCC would move sums between registers and memory.
inline void multiply_add(Floats& c, Floats a, Floats b) {
#ifdef BLOOMJAX_AVX2
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
#elif defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  for (int l = 0; l < kLanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
#else
  c += a * b;
#endif
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// Kinds of weights. `kPer` values an element; in Pairs, of four bits, byte k of 16 holds the values
// k and k + 16 of a unit, each plus 8. `widened` is the vector at place v of the unit at w.

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
struct Pairs {
  uint8_t bits;
};
template <typename W>
constexpr int64_t kPer = std::is_same_v<W, Pairs> ? 2 : 1;
template <typename W>
constexpr bool kScaled = std::is_same_v<W, Pairs> || std::is_same_v<W, int8_t>;

// GCC 12 makes scalar code of `__builtin_convertvector` from 8 and 16 bits.
#ifdef BLOOMJAX_AVX2
inline __m128i eight(const void* from) { return _mm_loadl_epi64((const __m128i*)from); }
inline Vector<int32_t> ints(const int8_t* w) {
  return (Vector<int32_t>)_mm256_cvtepi8_epi32(eight(w));
}
inline Vector<int32_t> ints(const uint8_t* w) {
  return (Vector<int32_t>)_mm256_cvtepu8_epi32(eight(w));
}
inline Vector<int32_t> ints(const uint16_t* w) {
  return (Vector<int32_t>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)w));
}
#else
template <typename T>
inline Vector<int32_t> ints(const T* w) {
  return __builtin_convertvector(load<T>(w), Vector<int32_t>);
}
#endif

inline Floats widened(const float* w, float, int v) { return load<float>(w + v); }

inline Floats widened(const Bfloat16* w, float, int v) {
  return (Floats)(ints(&w[v].bits) << 16);
}

inline Floats widened(const Float16* w, float, int v) {
#ifdef BLOOMJAX_AVX2
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + v)));
#else
  return __builtin_convertvector(load<_Float16>(w + v), Floats);
#endif
}

inline Floats widened(const int8_t* w, float scale, int v) {
  return __builtin_convertvector(ints(w + v), Floats) * scale;
}

inline Floats widened(const Pairs* w, float scale, int v) {
  constexpr int half = kUnit / 2;
  auto bits = ints(&w[v % half].bits);
  return __builtin_convertvector((v < half ? bits & 15 : bits >> 4) - 8, Floats) * scale;
}

// The sum of a vector: halves are added until one value is left.
inline float sum_of(Floats v) {
#ifdef BLOOMJAX_AVX2
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// What will be read next, fetched in even steps while there is arithmetic to do.
struct Ahead {
  const char* at;
  int64_t step;  // bytes for each unit of inputs
  void fetch() {
    int64_t byte = 0;
    do __builtin_prefetch(at + byte);
    while ((byte += 64) < step);
    at += step;
  }
};

// The two loops that all time goes into. Sums, and of x and w whichever are fewer, must live in
// registers: hence loops unrolled by name, and functions apart from others' variables.

// sums[b][r] += x[b] . w[r] for some inputs of R rows of w and of B rows of x, whose vectors take
// turns.
template <int B, int R, typename W>
__attribute__((noinline)) void dot(const W* w, int64_t stride, const float* scales, int64_t G,
                                   const float* x, int64_t inputs, Ahead& ahead,
                                   Floats (*sums)[R]) {
  Floats acc[B][R];
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[b][r] = sums[b][r];
  for (int64_t i = 0; i < inputs; i += kUnit, w += kUnit / kPer<W>, scales += G > 1) {
    ahead.fetch();
#pragma GCC unroll 8
    for (int v = 0; v < kUnit; v += kLanes, x += B * kLanes) {
      if constexpr (B < R) {
        Floats in[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) in[b] = load<float>(x + b * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Floats wide = widened(w + r * stride, scales[r * G], v);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) multiply_add(acc[b][r], wide, in[b]);
        }
      } else {
        Floats wide[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) wide[r] = widened(w + r * stride, scales[r * G], v);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          const Floats in = load<float>(x + b * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) multiply_add(acc[b][r], wide[r], in);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[b][r] = acc[b][r];
}

// A vector of one value; without a zero taken away, which is nothing, GCC has no word for it.
inline Floats every(float value) { return value - Floats{}; }

// What will be read next of some rows of w, in steps of `unit` bytes; if that is 0, nothing.
struct Rows {
  const char* at;
  int64_t stride, unit;
};

// sums[r][v] += wide[r] . x[v] for some inputs of R widened rows of w and V vectors of rows of x.
template <int V, int R>
__attribute__((noinline)) void outer(const float* wide, const float* x, int64_t inputs, Rows next,
                  Floats (*sums)[kBatch / kLanes]) {
  Floats acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = sums[r][v];
  for (int64_t u = 0; u < inputs; u += kUnit, next.at += next.unit) {
    for (int r = 0; r < R && next.unit; ++r)
      for (int64_t byte = 0; byte < next.unit; byte += 64)
        __builtin_prefetch(next.at + r * next.stride + byte);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kUnit; ++i, ++wide, x += V * kLanes) {
      Floats in[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) in[v] = load<float>(x + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats weight = every(wide[r * kStride]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) multiply_add(acc[r][v], weight, in[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = acc[r][v];
}

template <typename W>
struct Product {
  const float* x;  // as `arrange` leaves it
  const W* w;
  const float* scales;  // [J, G]; of floats, whose G is 0, one that is not used
  float* y;
  int64_t M, J, I, G;

  static constexpr int64_t bytes(int64_t inputs) { return inputs / kPer<W> * sizeof(W); }
  const W* at(int64_t j, int64_t i) const { return w + (j * I + i) / kPer<W>; }
  const float* scale(int64_t j, int64_t i) const {
    return scales + j * G + (G > 1 ? i / kUnit : 0);
  }

  void rows(int64_t begin, int64_t end) const {
    if (M > kFew) return many(begin, end);
    int64_t j = begin;
    if (M <= 2)
      for (; j + 6 <= end; j += 6) few<6>(j);
    for (; j + 3 <= end; j += 3) few<3>(j);
    for (; j < end; ++j) few<1>(j);
  }

  // R rows of w with few rows of x. What takes long to widen is widened once for all turns.
  template <int R>
  void few(int64_t j) const {
    alignas(64) Floats sums[kFew][R];
    alignas(64) float wide[R * kStride];
    for (int64_t m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[m][r] = Floats{};
    Ahead ahead{(const char*)at(j, 0) + std::max(R * bytes(I), kDistance),
                R * bytes(kUnit) / ((M + kTurns - 1) / kTurns)};
    const bool once = kScaled<W> && M > kTurns;
    const int64_t part = std::min(kNear / M / kUnit * kUnit, once ? kChunk : I);
    for (int64_t i = 0; i < I; i += part) {
      const int64_t inputs = std::min(part, I - i);
      if (once) widen(j, R, i, inputs, wide);
      for (int64_t m = 0; m < M; m += kTurns) {
        const auto add = [&](auto turns) {
          constexpr int B = decltype(turns)::value;
          const float* in = x + m * I + B * i;
          if (once)
            dot<B, R>(wide, kStride, scales, 0, in, inputs, ahead, sums + m);
          else
            dot<B, R>(at(j, i), I / kPer<W>, scale(j, i), G, in, inputs, ahead, sums + m);
        };
        if (M - m > 3) add(std::integral_constant<int, 4>());
        if (M - m == 3) add(std::integral_constant<int, 3>());
        if (M - m == 2) add(std::integral_constant<int, 2>());
        if (M - m == 1) add(std::integral_constant<int, 1>());
      }
    }
    for (int64_t m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) y[m * J + j + r] = sum_of(sums[m][r]);
  }

  void many(int64_t begin, int64_t end) const {
    constexpr int64_t vectors = kTile / kLanes, across = kBatch / kLanes;
    alignas(64) float wide[kRows * kStride] = {};
    alignas(64) Floats sums[kRows][across];
    for (int64_t panel = 0; panel < I; panel += kPanel)
      for (int64_t m = 0; m < M; m += kBatch)
        for (int64_t j = begin; j < end; j += kRows) {
          const int64_t rows = std::min<int64_t>(end - j, kRows), batch = std::min(M - m, kBatch);
          std::memset(sums, 0, sizeof sums);
          for (int64_t i = panel; i < std::min(panel + kPanel, I); i += kChunk) {
            const int64_t inputs = std::min(kChunk, I - i);
            widen(j, rows, i, inputs, wide);
            for (int64_t t = 0; t < batch; t += kTile) {
              const int64_t V = std::min((batch - t + kLanes - 1) / kLanes, vectors);
              const float* in = x + (m + t) * I + V * kLanes * i;
              for (int64_t r = 0; r < kRows; r += kRows / V) {
                const float* from = wide + r * kStride;
                const int64_t unit = m + t ? 0 : bytes(kUnit);
                const Rows next{(const char*)at(j + kRows + r, i), bytes(I), unit};
                const auto to = (Floats(*)[across])(sums[r] + t / kLanes);
                if (V == 3) outer<3, kRows / 3>(from, in, inputs, next, to);
                if (V == 2) outer<2, kRows / 2>(from, in, inputs, next, to);
                if (V == 1) outer<1, kRows>(from, in, inputs, next, to);
              }
            }
          }
          put((const float*)sums, rows, batch, y + m * J + j, panel > 0);
        }
  }

  // Some inputs of some rows of w, as float32.
  void widen(int64_t j, int64_t rows, int64_t i, int64_t inputs, float* wide) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < inputs; k += kUnit)
#pragma GCC unroll 8
        for (int v = 0; v < kUnit; v += kLanes)
          store(wide + r * kStride + k + v, widened(at(j + r, i + k), *scale(j + r, i + k), v));
  }

  // Sums of [rows, batch] to y, transposed; `more`, if y holds those of other inputs.
  void put(const float* sums, int64_t rows, int64_t batch, float* y, bool more) const {
    for (int64_t b = 0; b < batch; b += 4)
      for (int64_t r = 0; r < rows; r += 4) {
#ifdef BLOOMJAX_AVX2
        if (b + 4 <= batch && r + 4 <= rows) {
          const float* from = sums + r * kBatch + b;
          __m128 part[4] = {_mm_load_ps(from), _mm_load_ps(from + kBatch),
                            _mm_load_ps(from + 2 * kBatch), _mm_load_ps(from + 3 * kBatch)};
          _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
          for (int k = 0; k < 4; ++k) {
            float* to = y + (b + k) * J + r;
            _mm_storeu_ps(to, more ? _mm_add_ps(_mm_loadu_ps(to), part[k]) : part[k]);
          }
          continue;
        }
#endif
        for (int64_t k = b; k < std::min(b + 4, batch); ++k)
          for (int64_t l = r; l < std::min(r + 4, rows); ++l) {
            const float sum = sums[l * kBatch + k];
            y[k * J + l] = more ? y[k * J + l] + sum : sum;
          }
      }
  }
};

// Rows [begin, end) of x as `Product` reads them; both divide by `tile`, or `end` is M. The values
// of a tile's rows lie side by side: with few rows for each vector of inputs; with many for each
// input, up to a whole vector, filled with zeros.
void arrange(const float* x, int64_t begin, int64_t end, int64_t I, int64_t tile, float* to) {
  const int64_t side = tile == kTurns ? kLanes : 1;
  for (int64_t m = begin; m < end; m += tile) {
    const int64_t rows = std::min(end - m, tile);
    const int64_t width = side > 1 ? rows : (rows + kLanes - 1) / kLanes * kLanes;
    for (int64_t part = 0; part < I; part += kChunk)
      for (int64_t r = 0; r < width; ++r) {
        const float* from = x + (m + r) * I;
        float* into = to + m * I + r * side;
        for (int64_t i = part; i < std::min(part + kChunk, I); i += side)
          if (side > 1)
            store(into + i * width, load<float>(from + i));
          else
            into[i * width] = r < rows ? from[i] : 0;
      }
  }
}

// Calls `work(begin, end)` for pieces of [0, n), on the caller's thread and the pool's. Pieces are
// taken in turn, so that the caller never waits for a thread that has not begun.
template <typename F>
void in_pieces(ffi::ThreadPool& pool, int64_t n, int64_t piece, F work) {
  struct Shared {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const int64_t pieces = (n + piece - 1) / piece;
  std::function<void()> help = [=] {
    for (int64_t p; (p = shared->taken++) < pieces; ++shared->done)
      work(p * piece, std::min(n, (p + 1) * piece));
  };
  const int64_t helpers = std::min(pool.num_threads(), pieces) - 1;
  for (int64_t h = 0; h < helpers; ++h) pool.Schedule(std::function<void()>(help));
  help();
  while (shared->done < pieces) std::this_thread::yield();
}

template <typename W>
ffi::Error run(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, const ffi::AnyBuffer& w,
               const ffi::Buffer<ffi::F32>& scales, ffi::Buffer<ffi::F32>& y) {
  const int64_t M = x.dimensions()[0], I = x.dimensions()[1];
  const int64_t J = w.dimensions()[0], G = kScaled<W> ? scales.dimensions()[1] : 0;
  if (I % kUnit || w.dimensions()[1] * kPer<W> != I || y.dimensions()[0] != M ||
      y.dimensions()[1] != J || scales.element_count() == 0 ||
      (kScaled<W> && (scales.dimensions()[0] != J || (G != 1 && G != I / kUnit))))
    return ffi::Error::InvalidArgument("bloomjax: x, weights, scales and result do not agree");
  const float* rows = x.typed_data();
  thread_local std::vector<float> arranged;  // kept: fresh pages would cost more than the copy
  if (M > 1) {
    const int64_t tile = M > kFew ? kTile : kTurns;
    arranged.resize(std::max<size_t>(arranged.size(), (M + kLanes) * I));
    in_pieces(pool, M, tile * std::max<int64_t>(65536 / (I * tile), 1),
              [rows, I, tile, to = arranged.data()](int64_t begin, int64_t end) {
                arrange(rows, begin, end, I, tile, to);
              });
    rows = arranged.data();
  }
  const Product<W> product{rows, (const W*)w.untyped_data(), scales.typed_data(), y.typed_data(),
                           M,    J, I, G};
  const int64_t parts = 4 * std::max<int64_t>(pool.num_threads(), 1);
  const int64_t least = 65536 / (I * M) + 1;  // rows that are worth a thread's waking
  const int64_t piece = std::max((J + parts - 1) / parts, least);
  in_pieces(pool, J, (piece + kRows - 1) / kRows * kRows,
            [product](int64_t begin, int64_t end) { product.rows(begin, end); });
  return ffi::Error::Success();
}

// For one query: slot b and head n of `pair` b * N + n.
template <typename W>
struct Attention {
  const float* q;
  const W *keys, *values;
  const float *key_scales, *value_scales;  // [B, N, S]; of floats, ones that are not used
  const int32_t *positions, *origins;      // [B]: of the query, and from where ALiBi counts
  const float* slopes;                     // [N]
  float* out;
  int64_t B, N, S, H;

  void operator()(int64_t pair) const {
    thread_local std::vector<float> scores;
    thread_local std::vector<Floats> sums;
    const int64_t b = pair / N, seen = std::clamp<int64_t>(positions[b] + 1, 1, S);
    scores.resize(std::max<size_t>(scores.size(), seen));
    sums.assign(H / kLanes, Floats{});
    const float* mine = q + pair * H;
    float most = -INFINITY;
    for (int64_t s = 0; s < seen; ++s) {
      const W* key = keys + (pair * S + s) * H;
      Floats sum{};
      for (int64_t h = 0; h < H; h += kLanes)
        multiply_add(sum, widened(key + h, 1, 0), load<float>(mine + h));
      float score = sum_of(sum);
      if (kScaled<W>) score *= key_scales[pair * S + s];
      score = score / std::sqrt((float)H) + slopes[pair % N] * (float)(s - origins[b]);
      most = std::max(most, scores[s] = score);
    }
    float total = 0;
    for (int64_t s = 0; s < seen; ++s) total += scores[s] = std::exp(scores[s] - most);
    for (int64_t s = 0; s < seen; ++s) {
      const W* value = values + (pair * S + s) * H;
      const Floats share = every(kScaled<W> ? scores[s] * value_scales[pair * S + s] : scores[s]);
      for (int64_t h = 0; h < H; h += kLanes)
        multiply_add(sums[h / kLanes], widened(value + h, 1, 0), share);
    }
    for (int64_t h = 0; h < H; h += kLanes) store(out + pair * H + h, sums[h / kLanes] / total);
  }
};

template <typename W>
ffi::Error look(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& q, const ffi::AnyBuffer& keys,
                const ffi::Buffer<ffi::F32>& key_scales, const ffi::AnyBuffer& values,
                const ffi::Buffer<ffi::F32>& value_scales, const ffi::Buffer<ffi::S32>& positions,
                const ffi::Buffer<ffi::S32>& origins, const ffi::Buffer<ffi::F32>& slopes,
                ffi::Buffer<ffi::F32>& out) {
  const auto sizes = keys.dimensions();
  const int64_t B = sizes[0], N = sizes[1], S = sizes[2], H = sizes[3];
  const auto count = [](const auto& buffer) { return (int64_t)buffer.element_count(); };
  if (H % kLanes || count(values) != B * N * S * H || values.element_type() != keys.element_type() ||
      count(q) != B * N * H || count(out) != B * N * H || count(slopes) != N ||
      count(positions) != B || count(origins) != B ||
      (kScaled<W> && (count(key_scales) != B * N * S || count(value_scales) != B * N * S)))
    return ffi::Error::InvalidArgument("bloomjax: query, cache and result do not agree");
  const Attention<W> attention{q.typed_data(),
                               (const W*)keys.untyped_data(),
                               (const W*)values.untyped_data(),
                               key_scales.typed_data(),
                               value_scales.typed_data(),
                               positions.typed_data(),
                               origins.typed_data(),
                               slopes.typed_data(),
                               out.typed_data(),
                               B,
                               N,
                               S,
                               H};
  in_pieces(pool, B * N, 1, [attention](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) attention(pair);
  });
  return ffi::Error::Success();
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                    ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  if (x.dimensions().size() != 2 || w.dimensions().size() != 2 || scales.dimensions().size() != 2 ||
      y->dimensions().size() != 2)
    return ffi::Error::InvalidArgument("bloomjax: expected matrices");
  switch (w.element_type()) {
    case ffi::F32: return run<float>(pool, x, w, scales, *y);
    case ffi::F16: return run<Float16>(pool, x, w, scales, *y);
    case ffi::BF16: return run<Bfloat16>(pool, x, w, scales, *y);
    case ffi::S8: return run<int8_t>(pool, x, w, scales, *y);
    case ffi::U8: return run<Pairs>(pool, x, w, scales, *y);
    default: return ffi::Error::InvalidArgument("bloomjax: no kernel for weights of this type");
  }
}

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys,
                  ffi::Buffer<ffi::F32> key_scales, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::F32> value_scales, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::S32> origins, ffi::Buffer<ffi::F32> slopes,
                  ffi::Result<ffi::Buffer<ffi::F32>> out) {
  if (keys.dimensions().size() != 4)
    return ffi::Error::InvalidArgument("bloomjax: expected a cache of four dimensions");
  const auto run = [&](auto kind) {
    return look<decltype(kind)>(pool, q, keys, key_scales, values, value_scales, positions, origins,
                                slopes, *out);
  };
  switch (keys.element_type()) {
    case ffi::F32: return run(float());
    case ffi::F16: return run(Float16());
    case ffi::BF16: return run(Bfloat16());
    case ffi::S8: return run(int8_t());
    default: return ffi::Error::InvalidArgument("bloomjax: no kernel for a cache of this type");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BloomjaxMultiply, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(BloomjaxAttend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
