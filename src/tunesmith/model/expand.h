// Frozen weights of few bits, made floats eight at a time: what quantized.cpp and few_rows.cpp read.
//
// Every value is code * scale in float, as the torch twins in quant/ have it: the results are equal bit for bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int WIDE = 8, GROUP = 4;  // floats in a register, and how many registers are filled together
typedef float lanes __attribute__((vector_size(4 * WIDE)));

inline lanes lanes_at(const float* p) {
    lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

typedef uint32_t lane_bits __attribute__((vector_size(4 * WIDE)));

// The bits of the nearest bfloat16 above 16 zeros, ties to even. Weights are finite.
inline lane_bits nearest_bf16(lanes eight) {
    lane_bits bits;
    std::memcpy(&bits, &eight, sizeof bits);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

inline float half(const uint8_t* p) {  // IEEE binary16, in memory in any alignment
    uint16_t h;
    std::memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu, bits;
    if (exponent == 31) bits = sign | 0x7f800000u | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    else {
        float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

// One absmax a block, or, where `nested` is given, an index of `map` a block: map[index] * nested[block / 256] + offset.
struct Scales {
    const void* absmax;
    const float *nested, *map, *offset;

    float operator[](int64_t block) const {
        if (!nested) return static_cast<const float*>(absmax)[block];
        // volatile: rounded by itself, as the twin's is, and not fused with the sum.
        volatile float product = map[static_cast<const uint8_t*>(absmax)[block]] * nested[block / 256];
        return product + *offset;
    }
};

// Eight codes of 4 bits, a byte each in `index`: code[index] * scale.
#if defined(__AVX2__)
inline lanes chosen(__m128i index, __m256 low, __m256 high, __m256 scale) {
    __m256i wide = _mm256_cvtepu8_epi32(index);
    __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, wide), _mm256_permutevar8x32_ps(high, wide),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28)));  // bit 3 says which half
    return (lanes)_mm256_mul_ps(found, scale);
}
#endif

// The three storages. each(from, to, use) calls use(at, eight, place) with eight weights from `at` on, for all of
// [from, to), whole multiples of `unit`; `place` runs from 0 to GROUP - 1, over and over. A row and a block are
// multiples of eight: nothing less is written.

// Indices of a table, high bits first, with a scale a block.
struct Blockwise {
    const uint8_t* packed;
    const float* code;
    Scales scales;
    int64_t bits, block;

    int64_t unit() const { return block; }

    template <class Use>
    void each(int64_t from, int64_t to, Use use) const {
        for (int64_t at = from; at < to;) {
            int64_t end = std::min(at + block - at % block, to);
            float scale = scales[at / block];
#if defined(__AVX2__)
            if (bits == 4)
                for (; at + GROUP * WIDE <= end; at += GROUP * WIDE) four_bits(at, scale, use);
#endif
            for (; at < end; at += WIDE) use(at, any_bits(at, scale), 0);
        }
    }

  private:
#if defined(__AVX2__)
    template <class Use>
    void four_bits(int64_t at, float scale, Use use) const {
        __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8), times = _mm256_set1_ps(scale);
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + at / 2)), mask = _mm_set1_epi8(15);
        __m128i odd = _mm_and_si128(bytes, mask), even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
        __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
        use(at, chosen(first, low, high, times), 0);
        use(at + WIDE, chosen(_mm_srli_si128(first, 8), low, high, times), 1);
        use(at + 2 * WIDE, chosen(second, low, high, times), 2);
        use(at + 3 * WIDE, chosen(_mm_srli_si128(second, 8), low, high, times), 3);
    }
#endif

    lanes any_bits(int64_t at, float scale) const {
        const uint8_t* bytes = packed + at * bits / 8;
        float out[WIDE];
        uint32_t word = 0;
        for (int64_t i = 0; i < bits; i++) word = word << 8 | bytes[i];
        for (int64_t i = 0; i < WIDE; i++) out[i] = code[word >> (bits * (7 - i)) & ((1u << bits) - 1)] * scale;
        return lanes_at(out);
    }
};

inline lanes of_int8(const void* p) {
#if defined(__AVX2__)
    return (lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
    float out[WIDE];
    for (int i = 0; i < WIDE; i++) out[i] = float(static_cast<const int8_t*>(p)[i]);
    return lanes_at(out);
#endif
}

// int8, with a scale a row.
struct Rows {
    const int8_t* packed;
    const float* absmax;
    int64_t columns;

    int64_t unit() const { return columns; }

    template <class Use>
    void each(int64_t from, int64_t to, Use use) const {
        constexpr float ONE = 7.874015718698502e-3f;  // 1 / 127
        for (int64_t at = from; at < to;) {
            float scale = absmax[at / columns];
            int64_t end = std::min(at + columns - at % columns, to);
            for (; at + GROUP * WIDE <= end; at += GROUP * WIDE) {
#pragma GCC unroll 4
                for (int c = 0; c < GROUP; c++) use(at + c * WIDE, of_int8(packed + at + c * WIDE) * scale * ONE, c);
            }
            for (; at < end; at += WIDE) use(at, of_int8(packed + at) * scale * ONE, 0);
        }
    }
};

// GGUF's blocks of 32 weights, one after the other. 4 bits: the first 16 weights are the low nibbles.
enum GgmlType { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 };

template <GgmlType TYPE>
struct Ggml {
    const uint8_t* packed;

    int64_t unit() const { return GROUP * WIDE; }

    template <class Use>
    void each(int64_t from, int64_t to, Use use) const {
        constexpr int64_t BYTES = TYPE == Q8_0 ? 34 : TYPE == Q4_1 ? 20 : 18;
        const uint8_t* block = packed + from / 32 * BYTES;
        for (int64_t at = from; at < to; at += 32, block += BYTES) {
            float scale = half(block);
            if constexpr (TYPE == Q8_0) {
#pragma GCC unroll 4
                for (int c = 0; c < GROUP; c++) use(at + c * WIDE, of_int8(block + 2 + c * WIDE) * scale, c);
            } else four_bits(at, block + BYTES - 16, scale, TYPE == Q4_1 ? half(block + 2) : 0.0f, use);
        }
    }

  private:
    static constexpr int MIDDLE = TYPE == Q4_0 ? 8 : 0;

    // scale * (n - MIDDLE) is exact (4 bits times 11), so that it does not matter whether the sum is fused.
    template <class Use>
    static void four_bits(int64_t at, const uint8_t* nibbles, float scale, float least, Use use) {
#if defined(__AVX2__)
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)), mask = _mm_set1_epi8(15);
        __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
        use(at, value(low, scale, least), 0);
        use(at + WIDE, value(_mm_srli_si128(low, 8), scale, least), 1);
        use(at + 2 * WIDE, value(high, scale, least), 2);
        use(at + 3 * WIDE, value(_mm_srli_si128(high, 8), scale, least), 3);
    }

    static lanes value(__m128i index, float scale, float least) {
        __m256i n = _mm256_cvtepu8_epi32(index);
        if (MIDDLE) n = _mm256_sub_epi32(n, _mm256_set1_epi32(MIDDLE));
        return scale * (lanes)_mm256_cvtepi32_ps(n) + least;
    }
#else
        float out[GROUP * WIDE];
        for (int j = 0; j < 16; j++) {
            out[j] = scale * float(int(nibbles[j] & 15) - MIDDLE) + least;
            out[j + 16] = scale * float(int(nibbles[j] >> 4) - MIDDLE) + least;
        }
        for (int c = 0; c < GROUP; c++) use(at + c * WIDE, lanes_at(out + c * WIDE), c);
    }
#endif
};

template <class Use>
inline void with_ggml(const uint8_t* packed, int64_t type, Use use) {
    if (type == Q8_0) use(Ggml<Q8_0>{packed});
    else if (type == Q4_1) use(Ggml<Q4_1>{packed});
    else use(Ggml<Q4_0>{packed});
}

}  // namespace
