// Sums of products of one row of weights with a few rows of x, which few_rows.cpp and token_step.cpp share.

#pragma once

#include "bf16.h"
#include "expand.h"

namespace {

inline lanes wide_at(const float* p) { return lanes_at(p); }

inline lanes wide_at(const bf16* p) {
    typedef uint16_t narrow __attribute__((vector_size(2 * WIDE)));
    narrow eight;
    std::memcpy(&eight, p, sizeof eight);
    lane_bits bits = __builtin_convertvector(eight, lane_bits) << 16;
    lanes value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float added(lanes sum) {
    float whole = 0;
    for (int j = 0; j < WIDE; j++) whole += sum[j];
    return whole;
}

// Weights that are not packed, read as the storages of expand.h are. Columns are a multiple of WIDE.
template <class T>
struct Dense {
    const T* values;

    template <class Use>
    void each(int64_t from, int64_t to, Use use) const {
        int64_t at = from;
        for (; at + GROUP * WIDE <= to; at += GROUP * WIDE) {
#pragma GCC unroll 4
            for (int c = 0; c < GROUP; c++) use(at + c * WIDE, wide_at(values + at + c * WIDE), c);
        }
        for (; at < to; at += WIDE) use(at, wide_at(values + at), 0);
    }
};

// As a weight of the dense matrix in bfloat16 is.
inline lanes rounded(lanes value) {
    lane_bits bits = nearest_bf16(value);
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// The sums of N rows, in several chains each where there are few: an addition waits for the one before it in its chain.
template <int N>
struct Sums {
    static constexpr int CHAINS = N == 1 ? GROUP : N == 2 ? 2 : 1;
    lanes part[N][CHAINS] = {};

    inline void add(lanes weights, const float* x, int64_t columns, int place) {
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) part[i][place % CHAINS] += weights * lanes_at(x + i * columns);
    }

    float total(int i) const {
        lanes sum = part[i][0];
        for (int c = 1; c < CHAINS; c++) sum += part[i][c];
        return added(sum);
    }
};

}  // namespace
