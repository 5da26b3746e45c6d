// Frozen weights of few bits, read on a CPU to a dense matrix.
//
// Every value is rounded once to the output's type, as the torch twins in quant/ have it.

#include "bf16.h"
#include "expand.h"

namespace {

constexpr int64_t CHUNK = 8192;  // weights that a thread takes at a time

inline void put(float* out, lanes eight) { std::memcpy(out, &eight, sizeof eight); }

inline void put(bf16* out, lanes eight) {
    typedef uint16_t narrow __attribute__((vector_size(2 * WIDE)));
    narrow high = __builtin_convertvector(nearest_bf16(eight) >> 16, narrow);
    std::memcpy(out, &high, sizeof high);
}

template <class T, class Weights>
void dequantize(const Weights& weights, T* out, int64_t size) {
    int64_t unit = weights.unit(), step = unit * (CHUNK / unit > 1 ? CHUNK / unit : 1);
#pragma omp parallel for schedule(static)
    for (int64_t from = 0; from < size; from += step)
        weights.each(from, std::min(from + step, size), [&](int64_t at, lanes eight, int) { put(out + at, eight); });
}

}  // namespace

#define BOTH(T, NAME)                                                                                                       \
    extern "C" void dequantize_blockwise_##NAME(const uint8_t* p, const float* c, const void* a, const float* n,            \
                                                const float* m, const float* o, T* out, int64_t s, int64_t bits,            \
                                                int64_t b) {                                                                \
        dequantize(Blockwise{p, c, {a, n, m, o}, bits, b}, out, s);                                                         \
    }                                                                                                                       \
    extern "C" void dequantize_rows_##NAME(const int8_t* p, const float* a, T* out, int64_t r, int64_t d) {                 \
        dequantize(Rows{p, a, d}, out, r* d);                                                                               \
    }                                                                                                                       \
    extern "C" void dequantize_ggml_##NAME(const uint8_t* p, T* out, int64_t b, int64_t t) {                                \
        with_ggml(p, t, [&](auto weights) { dequantize(weights, out, b * 32); });                                                                                \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
