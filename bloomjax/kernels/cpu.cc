// What decoding does on CPU: products with packed weights, and attention over a cache.
//
// y[M, J] = x[M, I] times the transpose of w[J, I], for w in as few bits as it has; M rows of x, J
// outputs, I inputs, G scales of a row of w. Outputs are split over XLA's own threads. Few rows of
// x: every byte of w is read from memory once, fetched far ahead of its use, and becomes float32 in
// registers, whose lanes are inputs; sums are taken in the same order whatever M is, so that a row
// of y is the same bit by bit for any other rows, up to kFew of them.
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

// Few rows of x: up to four, and three of w, at a time, which are 12 sums in 16 registers; then, by
// turns, the next four with the same part of w, which is in the first cache by then.
constexpr int64_t kFew = 16, kTurn = 4, kPart = 1024;
constexpr int64_t kDistance = 12288;  // bytes from what is read of w to what is fetched, or more

// Many rows of x: a tile, and 12 rows of w, at a time. The first cache, half of which is often
// another's, keeps a chunk of inputs of these, 12 KiB, and the second a panel of inputs of a batch.
constexpr int64_t kTile = 3 * kLanes, kBatch = 6 * kTile;
constexpr int kRows = 12;
constexpr int64_t kChunk = 256, kPanel = 1024;

constexpr int64_t kPad = 16;  // after a widened row: were they a power of two apart, so would banks

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

// On AVX2 the instruction itself, since GCC would gather those of a loop in one place.
inline void fetch(const char* line) {
#ifdef BLOOMJAX_AVX2
  asm volatile("prefetcht0 %0" : : "m"(*line));
#else
  __builtin_prefetch(line);
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
struct Wholes {  // int8 with one scale for all of a row, which multiplies its sums
  int8_t bits;
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

inline Floats widened(const Wholes* w, float, int v) {
  return __builtin_convertvector(ints(&w[v].bits), Floats);
}

inline Floats widened(const int8_t* w, float scale, int v) {
  return __builtin_convertvector(ints(w + v), Floats) * scale;
}

inline Floats widened(const Pairs* w, float scale, int v) {
  constexpr int half = kUnit / 2;
  auto bits = ints(&w[v % half].bits);
  return __builtin_convertvector((v < half ? bits & 15 : bits >> 4) - 8, Floats) * scale;
}

// The sums of four vectors: halves are added until one value is left.
inline void sum_four(const Floats* v, float* to) {
#ifdef BLOOMJAX_AVX2
  const auto halved = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  };
  const __m256 a = halved(v[0], v[1]), b = halved(v[2], v[3]);
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int k = 0; k < 4; ++k) to[k] = (v[k][0] + v[k][2]) + (v[k][1] + v[k][3]);
#endif
}

// The two loops that all time goes into. Sums, and of x and w whichever are fewer, must live in
// registers: hence loops unrolled by name, and functions apart from others' variables.

// to[r * B + b] = x[b] . w[r] for some inputs of R rows of w and of B rows of x, whose vectors take
// turns. Meanwhile `next` is fetched, in even steps: kLines lines of 64 bytes for each unit.
template <int B, int R, int kLines, typename W>
__attribute__((noinline)) void dot(const W* w, int64_t stride, const float* scales, int64_t G,
                                   const float* x, int64_t inputs, const char* next, int64_t step,
                                   float* to) {
  constexpr int kSums = (B * R + 3) / 4 * 4, kVectors = kUnit / kLanes;
  Floats acc[kSums] = {};
  const W* rows[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) rows[r] = w + r * stride;
  for (int64_t i = 0; i < inputs; i += kUnit, next += step, scales += G > 1)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v, x += B * kLanes) {
#pragma GCC unroll 32
      for (int line = 0; line < kLines; ++line)
        if (line * kVectors / kLines == v) fetch(next + line * 64);
      const auto in = [&](int b) { return load<float>(x + b * kLanes); };
      const auto wide = [&](int r) {
        return widened(rows[r] + i / kPer<W>, scales[r * G], v * kLanes);
      };
      Floats few[std::min(B, R)];
#pragma GCC unroll 4
      for (int k = 0; k < std::min(B, R); ++k) few[k] = B < R ? in(k) : wide(k);
#pragma GCC unroll 4
      for (int k = 0; k < std::max(B, R); ++k) {
        const Floats one = B < R ? wide(k) : in(k);
#pragma GCC unroll 4
        for (int l = 0; l < std::min(B, R); ++l)
          multiply_add(acc[B < R ? k * B + l : l * B + k], one, few[l]);
      }
    }
#pragma GCC unroll 4
  for (int k = 0; k < kSums; k += 4) sum_four(acc + k, to + k);
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
        const Floats weight = every(wide[r * (kChunk + kPad)]);
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
  const float* scales;  // [J, G]; of Wholes [J], whose G is 0, as of floats, which have none
  float* y;
  int64_t M, J, I, G;

  static constexpr int64_t bytes(int64_t inputs) { return inputs / kPer<W> * sizeof(W); }
  const W* at(int64_t j, int64_t i) const { return w + (j * I + i) / kPer<W>; }
  const float* scale(int64_t j, int64_t i) const {
    return scales + j * G + (G > 1 ? i / kUnit : 0);
  }

  // What sums of a row are multiplied by.
  float factor(int64_t j) const { return std::is_same_v<W, Wholes> ? scales[j] : 1; }

  void rows(int64_t begin, int64_t end) const {
    if (M > kFew) return many(begin, end);
    int64_t j = begin;
    if (M <= 2)
      for (; j + 4 <= end; j += 4) few<4, false>(j);
    for (; j + 3 <= end; j += 3) M > kTurn ? few<3, true>(j) : few<3, false>(j);
    for (; j < end; ++j) M > kTurn ? few<1, true>(j) : few<1, false>(j);
  }

  // R rows of w with few rows of x, in one turn or more. What takes long to widen is widened once
  // for all turns.
  template <int R, bool kMore>
  void few(int64_t j) const {
    constexpr int kLines = (R * bytes(kUnit) / (kMore ? 2 : 1) + 63) / 64;
    constexpr bool kOnce = kScaled<W> && kMore;
    constexpr int64_t kStride = kPart + kPad;
    alignas(64) float wide[kOnce ? R * kStride : 1];
    const char* next = (const char*)at(j, 0) + std::max(R * bytes(I), kDistance);
    const int64_t step = R * bytes(kUnit) / ((M + kTurn - 1) / kTurn);  // of a turn
    for (int64_t i = 0; i < I; i += kPart) {
      const int64_t inputs = std::min(kPart, I - i);
      if (kOnce) widen(j, R, i, inputs, wide, kStride);
      for (int64_t m = 0; m < M; m += kTurn) {
        const auto turn = [&](auto rows) {
          constexpr int B = decltype(rows)::value;
          const float* in = x + m * I + B * i;
          float sums[4 * R];
          if constexpr (kOnce)
            dot<B, R, kLines>(wide, kStride, scales, 0, in, inputs, next, step, sums);
          else
            dot<B, R, kLines>(at(j, i), I / kPer<W>, scale(j, i), G, in, inputs, next, step, sums);
          next += inputs / kUnit * step;
          for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r) {
              float& to = y[(m + b) * J + j + r];
              to = (i ? to : 0) + sums[r * B + b] * factor(j + r);
            }
        };
        if (M - m > 3) turn(std::integral_constant<int, 4>());
        if (M - m == 3) turn(std::integral_constant<int, 3>());
        if (M - m == 2) turn(std::integral_constant<int, 2>());
        if (M - m == 1) turn(std::integral_constant<int, 1>());
      }
    }
  }

  void many(int64_t begin, int64_t end) const {
    constexpr int64_t kStride = kChunk + kPad, vectors = kTile / kLanes, across = kBatch / kLanes;
    alignas(64) float wide[kRows * kStride] = {};
    alignas(64) Floats sums[kRows][across];
    for (int64_t panel = 0; panel < I; panel += kPanel)
      for (int64_t m = 0; m < M; m += kBatch)
        for (int64_t j = begin; j < end; j += kRows) {
          const int64_t rows = std::min<int64_t>(end - j, kRows), batch = std::min(M - m, kBatch);
          std::memset(sums, 0, sizeof sums);
          for (int64_t i = panel; i < std::min(panel + kPanel, I); i += kChunk) {
            const int64_t inputs = std::min(kChunk, I - i);
            widen(j, rows, i, inputs, wide, kStride);
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
          for (int64_t r = 0; r < rows; ++r)
            for (Floats& sum : sums[r]) sum *= factor(j + r);
          put((const float*)sums, rows, batch, y + m * J + j, panel > 0);
        }
  }

  // Some inputs of some rows of w, as float32.
  void widen(int64_t j, int64_t rows, int64_t i, int64_t inputs, float* wide,
             int64_t stride) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < inputs; k += kUnit)
#pragma GCC unroll 8
        for (int v = 0; v < kUnit; v += kLanes)
          store(wide + r * stride + k + v, widened(at(j + r, i + k), *scale(j + r, i + k), v));
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
  const int64_t side = tile == kTurn ? kLanes : 1;
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

// Calls `work(begin, end)` for pieces of [0, n), on the caller's thread and the pool's. A thread
// takes half of its share of what is left, in whole `units`: the caller never waits for a thread
// that has not begun, nor long for one that has.
template <typename F>
void in_pieces(ffi::ThreadPool& pool, int64_t n, int64_t unit, F work) {
  struct Shared {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const int64_t threads = std::min(std::max<int64_t>(pool.num_threads(), 1), (n + unit - 1) / unit);
  std::function<void()> help = [=] {
    for (int64_t begin = shared->taken; begin < n;) {
      const int64_t part = (n - begin) / (2 * threads) / unit * unit;
      const int64_t end = std::min(begin + std::max(part, unit), n);
      if (!shared->taken.compare_exchange_weak(begin, end)) continue;
      work(begin, end);
      shared->done += end - begin;
      begin = shared->taken;
    }
  };
  for (int64_t h = 1; h < threads; ++h) pool.Schedule(std::function<void()>(help));
  help();
  while (shared->done < n) std::this_thread::yield();
}

template <typename W>
ffi::Error run(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, const ffi::AnyBuffer& w,
               const ffi::Buffer<ffi::F32>& scales, ffi::Buffer<ffi::F32>& y) {
  const int64_t M = x.dimensions()[0], I = x.dimensions()[1];
  const int64_t J = w.dimensions()[0], G = kScaled<W> ? I / kUnit : 0;
  if (I % kUnit || w.dimensions()[1] * kPer<W> != I || y.dimensions()[0] != M ||
      y.dimensions()[1] != J || scales.element_count() == 0 ||
      (sizeof(W) == 1 &&
       (scales.dimensions()[0] != J || scales.dimensions()[1] != std::max<int64_t>(G, 1))))
    return ffi::Error::InvalidArgument("bloomjax: x, weights, scales and result do not agree");
  const float* rows = x.typed_data();
  struct alignas(64) Line {
    float values[16];
  };
  thread_local std::vector<Line> arranged;  // kept: fresh pages would cost more than the copy
  if (M > 1) {
    const int64_t tile = M > kFew ? kTile : kTurn;
    arranged.resize(std::max<size_t>(arranged.size(), (M + kLanes) * I / 16));
    in_pieces(pool, M, tile * std::max<int64_t>(65536 / (I * tile), 1),
              [rows, I, tile, to = arranged.data()->values](int64_t begin, int64_t end) {
                arrange(rows, begin, end, I, tile, to);
              });
    rows = arranged.data()->values;
  }
  const Product<W> product{rows, (const W*)w.untyped_data(), scales.typed_data(), y.typed_data(),
                           M,    J, I, G};
  // Rows that are worth a thread's waking, or, of many, reading all of x.
  const int64_t least = M > kFew ? 4 * kRows : 65536 / (I * M) + 1;
  in_pieces(pool, J, (least + kRows - 1) / kRows * kRows,
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
    const int64_t b = pair / N, first = pair * S;
    const int64_t seen = std::clamp<int64_t>(positions[b] + 1, 1, S);
    scores.resize(std::max<size_t>(scores.size(), seen));
    const float root = std::sqrt((float)H), slope = slopes[pair % N];
    float most = -INFINITY;
    for (int64_t s = 0; s < seen; s += 4) {
      float four[4];
      along(first, s, seen, q + pair * H, four);
      for (int64_t k = s; k < std::min(s + 4, seen); ++k) {
        const float score = kScaled<W> ? four[k - s] * key_scales[first + k] : four[k - s];
        scores[k] = score / root + slope * (float)(k - origins[b]);
        most = std::max(most, scores[k]);
      }
    }
    float total = 0;
    for (int64_t s = 0; s < seen; ++s) total += scores[s] = std::exp(scores[s] - most);
    for (int64_t s = 0; s < seen; ++s)
      scores[s] *= (kScaled<W> ? value_scales[first + s] : 1) / total;
    int64_t h = 0;
    for (; h + 8 * kLanes <= H; h += 8 * kLanes) mixed<8>(scores.data(), seen, pair, h);
    for (; h < H; h += kLanes) mixed<1>(scores.data(), seen, pair, h);
  }

  // A query with four keys from place s on, or with those that there are.
  void along(int64_t first, int64_t s, int64_t seen, const float* query, float* to) const {
    Floats sums[4] = {};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const W* key = keys + (first + std::min(s + k, seen - 1)) * H;
      for (int64_t h = 0; h < H; h += kLanes)
        multiply_add(sums[k], widened(key + h, 1, 0), load<float>(query + h));
    }
    sum_four(sums, to);
  }

  // V vectors of the output, from h on.
  template <int V>
  void mixed(const float* shares, int64_t seen, int64_t pair, int64_t h) const {
    Floats sums[V] = {};
    const W* value = values + pair * S * H + h;
    for (int64_t s = 0; s < seen; ++s, value += H) {
      const Floats share = every(shares[s]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) multiply_add(sums[v], widened(value + v * kLanes, 1, 0), share);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + pair * H + h + v * kLanes, sums[v]);
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
    case ffi::S8:
      return scales.dimensions()[1] == 1 ? run<Wholes>(pool, x, w, scales, *y)
                                         : run<int8_t>(pool, x, w, scales, *y);
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
