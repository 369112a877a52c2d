// Vector arithmetic and the one matrix product everything is built of.
//
// Every result is a fixed sequence of operations on its own inputs: an element of a product is accumulated over k in
// order, whatever the number of rows, and no reduction depends on the batch. So a token's logits have the same bits
// alone, in any batch, and in prefill or decoding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 14;  // 28 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 6;  // 12 of 16
#else
constexpr int LANES = 4, TILE_ROWS = 12;  // 24 of 32 (NEON)
#endif
constexpr int PANEL = 2 * LANES;  // columns of a packed weight that lie together: [panel][k][PANEL]

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
static inline Vec splat(float a) { return a - Vec{}; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

static inline float sum(Vec v) {  // halves onto each other: the same tree for every vector
    float lane[LANES];
    store(lane, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

// exp, 1 ulp off at most a few: x = n ln 2 + r, a polynomial in r (Cephes' coefficients), 2^n into the exponent.
static inline Vec exponential(Vec x) {
    const Vec low = splat(-87.0f), high = splat(88.0f), shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to integer
    x = x < low ? low : x;
    x = x > high ? high : x;
    Vec n = (x * 1.44269504088896341f + shift) - shift;
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (Vec)((IntVec)p + (__builtin_convertvector(n, IntVec) << 23));  // the casts keep the bits
}

static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// What happens to a tile of the product before it is stored.
enum Store {
    SCALE,   // c = row_scale * acc
    ADD,     // c += acc
    SWIGLU,  // a panel is LANES gate columns beside LANES up columns: c = silu(s gate) * (s up), LANES wide
};

template <int ROWS, Store MODE>
static void tile(const float* a, long lda, const float* b, int k, float* c, long ldc, const float* scale) {
    Vec left[ROWS] = {}, right[ROWS] = {};
    for (int i = 0; i < k; i++, b += PANEL) {
        const Vec b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const float x = a[r * lda + i];
            left[r] += x * b0;
            right[r] += x * b1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        float* out = c + r * ldc;
        if (MODE == SCALE) {
            store(out, left[r] * scale[r]);
            store(out + LANES, right[r] * scale[r]);
        } else if (MODE == ADD) {
            store(out, load(out) + left[r]);
            store(out + LANES, load(out + LANES) + right[r]);
        } else {
            const Vec gate = left[r] * scale[r], up = right[r] * scale[r];
            store(out, gate * sigmoid(gate) * up);
        }
    }
}

template <Store MODE, int ROWS = TILE_ROWS>
static void tile_of(int rows, const float* a, long lda, const float* b, int k, float* c, long ldc, const float* scale) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return tile<ROWS, MODE>(a, lda, b, k, c, ldc, scale);
        tile_of<MODE, ROWS - 1>(rows, a, lda, b, k, c, ldc, scale);
    }
}

// c[m, n] from a[m, k] and a packed weight of `panels` panels. Panel by panel, so that one (k * PANEL floats) stays in
// the first-level cache while all rows pass.
template <Store MODE>
static void product(
    int m, int k, int panels, const float* a, long lda, const float* b, float* c, long ldc, const float* scale,
    bool triangular = false) {
    const int width = MODE == SWIGLU ? LANES : PANEL;
    const int blocks = (m + TILE_ROWS - 1) / TILE_ROWS;
    for (int p = 0; p < panels; p++) {
        const int skip = triangular ? std::min(p * PANEL, k) : 0;  // rows of an upper triangle begin at the diagonal
        for (int block = 0; block < blocks; block++) {
            const int start = (long)m * block / blocks, end = (long)m * (block + 1) / blocks;
            tile_of<MODE>(
                end - start, a + start * lda + skip, lda, b + ((long)p * k + skip) * PANEL, k - skip,
                c + start * ldc + (long)p * width, ldc, scale ? scale + start : nullptr);
        }
    }
}

// 1 / sqrt(mean(x^2) + eps) of n values times gain.
static inline float inverse_rms(const float* x, int n, float mean_over, float eps) {
    Vec total = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) total += load(x + i) * load(x + i);
    float rest = 0;
    for (; i < n; i++) rest += x[i] * x[i];
    return 1.0f / std::sqrt((sum(total) + rest) / mean_over + eps);
}
