// Element-wise kernels of the packed step for CPUs, each one pass over memory where torch makes several.
//
// Values are float or bfloat16 in memory and float in registers. A row is always computed by one thread in one order, so
// results do not depend on the number of threads. NaN and infinity pass through: the guards of training rely on it.
// Built by native.py with the machine's own compiler; the formulas and their torch twins stand in fused.py and attention.py.

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

// Rows of x (tokens, heads, d) at `rows` (batch, n; negative: zeros) -> out (batch, kv, group, n, d), heads = kv * group.
template <class T, class O>
void stack(const T* x, const int64_t* rows, O* out, int64_t batch, int64_t n, int64_t kv, int64_t group, int64_t d, float scale) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < kv * group; h++) {
            O* o = out + (b * kv * group + h) * n * d;
            for (int64_t i = 0; i < n; i++) {
                int64_t row = rows[b * n + i];
                const T* a = x + (row * kv * group + h) * d;
                if (row < 0) std::memset(o + i * d, 0, size_t(d) * sizeof(O));
                else
#pragma omp simd
                    for (int64_t j = 0; j < d; j++) store(o + i * d + j, load(a + j) * scale);
            }
        }
}

// The reverse: x (batch, kv, group, n, d) times scale to out (tokens, heads, d) at `rows`; every row occurs once.
template <class T, class O>
void unstack(const T* x, const int64_t* rows, O* out, int64_t batch, int64_t n, int64_t kv, int64_t group, int64_t d, float scale) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < kv * group; h++) {
            const T* a = x + (b * kv * group + h) * n * d;
            for (int64_t i = 0; i < n; i++) {
                int64_t row = rows[b * n + i];
                if (row < 0) continue;
                O* o = out + (row * kv * group + h) * d;
#pragma omp simd
                for (int64_t j = 0; j < d; j++) store(o + j, load(a + i * d + j) * scale);
            }
        }
}

// out (tokens, kv, d), float, gains x (batch, kv, m, d) at `rows` (batch, m); rows may repeat, so a thread has heads to itself.
template <class T>
void gather_add(const T* x, const int64_t* rows, float* out, int64_t batch, int64_t m, int64_t kv, int64_t d, float scale) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t h = 0; h < kv; h++)
        for (int64_t part = 0; part < d; part += 16)
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < m; i++) {
                    const T* a = x + ((b * kv + h) * m + i) * d + part;
                    float* o = out + (rows[b * m + i] * kv + h) * d + part;
                    int64_t width = d - part < 16 ? d - part : 16;
#pragma omp simd
                    for (int64_t j = 0; j < width; j++) o[j] += load(a + j) * scale;
                }
}

// scores (batch, heads, n, m), float -> probabilities p of the same shape. Query i of tile b sees keys [low, high) of its tile,
// visible (batch, n, 2); all others get 0. low >= high: a padded query, all 0. lse, if given: the rows' log-sum-exp.
template <class T>
void softmax(const float* scores, const int64_t* visible, T* p, float* lse, int64_t batch, int64_t heads, int64_t n, int64_t m) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < heads * n; r++) {
            const int64_t* range = visible + (b * n + r % n) * 2;
            int64_t low = range[0], high = range[1];
            const float* s = scores + (b * heads * n + r) * m;
            T* o = p + (b * heads * n + r) * m;
            for (int64_t j = 0; j < m && j < low; j++) store(o + j, 0.0f);
            float most = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : most)
            for (int64_t j = low; j < high; j++) most = s[j] > most ? s[j] : most;
            float* w = const_cast<float*>(s);  // the scores are scratch space from here on
#pragma omp simd reduction(+ : sum)
            for (int64_t j = low; j < high; j++) {
                w[j] = exponential(s[j] - most);
                sum += w[j];
            }
            float inverse = 1.0f / sum;
            if (lse) lse[b * heads * n + r] = most + std::log(sum);
#pragma omp simd
            for (int64_t j = low; j < high; j++) store(o + j, w[j] * inverse);
            for (int64_t j = high > low ? high : low; j < m; j++) store(o + j, 0.0f);
        }
}

// ds = p (dp - sum_j p_j dp_j), row by row over the visible keys, written over dp. inner, if given: that sum.
template <class T>
void softmax_backward(const T* p, T* dp, const int64_t* visible, const float* inner, int64_t batch, int64_t heads, int64_t n,
                      int64_t m) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < heads * n; r++) {
            const int64_t* range = visible + (b * n + r % n) * 2;
            int64_t low = range[0], high = range[1];
            const T* q = p + (b * heads * n + r) * m;
            T* o = dp + (b * heads * n + r) * m;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = low; j < high; j++) dot += load(q + j) * load(o + j);
            if (inner) dot = inner[b * heads * n + r];
            for (int64_t j = 0; j < m && j < low; j++) store(o + j, 0.0f);
#pragma omp simd
            for (int64_t j = low; j < high; j++) store(o + j, load(q + j) * (load(o + j) - dot));
            for (int64_t j = high > low ? high : low; j < m; j++) store(o + j, 0.0f);
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
    extern "C" void stack_##NAME(const T* x, const int64_t* r, T* o, int64_t b, int64_t n, int64_t k, int64_t g, int64_t d, \
                                 float s) {                                                                                 \
        stack(x, r, o, b, n, k, g, d, s);                                                                                   \
    }                                                                                                                       \
    extern "C" void stack_wide_##NAME(const T* x, const int64_t* r, float* o, int64_t b, int64_t n, int64_t k, int64_t g,   \
                                      int64_t d, float s) {                                                                 \
        stack(x, r, o, b, n, k, g, d, s);                                                                                   \
    }                                                                                                                       \
    extern "C" void unstack_##NAME(const T* x, const int64_t* r, T* o, int64_t b, int64_t n, int64_t k, int64_t g,          \
                                   int64_t d, float s) {                                                                    \
        unstack(x, r, o, b, n, k, g, d, s);                                                                                 \
    }                                                                                                                       \
    extern "C" void unstack_wide_##NAME(const float* x, const int64_t* r, T* o, int64_t b, int64_t n, int64_t k, int64_t g, \
                                        int64_t d, float s) {                                                               \
        unstack(x, r, o, b, n, k, g, d, s);                                                                                 \
    }                                                                                                                       \
    extern "C" void gather_add_##NAME(const T* x, const int64_t* r, float* o, int64_t b, int64_t m, int64_t k, int64_t d,   \
                                      float s) {                                                                            \
        gather_add(x, r, o, b, m, k, d, s);                                                                                 \
    }                                                                                                                       \
    extern "C" void softmax_##NAME(const float* s, const int64_t* v, T* p, float* l, int64_t b, int64_t h, int64_t n,       \
                                   int64_t m) {                                                                             \
        softmax(s, v, p, l, b, h, n, m);                                                                                    \
    }                                                                                                                       \
    extern "C" void softmax_backward_##NAME(const T* p, T* d, const int64_t* v, const float* i, int64_t b, int64_t h,       \
                                            int64_t n, int64_t m) {                                                         \
        softmax_backward(p, d, v, i, b, h, n, m);                                                                           \
    }                                                                                                                       \
    extern "C" void cross_entropy_##NAME(T* l, const int64_t* t, const float* w, float* o, int64_t r, int64_t s) {          \
        cross_entropy(l, t, w, o, r, s);                                                                                    \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
