// Numbers, and vectors of as many as a register holds.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

using std::int64_t;
using std::uint32_t;

namespace {

struct Bfloat16 {
  std::uint16_t bits;
};

// A whole number of a vector that was stretched to the length LONGEST.
struct Fixed {
  std::int16_t value;
};

// One of eight bits: of each SPAN neighbours of a vector the largest is 127.
struct Small {
  std::int8_t value;
};
constexpr int64_t SPAN = 32;

// The inputs of weights of eight bits. Small ones are worth what they lose where an instruction
// multiplies four of them for every two others.
#ifdef __AVX512VNNI__
using Whole = Small;
#else
using Whole = Fixed;
#endif

template <class T>
constexpr bool is_whole = std::is_same_v<T, Fixed> || std::is_same_v<T, Small>;

// A product of such a vector with n weights of eight bits is at most LONGEST * 127 * sqrt(n) (Cauchy
// and Schwarz), which 32 bits hold for all n to a quarter of a million.
constexpr float LONGEST = 32766;

template <class To, class From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widened(float x) { return x; }
inline float widened(Bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

inline void put(float x, float& to) { to = x; }

// To the nearest, ties to even; a NaN stays one.
inline void put(float x, Bfloat16& to) {
  uint32_t bits = same_bits<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = std::uint16_t(x != x ? 0x7fc0 : rounded);
}

constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer

// To the nearest of the numbers from -32768 to 32767, in which the sum's bits end.
inline void put(float x, Fixed& to) { to.value = std::int16_t(same_bits<uint32_t>(x + SHIFT)); }

inline void put(float x, Small& to) { to.value = std::int8_t(same_bits<uint32_t>(x + SHIFT)); }

// exp(x) = 2^n exp(r), |r| <= log(2) / 2, with the minimax polynomial of Cephes' expf: error 1e-7.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float n = (x * 1.44269504f + SHIFT) - SHIFT;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * same_bits<float>(uint32_t(std::int32_t(n) + 127) << 23);
}

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef std::int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef std::int8_t Bytes __attribute__((vector_size(2 * LANES)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Lanes lanes(const float* from) { return load<Lanes>(from); }
inline Lanes lanes(const Bfloat16* from) {
  return same_bits<Lanes>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline Shorts widened(Bytes bytes) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // of which gcc 12 makes four instructions
  return same_bits<Shorts>(_mm256_cvtepi8_epi16(same_bits<__m128i>(bytes)));
#else
  return __builtin_convertvector(bytes, Shorts);
#endif
}

// Products are made of words of 32 bits: one float, or two or four neighbours of fewer bits.
template <class T>
constexpr int64_t IN_WORD = 4 / int64_t(sizeof(T));
template <class T>
constexpr int64_t words(int64_t numbers) {
  return (numbers + IN_WORD<T> - 1) / IN_WORD<T>;
}

// Sums of whole numbers are exact.
template <class T>
using Sums = std::conditional_t<is_whole<T>, Integers, Lanes>;

inline Lanes as_floats(Lanes sums) { return sums; }
inline Lanes as_floats(Integers sums) { return __builtin_convertvector(sums, Lanes); }

// sum + a b, of each pair of words.
template <class T>
inline Sums<T> fused(Sums<T> sum, Words a, Words b);

template <>
inline Lanes fused<float>(Lanes sum, Words a, Words b) {
  return sum + same_bits<Lanes>(a) * same_bits<Lanes>(b);
}

template <>
inline Lanes fused<Bfloat16>(Lanes sum, Words a, Words b) {
#ifdef __AVX512BF16__
  return same_bits<Lanes>(_mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(a),
                                           same_bits<__m512bh>(b)));
#else
  sum += same_bits<Lanes>(a << 16) * same_bits<Lanes>(b << 16);
  return sum + same_bits<Lanes>(a & 0xffff0000u) * same_bits<Lanes>(b & 0xffff0000u);
#endif
}

template <>
inline Integers fused<Fixed>(Integers sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return same_bits<Integers>(_mm512_dpwssd_epi32(same_bits<__m512i>(sum), same_bits<__m512i>(a),
                                                 same_bits<__m512i>(b)));
#elif defined(__AVX512BW__)
  return sum + same_bits<Integers>(_mm512_madd_epi16(same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + same_bits<Integers>(_mm256_madd_epi16(same_bits<__m256i>(a), same_bits<__m256i>(b)));
#else
  const Integers x = same_bits<Integers>(a), y = same_bits<Integers>(b);
  return sum + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

#ifdef __AVX512VNNI__
// Of these a are weights, to which 128 was added.
template <>
inline Integers fused<Small>(Integers sum, Words a, Words b) {
  return same_bits<Integers>(_mm512_dpbusd_epi32(same_bits<__m512i>(sum), same_bits<__m512i>(b),
                                                 same_bits<__m512i>(a)));
}
#endif

inline float total(Lanes v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(same_bits<__m512>(v));
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
#endif
}

}  // namespace
