// Products of few rows with frozen weights of few bits: y (n, rows) = x (n, columns) W^T, without a dense W.
//
// A weight is expanded once for up to eight rows, and rounded as the dense matrix would be, so that it is a product with
// that matrix; sums are in float. Columns are a multiple of 32.

#include <vector>

#include "bf16.h"
#include "dots.h"

namespace {

template <int N, class Weights>
void together(const Weights& weights, bool narrow, const float* x, float* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        Sums<N> sums;
        weights.each(r * columns, (r + 1) * columns, [&](int64_t at, lanes eight, int place) {
            sums.add(narrow ? rounded(eight) : eight, x + at - r * columns, columns, place);
        });
        for (int i = 0; i < N; i++) y[i * rows + r] = sums.total(i);
    }
}

template <class Weights>
void all(const Weights& weights, bool narrow, const float* x, float* y, int64_t n, int64_t rows, int64_t columns) {
    while (n > 0) {
        int64_t taken = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
        if (taken == 8) together<8>(weights, narrow, x, y, rows, columns);
        else if (taken == 4) together<4>(weights, narrow, x, y, rows, columns);
        else if (taken == 2) together<2>(weights, narrow, x, y, rows, columns);
        else together<1>(weights, narrow, x, y, rows, columns);
        n -= taken, x += taken * columns, y += taken * rows;
    }
}

template <class Weights>
void product(const Weights& weights, const float* x, float* y, int64_t n, int64_t rows, int64_t columns) {
    all(weights, false, x, y, n, rows, columns);
}

template <class Weights>
void product(const Weights& weights, const bf16* x, bf16* y, int64_t n, int64_t rows, int64_t columns) {
    std::vector<float> wide(n * columns), sums(n * rows);
    for (int64_t j = 0; j < n * columns; j++) wide[j] = load(x + j);
    all(weights, true, wide.data(), sums.data(), n, rows, columns);
    for (int64_t j = 0; j < n * rows; j++) store(y + j, sums[j]);
}

}  // namespace

#define BOTH(T, NAME)                                                                                                     \
    extern "C" void product_blockwise_##NAME(const uint8_t* p, const float* c, const void* a, const float* n,             \
                                             const float* m, const float* o, const T* x, T* y, int64_t k, int64_t r,      \
                                             int64_t d, int64_t bits, int64_t b) {                                        \
        product(Blockwise{p, c, {a, n, m, o}, bits, b}, x, y, k, r, d);                                                   \
    }                                                                                                                     \
    extern "C" void product_rows_##NAME(const int8_t* p, const float* a, const T* x, T* y, int64_t k, int64_t r,          \
                                        int64_t d) {                                                                      \
        product(Rows{p, a, d}, x, y, k, r, d);                                                                            \
    }                                                                                                                     \
    extern "C" void product_ggml_##NAME(const uint8_t* p, const T* x, T* y, int64_t k, int64_t r, int64_t d, int64_t t) { \
        with_ggml(p, t, [&](auto weights) { product(weights, x, y, k, r, d); });                                                                               \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
