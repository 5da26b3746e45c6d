// One block of the model for one new token of each of n sequences, in one call (token_step.py).
//
//     h += o(attention(rotate(q(x)), rotate(k(x)), v(x))),  x = norm(h)        h += down(silu(gate(x)) * up(x)),  x = norm(h)
//
// Keys and values go into the cache; all else between h and h stays in float. As in the other kernels, a value is
// computed by one thread in one order, so results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "dots.h"
#include "exponential.h"

namespace {

constexpr int64_t MOST = 8;  // sequences

// W (rows, columns) in one of the storages of expand.h or dense, its bias, and scale B A, float, of `rank`, to be added.
template <class T>
struct Matrix {
    int64_t kind, rows, columns, detail, block, rank;
    const void *packed, *code, *absmax, *nested, *map, *offset;
    const T* bias;
    const float *A, *B;
    double scale;

    template <class Use>
    void read(Use use) const {
        const uint8_t* bytes = static_cast<const uint8_t*>(packed);
        auto floats = [](const void* p) { return static_cast<const float*>(p); };
        if (kind == 0) use(Dense<T>{static_cast<const T*>(packed)});
        else if (kind == 1)
            use(Blockwise{bytes, floats(code), {absmax, floats(nested), floats(map), floats(offset)}, detail, block});
        else if (kind == 2) with_ggml(bytes, detail, use);
        else use(Rows{static_cast<const int8_t*>(packed), floats(absmax), columns});
    }
};

template <class T>
struct Block {
    int64_t size, heads, kv_heads, width, inner, window;
    double eps;
    const T *input_norm, *post_norm, *q_norm, *k_norm;
    Matrix<T> q, k, v, o, gate, up, down;
};

// y = W x for N rows x, of row r of W.
template <int N, bool NARROW, class Weights>
inline void row(const Weights& weights, int64_t r, const float* x, int64_t columns, float* y) {
    Sums<N> sums;
    weights.each(r * columns, (r + 1) * columns, [&](int64_t at, lanes eight, int place) {
        sums.add(NARROW ? rounded(eight) : eight, x + at - r * columns, columns, place);
    });
    for (int i = 0; i < N; i++) y[i] = sums.total(i);
}

// A x for each of n rows x, (n, rank): needed by `product`, within a parallel region, with a barrier between.
template <class T>
void low_rank(const Matrix<T>& m, const float* x, int64_t n, float* out) {
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < m.rank * n; j++) {
        const float *a = m.A + j % m.rank * m.columns, *xi = x + j / m.rank * m.columns;
        lanes sum = {};
        for (int64_t c = 0; c < m.columns; c += WIDE) sum += lanes_at(a + c) * lanes_at(xi + c);
        out[j] = added(sum);
    }
}

// What becomes of a product's values: added to what is there, or times silu(there), or put there.
enum class Into { PUT, ADD, GATE };

// W x (n, rows) into `out`; `inner` is what `low_rank` made. No barrier at the end.
template <class T>
void product(const Matrix<T>& m, const float* x, int64_t n, const float* inner, float* out, Into into) {
    constexpr bool NARROW = std::is_same<T, bf16>::value;
    m.read([&](auto weights) {
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < m.rows; r++) {
            float y[MOST];
            for (int64_t i = 0; i < n;) {
                const float* xi = x + i * m.columns;
                if (n - i >= 8) row<8, NARROW>(weights, r, xi, m.columns, y + i), i += 8;
                else if (n - i >= 4) row<4, NARROW>(weights, r, xi, m.columns, y + i), i += 4;
                else if (n - i >= 2) row<2, NARROW>(weights, r, xi, m.columns, y + i), i += 2;
                else row<1, NARROW>(weights, r, xi, m.columns, y + i), i += 1;
            }
            for (int64_t i = 0; i < n; i++) {
                float more = 0, *there = out + i * m.rows + r;
                for (int64_t j = 0; j < m.rank; j++) more += m.B[r * m.rank + j] * inner[i * m.rank + j];
                float value = y[i] + (m.bias ? load(m.bias + r) : 0.0f) + float(m.scale) * more;
                if (into == Into::ADD) value += *there;
                else if (into == Into::GATE) value *= *there * sigmoid(*there);
                *there = value;
            }
        }
    });
}

template <class T>
void norm(const float* x, const T* weight, float* y, int64_t size, double eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++) sum += x[j] * x[j];
    float scale = 1.0f / std::sqrt(sum / float(size) + float(eps));
#pragma omp simd
    for (int64_t j = 0; j < size; j++) y[j] = x[j] * scale * load(weight + j);
}

// One head of q or k: its norm, if it has one, and its rotation.
template <class T>
void turn(float* x, const T* weight, double eps, const T* cos, const T* sin, int64_t width) {
    if (weight) norm(x, weight, x, width, eps);
    for (int64_t j = 0, half = width / 2; j < half; j++) {
        float first = x[j], second = x[j + half], c = load(cos + j), s = load(sin + j);
        x[j] = first * c - second * s;
        x[j + half] = second * c + first * s;
    }
}

// One query over the keys from `first` to `used`: out = sum_j p_j v_j.
template <class T>
void look(const float* q, const T* keys, const T* values, int64_t first, int64_t used, int64_t width, float* out,
          std::vector<float>& p) {
    float highest = -std::numeric_limits<float>::infinity(), scale = 1.0f / std::sqrt(float(width)), sum = 0;
    int64_t count = used - first;
    p.resize(count);
    for (int64_t j = 0; j < count; j++) {
        lanes dot = {};
        for (int64_t c = 0; c < width; c += WIDE) dot += lanes_at(q + c) * wide_at(keys + (first + j) * width + c);
        p[j] = added(dot) * scale;
        highest = p[j] > highest ? p[j] : highest;
    }
    float* scores = p.data();
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        scores[j] = exponential(scores[j] - highest);
        sum += scores[j];
    }
    for (int64_t c = 0; c < width; c += WIDE) {
        lanes total = {};
        for (int64_t j = 0; j < count; j++) total += p[j] * wide_at(values + (first + j) * width + c);
        total /= sum;
        std::memcpy(out + c, &total, sizeof total);
    }
}

// Buffers of one call, (n, their size) each, end to end.
struct Room {
    std::vector<float> held;
    float *state, *x, *q, *k, *v, *mixed, *gate, *a, *b, *c;

    template <class T>
    Room(const Block<T>& m, int64_t n) {
        int64_t query = m.heads * m.width, key = m.kv_heads * m.width;
        int64_t rank = std::max({m.q.rank, m.k.rank, m.v.rank, m.o.rank, m.gate.rank, m.up.rank, m.down.rank});
        held.resize(n * (2 * m.size + 2 * query + 2 * key + m.inner + 3 * rank));
        float* at = held.data();
        auto take = [&](int64_t size) { return at += n * size, at - n * size; };
        state = take(m.size), x = take(m.size), q = take(query), k = take(key), v = take(key), mixed = take(query);
        gate = take(m.inner), a = take(rank), b = take(rank), c = take(rank);
    }
};

template <class T>
void step(const Block<T>& m, const T* h, T* out, int64_t n, T* keys, T* values, int64_t capacity, const int64_t* lengths,
          const T* cos, const T* sin) {
    const int64_t d = m.width, kv = m.kv_heads, half = d / 2, group = m.heads / kv;
    Room room(m, n);
    auto place = [&](T* store, int64_t i, int64_t head) { return store + (i * kv + head) * capacity * d; };
#pragma omp parallel
    {
        std::vector<float> p;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < m.size; j++) room.state[i * m.size + j] = load(h + i * m.size + j);
            norm(room.state + i * m.size, m.input_norm, room.x + i * m.size, m.size, m.eps);
        }
        if (m.q.rank || m.k.rank || m.v.rank) {
            low_rank(m.q, room.x, n, room.a), low_rank(m.k, room.x, n, room.b), low_rank(m.v, room.x, n, room.c);
#pragma omp barrier
        }
        product(m.q, room.x, n, room.a, room.q, Into::PUT);
        product(m.k, room.x, n, room.b, room.k, Into::PUT);
        product(m.v, room.x, n, room.c, room.v, Into::PUT);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n * (m.heads + kv); t++) {
            int64_t i = t / (m.heads + kv), head = t % (m.heads + kv) - kv;
            if (head >= 0) {
                turn(room.q + (i * m.heads + head) * d, m.q_norm, m.eps, cos + i * half, sin + i * half, d);
                continue;
            }
            head += kv;
            float *k = room.k + (i * kv + head) * d, *v = room.v + (i * kv + head) * d;
            T *key = place(keys, i, head) + lengths[i] * d, *value = place(values, i, head) + lengths[i] * d;
            turn(k, m.k_norm, m.eps, cos + i * half, sin + i * half, d);
            for (int64_t j = 0; j < d; j++) store(key + j, k[j]), store(value + j, v[j]);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n * m.heads; t++) {
            int64_t i = t / m.heads, head = t % m.heads / group, used = lengths[i] + 1;
            int64_t first = m.window && used > m.window ? used - m.window : 0;
            look(room.q + t * d, place(keys, i, head), place(values, i, head), first, used, d, room.mixed + t * d, p);
        }
        if (m.o.rank) {
            low_rank(m.o, room.mixed, n, room.a);
#pragma omp barrier
        }
        product(m.o, room.mixed, n, room.a, room.state, Into::ADD);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++)
            norm(room.state + i * m.size, m.post_norm, room.x + i * m.size, m.size, m.eps);
        if (m.gate.rank || m.up.rank) {
            low_rank(m.gate, room.x, n, room.a), low_rank(m.up, room.x, n, room.b);
#pragma omp barrier
        }
        product(m.gate, room.x, n, room.a, room.gate, Into::PUT);
        // gate and up have as many rows: a thread finds what it wrote
        product(m.up, room.x, n, room.b, room.gate, Into::GATE);
#pragma omp barrier
        if (m.down.rank) {
            low_rank(m.down, room.gate, n, room.a);
#pragma omp barrier
        }
        product(m.down, room.gate, n, room.a, room.state, Into::ADD);
    }
    for (int64_t j = 0; j < n * m.size; j++) store(out + j, room.state[j]);
}

}  // namespace

#define BOTH(T, NAME)                                                                                               \
    extern "C" void token_step_##NAME(const Block<T>* m, const T* h, T* out, int64_t n, T* keys, T* values,         \
                                      int64_t capacity, const int64_t* lengths, const T* cos, const T* sin) {       \
        step(*m, h, out, n, keys, values, capacity, lengths, cos, sin);                                             \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
