// Reading and writing the cards' number formats.
#pragma once
#include <library_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace card {
inline float of_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {  // to the nearest, halves to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// An 8-bit float with `mantissa` bits; only E4M3 goes on where others have infinity.
inline float of_fp8(uint8_t bits, int mantissa, int bias) {
  int exponent = (bits & 0x7f) >> mantissa, rest = bits & ((1 << mantissa) - 1), last = (0x7f >> mantissa);
  float part = float(rest) / (1 << mantissa);
  float value = exponent ? std::ldexp(1 + part, exponent - bias) : std::ldexp(part, 1 - bias);
  if (mantissa == 3 && (bits & 0x7f) == 0x7f) value = NAN;
  if (mantissa == 2 && exponent == last) value = rest ? NAN : INFINITY;
  return bits >> 7 ? -value : value;
}

inline float load(const void* data, size_t i, cudaDataType type) {
  switch (type) {
    case CUDA_R_32F:
      return static_cast<const float*>(data)[i];
    case CUDA_R_16BF:
      return of_bf16(static_cast<const uint16_t*>(data)[i]);
    case CUDA_R_16F:
      return static_cast<const _Float16*>(data)[i];
    case CUDA_R_8F_E4M3:
      return of_fp8(static_cast<const uint8_t*>(data)[i], 3, 7);
    case CUDA_R_8F_E5M2:
      return of_fp8(static_cast<const uint8_t*>(data)[i], 2, 15);
    default:
      fprintf(stderr, "numbers.h: type %d\n", type);
      abort();
  }
}

inline void store(void* data, size_t i, cudaDataType type, float value) {
  switch (type) {
    case CUDA_R_32F:
      static_cast<float*>(data)[i] = value;
      return;
    case CUDA_R_16BF:
      static_cast<uint16_t*>(data)[i] = to_bf16(value);
      return;
    case CUDA_R_16F:
      static_cast<_Float16*>(data)[i] = value;
      return;
    default:
      fprintf(stderr, "numbers.h: type %d\n", type);
      abort();
  }
}
}  // namespace card
