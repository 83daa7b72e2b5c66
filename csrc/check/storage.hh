// Numbers of 2 bytes, rounded one at a time: written from the formats, sharing nothing with csrc/cpu/convert.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"

namespace check {

using mmvmamba::Element;

inline const char* name_of(Element element) {
  return element == Element::kSame ? "same" : element == Element::kBFloat16 ? "bfloat16" : "float16";
}

// To nearest, ties to even, with `digits` bits of fraction and exponents from 2^smallest on; infinite from 2^largest
// on.
inline uint16_t encode(double value, int digits, int smallest, int largest) {
  const int exponent_bits = 15 - digits;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << digits);
  if (std::isnan(value)) return infinity | static_cast<uint16_t>(1 << (digits - 1));
  const double size = std::fabs(value);
  if (std::isinf(size)) return sign | infinity;
  const int exponent = size == 0 ? smallest : std::max(std::ilogb(size), smallest);
  const int64_t steps = static_cast<int64_t>(std::nearbyint(std::ldexp(size, digits - exponent)));
  // A fraction that rounds up to 2 carries into the exponent by itself; a denormal number has the field 0.
  const int64_t bits = (static_cast<int64_t>(exponent - smallest) << digits) + steps;
  if (exponent > largest || bits >= infinity) return sign | infinity;
  return sign | static_cast<uint16_t>(bits);
}

inline double decode(uint16_t bits, int digits, int smallest) {
  const int field = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (field == (1 << (15 - digits)) - 1)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (field == 0) return sign * std::ldexp(fraction, smallest - digits);
  return sign * std::ldexp(fraction + (1 << digits), field - 1 + smallest - digits);
}

inline uint16_t to_bits(double value, Element element) {
  return element == Element::kBFloat16 ? encode(value, 7, -126, 127) : encode(value, 10, -14, 15);
}

inline double from_bits(uint16_t bits, Element element) {
  return element == Element::kBFloat16 ? decode(bits, 7, -126) : decode(bits, 10, -14);
}

}  // namespace check
