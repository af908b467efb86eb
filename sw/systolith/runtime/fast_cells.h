// The arithmetic of the floating-point cells of the `rtl-fast` device, called from fast_cells.v.
//
// Part of the loops over the lanes (lanes.cpp), so that the arithmetic stands in them itself, and by
// lanes.h in front of every file that Verilator writes. Without branches, so that vector instructions
// can be made of it.

#ifndef SYSTOLITH_FAST_CELLS_H
#define SYSTOLITH_FAST_CELLS_H

#include <cfloat>
#include <cstdint>
#include <cstring>
#include <limits>

static_assert(FLT_EVAL_METHOD == 0, "FP32 results must be rounded at once: no x87");
static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559,
              "IEEE-754 arithmetic is needed");
#ifdef __FAST_MATH__
#error "-ffast-math would change bits"
#endif

namespace systolith {

constexpr uint32_t kCanonicalNan = 0x7FC00000;

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline uint32_t fp32_bits(float value) {
    return value == value ? bits_as<uint32_t>(value) : kCanonicalNan;
}

// With masks: of C++'s own choice the compiler often makes branches, which no vector has.
inline uint32_t pick(uint32_t select, uint32_t one, uint32_t zero) {
    return zero ^ ((0u - select) & (one ^ zero));
}

inline uint64_t pick(uint32_t select, uint64_t one, uint64_t zero) {
    return zero ^ ((0ull - select) & (one ^ zero));
}

}  // namespace systolith

inline unsigned int fast_add(unsigned int a, unsigned int b) {
    using namespace systolith;
    return fp32_bits(bits_as<float>(a) + bits_as<float>(b));
}

inline unsigned int fast_mul(unsigned int a, unsigned int b) {
    using namespace systolith;
    return fp32_bits(bits_as<float>(a) * bits_as<float>(b));
}

// The modes of MulMode of arith/fp32.py.
inline unsigned int fast_word_mul(unsigned int a, unsigned int b, unsigned int mode) {
    using namespace systolith;
    // Above 31 nothing is left of a word shifted in two steps.
    unsigned int some = b > 31 ? 31 : b, rest = b > 31;
    unsigned int word = static_cast<unsigned int>(static_cast<int>(a) >> some);
    word = pick(mode == 3, a >> some >> rest, word);
    word = pick(mode == 2, a << some << rest, word);
    word = pick(mode == 1, a * b, word);
    return pick(mode == 0, fast_mul(a, b), word);
}

// A number in the encoding `Narrow` of tensor/mac.py as a double, of which these are the upper 32
// bits, the others being 0: sign in bit 0, exponent in bits 1 to 9, significand in bits 10 to 20,
// its top bit clear only for zero, infinity in bit 21, NaN in bit 22.
inline unsigned int fast_factor(unsigned int x) {
    unsigned int exponent = static_cast<unsigned int>(static_cast<int>(x >> 1 << 23) >> 3);
    unsigned int finite = (exponent + (1023u << 20)) | (x & 0x3FFu << 10);
    unsigned int special = (x & 3u << 21) != 0 ? 0x7FFu << 20 : 0;
    return (finite & (0u - (x >> 20 & 1))) | special | (x >> 22 & 1) << 19 | x << 31;
}

// Exact product, as a double, of two numbers in that encoding: the significands' product has 22
// bits and exponents reach from -266 to 254.
inline uint64_t fast_product(unsigned int a, unsigned int w) {
    using namespace systolith;
    double left = bits_as<double>(static_cast<uint64_t>(fast_factor(a)) << 32);
    double right = bits_as<double>(static_cast<uint64_t>(fast_factor(w)) << 32);
    return bits_as<uint64_t>(left * right);
}

// One half of a pair, in the encoding `Fp8` of tensor/mac_fp8x2.py, as `Narrow`: sign in bit 0,
// exponent in bits 1 to 5, significand in bits 6 to 9, infinity in bit 10, NaN in bit 11.
inline unsigned int fast_widen(unsigned int half) {
    unsigned int exponent = (half >> 1 & 0xF) | (0u - (half >> 5 & 1)) << 4;
    return (half & 1) | (exponent & 0x1FF) << 1 | (half >> 6 & 0xF) << 17 | half >> 10 << 21;
}

// Product of two numbers or pairs in the encoding `Factor` of tensor/mac_fp8x2.py: a number in bits 0
// to 22, in which bits 6 to 16 are free if it is FP8 and hold, with bit 23, the second of a pair;
// bit 24 says that it is one. Pairs give the sum of two products, rounded to FP32: both are exact
// in FP32, so an FP32 addition rounds once.
inline uint64_t fast_product_fp8x2(unsigned int a, unsigned int w) {
    using namespace systolith;
    unsigned int first[2], second[2];
    const unsigned int factors[2] = {a, w};
    for (int i = 0; i < 2; ++i) {
        unsigned int bits = factors[i];
        unsigned int low = fast_widen((bits & 0x3F) | (bits >> 17 & 0x3F) << 6);
        unsigned int high = fast_widen((bits >> 6 & 0x7FF) | (bits >> 23 & 1) << 11);
        first[i] = bits >> 24 ? low : bits & 0x7FFFFF;
        second[i] = bits >> 24 ? high : 0;
    }
    uint64_t one = fast_product(first[0], first[1]);
    uint64_t other = fast_product(second[0], second[1]);
    float both =
        static_cast<float>(bits_as<double>(one)) + static_cast<float>(bits_as<double>(other));
    return (a & w) >> 24 ? bits_as<uint64_t>(static_cast<double>(both)) : one;
}

// acc + addend, rounded once to FP32 although it is rounded to a double on the way. The addend is a
// product, or -0 to add nothing, not even to -0.
//
// The double is exact if the sum's bits span at most 53 places. If they span more, one of the two is
// far below the other:
// - the product (22 bits) below 2**-30 of acc, or
// - acc (24 bits) below 2**-28 of the product. The product then has no bit below FP32's smallest
//   subnormal, since acc has none, so with its 22 bits it is an FP32 number, or above their range.
// The sum is then closer to the larger one than to any tie between FP32 numbers (or, above their
// range, to the tie with infinity), and rounding to a double first does not take it across one.
inline unsigned int fast_accumulate(unsigned int acc, uint64_t addend) {
    using namespace systolith;
    double sum = static_cast<double>(bits_as<float>(acc)) + bits_as<double>(addend);
    return fp32_bits(static_cast<float>(sum));
}

#endif
