// Attention over tiles of queries and keys (layout.py), and its gradients, with the scores of a few queries at a time, which
// never leave the processor's cache. Whatever the type in memory, all arithmetic is in float.
//
//     p = softmax(scale q k^T) over the keys low..high that a query sees        o = p v
//     dv = p^T do        ds = p (do v^T - sum_j p_j (do v^T)_j)        dq = scale ds k        dk = scale ds^T q
//
// One thread has one tile of one key/value head; the query heads that share it are rows of the same products. Only panels
// of keys that one of the queries sees are computed. Results do not depend on the number of threads, and NaN and infinity
// pass through. The torch twin is attention.py's.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bf16.h"
#include "exponential.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4;  // 32 registers, of which TALL * WIDE are sums
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 2;
#else
constexpr int LANES = 4, WIDE = 2;
#endif
constexpr int TALL = 6, LOW = 4;         // rows of a product that are made at once: of queries, of keys
constexpr int64_t PANEL = LANES * WIDE;  // its columns
constexpr int64_t ROWS = 48;             // query rows whose scores are there at once
static_assert(PANEL <= 64 && ROWS % TALL == 0 && LANES % LOW == 0);  // native.py allocates for 64
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), may_alias));

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

inline int64_t padded(int64_t count) { return whole(count, PANEL); }

inline vec splat(float x) { return x - vec{}; }

// c (R, W vectors) gains (ADD) or becomes a (R, depth) b (depth, W vectors); a's element (i, j): a[i * down + j * right].
template <int R, int W, bool ADD>
inline void product(const float* a, int64_t down, int64_t right, const float* b, int64_t b_row, int64_t depth, float* c,
                    int64_t c_row) {
    vec sum[R][W];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) sum[i][w] = ADD ? *reinterpret_cast<const vec*>(c + i * c_row + w * LANES) : vec{};
    for (int64_t j = 0; j < depth; j++) {
        vec row[W];
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) row[w] = *reinterpret_cast<const vec*>(b + j * b_row + w * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            vec x = splat(a[i * down + j * right]);
#pragma GCC unroll 8
            for (int w = 0; w < W; w++) sum[i][w] += x * row[w];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) *reinterpret_cast<vec*>(c + i * c_row + w * LANES) = sum[i][w];
}

// What is in a call: tiles of n queries and m keys, and floats of scratch space for each thread.
struct Sizes {
    int64_t batch, n, m, kv, group, d, threads, each;
};

// One tile of one key/value head: n queries of `group` heads, m keys, and where its queries and keys stand.
struct Tile {
    const int64_t *queries, *keys, *visible;
    int64_t n, m, kv, head, group, d;

    float scale() const { return 1.0f / std::sqrt(float(d)); }
    int64_t wide() const { return padded(d); }
    int64_t stride() const { return padded(m) + LANES; }  // of scores: not a multiple of the cache's sets
    int64_t rows() const { return n * group; }
    bool real(int64_t i) const { return queries[i] >= 0 && visible[2 * i] < visible[2 * i + 1]; }
    int64_t at(int64_t r) const { return queries[r / group] * kv * group + head * group + r % group; }  // of (tokens, heads)
};

// A block of rows from `start` to `end`, `rows` with those that fill it up, and the keys low..high that it is multiplied with.
struct Span {
    int64_t start, end, rows, low, high;
    Span(const Tile& t, int64_t start)
        : start(start), end(std::min(start + ROWS, t.rows())), rows(whole(end - start, TALL)), low(t.m), high(0) {
        for (int64_t i = start / t.group; i <= (end - 1) / t.group; i++)
            if (t.real(i)) low = std::min(low, t.visible[2 * i]), high = std::max(high, t.visible[2 * i + 1]);
        low = low / PANEL * PANEL;
        high = whole(high, LANES);
    }
};

// x (tokens, kv, d) at the tile's keys: as it stands, (padded m, padded d); and turned, panel by panel (d, PANEL).
template <class T>
void gather(const Tile& t, const T* x, float* plain, float* turned) {
    int64_t wide = t.wide(), all = padded(t.m);
    for (int64_t j = 0; j < all; j++) {
        const T* from = j < t.m ? x + (t.keys[j] * t.kv + t.head) * t.d : nullptr;
        if (plain) {
            float* to = plain + j * wide;
            for (int64_t c = 0; c < t.d; c++) to[c] = from ? load(from + c) : 0.0f;
            for (int64_t c = t.d; c < wide; c++) to[c] = 0;
        }
        if (turned) {
            float* to = turned + j / PANEL * PANEL * t.d + j % PANEL;
            for (int64_t c = 0; c < t.d; c++) to[c * PANEL] = from ? load(from + c) : 0.0f;
        }
    }
}

// The block's rows of x (tokens, heads, d) times scale, (rows, padded d); rows of no query are 0.
template <class T>
void take(const Tile& t, const Span& span, const T* x, float scale, float* to) {
    int64_t wide = t.wide();
    for (int64_t r = span.start; r < span.start + span.rows; r++, to += wide) {
        bool some = r < span.end && t.real(r / t.group);
        const T* from = some ? x + t.at(r) * t.d : nullptr;
        for (int64_t c = 0; c < t.d; c++) to[c] = some ? load(from + c) * scale : 0.0f;
        for (int64_t c = t.d; c < wide; c++) to[c] = 0;
    }
}

// One panel of scores, (rows, keys): `vectors` of it, which are W at most.
template <int W>
inline void panel(const Tile& t, const Span& span, int64_t vectors, const float* q, const float* turned, float* s) {
    if constexpr (W > 1)
        if (vectors < W) return panel<W - 1>(t, span, vectors, q, turned, s);
    for (int64_t i = 0; i < span.rows; i += TALL)
        product<TALL, W, false>(q + i * t.wide(), t.wide(), 1, turned, PANEL, t.d, s + i * t.stride(), t.stride());
}

// scores (rows, keys) = q k^T over the keys of the span; `turned` holds k's.
void scores(const Tile& t, const Span& span, const float* q, const float* turned, float* s) {
    for (int64_t p = span.low; p < span.high; p += PANEL) panel<WIDE>(t, span, (span.high - p) / LANES, q, turned + p * t.d, s + p);
}

// out (rows, d) = p (rows, keys) x over the keys of the span.
void weighed(const Tile& t, const Span& span, const float* p, const float* x, float* out) {
    std::memset(out, 0, size_t(span.rows * t.wide()) * sizeof(float));
    for (int64_t k = span.low; k < span.high; k += PANEL)
        for (int64_t c = 0; c < t.wide(); c += PANEL)
            for (int64_t i = 0; i < span.rows; i += TALL)
                product<TALL, WIDE, true>(p + i * t.stride() + k, t.stride(), 1, x + k * t.wide() + c, t.wide(),
                                          std::min(PANEL, span.high - k), out + i * t.wide() + c, t.wide());
}

// out (keys, d) gains p^T (keys, rows) x over the keys of the span.
void scattered(const Tile& t, const Span& span, const float* p, const float* x, float* out) {
    for (int64_t c = 0; c < t.wide(); c += PANEL)
        for (int64_t k = span.low; k < span.high; k += LOW)
            product<LOW, WIDE, true>(p + k, 1, t.stride(), x + c, t.wide(), span.rows, out + k * t.wide() + c, t.wide());
}

// What row r sees, within the span; nothing where it is no query.
struct Seen {
    int64_t low = 0, high = 0;
    Seen(const Tile& t, int64_t r) {
        if (r < t.rows() && t.real(r / t.group)) low = t.visible[2 * (r / t.group)], high = t.visible[2 * (r / t.group) + 1];
    }
};

// One row of scores becomes exp(s - most), 0 where it does not see; returns their sum.
inline float exponentials(const Seen& seen, const Span& span, float* s, float* most) {
    float top = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = seen.low; j < seen.high; j++) top = s[j] > top ? s[j] : top;
    for (int64_t j = span.low; j < seen.low; j++) s[j] = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = seen.low; j < seen.high; j++) {
        s[j] = exponential(s[j] - top);
        sum += s[j];
    }
    for (int64_t j = std::max(seen.high, span.low); j < span.high; j++) s[j] = 0;
    *most = top;
    return sum;
}

template <class T>
void forward(const Tile& t, const T* q, const T* k, const T* v, T* out, float* lse, float* work) {
    float *keys = work, *values = keys + padded(t.m) * t.wide(), *s = values + padded(t.m) * t.wide();
    float *rows = s + ROWS * t.stride(), *o = rows + ROWS * t.wide();
    gather(t, k, nullptr, keys);
    gather(t, v, values, nullptr);
    for (int64_t start = 0; start < t.rows(); start += ROWS) {
        Span span(t, start);
        float most[ROWS], sum[ROWS];
        take(t, span, q, t.scale(), rows);
        scores(t, span, rows, keys, s);
        for (int64_t i = 0; i < span.rows; i++) sum[i] = exponentials(Seen(t, start + i), span, s + i * t.stride(), most + i);
        weighed(t, span, s, values, o);
        for (int64_t r = start; r < span.end; r++) {
            if (t.queries[r / t.group] < 0) continue;
            bool some = t.real(r / t.group);
            float inverse = some ? 1.0f / sum[r - start] : 0.0f;
            for (int64_t c = 0; c < t.d; c++) store(out + t.at(r) * t.d + c, o[(r - start) * t.wide() + c] * inverse);
            if (lse) lse[t.at(r)] = some ? most[r - start] + std::log(sum[r - start]) : -std::numeric_limits<float>::infinity();
        }
    }
}

// dk and dv (padded m, padded d) of the tile are made; dq goes to its place. Of every query and head, (tokens, heads): lse, the
// log-sum-exp of its scores, and, where that is over more keys than these, inner: sum_j p_j (do v^T)_j over all of them.
template <class T>
void backward(const Tile& t, const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* inner, T* dq,
              float* dk, float* dv, float* work) {
    int64_t size = padded(t.m) * t.wide();
    float *keys = work, *keys_turned = keys + size, *values_turned = keys_turned + size, *p = values_turned + size;
    float *ds = p + ROWS * t.stride(), *rows = ds + ROWS * t.stride(), *g = rows + ROWS * t.wide(), *o = g + ROWS * t.wide();
    gather(t, k, keys, keys_turned);
    gather(t, v, nullptr, values_turned);
    std::memset(dk, 0, size_t(size) * sizeof(float));
    std::memset(dv, 0, size_t(size) * sizeof(float));
    for (int64_t start = 0; start < t.rows(); start += ROWS) {
        Span span(t, start);
        take(t, span, q, t.scale(), rows);
        take(t, span, grad, 1.0f, g);
        scores(t, span, rows, keys_turned, p);
        scores(t, span, g, values_turned, ds);
        for (int64_t i = 0; i < span.rows; i++) {
            Seen seen(t, start + i);
            float *pi = p + i * t.stride(), *di = ds + i * t.stride(), dot = 0;
            float all = seen.low < seen.high ? lse[t.at(start + i)] : 0.0f;
            for (int64_t j = span.low; j < seen.low; j++) pi[j] = di[j] = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = seen.low; j < seen.high; j++) {
                pi[j] = exponential(pi[j] - all);
                dot += pi[j] * di[j];
            }
            if (inner && seen.low < seen.high) dot = inner[t.at(start + i)];
#pragma omp simd
            for (int64_t j = seen.low; j < seen.high; j++) di[j] = pi[j] * (di[j] - dot);
            for (int64_t j = std::max(seen.high, span.low); j < span.high; j++) pi[j] = di[j] = 0;
        }
        scattered(t, span, p, g, dv);
        scattered(t, span, ds, rows, dk);
        weighed(t, span, ds, keys, o);
        for (int64_t r = start; r < span.end; r++)
            if (t.queries[r / t.group] >= 0)
                for (int64_t c = 0; c < t.d; c++) store(dq + t.at(r) * t.d + c, o[(r - start) * t.wide() + c] * t.scale());
    }
}

// out (tokens, kv, d) gains x (batch, kv, padded m, padded d) at `keys` (batch, m); keys repeat, so a thread has columns to itself.
void add(const Sizes& of, const float* x, const int64_t* keys, float* out) {
    int64_t wide = padded(of.d), all = padded(of.m);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t h = 0; h < of.kv; h++)
        for (int64_t part = 0; part < of.d; part += LANES)
            for (int64_t b = 0; b < of.batch; b++)
                for (int64_t j = 0; j < of.m; j++) {
                    const float* from = x + ((b * of.kv + h) * all + j) * wide + part;
                    float* to = out + (keys[b * of.m + j] * of.kv + h) * of.d + part;
                    int64_t width = std::min(of.d - part, int64_t(LANES));
                    for (int64_t c = 0; c < width; c++) to[c] += from[c];
                }
}

// What `use(tile, i, work)` does for every tile i / kv and key/value head i % kv; each thread has `each` floats of `work`.
template <class Use>
void share(const Sizes& of, const int64_t* queries, const int64_t* keys, const int64_t* visible, float* work, Use use) {
    std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(int(of.threads))
    for (int64_t thread = 0; thread < of.threads; thread++)
        for (int64_t i; (i = next++) < of.batch * of.kv;) {
            int64_t b = i / of.kv;
            Tile tile{queries + b * of.n, keys + b * of.m, visible + b * of.n * 2, of.n, of.m, of.kv, i % of.kv, of.group, of.d};
            use(tile, i, work + thread * of.each);
        }
}

}  // namespace

#define BOTH(T, NAME)                                                                                                       \
    extern "C" void attention_##NAME(const T* q, const T* k, const T* v, const int64_t* queries, const int64_t* keys,       \
                                     const int64_t* visible, T* out, float* lse, float* work, const Sizes* of) {            \
        share(*of, queries, keys, visible, work, [=](const Tile& tile, int64_t, float* own) {                               \
            forward(tile, q, k, v, out, lse, own);                                                                          \
        });                                                                                                                 \
    }                                                                                                                       \
    extern "C" void attention_backward_##NAME(                                                                              \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* inner, const int64_t* queries,    \
        const int64_t* keys, const int64_t* visible, T* dq, float* dk, float* dv, float* found, float* work,                \
        const Sizes* of) {                                                                                                  \
        int64_t size = padded(of->m) * padded(of->d), count = of->batch * of->kv;                                           \
        share(*of, queries, keys, visible, work, [=](const Tile& tile, int64_t i, float* own) {                             \
            backward(tile, q, k, v, grad, lse, inner, dq, found + i * size, found + (count + i) * size, own);               \
        });                                                                                                                 \
        add(*of, found, keys, dk);                                                                                          \
        add(*of, found + count * size, keys, dv);                                                                           \
    }

BOTH(float, float32)
BOTH(bf16, bfloat16)
