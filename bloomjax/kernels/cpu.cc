// y[M, J] = x[M, I] times the transpose of w[J, I], for w in as few bits as it has.
//
// M rows of x, J outputs, I inputs, G scales of a row of w. Every byte of w is read from memory
// once, and becomes float32 in registers: for every four rows of x anew, since arithmetic is what
// those take time for, and w is in the first cache by then. Outputs are split over XLA's own
// threads. The invariant: a sum is kept in kLanes interleaved parts, in the same order whatever M
// is, so that no row of y depends on how many others there are.

#include <algorithm>
#include <atomic>
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
constexpr int kRows = 6;       // of w at a time
constexpr int64_t kTurns = 4;  // rows of x at a time: with three of w, 12 sums in 16 registers

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

// a * b + c, rounded once where the processor can. Written out, since compilers contract at will.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef BLOOMJAX_AVX2
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  for (int l = 0; l < kLanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
#else
  return a * b + c;
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

inline float sum_of(Floats lanes) {
  float sums[kLanes];
  store(sums, lanes);
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// y[b * J + r] = x[b] . w[r], for R rows of w and B rows of x whose vectors take turns. What comes
// kRows further is fetched if `ahead`. Loops are unrolled by name, lest the sums live in memory.
template <int B, int R, bool ahead, typename W>
inline void products(const W* w, const float* scales, int64_t G, const float* x, int64_t I,
                     float* y, int64_t J) {
  const int64_t stride = I / kPer<W>;
  Floats acc[B][R] = {};
  for (int64_t u = 0; u < I; u += kUnit, w += kUnit / kPer<W>, scales += G > 1) {
    if (ahead)
      for (int r = 0; r < R; ++r)
        for (int64_t b = 0; b < kUnit / kPer<W> * sizeof(W); b += 64)
          __builtin_prefetch((const char*)(w + (r + kRows) * stride) + b);
#pragma GCC unroll 8
    for (int v = 0; v < kUnit; v += kLanes, x += B * kLanes) {
      Floats wide[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) wide[r] = widened(w + r * stride, scales[r * G], v);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const Floats in = load<float>(x + b * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[b][r] = multiply_add(wide[r], in, acc[b][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[b * J + r] = sum_of(acc[b][r]);
}

template <typename W>
struct Product {
  const float* x;  // kTurns rows at a time, their vectors taking turns, and what is left likewise
  const W* w;
  const float* scales;  // [J, G]; of floats, whose G is 0, one that is not used
  float* y;
  int64_t M, J, I, G;

  void rows(int64_t begin, int64_t end) const {
    int64_t j = begin;
    for (; j + kRows <= end; j += kRows) block<kRows>(j);
    for (; j < end; ++j) block<1>(j);
  }

  template <int R>
  void block(int64_t j) const {
    int64_t m = 0;
    for (; m + kTurns <= M; m += kTurns) turn<kTurns, R>(m, j);
    if (M - m == 3) turn<3, R>(m, j);
    if (M - m == 2) turn<2, R>(m, j);
    if (M - m == 1) turn<1, R>(m, j);
  }

  template <int B, int R>
  void turn(int64_t m, int64_t j) const {
    constexpr int some = B > 2 && R == kRows ? kRows / 2 : R;
    for (int r = 0; r < R; r += some) {
      const int64_t row = j + r;
      const W* from = w + row * (I / kPer<W>);
      if (m == 0)
        products<B, some, true>(from, scales + row * G, G, x + m * I, I, y + m * J + row, J);
      else
        products<B, some, false>(from, scales + row * G, G, x + m * I, I, y + m * J + row, J);
    }
  }
};

// Rows [begin, end) of x as `Product` reads them; both divide by kTurns, or `end` is M.
void in_turns(const float* x, int64_t begin, int64_t end, int64_t I, float* to) {
  for (int64_t m = begin; m < end; m += kTurns)
    for (int64_t i = 0, turns = std::min(end - m, kTurns); i < I; i += kLanes)
      for (int64_t t = 0; t < turns; ++t)
        store(to + m * I + turns * i + t * kLanes, load<float>(x + (m + t) * I + i));
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
  std::vector<float> turns(M > 1 ? M * I : 0);
  if (M > 1) {
    in_pieces(pool, M, kTurns * std::max<int64_t>(65536 / I, 1),
              [rows, I, to = turns.data()](int64_t begin, int64_t end) {
                in_turns(rows, begin, end, I, to);
              });
    rows = turns.data();
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BloomjaxMultiply, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
