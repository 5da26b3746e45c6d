// Element-wise kernels of the packed step for CPUs, each one pass over memory where torch makes several.
//
// Values are float or bfloat16 in memory and float in registers. A row is always computed by one thread in one order, so
// results do not depend on the number of threads. NaN and infinity pass through: the guards of training rely on it.
// Built by native.py with the machine's own compiler; the formulas and their torch twins stand in fused.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bf16.h"
#include "exponential.h"

namespace {

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* scale, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T* xi = x + i * size;
        T* yi = y + i * size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += load(xi + j) * load(xi + j);
        float s = 1.0f / std::sqrt(sum / float(size) + eps);
        scale[i] = s;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) {
            T normed;  // rounded before the weight is applied, as in the published implementations
            store(&normed, load(xi + j) * s);
            store(yi + j, load(&normed) * load(weight + j));
        }
    }
}

template <class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* scale, T* dx, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *gi = grad + i * size, *xi = x + i * size;
        float s = scale[i], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < size; j++) dot += load(gi + j) * load(weight + j) * load(xi + j);
        float mean = dot * s * s / float(size);
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            store(dx + i * size + j, (load(gi + j) * load(weight + j) - load(xi + j) * mean) * s);
    }
}

constexpr int64_t BLOCK = 4096;  // values a thread takes at a time

template <class T>
void swiglu(const T* gate, const T* up, T* out, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < count; b += BLOCK) {
        int64_t end = b + BLOCK < count ? b + BLOCK : count;
#pragma omp simd
        for (int64_t j = b; j < end; j++) {
            float g = load(gate + j);
            T silu;
            store(&silu, g * sigmoid(g));
            store(out + j, load(&silu) * load(up + j));
        }
    }
}

template <class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < count; b += BLOCK) {
        int64_t end = b + BLOCK < count ? b + BLOCK : count;
#pragma omp simd
        for (int64_t j = b; j < end; j++) {
            float d = load(grad + j), g = load(gate + j), s = sigmoid(g), silu = g * s;
            store(dup + j, d * silu);
            store(dgate + j, d * load(up + j) * (s + silu * (1.0f - s)));
        }
    }
}

// gate, which becomes silu(gate) * up, and up in float32; both are kept rounded.
template <class T>
void swiglu_wide(float* gate, const float* up, T* kept_gate, T* kept_up, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < count; b += BLOCK) {
        int64_t end = b + BLOCK < count ? b + BLOCK : count;
#pragma omp simd
        for (int64_t j = b; j < end; j++) {
            float g = gate[j], u = up[j];
            store(kept_gate + j, g);
            store(kept_up + j, u);
            gate[j] = g * sigmoid(g) * u;
        }
    }
}

// grad, which becomes that of gate, in float32, as is that of up.
template <class T>
void swiglu_backward_wide(float* grad, const T* gate, const T* up, float* dup, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < count; b += BLOCK) {
        int64_t end = b + BLOCK < count ? b + BLOCK : count;
#pragma omp simd
        for (int64_t j = b; j < end; j++) {
            float d = grad[j], g = load(gate + j), s = sigmoid(g), silu = g * s;
            dup[j] = d * silu;
            grad[j] = d * load(up + j) * (s + silu * (1.0f - s));
        }
    }
}

// x and out: (tokens, heads, 2 half); cos and sin: (tokens, half); sign -1 turns back.
template <class T>
void rotate(const T* x, const T* cosine, const T* sine, T* out, int64_t tokens, int64_t heads, int64_t half, float sign) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < heads; h++) {
            const T* a = x + (t * heads + h) * 2 * half;
            T* o = out + (t * heads + h) * 2 * half;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float c = load(cosine + t * half + j), s = sign * load(sine + t * half + j);
                float first = load(a + j), second = load(a + half + j);
                store(o + j, first * c - second * s);
                store(o + half + j, second * c + first * s);
            }
        }
    }
}

// Losses weight * -log softmax(logits)[target], and their gradient written over the logits (rows, size).
template <class T>
void cross_entropy(T* logits, const int64_t* target, const float* weight, float* loss, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        T* row = logits + i * size;
        float most = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < size; j++) most = load(row + j) > most ? load(row + j) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += exponential(load(row + j) - most);
        loss[i] = weight[i] * (most + std::log(sum) - load(row + target[i]));
        float chosen = load(row + target[i]), scale = weight[i] / sum;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) store(row + j, exponential(load(row + j) - most) * scale);
        store(row + target[i], weight[i] * (exponential(chosen - most) / sum - 1.0f));
    }
}

}  // namespace

#define BOTH(T, NAME)                                                                                                       \
    extern "C" void rms_norm_##NAME(const T* x, const T* w, T* y, float* s, int64_t r, int64_t d, float e) {                \
        rms_norm(x, w, y, s, r, d, e);                                                                                      \
    }                                                                                                                       \
    extern "C" void rms_norm_backward_##NAME(const T* g, const T* x, const T* w, const float* s, T* dx, int64_t r,          \
                                             int64_t d) {                                                                   \
        rms_norm_backward(g, x, w, s, dx, r, d);                                                                            \
    }                                                                                                                       \
    extern "C" void swiglu_##NAME(const T* g, const T* u, T* o, int64_t c) { swiglu(g, u, o, c); }                          \
    extern "C" void swiglu_backward_##NAME(const T* d, const T* g, const T* u, T* dg, T* du, int64_t c) {                   \
        swiglu_backward(d, g, u, dg, du, c);                                                                                \
    }                                                                                                                       \
    extern "C" void swiglu_wide_##NAME(float* g, const float* u, T* kg, T* ku, int64_t c) { swiglu_wide(g, u, kg, ku, c); } \
    extern "C" void swiglu_backward_wide_##NAME(float* d, const T* g, const T* u, float* du, int64_t c) {                   \
        swiglu_backward_wide(d, g, u, du, c);                                                                               \
    }                                                                                                                       \
    extern "C" void rotate_##NAME(const T* x, const T* c, const T* s, T* o, int64_t t, int64_t h, int64_t f, float sign) {  \
        rotate(x, c, s, o, t, h, f, sign);                                                                                  \
    }                                                                                                                       \
    extern "C" void cross_entropy_##NAME(T* l, const int64_t* t, const float* w, float* o, int64_t r, int64_t s) {          \
        cross_entropy(l, t, w, o, r, s);                                                                                    \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
