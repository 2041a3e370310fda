// Tiles of 64 rows in shared memory, read by 4 warps as tensor-core fragments, and rows of registers to global memory.
// A tile's rows are SIDE elements longer than its columns: an odd number of 16-byte steps, so that `ldmatrix` meets no
// bank twice.
#pragma once

#include "common.cuh"

namespace margay {

constexpr int ROWS = 64, THREADS = 128, SIDE = 8;

// `count` rows of `width` elements (a multiple of 8) into rows of COLS + SIDE; what lies outside becomes zero.
template <int COLS, int TILE = ROWS>
__device__ __forceinline__ void load_tile(bf16* to, const bf16* from, int64_t row, int count, int width) {
    constexpr int PARTS = COLS / 8;
#pragma unroll
    for (int i = threadIdx.x; i < TILE * PARTS; i += THREADS) {
        const int r = i / PARTS, c = i % PARTS * 8;
        const bool valid = r < count && c < width;
        copy16(to + r * (COLS + SIDE) + c, valid ? from + r * row + c : from, valid);
    }
}

// Fragments of a tile in shared memory. A: rows x k. B: `b` of [n][k], `b_t` of [k][n]: two 8-column groups each.
__device__ __forceinline__ void frag_a(uint32_t (&a)[4], const bf16* x, int ld, int row, int k) {
    const int l = threadIdx.x % WARP;
    load_tiles(a, x + (row + (l & 15)) * ld + k + (l >> 4) * 8);
}
__device__ __forceinline__ void frag_a_t(uint32_t (&a)[4], const bf16* x, int ld, int row, int k) {
    const int l = threadIdx.x % WARP;
    load_tiles_t(a, x + (k + (l & 7) + (l >> 4) * 8) * ld + row + (l >> 3 & 1) * 8);
}
__device__ __forceinline__ void frag_b(uint32_t (&b)[4], const bf16* x, int ld, int n, int k) {
    const int l = threadIdx.x % WARP;
    load_tiles(b, x + (n + (l & 7) + (l >> 4) * 8) * ld + k + (l >> 3 & 1) * 8);
}
__device__ __forceinline__ void frag_b_t(uint32_t (&b)[4], const bf16* x, int ld, int k, int n) {
    const int l = threadIdx.x % WARP;
    load_tiles_t(b, x + (k + (l & 15)) * ld + n + (l >> 4) * 8);
}

template <int N> __device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[n][i] = 0.0f;
}

template <int N> __device__ __forceinline__ void scale_all(float (&c)[N][4], float upper, float lower) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        c[n][0] *= upper, c[n][1] *= upper;
        c[n][2] *= lower, c[n][3] *= lower;
    }
}

// c [16, 8 N] += a b^T with a's rows `row`.. of shared memory and b [n][k].
template <int K, int N>
__device__ __forceinline__ void product(float (&c)[N][4], const bf16* a, int lda, int row, const bf16* b, int ldb) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t fa[4];
        frag_a(fa, a, lda, row, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[4];
            frag_b(fb, b, ldb, n * 8, k);
            mma(c[n], fa, fb[0], fb[1]);
            mma(c[n + 1], fa, fb[2], fb[3]);
        }
    }
}

// The same with b [k][n].
template <int K, int N>
__device__ __forceinline__ void product_t(float (&c)[N][4], const bf16* a, int lda, int row, const bf16* b, int ldb) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t fa[4];
        frag_a(fa, a, lda, row, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[4];
            frag_b_t(fb, b, ldb, k, n * 8);
            mma(c[n], fa, fb[0], fb[1]);
            mma(c[n + 1], fa, fb[2], fb[3]);
        }
    }
}

// a held as fragments [K / 16][4]; b [n][k].
template <int KS, int N>
__device__ __forceinline__ void product(float (&c)[N][4], const uint32_t (&a)[KS][4], const bf16* b, int ldb) {
#pragma unroll
    for (int k = 0; k < KS; k++)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[4];
            frag_b(fb, b, ldb, n * 8, k * 16);
            mma(c[n], a[k], fb[0], fb[1]);
            mma(c[n + 1], a[k], fb[2], fb[3]);
        }
}

// c += w b with w [16, 8 K] in accumulator layout, rounded to bf16, and b [8 K][n].
template <int K, int N>
__device__ __forceinline__ void weighted(float (&c)[N][4], const float (&w)[K][4], const bf16* b, int ldb) {
#pragma unroll
    for (int k = 0; k < K / 2; k++) {
        const uint32_t a[4] = {pack(w[2 * k][0], w[2 * k][1]), pack(w[2 * k][2], w[2 * k][3]),
                               pack(w[2 * k + 1][0], w[2 * k + 1][1]), pack(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[4];
            frag_b_t(fb, b, ldb, k * 16, n * 8);
            mma(c[n], a, fb[0], fb[1]);
            mma(c[n + 1], a, fb[2], fb[3]);
        }
    }
}

// The same with b [n][8 K].
template <int K, int N>
__device__ __forceinline__ void weighted_rows(float (&c)[N][4], const float (&w)[K][4], const bf16* b, int ldb) {
#pragma unroll
    for (int k = 0; k < K / 2; k++) {
        const uint32_t a[4] = {pack(w[2 * k][0], w[2 * k][1]), pack(w[2 * k][2], w[2 * k][3]),
                               pack(w[2 * k + 1][0], w[2 * k + 1][1]), pack(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t fb[4];
            frag_b(fb, b, ldb, n * 8, k * 16);
            mma(c[n], a, fb[0], fb[1]);
            mma(c[n + 1], a, fb[2], fb[3]);
        }
    }
}

// Word i of lane t of each group of four becomes word t of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
    uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
    if (odd) w[0] = x, w[2] = y;
    else w[1] = x, w[3] = y;
    x = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2);
    y = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
    if (high) w[0] = x, w[1] = y;
    else w[2] = x, w[3] = y;
}

// Rows of packed pairs: `word(n, lower)` is the pair of column group n in row g (lower: g + 8). 16-byte stores to
// `upper` and `lower`, the rows' addresses, null where the row does not exist.
template <int N, class F>
__device__ __forceinline__ void store_rows(bf16* upper, bf16* lower, int width, F word) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = word(n + i, half);
            transpose_quad(w);
            bf16* row = half ? lower : upper;
            if (row && (n + t) * 8 < width) *reinterpret_cast<uint4*>(row + (n + t) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
        }
}

template <int N> __device__ __forceinline__ void store_rows(bf16* upper, bf16* lower, int width, const float (&c)[N][4]) {
    store_rows<N>(upper, lower, width, [&](int n, int half) { return pack(c[n][2 * half], c[n][2 * half + 1]); });
}

__device__ __forceinline__ float quad_sum(float x) { return warp_sum<4>(x); }

}  // namespace margay
