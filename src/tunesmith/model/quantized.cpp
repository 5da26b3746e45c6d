// Frozen weights of few bits, read on a CPU: to a dense matrix, or straight into a product with few rows.
//
// Every value is code * scale in float, rounded once to the output's type, as the torch twins in quant/ have it: the
// results are equal bit for bit. A product rounds its weights the same way, so that it is a product with that matrix.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace {

inline float rounded(float value, const float*) { return value; }

inline float rounded(float value, const bf16*) {
    bf16 narrow;
    store(&narrow, value);
    return load(&narrow);
}

inline float half(const uint8_t* p) {  // IEEE binary16, in memory in any alignment
    uint16_t h;
    std::memcpy(&h, p, 2);
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
}

constexpr int64_t STRIP = 64;   // weights that are expanded at a time; they stay in the nearest cache
constexpr int64_t MOST = 8;     // rows of a product that share one expansion

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

// 16 weights from 8 bytes, high nibble first: out = code[nibble] * scale.
inline void expand16(const uint8_t* packed, const float* code, float scale, float* out) {
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)), mask = _mm_set1_epi8(15);
    __m128i index = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), _mm_and_si128(bytes, mask));
    __m512 found = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), _mm512_loadu_ps(code));
    _mm512_storeu_ps(out, _mm512_mul_ps(found, _mm512_set1_ps(scale)));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)), mask = _mm_set1_epi8(15);
    __m128i index = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), _mm_and_si128(bytes, mask));
    __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8), times = _mm256_set1_ps(scale);
    for (int part = 0; part < 2; part++, index = _mm_srli_si128(index, 8)) {
        __m256i wide = _mm256_cvtepu8_epi32(index);
        __m256 chosen = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, wide), _mm256_permutevar8x32_ps(high, wide),
                                         _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28)));  // bit 3 says which half
        _mm256_storeu_ps(out + 8 * part, _mm256_mul_ps(chosen, times));
    }
#else
    for (int j = 0; j < 8; j++) {
        out[2 * j] = code[packed[j] >> 4] * scale;
        out[2 * j + 1] = code[packed[j] & 15] * scale;
    }
#endif
}

// `count` weights from `at` (both multiples of 8) of a string of indices of `bits`: out = code[index] * scale.
inline void expand(const uint8_t* packed, int64_t bits, int64_t at, int64_t count, const float* code, float scale, float* out) {
    const uint8_t* bytes = packed + at * bits / 8;
    int64_t j = 0;
    if (bits == 4)
        for (; j + 16 <= count; j += 16) expand16(bytes + j / 2, code, scale, out + j);
    for (; j < count; j += 8) {
        uint32_t word = 0;
        for (int64_t i = 0; i < bits; i++) word = word << 8 | bytes[j * bits / 8 + i];
        for (int64_t i = 0; i < 8; i++) out[j + i] = code[word >> (bits * (7 - i)) & ((1u << bits) - 1)] * scale;
    }
}

// Calls use(at, count, line) with `count` weights from `at` on, in float, for all of [from, to): block by block.
template <class Use>
inline void each_strip(const uint8_t* packed, int64_t bits, const float* code, const Scales& scales, int64_t block,
                       int64_t from, int64_t to, Use use) {
    alignas(64) float line[STRIP];
    for (int64_t at = from; at < to;) {
        int64_t rest = block - at % block, count = rest < STRIP ? rest : STRIP;
        count = to - at < count ? to - at : count;
        expand(packed, bits, at, count, code, scales[at / block], line);
        use(at, count, line);
        at += count;
    }
}

constexpr int64_t CHUNK = 8192;  // weights that a thread takes at a time

template <class T>
void dequantize_blockwise(const uint8_t* packed, const float* code, const Scales& scales, T* out, int64_t size, int64_t bits,
                          int64_t block) {
    int64_t step = block * (CHUNK / block > 1 ? CHUNK / block : 1);
#pragma omp parallel for schedule(static)
    for (int64_t from = 0; from < size; from += step)
        each_strip(packed, bits, code, scales, block, from, from + step < size ? from + step : size,
                   [&](int64_t at, int64_t count, const float* line) {
#pragma omp simd
                       for (int64_t j = 0; j < count; j++) store(out + at + j, line[j]);
                   });
}

// y (n, rows) = x (n, columns) W^T, for n up to MOST; columns are a multiple of 8.
template <class T>
void product_blockwise(const uint8_t* packed, const float* code, const Scales& scales, const T* x, T* y, int64_t n,
                       int64_t rows, int64_t columns, int64_t bits, int64_t block) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float sums[MOST] = {};
        each_strip(packed, bits, code, scales, block, r * columns, (r + 1) * columns,
                   [&](int64_t at, int64_t count, float* line) {
                       const T* from = x + at - r * columns;
#pragma omp simd
                       for (int64_t j = 0; j < count; j++) line[j] = rounded(line[j], x);
                       for (int64_t i = 0; i < n; i++) {
                           float sum = 0;
#pragma omp simd reduction(+ : sum)
                           for (int64_t j = 0; j < count; j++) sum += line[j] * load(from + i * columns + j);
                           sums[i] += sum;
                       }
                   });
        for (int64_t i = 0; i < n; i++) store(y + i * rows + r, sums[i]);
    }
}

constexpr float ONE = 7.874015718698502e-3f;  // 1 / 127

template <class T>
void dequantize_rows(const int8_t* packed, const float* absmax, T* out, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float scale = absmax[r];
#pragma omp simd
        for (int64_t j = 0; j < columns; j++)
            store(out + r * columns + j, float(packed[r * columns + j]) * scale * ONE);
    }
}

template <class T>
void product_rows(const int8_t* packed, const float* absmax, const T* x, T* y, int64_t n, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float scale = absmax[r];
        for (int64_t i = 0; i < n; i++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < columns; j++)
                sum += rounded(float(packed[r * columns + j]) * scale * ONE, x) * load(x + i * columns + j);
            store(y + i * rows + r, sum);
        }
    }
}

// GGUF's blocks of 32 weights, one after the other. 4 bits: the first 16 weights are the low nibbles.
enum Ggml { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 };

inline void expand_ggml(const uint8_t* block, int64_t type, float* out) {
    float scale = half(block);
    if (type == Q8_0) {
        for (int j = 0; j < 32; j++) out[j] = scale * float(static_cast<int8_t>(block[2 + j]));
        return;
    }
    float least = type == Q4_1 ? half(block + 2) : 0.0f;
    int middle = type == Q4_0 ? 8 : 0;
    const uint8_t* nibbles = block + (type == Q4_1 ? 4 : 2);
    for (int j = 0; j < 16; j++) {
        // Rounded before the sum, as the twin has it: a whole number of 4 bits times 11 bits is exact in float.
        out[j] = scale * float(int(nibbles[j] & 15) - middle) + least;
        out[j + 16] = scale * float(int(nibbles[j] >> 4) - middle) + least;
    }
}

inline int64_t width(int64_t type) { return type == Q8_0 ? 34 : type == Q4_1 ? 20 : 18; }

template <class T>
void dequantize_ggml(const uint8_t* packed, T* out, int64_t blocks, int64_t type) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        alignas(64) float line[32];
        expand_ggml(packed + b * width(type), type, line);
#pragma omp simd
        for (int j = 0; j < 32; j++) store(out + b * 32 + j, line[j]);
    }
}

template <class T>
void product_ggml(const uint8_t* packed, const T* x, T* y, int64_t n, int64_t rows, int64_t columns, int64_t type) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float sums[MOST] = {};
        alignas(64) float line[32];
        for (int64_t b = 0; b < columns / 32; b++) {
            expand_ggml(packed + (r * columns / 32 + b) * width(type), type, line);
            for (int64_t i = 0; i < n; i++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int j = 0; j < 32; j++) sum += rounded(line[j], x) * load(x + i * columns + b * 32 + j);
                sums[i] += sum;
            }
        }
        for (int64_t i = 0; i < n; i++) store(y + i * rows + r, sums[i]);
    }
}

}  // namespace

#define BOTH(T, NAME)                                                                                                       \
    extern "C" void dequantize_blockwise_##NAME(const uint8_t* p, const float* c, const void* a, const float* n,            \
                                                const float* m, const float* o, T* out, int64_t s, int64_t bits,            \
                                                int64_t b) {                                                                \
        dequantize_blockwise(p, c, Scales{a, n, m, o}, out, s, bits, b);                                                    \
    }                                                                                                                       \
    extern "C" void product_blockwise_##NAME(const uint8_t* p, const float* c, const void* a, const float* n,               \
                                             const float* m, const float* o, const T* x, T* y, int64_t k, int64_t r,        \
                                             int64_t d, int64_t bits, int64_t b) {                                          \
        product_blockwise(p, c, Scales{a, n, m, o}, x, y, k, r, d, bits, b);                                                \
    }                                                                                                                       \
    extern "C" void dequantize_rows_##NAME(const int8_t* p, const float* a, T* out, int64_t r, int64_t d) {                 \
        dequantize_rows(p, a, out, r, d);                                                                                   \
    }                                                                                                                       \
    extern "C" void product_rows_##NAME(const int8_t* p, const float* a, const T* x, T* y, int64_t k, int64_t r,            \
                                        int64_t d) {                                                                        \
        product_rows(p, a, x, y, k, r, d);                                                                                  \
    }                                                                                                                       \
    extern "C" void dequantize_ggml_##NAME(const uint8_t* p, T* out, int64_t b, int64_t t) { dequantize_ggml(p, out, b, t); } \
    extern "C" void product_ggml_##NAME(const uint8_t* p, const T* x, T* y, int64_t k, int64_t r, int64_t d, int64_t t) {   \
        product_ggml(p, x, y, k, r, d, t);                                                                                  \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
