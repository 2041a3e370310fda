// Causal softmax attention with grouped key heads, optional sliding window, soft-cap and sinks; forward and backward.
//
//   s_ij = q_i·k_j scale, or cap tanh(q_i·k_j scale / cap)         i - window < j <= i
//   lse_i = log(exp(sink) + Σ_j exp(s_ij))                          the sink's term only where sinks are given
//   y_i   = Σ_j exp(s_ij - lse_i) v_j
//   top_i = max_j s_ij    mass_i = Σ_j exp(s_ij - top_i)            where asked, without sinks
//   δ_i   = dy_i·y_i - dlse_i   dS_ij = p_ij (dy_i·v_j - δ_i)   dq_i = scale Σ_j dS_ij k_j      dk_j = scale Σ_i dS_ij q_i
//   dv_j  = Σ_i p_ij dy_i                                    dsink = -Σ_i exp(sink - lse_i) δ_i
//
// Layout: qkv, dqkv [B, T, H + 2 Hkv, D] bf16; y, dy [B, T, H, D] bf16; lse [B, H, T] f32; sinks, dsinks [H] f32.
// top, mass and their gradients [B, T, H] f32. A gradient of mass is one of lse and top, since mass = exp(lse - top); that of
// top goes to the key that holds the largest score, the first of equal ones, in two kernels of its own.
// D is any multiple of 8 up to 256: tiles are 64, 96, 128 or 256 wide and their columns beyond D are zeros.
//
// Nothing of size T x T is formed: blocks of keys stream through shared memory, the softmax is carried along (running
// maximum and sum per row), tiles outside the window are never visited. Products are mma.sync m16n8k16 on bf16 with
// f32 sums. Backward is two kernels rather than one: the first owns query rows (δ, dq), the second key rows (dk, dv,
// summed over the query heads of a group in a register, in order). Scores are computed twice, but no sum crosses
// blocks, so results are the same every time, without f32 scratch for dq, and no score passes through shared memory:
// the second kernel computes transposed scores, whose registers are already the operand of the next product.
// On Hopper, up to a width of 128, products are wgmma and backward is one kernel, which sums dq in f32 scratch in a fixed order.
#include <algorithm>

#include "hopper.cuh"

using namespace margay;

namespace {

constexpr float LOG2E = 1.4426950408889634f;

struct Problem {
    int time, heads, kv_heads, dim;
    int window;  // keys a row sees, self included; at most `time`
    float scale, cap;  // cap 0: none

    __device__ int64_t row() const { return int64_t(heads + 2 * kv_heads) * dim; }
    // Row statistics are padded to whole tiles, so that a tile's are aligned and all written.
    __host__ __device__ static int64_t padded(int time) { return (int64_t(time) + 127) / 128 * 128; }
    __device__ int64_t stat(int batch, int head, int row) const { return (int64_t(batch) * heads + head) * padded(time) + row; }
    __device__ bool sees(int query, int key) const { return key <= query && key > query - window; }
};

// What the forward pass leaves of a row; top and mass may be null.
struct Rows {
    float *lse, *top, *mass;

    // The largest score in units of log 2, and the sum.
    __device__ void write(const Problem& p, int batch, int head, int row, float top2, float sum) const {
        lse[(int64_t(batch) * p.heads + head) * p.time + row] = (top2 + log2f(sum)) / LOG2E;
        if (!top) return;
        const int64_t at = (int64_t(batch) * p.time + row) * p.heads + head;
        top[at] = top2 / LOG2E;
        mass[at] = sum;
    }
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh.approx is good to 2^-11, which a cap of 50 turns into 0.02 in a score; this is good to f32 rounding of 1.
__device__ __forceinline__ float tanh_fast(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(x * (2.0f * LOG2E), 126.0f)));
}

// Rows of D values, 16 bytes of padding between: eight rows of ldmatrix then lie in different banks.
template <int D> constexpr int PITCH = D + 8;

// `ROWS` rows of one head from `row0` on; rows from `time` on and columns from `dim` on become zeros.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(bf16* tile, const bf16* head, int64_t stride, int row0, int time, int dim) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; i++) {
        const int n = i * THREADS + threadIdx.x, row = n / CHUNKS, col = n % CHUNKS * 8;
        if (ROWS * CHUNKS % THREADS != 0 && n >= ROWS * CHUNKS) break;
        const bool valid = row0 + row < time && col < dim;
        copy16(tile + row * PITCH<D> + col, valid ? head + (row0 + row) * stride + col : head, valid);
    }
}

// One warp's 16 rows of sums, scaled per row, to global memory as bf16 in 16-byte pieces. `rows` is 16 rows of shared
// memory nobody else reads any more.
template <int D, int PITCHED>
__device__ __forceinline__ void store_rows(float (&sums)[D / 8][4], float scale0, float scale1, bf16* rows, bf16* head,
                                           int64_t stride, int row0, int time, int dim) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        *reinterpret_cast<uint32_t*>(rows + g * PITCHED + 8 * j + 2 * t) = pack(sums[j][0] * scale0, sums[j][1] * scale0);
        *reinterpret_cast<uint32_t*>(rows + (g + 8) * PITCHED + 8 * j + 2 * t) = pack(sums[j][2] * scale1, sums[j][3] * scale1);
    }
    __syncwarp();
#pragma unroll
    for (int n = lane; n < 16 * (D / 8); n += WARP) {
        const int row = n / (D / 8), col = n % (D / 8) * 8;
        if (row0 + row < time && col < dim)
            *reinterpret_cast<uint4*>(head + (row0 + row) * stride + col) = *reinterpret_cast<uint4*>(rows + row * PITCHED + col);
    }
}

// acc[m] += rows of `a` (16 M of them) times the transposed rows of `b`: a, b [.., D], acc 16 M x N.
template <int D, int M, int N>
__device__ __forceinline__ void mma_abt(float (&acc)[M][N / 8][4], const bf16* a, const bf16* b) {
    const int lane = threadIdx.x % WARP;
    const bf16* a_row = a + lane % 16 * PITCH<D> + lane / 16 * 8;
    const bf16* b_row = b + (lane % 8 + lane / 16 * 8) * PITCH<D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t af[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_tiles(af[m], a_row + m * 16 * PITCH<D> + k);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t bf[4];
            load_tiles(bf, b_row + n * PITCH<D> + k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(acc[m][n / 8], af[m], bf[0], bf[1]);
                mma(acc[m][n / 8 + 1], af[m], bf[2], bf[3]);
            }
        }
    }
}

// acc[m] += p[m] (16 x K, packed operands) times the rows of `b` [K, D]; N columns of b from its pointer on.
template <int D, int M, int K, int N>
__device__ __forceinline__ void mma_pb(float (&acc)[M][N / 8][4], const uint32_t (&p)[M][K / 16][4], const bf16* b) {
    const int lane = threadIdx.x % WARP;
    const bf16* b_row = b + lane % 16 * PITCH<D> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16)
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t bf[4];
            load_tiles_t(bf, b_row + k * PITCH<D> + n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(acc[m][n / 8], p[m][k / 16], bf[0], bf[1]);
                mma(acc[m][n / 8 + 1], p[m][k / 16], bf[2], bf[3]);
            }
        }
}

// Sums of a product as the left operand of the next one.
template <int N> __device__ __forceinline__ void to_operand(uint32_t (&p)[N / 16][4], const float (&s)[N / 8][4]) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        p[k][0] = pack(s[2 * k][0], s[2 * k][1]);
        p[k][1] = pack(s[2 * k][2], s[2 * k][3]);
        p[k][2] = pack(s[2 * k + 1][0], s[2 * k + 1][1]);
        p[k][3] = pack(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
}

// A block owns 16 M x 4 query rows of one head; keys come in tiles of N, the last (diagonal) one first.
template <int D, int M, int N>
__global__ void __launch_bounds__(128, 2)
    forward_kernel(Problem p, const bf16* qkv, const float* sinks, bf16* y, Rows rows) {
    constexpr int ROWS = 64 * M;
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *qs = shared, *ks = qs + ROWS * PITCH<D>, *vs = ks + N * PITCH<D>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int head = blockIdx.y, batch = blockIdx.z, kv = head / (p.heads / p.kv_heads);
    const int row0 = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the longest rows start first
    const int64_t stride = p.row();
    const bf16* base = qkv + batch * (p.time * stride);
    const bf16 *q = base + int64_t(head) * p.dim, *k = base + int64_t(p.heads + kv) * p.dim;
    const bf16* v = k + int64_t(p.kv_heads) * p.dim;

    const int first = max(0, row0 - p.window + 1) / N, last = (min(row0 + ROWS, p.time) - 1) / N;
    load_rows<D, ROWS, 128>(qs, q, stride, row0, p.time, p.dim);
    load_rows<D, N, 128>(ks, k, stride, last * N, p.time, p.dim);
    copy_commit();

    const int warp_row = row0 + warp * 16 * M;
    const float start = sinks ? sinks[head] * LOG2E : -INFINITY;
    const float scale2 = p.cap > 0.0f ? 1.0f : p.scale * LOG2E;
    float o[M][D / 8][4] = {}, top[M][2], sum[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) top[m][r] = start, sum[m][r] = sinks && t == 0 ? 1.0f : 0.0f;

    for (int tile = last; tile >= first; tile--) {
        const int key0 = tile * N;
        const bool needed = key0 <= warp_row + 16 * M - 1 && key0 + N - 1 > warp_row - p.window;
        copy_wait<0>();
        __syncthreads();
        load_rows<D, N, 128>(vs, v, stride, key0, p.time, p.dim);
        copy_commit();
        uint32_t probs[M][N / 16][4];
        if (needed) {
            float s[M][N / 8][4] = {};
            mma_abt<D, M, N>(s, qs + warp * 16 * M * PITCH<D>, ks);
            if (p.cap > 0.0f) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int j = 0; j < N / 8; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) s[m][j][e] = p.cap * LOG2E * tanh_fast(s[m][j][e] * (p.scale / p.cap));
            }
            if (key0 + N - 1 > warp_row || key0 <= warp_row + 16 * M - 1 - p.window) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int j = 0; j < N / 8; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (!p.sees(warp_row + 16 * m + g + e / 2 * 8, key0 + 8 * j + 2 * t + e % 2)) s[m][j][e] = -INFINITY;
            }
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float high = -INFINITY;
#pragma unroll
                    for (int j = 0; j < N / 8; j++) high = fmaxf(high, fmaxf(s[m][j][2 * r], s[m][j][2 * r + 1]));
                    high = fmaxf(top[m][r], warp_max<4>(high) * scale2);
                    const float shift = high == -INFINITY ? 0.0f : high;  // a row that has seen no key yet
                    const float shrink = exp2_fast(top[m][r] - shift);
                    top[m][r] = high;
                    float row_sum = 0.0f;
#pragma unroll
                    for (int j = 0; j < N / 8; j++)
#pragma unroll
                        for (int e = 2 * r; e < 2 * r + 2; e++) {
                            s[m][j][e] = exp2_fast(fmaf(s[m][j][e], scale2, -shift));
                            row_sum += s[m][j][e];
                        }
                    sum[m][r] = sum[m][r] * shrink + row_sum;
#pragma unroll
                    for (int j = 0; j < D / 8; j++) o[m][j][2 * r] *= shrink, o[m][j][2 * r + 1] *= shrink;
                }
#pragma unroll
            for (int m = 0; m < M; m++) to_operand<N>(probs[m], s[m]);
        }
        copy_wait<0>();
        __syncthreads();
        if (tile > first) load_rows<D, N, 128>(ks, k, stride, key0 - N, p.time, p.dim);
        copy_commit();
        if (needed) mma_pb<D, M, N, D>(o, probs, vs);
    }

    bf16* out = y + (int64_t(batch) * p.time * p.heads + head) * p.dim;
#pragma unroll
    for (int m = 0; m < M; m++) {
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float total = warp_sum<4>(sum[m][r]);
            const int row = warp_row + 16 * m + 8 * r + g;
            inverse[r] = 1.0f / total;
            if (t == 0 && row < p.time) rows.write(p, batch, head, row, top[m][r], total);
        }
        store_rows<D, PITCH<D>>(o[m], inverse[0], inverse[1], qs + (warp * M + m) * 16 * PITCH<D>, out,
                                int64_t(p.heads) * p.dim, warp_row + 16 * m, p.time, p.dim);
    }
}

// With a soft-cap, a product's probability and that times the cap's slope there. lse2 is lse in units of log 2; a product of
// -infinity is one that nobody sees.
__device__ __forceinline__ float2 capped(const Problem& p, float product, float lse2) {
    const float bent = tanh_fast(product * (p.scale / p.cap));
    const float prob = product == -INFINITY ? 0.0f : exp2_fast(p.cap * LOG2E * bent - lse2);
    return make_float2(prob, prob * (1.0f - bent * bent));
}

// The same with or without one.
__device__ __forceinline__ float2 probability(const Problem& p, float product, float lse2, bool visible) {
    if (p.cap > 0.0f) return capped(p, visible ? product : -INFINITY, lse2);
    const float prob = visible ? exp2_fast(fmaf(product, p.scale * LOG2E, -lse2)) : 0.0f;
    return make_float2(prob, prob);
}

// (lse in units of log 2, δ) of the 16 rows of a warp, into shared memory and `stats`; zeros beyond the end.
template <int D>
__device__ __forceinline__ void row_sums(const Problem& p, int head, int batch, int row0, const bf16* y, const bf16* dy, const float* lse, const float* dlse,
                                         float2* row_stats, float2* stats) {
    constexpr int LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32;  // 16 bytes each
    const int lane = threadIdx.x % WARP;
    const int64_t stride = int64_t(p.heads) * p.dim, out = (int64_t(batch) * p.time * p.heads + head) * p.dim;
#pragma unroll
    for (int i = 0; i < 16; i += WARP / LANES) {
        const int row = row0 + i + lane / LANES, col = lane % LANES * 8;
        float dot = 0.0f;
        if (row < p.time && col < p.dim) {
            const uint4 a = *reinterpret_cast<const uint4*>(y + out + row * stride + col);
            const uint4 b = *reinterpret_cast<const uint4*>(dy + out + row * stride + col);
            const uint32_t aw[4] = {a.x, a.y, a.z, a.w}, bw[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 x = unpack(aw[e]), z = unpack(bw[e]);
                dot += x.x * z.x + x.y * z.y;
            }
        }
        dot = warp_sum<LANES>(dot);
        if (lane % LANES == 0) {
            if (dlse && row < p.time) dot -= dlse[(int64_t(batch) * p.time + row) * p.heads + head];
            const float2 pair = make_float2(row < p.time ? lse[(int64_t(batch) * p.heads + head) * p.time + row] * LOG2E : 0.0f, dot);
            row_stats[row - row0] = pair;
            if (row < Problem::padded(p.time)) stats[p.stat(batch, head, row)] = pair;
        }
    }
    __syncwarp();
}

// A block owns 64 query rows of one head: δ and dq. Leaves the row sums in `stats`.
template <int D, int N>
__global__ void __launch_bounds__(128, 2) backward_q_kernel(Problem p, const bf16* qkv, const bf16* y, const bf16* dy,
                                                            const float* lse, const float* dlse, float2* stats, bf16* dqkv) {
    constexpr int ROWS = 64;
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *qs = shared, *dys = qs + ROWS * PITCH<D>, *ks = dys + ROWS * PITCH<D>, *vs = ks + N * PITCH<D>;
    __shared__ float2 row_stats[ROWS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int head = blockIdx.y, batch = blockIdx.z, kv = head / (p.heads / p.kv_heads);
    const int row0 = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int64_t stride = p.row(), out_stride = int64_t(p.heads) * p.dim;
    const int64_t base = batch * (p.time * stride);
    const bf16 *q = qkv + base + int64_t(head) * p.dim, *k = qkv + base + int64_t(p.heads + kv) * p.dim;
    const bf16* v = k + int64_t(p.kv_heads) * p.dim;
    const int64_t out = (int64_t(batch) * p.time * p.heads + head) * p.dim;

    const int first = max(0, row0 - p.window + 1) / N, last = (min(row0 + ROWS, p.time) - 1) / N;
    load_rows<D, ROWS, 128>(qs, q, stride, row0, p.time, p.dim);
    load_rows<D, ROWS, 128>(dys, dy + out, out_stride, row0, p.time, p.dim);
    load_rows<D, N, 128>(ks, k, stride, last * N, p.time, p.dim);
    copy_commit();

    const int warp_row = row0 + warp * 16;
    row_sums<D>(p, head, batch, warp_row, y, dy, lse, dlse, row_stats + warp * 16, stats);
    const float2 stat[2] = {row_stats[warp * 16 + g], row_stats[warp * 16 + g + 8]};

    float dq[1][D / 8][4] = {};
    for (int tile = last; tile >= first; tile--) {
        const int key0 = tile * N;
        const bool needed = key0 <= warp_row + 15 && key0 + N - 1 > warp_row - p.window;
        copy_wait<0>();
        __syncthreads();
        load_rows<D, N, 128>(vs, v, stride, key0, p.time, p.dim);
        copy_commit();
        float s[1][N / 8][4] = {};
        if (needed) mma_abt<D, 1, N>(s, qs + warp * 16 * PITCH<D>, ks);
        copy_wait<0>();
        __syncthreads();
        uint32_t ds[1][N / 16][4];
        if (needed) {
            const bool edge = key0 + N - 1 > warp_row || key0 <= warp_row + 15 - p.window;
            float dp[1][N / 8][4] = {};
            mma_abt<D, 1, N>(dp, dys + warp * 16 * PITCH<D>, vs);
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const bool visible = !edge || p.sees(warp_row + g + e / 2 * 8, key0 + 8 * j + 2 * t + e % 2);
                    s[0][j][e] = probability(p, s[0][j][e], stat[e / 2].x, visible).y * (dp[0][j][e] - stat[e / 2].y);
                }
            to_operand<N>(ds[0], s[0]);
            mma_pb<D, 1, N, D>(dq, ds, ks);
        }
        __syncthreads();
        if (tile > first) load_rows<D, N, 128>(ks, k, stride, key0 - N, p.time, p.dim);
        copy_commit();
    }
    store_rows<D, PITCH<D>>(dq[0], p.scale, p.scale, qs + warp * 16 * PITCH<D>, dqkv + base + int64_t(head) * p.dim, stride,
                            warp_row, p.time, p.dim);
}

// A block owns 64 keys of one key head and `W` columns of dk and dv, and walks the query rows that see them, head after
// head of the group. Scores are transposed: 16 keys of a warp by N queries.
template <int D, int N, int W>
__global__ void __launch_bounds__(128, 2)
    backward_kv_kernel(Problem p, const bf16* qkv, const bf16* dy, const float2* stats, bf16* dqkv) {
    constexpr int ROWS = 64, PARTS = D / W;
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *ks = shared, *vs = ks + ROWS * PITCH<D>, *qs = vs + ROWS * PITCH<D>, *dys = qs + N * PITCH<D>;
    __shared__ __align__(16) float2 stat[N];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int kv = blockIdx.y / PARTS, column = blockIdx.y % PARTS * W, batch = blockIdx.z, group = p.heads / p.kv_heads;
    const int key0 = blockIdx.x * ROWS, warp_key = key0 + warp * 16;  // the first keys are seen by most rows
    const int64_t stride = p.row(), out_stride = int64_t(p.heads) * p.dim;
    const int64_t base = batch * (p.time * stride), out = int64_t(batch) * p.time * out_stride;
    const int64_t k_at = base + int64_t(p.heads + kv) * p.dim, v_at = k_at + int64_t(p.kv_heads) * p.dim;

    load_rows<D, ROWS, 128>(ks, qkv + k_at, stride, key0, p.time, p.dim);
    load_rows<D, ROWS, 128>(vs, qkv + v_at, stride, key0, p.time, p.dim);

    // Rows key0 .. the last one that sees the block's last key.
    const int first = key0 / N, tiles = (min(p.time - 1, key0 + ROWS - 1 + p.window - 1)) / N - first + 1;
    const auto load_q = [&](int n) {
        const int head = kv * group + n / tiles, row0 = (first + n % tiles) * N;
        load_rows<D, N, 128>(qs, qkv + base + int64_t(head) * p.dim, stride, row0, p.time, p.dim);
    };
    const auto load_dy = [&](int n) {
        const int head = kv * group + n / tiles, row0 = (first + n % tiles) * N;
        load_rows<D, N, 128>(dys, dy + out + int64_t(head) * p.dim, out_stride, row0, p.time, p.dim);
    };
    const auto load_stat = [&](int n) {
        const int head = kv * group + n / tiles, row = (first + n % tiles) * N + threadIdx.x;
        // Rows beyond the end: their dy, q and δ are zeros, whatever their p.
        return threadIdx.x < N && row < p.time ? stats[p.stat(batch, head, row)] : make_float2(0.0f, 0.0f);
    };
    load_q(0);
    load_dy(0);
    copy_commit();
    float2 next = load_stat(0);

    float dk[1][W / 8][4] = {}, dv[1][W / 8][4] = {};
    for (int n = 0; n < group * tiles; n++) {
        const int row0 = (first + n % tiles) * N;
        const bool needed = row0 + N - 1 >= warp_key && row0 < warp_key + 15 + p.window;
        const bool edge = row0 < warp_key + 15 || row0 + N - 1 >= warp_key + p.window;
        if (threadIdx.x < N) stat[threadIdx.x] = next;
        copy_wait<0>();
        __syncthreads();
        if (n + 1 < group * tiles) next = load_stat(n + 1);
        uint32_t ds[1][N / 16][4];
        if (needed) {
            float s[1][N / 8][4] = {};
            mma_abt<D, 1, N>(s, ks + warp * 16 * PITCH<D>, qs);
            uint32_t probs[1][N / 16][4];
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float2 prob[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int row = 8 * j + 2 * t + e;
                        const bool visible = !edge || p.sees(row0 + row, warp_key + g + 8 * r);
                        prob[e] = probability(p, s[0][j][2 * r + e], stat[row].x, visible);
                        s[0][j][2 * r + e] = prob[e].y;
                    }
                    probs[0][j / 2][j % 2 * 2 + r] = pack(prob[0].x, prob[1].x);
                }
            mma_pb<D, 1, N, W>(dv, probs, dys + column);
            float dp[1][N / 8][4] = {};
            mma_abt<D, 1, N>(dp, vs + warp * 16 * PITCH<D>, dys);
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[0][j][e] *= dp[0][j][e] - stat[8 * j + 2 * t + e % 2].y;
            to_operand<N>(ds[0], s[0]);
        }
        __syncthreads();
        if (n + 1 < group * tiles) load_dy(n + 1);
        if (needed) mma_pb<D, 1, N, W>(dk, ds, qs + column);
        __syncthreads();
        if (n + 1 < group * tiles) load_q(n + 1);
        copy_commit();
    }
    copy_wait<0>();
    __syncthreads();  // with W < D the staging rows are narrower, so a warp's lie among other warps' keys
    bf16* staging = shared + warp * 16 * PITCH<W>;
    store_rows<W, PITCH<W>>(dk[0], p.scale, p.scale, staging, dqkv + k_at + column, stride, warp_key, p.time, p.dim - column);
    store_rows<W, PITCH<W>>(dv[0], 1.0f, 1.0f, staging, dqkv + v_at + column, stride, warp_key, p.time, p.dim - column);
}

// One block per head: every thread sums its own rows, then the block; the order never varies.
__global__ void backward_sink_kernel(Problem p, int batch, const float* sinks, const float2* stats, float* dsinks) {
    __shared__ float shared[WARP];
    const int head = blockIdx.x;
    const float sink = sinks[head] * LOG2E;
    float sum = 0.0f;
    for (int b = 0; b < batch; b++)
        for (int i = threadIdx.x; i < p.time; i += blockDim.x) {
            const float2 stat = stats[p.stat(b, head, i)];
            sum -= exp2_fast(sink - stat.x) * stat.y;
        }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dsinks[head] = sum;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A warpgroup's 64 rows of sums, scaled per row, as the panels tile_store reads.
template <int D> __device__ __forceinline__ void store_tile(bf16* tile, const float (&sums)[D / 8][4], float scale0, float scale1) {
    const int warp = threadIdx.x % 128 / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        bf16* at = tile + j / 8 * 64 * 64 + (warp * 16 + g) * 64 + (j % 8 ^ g) * 8 + 2 * t;
        *reinterpret_cast<uint32_t*>(at) = pack(sums[j][0] * scale0, sums[j][1] * scale0);
        *reinterpret_cast<uint32_t*>(at + 8 * 64) = pack(sums[j][2] * scale1, sums[j][3] * scale1);
    }
}
#endif

// The forward pass on Hopper. Three warpgroups: one copies, two own 64 query rows each and share tiles of N keys. Keys and values
// stream through STAGES places; a warpgroup issues the scores of the next tile before the sums of this one, so that the tensor
// cores work while it exponentiates, and the two take turns at issuing, so that one exponentiates during the other's products
// (4 % at T = 1024). Blocks stay and take work in pairs of a long and a short row block, which all cost the same.
constexpr int STAGES = 2;
[[maybe_unused]] constexpr int TURNS = 3;  // named barriers: one per owning warpgroup

template <int D, int N> struct ForwardShared {
    static constexpr int PANELS = D / 64;
    bf16 q[2][PANELS][64 * 64];  // of each warpgroup; its results leave from here
    bf16 k[STAGES][PANELS][N * 64], v[STAGES][PANELS][N * 64];
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// The work of the `n`-th turn of a block: which rows of which head. False past the end.
struct Turn {
    int head, batch, row0;
    bool done, skip;

    __device__ Turn(const Problem& p, int heads, int batches, int n) {
        const int blocks = (p.time + 127) / 128, pairs = (blocks + 1) / 2;
        const int unit = blockIdx.x + n / 2 * gridDim.x, pair = unit % pairs, which = n % 2;
        const int long_block = blocks - 1 - pair;
        done = unit >= pairs * heads * batches;
        skip = which == 1 && pair == long_block;
        row0 = (which == 0 ? long_block : pair) * 128;
        head = unit / pairs % heads;
        batch = unit / pairs / heads;
    }
};

template <int D, int N>
__global__ void __launch_bounds__(384, 1) forward_hopper_kernel(Problem p, int batches, const __grid_constant__ CUtensorMap qkv,
                                                                const __grid_constant__ CUtensorMap y, const float* sinks, Rows out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = ForwardShared<D, N>;
    constexpr int PANELS = D / 64;
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& sh = *reinterpret_cast<Shared*>(memory);
    const int group = warpgroup();
    if (threadIdx.x == 0) {
        barrier_init(&sh.q_full, 1);
        barrier_init(&sh.q_empty, 2);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&sh.k_full[i], 1);
            barrier_init(&sh.v_full[i], 1);
            barrier_init(&sh.k_empty[i], 8);
            barrier_init(&sh.v_empty[i], 8);
        }
        async_fence();
    }
    __syncthreads();

    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x == 0) {
            int tile = 0, rows = 0;  // counted over all turns
            for (int n = 0;; n++) {
                const Turn turn(p, p.heads, batches, n);
                if (turn.done) break;
                if (turn.skip) continue;
                const int kv = p.heads + turn.head / (p.heads / p.kv_heads);
                const int first = max(0, turn.row0 - p.window + 1) / N, last = (min(turn.row0 + 128, p.time) - 1) / N;
                for (int i = last; i >= first; i--, tile++) {
                    const int stage = tile % STAGES, parity = tile / STAGES % 2 ^ 1;
                    barrier_wait(&sh.k_empty[stage], parity);
                    barrier_expect(&sh.k_full[stage], N * D * 2);
                    for (int c = 0; c < PANELS; c++)
                        for (int r = 0; r < N; r += 64)
                            tile_load(&qkv, &sh.k_full[stage], sh.k[stage][c] + r * 64, c * 64, kv, i * N + r, turn.batch);
                    if (i == last) {
                        barrier_wait(&sh.q_empty, rows % 2 ^ 1);
                        barrier_expect(&sh.q_full, 128 * D * 2);
                        for (int w = 0; w < 2; w++)
                            for (int c = 0; c < PANELS; c++)
                                tile_load(&qkv, &sh.q_full, sh.q[w][c], c * 64, turn.head, turn.row0 + w * 64, turn.batch);
                        rows++;
                    }
                    barrier_wait(&sh.v_empty[stage], parity);
                    barrier_expect(&sh.v_full[stage], N * D * 2);
                    for (int c = 0; c < PANELS; c++)
                        for (int r = 0; r < N; r += 64)
                            tile_load(&qkv, &sh.v_full[stage], sh.v[stage][c] + r * 64, c * 64, kv + p.kv_heads, i * N + r, turn.batch);
                }
            }
        }
        return;
    }

    registers_more<232>();
    const int w = group - 1, thread = threadIdx.x % 128, warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
    if (w == 1) named_arrive(TURNS, 256);
    const uint64_t queries = operand_k(shared_address(sh.q[w][0]));
    const float scale2 = p.cap > 0.0f ? 1.0f : p.scale * LOG2E;
    int tile = 0, rows = 0;

    const auto scores = [&](float (&s)[N / 8][4], int stage) {
        const uint64_t keys = operand_k(shared_address(sh.k[stage][0]));
#pragma unroll
        for (int k = 0; k < D; k += 16)
            Wgmma<N / 8, false>::ss(s, operand_at(queries, k / 64 * 64 * 128 + k % 64 * 2), operand_at(keys, k / 64 * N * 128 + k % 64 * 2), k > 0);
    };

    for (int n = 0;; n++) {
        const Turn turn(p, p.heads, batches, n);
        if (turn.done) break;
        if (turn.skip) continue;
        const int first = max(0, turn.row0 - p.window + 1) / N, last = (min(turn.row0 + 128, p.time) - 1) / N;
        const int row = turn.row0 + w * 64 + warp * 16 + g;  // and row + 8
        const int low = turn.row0 + w * 64;

        float o[D / 8][4], s[N / 8][4], top[2], sum[2], shrink[2];
        uint32_t probs[N / 16][4];
        const float start = sinks ? sinks[turn.head] * LOG2E : -INFINITY;
#pragma unroll
        for (int r = 0; r < 2; r++) top[r] = start, sum[r] = sinks && t == 0 ? 1.0f : 0.0f;

        const auto soften = [&](int i) {
            if (p.cap > 0.0f) {
#pragma unroll
                for (int j = 0; j < N / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[j][e] = p.cap * LOG2E * tanh_fast(s[j][e] * (p.scale / p.cap));
            }
            if (i * N + N - 1 > low || i * N <= low + 63 - p.window) {
#pragma unroll
                for (int j = 0; j < N / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!p.sees(row + e / 2 * 8, i * N + 8 * j + 2 * t + e % 2)) s[j][e] = -INFINITY;
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float high = -INFINITY;
#pragma unroll
                for (int j = 0; j < N / 8; j++) high = fmaxf(high, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
                high = fmaxf(top[r], warp_max<4>(high) * scale2);
                const float shift = high == -INFINITY ? 0.0f : high;
                shrink[r] = exp2_fast(top[r] - shift);
                top[r] = high;
                float total = 0.0f;
#pragma unroll
                for (int j = 0; j < N / 8; j++)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; e++) {
                        s[j][e] = exp2_fast(fmaf(s[j][e], scale2, -shift));
                        total += s[j][e];
                    }
                sum[r] = sum[r] * shrink[r] + total;
            }
        };
        const auto add_values = [&](int stage, bool add) {
            const uint64_t values = operand_n(shared_address(sh.v[stage][0]), N * 128);
#pragma unroll
            for (int k = 0; k < N; k += 16) Wgmma<D / 8, true>::rs(o, probs[k / 16], operand_at(values, k * 128), k > 0 || add);
        };

        barrier_wait(&sh.q_full, rows % 2);
        barrier_wait(&sh.k_full[tile % STAGES], tile / STAGES % 2);
        wgmma_fence();
        scores(s, tile % STAGES);
        wgmma_commit();
        wgmma_wait<0>();
        hold(s);
        if (lane == 0) barrier_arrive(&sh.k_empty[tile % STAGES]);
        soften(last);
        to_operand<N>(probs, s);

        for (int i = last - 1; i >= first; i--) {
            const int next = tile + 1;
            barrier_wait(&sh.k_full[next % STAGES], next / STAGES % 2);
            named_sync(TURNS + w, 256);
            wgmma_fence();
            scores(s, next % STAGES);
            wgmma_commit();
            barrier_wait(&sh.v_full[tile % STAGES], tile / STAGES % 2);
            add_values(tile % STAGES, i < last - 1);
            wgmma_commit();
            named_arrive(TURNS + 1 - w, 256);
            wgmma_wait<1>();
            hold(s);
            if (lane == 0) barrier_arrive(&sh.k_empty[next % STAGES]);
            soften(i);
            wgmma_wait<0>();
            hold(o);
            if (lane == 0) barrier_arrive(&sh.v_empty[tile % STAGES]);
            to_operand<N>(probs, s);
#pragma unroll
            for (int j = 0; j < D / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[j][e] *= shrink[e / 2];
            tile = next;
        }
        barrier_wait(&sh.v_full[tile % STAGES], tile / STAGES % 2);
        wgmma_fence();
        add_values(tile % STAGES, last > first);
        wgmma_commit();
        wgmma_wait<0>();
        hold(o);
        if (lane == 0) barrier_arrive(&sh.v_empty[tile % STAGES]);
        tile++;

#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float total = warp_sum<4>(sum[r]);
            shrink[r] = 1.0f / total;
            if (t == 0 && row + 8 * r < p.time) out.write(p, turn.batch, turn.head, row + 8 * r, top[r], total);
        }
        store_tile<D>(sh.q[w][0], o, shrink[0], shrink[1]);
        async_fence();
        named_sync(1 + w, 128);
        if (thread == 0) {
            for (int c = 0; c < PANELS; c++) tile_store(&y, sh.q[w][c], c * 64, turn.head, low, turn.batch);
            tile_store_wait();
            barrier_arrive(&sh.q_empty);
        }
        rows++;
    }
    if (thread == 0) tile_store_wait();
#else
    __trap();
#endif
}

// The backward pass on Hopper as one kernel, after one that leaves (lse, δ) of every row. A block takes 128 keys and walks the tiles
// of rows that see them, the last rows first: five products a tile, dk and dv in registers. dS passes through shared memory once, for
// dq, of which each owning warpgroup computes half, 64 x 64 floats. What blocks have of a tile's dq is summed in global memory in
// a fixed order: the earliest keys that its rows see write, later ones add in turn, those on the diagonal read the sum and write bf16.
// A count per half says whose turn it is. Blocks take keys by ticket, the earliest of a head first: so a block waits for none but
// blocks that began before it, which walk the same tiles ahead of it, and those with most to do begin first.
// The other warpgroup has one thread that loads and two that carry results away, one for each owning warpgroup.
template <int D> struct BackwardShared {
    static constexpr int PANELS = D / 64, N = 8192 / D;  // rows of a tile: its dq has two halves of 64 x 64
    bf16 k[2][PANELS][64 * 64], v[2][PANELS][64 * 64];
    bf16 q[STAGES][PANELS][N * 64], dy[STAGES][PANELS][N * 64];
    bf16 ds[2][N / 64][128 * 64];  // [keys][rows]
    float out[2][2][64 * 64];  // in turns, of each owning warpgroup: half of dq, or its dk or dv in bf16
    float2 stat[STAGES][N];
    int ticket[2];
    uint64_t ticket_full[2], ticket_empty[2], keys_full, keys_empty, full[STAGES], empty[STAGES], room[2][2], filled[2][2];
};

// Sums of dq [B, H, tiles, 2 warpgroups, 64 x 64], as the threads hold them; of how many key blocks each has [B, H, tiles, 2]; the next
// ticket.
struct Partials {
    float* sums;
    int* counts;
    int* ticket;
};

// The work of a ticket: a key block of one key head, and the tiles of N rows that see it. `spread` heads are under way at a time.
template <int N> struct Keys {
    int head, batch, row0, first, last;
    bool done;

    __device__ Keys(const Problem& p, int batches, int spread, int ticket) {
        const int blocks = (p.time + 127) / 128, all = p.kv_heads * batches, low = ticket / (blocks * spread) * spread;
        const int heads = min(spread, all - low), at = ticket - low * blocks;
        done = ticket >= blocks * all;
        if (done) return;
        head = (low + at % heads) % p.kv_heads, batch = (low + at % heads) / p.kv_heads;
        row0 = at / heads * 128;
        first = row0 / N, last = min(p.time - 1, row0 + 127 + p.window - 1) / N;
    }

    // Of the sum of a tile's dq: blocks that come before this one, and whether it is the last.
    __device__ int before(const Problem& p, int tile) const { return row0 / 128 - max(0, tile * N - p.window + 1) / 128; }
    __device__ bool ends(int tile) const { return tile * N / 128 == row0 / 128; }
};

// A tile of one head of the group; the heads of a tile come before the next tile.
struct Walk {
    int tile, head;

    __device__ void step(int heads) {
        if (++head == heads) head = 0, tile--;
    }
};

// (lse, δ) of 64 rows of a head, and no sum begun.
template <int D>
__global__ void __launch_bounds__(128)
    backward_rows_kernel(Problem p, const bf16* y, const bf16* dy, const float* lse, const float* dlse, float2* stats, Partials partials) {
    const int head = blockIdx.y, batch = blockIdx.z, row0 = blockIdx.x * 64, warp = threadIdx.x / WARP;
    __shared__ float2 row_stats[64];
    row_sums<D>(p, head, batch, row0 + warp * 16, y, dy, lse, dlse, row_stats + warp * 16, stats);
    if (threadIdx.x < 2) partials.counts[p.stat(batch, head, row0) / 64 * 2 + threadIdx.x] = 0;
    if (threadIdx.x == 0 && row0 == 0 && head == 0 && batch == 0) *partials.ticket = 0;
}

template <int D>
__global__ void __launch_bounds__(384, 1)
    backward_hopper_kernel(Problem p, int batches, int spread, const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dy_map,
                           const __grid_constant__ CUtensorMap dqkv, const float2* stats, Partials partials) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = BackwardShared<D>;
    constexpr int PANELS = D / 64, N = Shared::N, HALF = 64 * 64;
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& sh = *reinterpret_cast<Shared*>(memory);
    const int group = warpgroup(), heads = p.heads / p.kv_heads;
    if (threadIdx.x == 0) {
        barrier_init(&sh.keys_full, 1);
        barrier_init(&sh.keys_empty, 8);
        for (int i = 0; i < 2; i++) {
            barrier_init(&sh.ticket_full[i], 1);
            barrier_init(&sh.ticket_empty[i], 10);
            for (int w = 0; w < 2; w++) barrier_init(&sh.room[i][w], 1), barrier_init(&sh.filled[i][w], 4);
        }
        for (int i = 0; i < STAGES; i++) barrier_init(&sh.full[i], 1), barrier_init(&sh.empty[i], 8);
        async_fence();
    }
    __syncthreads();

    if (group == 0) {
        registers_less<24>();
        if (threadIdx.x == 0) {
            int done = 0;  // tiles of earlier turns
            for (int n = 0;; n++) {
                barrier_wait(&sh.ticket_empty[n % 2], n / 2 % 2 ^ 1);
                const int ticket = atomicAdd(partials.ticket, 1);
                sh.ticket[n % 2] = ticket;
                barrier_arrive(&sh.ticket_full[n % 2]);
                const Keys<N> turn(p, batches, spread, ticket);
                if (turn.done) break;
                for (int tile = turn.last; tile >= turn.first; tile--)
                    for (int h = 0; h < heads; h++, done++) {
                        const int stage = done % STAGES, head = turn.head * heads + h, row0 = tile * N;
                        barrier_wait(&sh.empty[stage], done / STAGES % 2 ^ 1);
                        barrier_expect(&sh.full[stage], 2 * N * D * 2 + N * 8);
                        for (int c = 0; c < PANELS; c++)
                            for (int r = 0; r < N; r += 64) {
                                tile_load(&qkv, &sh.full[stage], sh.q[stage][c] + r * 64, c * 64, head, row0 + r, turn.batch);
                                tile_load(&dy_map, &sh.full[stage], sh.dy[stage][c] + r * 64, c * 64, head, row0 + r, turn.batch);
                            }
                        bulk_load(&sh.full[stage], sh.stat[stage], stats + p.stat(turn.batch, head, row0), N * 8);
                        if (h == 0 && tile == turn.last) {
                            barrier_wait(&sh.keys_empty, n % 2 ^ 1);
                            barrier_expect(&sh.keys_full, 2 * 128 * D * 2);
                            for (int w = 0; w < 2; w++)
                                for (int c = 0; c < PANELS; c++) {
                                    const int k_head = p.heads + turn.head;
                                    tile_load(&qkv, &sh.keys_full, sh.k[w][c], c * 64, k_head, turn.row0 + w * 64, turn.batch);
                                    tile_load(&qkv, &sh.keys_full, sh.v[w][c], c * 64, k_head + p.kv_heads, turn.row0 + w * 64, turn.batch);
                                }
                        }
                    }
            }
        } else if (threadIdx.x == WARP || threadIdx.x == 2 * WARP) {
            const int w = threadIdx.x / WARP - 1;
            int done = 0;  // of results
            for (int n = 0;; n++) {
                barrier_wait(&sh.ticket_full[n % 2], n / 2 % 2);
                const Keys<N> turn(p, batches, spread, sh.ticket[n % 2]);
                barrier_arrive(&sh.ticket_empty[n % 2]);
                if (turn.done) break;
                const int total = heads * (turn.last - turn.first + 1);
                const auto half_at = [&](const Walk& at) { return p.stat(turn.batch, turn.head * heads + at.head, at.tile * N) / N * 2 + w; };
                // Result `i` completes a sum that blocks before this one began.
                const auto completes = [&](int i, const Walk& at) { return i < total && turn.ends(at.tile) && turn.before(p, at.tile) > 0; };
                // Hands out the place of result `i`, empty or with the sum in it.
                const auto offer_empty = [&](int i) { barrier_arrive(&sh.room[(done + i) % 2][w]); };
                const auto offer_sum = [&](int i, int64_t sum) {
                    const int place = (done + i) % 2;
                    barrier_expect(&sh.room[place][w], HALF * 4);
                    bulk_load(&sh.room[place][w], sh.out[place][w], partials.sums + sum * HALF, HALF * 4);
                };
                Walk at = {turn.last, 0}, next = at;
                if (completes(0, at)) {
                    count_wait(partials.counts + half_at(at), turn.before(p, at.tile));
                    offer_sum(0, half_at(at));
                } else {
                    offer_empty(0);
                }
                for (int i = 0; i < total + 2; i++, at.step(heads)) {
                    next.step(heads);
                    // The next place before this result comes. Where a sum is not there yet, this result goes first: others wait for it.
                    const bool sum_next = completes(i + 1, next);
                    const int64_t next_half = half_at(next);
                    const bool late = sum_next && !count_reached(partials.counts + next_half, turn.before(p, next.tile));
                    if (sum_next && !late) offer_sum(i + 1, next_half);
                    if (!sum_next && i + 1 < total + 2) offer_empty(i + 1);

                    const bool sums = i < total && !turn.ends(at.tile);
                    const int64_t half = half_at(at);
                    const int before = turn.before(p, at.tile), place = (done + i) % 2;
                    if (sums && before > 0) count_wait(partials.counts + half, before);
                    void* out = sh.out[place][w];
                    barrier_wait(&sh.filled[place][w], (done + i) / 2 % 2);
                    if (sums) {
                        if (before == 0) bulk_store(partials.sums + half * HALF, out, HALF * 4);
                        else bulk_add(partials.sums + half * HALF, out, HALF * 4);
                        bulk_store_done();
                        count_set(partials.counts + half, before + 1);
                    } else if (i < total) {
                        tile_store(&dqkv, out, D == 128 ? w * 64 : 0, turn.head * heads + at.head, at.tile * N + (D == 128 ? 0 : w * 64), turn.batch);
                        tile_store_wait();
                    } else {
                        const int head = p.heads + turn.head + (i - total) * p.kv_heads;
                        for (int c = 0; c < PANELS; c++)
                            tile_store(&dqkv, static_cast<bf16*>(out) + c * 64 * 64, c * 64, head, turn.row0 + w * 64, turn.batch);
                        tile_store_wait();
                    }
                    if (late) {
                        count_wait(partials.counts + next_half, turn.before(p, next.tile));
                        offer_sum(i + 1, next_half);
                    }
                }
                done += total + 2;
            }
        }
        return;
    }

    registers_more<240>();
    const int w = group - 1, thread = threadIdx.x % 128, warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
    const uint64_t keys = operand_k(shared_address(sh.k[w][0])), values = operand_k(shared_address(sh.v[w][0]));
    const uint64_t key_rows = operand_n(shared_address(sh.k[0][D == 128 ? w : 0]), 64 * 128);  // the columns of this warpgroup's half of dq
    const float scale2 = p.scale * LOG2E;
    // dS of this warpgroup's keys: a lane's row and, before they are swizzled, the first of its 16-byte pieces.
    const int ds_row = (w * 64 + warp * 16 + lane % 16) * 64, piece = lane / 16;
    int done = 0, results = 0;

    for (int n = 0;; n++) {
        barrier_wait(&sh.ticket_full[n % 2], n / 2 % 2);
        const Keys<N> turn(p, batches, spread, sh.ticket[n % 2]);
        __syncwarp();
        if (lane == 0) barrier_arrive(&sh.ticket_empty[n % 2]);
        if (turn.done) break;
        const int low = turn.row0 + w * 64, key = low + warp * 16 + g, total = heads * (turn.last - turn.first + 1);  // and key + 8

        float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[N / 8][4], dp[N / 8][4];
        const auto issue_scores = [&](int stage) {
            const uint64_t queries = operand_k(shared_address(sh.q[stage][0]));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D; k += 16)
                Wgmma<N / 8, false>::ss(s, operand_at(keys, k / 64 * 64 * 128 + k % 64 * 2), operand_at(queries, k / 64 * N * 128 + k % 64 * 2), k > 0);
            wgmma_commit();
        };
        const auto issue_dp = [&](int stage) {
            const uint64_t slopes = operand_k(shared_address(sh.dy[stage][0]));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D; k += 16)
                Wgmma<N / 8, false>::ss(dp, operand_at(values, k / 64 * 64 * 128 + k % 64 * 2), operand_at(slopes, k / 64 * N * 128 + k % 64 * 2), k > 0);
            wgmma_commit();
        };
        const auto leave_dq = [&](int tile, const float (&dq)[8][4]) {
            const int place = results % 2;
            float* out = sh.out[place][w];
            barrier_wait(&sh.room[place][w], results / 2 % 2);
            if (!turn.ends(tile)) {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    *reinterpret_cast<float4*>(out + (j * 128 + thread) * 4) = make_float4(dq[j][0], dq[j][1], dq[j][2], dq[j][3]);
            } else {
                const bool more = turn.before(p, tile) > 0;
                uint32_t halves[8][2];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float4 sum = more ? *reinterpret_cast<const float4*>(out + (j * 128 + thread) * 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    halves[j][0] = pack((sum.x + dq[j][0]) * p.scale, (sum.y + dq[j][1]) * p.scale);
                    halves[j][1] = pack((sum.z + dq[j][2]) * p.scale, (sum.w + dq[j][3]) * p.scale);
                }
                if (more) named_sync(1 + w, 128);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    uint32_t* at = reinterpret_cast<uint32_t*>(out) + (warp * 16 + g) * 32 + (j ^ g) * 4 + t;
                    at[0] = halves[j][0];
                    at[8 * 32] = halves[j][1];
                }
            }
            async_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(&sh.filled[place][w]);
            results++;
        };
        barrier_wait(&sh.keys_full, n % 2);
        Walk at = {turn.last, 0};
        for (int i = 0; i < total; i++, at.step(heads)) {
            const int stage = (done + i) % STAGES, row0 = at.tile * N;
            barrier_wait(&sh.full[stage], (done + i) / STAGES % 2);
            issue_scores(stage);
            wgmma_wait<1>();
            if (lane == 0 && i > 0) barrier_arrive(&sh.empty[(done + i - 1) % STAGES]);
            issue_dp(stage);
            const uint64_t q_rows = operand_n(shared_address(sh.q[stage][0]), N * 128), dy_rows = operand_n(shared_address(sh.dy[stage][0]), N * 128);
            const bool edge = row0 < low + 63 || row0 + N - 1 >= low + p.window;
            uint32_t probs[N / 16][4], ds[N / 16][4];
            wgmma_wait<1>();
            hold(s);
            if (edge) {
#pragma unroll
                for (int j = 0; j < N / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!p.sees(row0 + 8 * j + 2 * t + e % 2, key + e / 2 * 8)) s[j][e] = -INFINITY;
            }
            // s becomes what dP - δ is multiplied by: the probability, times the slope of a soft-cap.
            if (p.cap > 0.0f) {
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
                    const float4 stat = *reinterpret_cast<const float4*>(sh.stat[stage] + 8 * j + 2 * t);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const float2 a = capped(p, s[j][2 * r], stat.x), b = capped(p, s[j][2 * r + 1], stat.z);
                        probs[j / 2][j % 2 * 2 + r] = pack(a.x, b.x);
                        s[j][2 * r] = a.y, s[j][2 * r + 1] = b.y;
                    }
                }
            } else {
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
                    const float4 stat = *reinterpret_cast<const float4*>(sh.stat[stage] + 8 * j + 2 * t);
#pragma unroll
                    for (int e = 0; e < 4; e++) s[j][e] = exp2_fast(fmaf(s[j][e], scale2, e % 2 == 0 ? -stat.x : -stat.z));
                }
                to_operand<N>(probs, s);
            }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < N; k += 16) Wgmma<D / 8, true>::rs(dv, probs[k / 16], operand_at(dy_rows, k * 128), 1);
            wgmma_commit();
            wgmma_wait<1>();
            hold(dp);
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                const float4 stat = *reinterpret_cast<const float4*>(sh.stat[stage] + 8 * j + 2 * t);
#pragma unroll
                for (int e = 0; e < 4; e++) s[j][e] *= dp[j][e] - (e % 2 == 0 ? stat.y : stat.w);
            }
            to_operand<N>(ds, s);
#pragma unroll
            for (int j = 0; j < N / 8; j += 2) store_tiles(sh.ds[i % 2][j / 8] + ds_row + ((j % 8 + piece) ^ lane % 8) * 8, ds[j / 2]);
            async_fence();
            named_sync(3, 256);
            float dq[8][4];
            const uint64_t ds_columns = operand_n(shared_address(sh.ds[i % 2][D == 128 ? 0 : w]), 128 * 128);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 128; k += 16)
                Wgmma<8, true>::ss_t(dq, operand_at(ds_columns, k * 128), operand_at(key_rows, (k / 64 * PANELS * 64 + k % 64) * 128), k > 0);
            wgmma_commit();
#pragma unroll
            for (int k = 0; k < N; k += 16) Wgmma<D / 8, true>::rs(dk, ds[k / 16], operand_at(q_rows, k * 128), 1);
            wgmma_commit();
            wgmma_wait<1>();
            hold(dq);
            leave_dq(at.tile, dq);
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&sh.empty[(done + total - 1) % STAGES]);
        hold(dv);
        hold(dk);
        if (lane == 0) barrier_arrive(&sh.keys_empty);
        done += total;
        const auto leave = [&](const float (&sums)[D / 8][4], float scale) {
            barrier_wait(&sh.room[results % 2][w], results / 2 % 2);
            store_tile<D>(reinterpret_cast<bf16*>(sh.out[results % 2][w]), sums, scale, scale);
            async_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(&sh.filled[results % 2][w]);
            results++;
        };
        leave(dk, p.scale);
        leave(dv, 1.0f);
    }
#else
    __trap();
#endif
}

// What a row's score changes where the largest one, `top`, does: the scale, and the slope of the soft-cap.
__device__ __forceinline__ float top_slope(const Problem& p, float top) {
    const float bent = p.cap > 0.0f ? top / p.cap : 0.0f;
    return p.scale * (1.0f - bent * bent);
}

// A warp owns a row of a head: finds the key of its largest score, adds that key's share to dq, leaves it in `best`.
__global__ void __launch_bounds__(128) top_rows_kernel(Problem p, const bf16* qkv, const float* top, const float* dtop, int* best, bf16* dqkv) {
    const int row = blockIdx.x * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.y, batch = blockIdx.z;
    if (row >= p.time) return;
    const bf16* base = qkv + batch * (p.time * p.row());
    const bf16 *q = base + row * p.row() + int64_t(head) * p.dim, *k = base + int64_t(p.heads + head / (p.heads / p.kv_heads)) * p.dim;
    float high = -INFINITY;
    int key = row;
    for (int j = max(0, row - p.window + 1) + lane; j <= row; j += WARP) {
        float dot = 0.0f;
        for (int c = 0; c < p.dim; c += 8) {
            const uint4 a = *reinterpret_cast<const uint4*>(q + c), b = *reinterpret_cast<const uint4*>(k + j * p.row() + c);
            const uint32_t aw[4] = {a.x, a.y, a.z, a.w}, bw[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 x = unpack(aw[e]), z = unpack(bw[e]);
                dot = fmaf(x.x, z.x, fmaf(x.y, z.y, dot));
            }
        }
        if (dot > high) high = dot, key = j;
    }
    const float highest = warp_max(high);
    key = high == highest ? key : p.time;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) key = min(key, __shfl_xor_sync(0xffffffffu, key, step));
    if (lane == 0) best[(int64_t(batch) * p.heads + head) * p.time + row] = key;
    const int64_t at = (int64_t(batch) * p.time + row) * p.heads + head;
    const float factor = dtop[at] * top_slope(p, top[at]);
    bf16* dq = dqkv + batch * (p.time * p.row()) + row * p.row() + int64_t(head) * p.dim;
    for (int c = lane; c < p.dim; c += WARP) dq[c] = from_float<bf16>(fmaf(factor, to_float(k[key * p.row() + c]), to_float(dq[c])));
}

// A warp owns a key: adds what the rows of its group's heads give it whose largest score it holds, in order.
__global__ void __launch_bounds__(128) top_keys_kernel(Problem p, const bf16* qkv, const float* top, const float* dtop, const int* best, bf16* dqkv) {
    const int key = blockIdx.x * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP, kv = blockIdx.y, batch = blockIdx.z;
    if (key >= p.time) return;
    const int64_t base = batch * (p.time * p.row());
    float sums[256 / WARP] = {};
    bool any = false;
    for (int head = kv * (p.heads / p.kv_heads); head < (kv + 1) * (p.heads / p.kv_heads); head++) {
        const int* own = best + (int64_t(batch) * p.heads + head) * p.time;
        const int end = min(p.time, key + p.window);
        for (int first = key; first < end; first += WARP) {
            unsigned found = __ballot_sync(0xffffffffu, first + lane < end && own[first + lane] == key);
            for (; found != 0; found &= found - 1) {
                const int row = first + __ffs(found) - 1;
                const int64_t at = (int64_t(batch) * p.time + row) * p.heads + head;
                const float factor = dtop[at] * top_slope(p, top[at]);
                const bf16* q = qkv + base + row * p.row() + int64_t(head) * p.dim;
#pragma unroll
                for (int c = 0; c < 256 / WARP; c++)
                    if (c * WARP + lane < p.dim) sums[c] = fmaf(factor, to_float(q[c * WARP + lane]), sums[c]);
                any = true;
            }
        }
    }
    if (!any) return;
    bf16* dk = dqkv + base + key * p.row() + int64_t(p.heads + kv) * p.dim;
#pragma unroll
    for (int c = 0; c < 256 / WARP; c++)
        if (c * WARP + lane < p.dim) dk[c * WARP + lane] = from_float<bf16>(to_float(dk[c * WARP + lane]) + sums[c]);
}

template <class K> cudaError_t reserve(K kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <int D, int M, int N>
cudaError_t launch_forward(const Problem& p, int batch, const bf16* qkv, const float* sinks, bf16* y, Rows rows, cudaStream_t stream) {
    constexpr int ROWS = 64 * M, BYTES = (ROWS + 2 * N) * PITCH<D> * 2;
    if (cudaError_t e = reserve(forward_kernel<D, M, N>, BYTES)) return e;
    forward_kernel<D, M, N><<<dim3((p.time + ROWS - 1) / ROWS, p.heads, batch), 128, BYTES, stream>>>(p, qkv, sinks, y, rows);
    return cudaGetLastError();
}

template <int D, int N, int W>
cudaError_t launch_backward(const Problem& p, int batch, const bf16* qkv, const float* sinks, const bf16* y, const bf16* dy,
                            const float* lse, const float* dlse, float2* stats, bf16* dqkv, float* dsinks, cudaStream_t stream) {
    constexpr int BYTES = 2 * (64 + N) * PITCH<D> * 2;
    const int blocks = (p.time + 63) / 64;
    if (cudaError_t e = reserve(backward_q_kernel<D, N>, BYTES)) return e;
    if (cudaError_t e = reserve(backward_kv_kernel<D, N, W>, BYTES)) return e;
    backward_q_kernel<D, N><<<dim3(blocks, p.heads, batch), 128, BYTES, stream>>>(p, qkv, y, dy, lse, dlse, stats, dqkv);
    backward_kv_kernel<D, N, W><<<dim3(blocks, p.kv_heads * (D / W), batch), 128, BYTES, stream>>>(p, qkv, dy, stats, dqkv);
    if (sinks && dsinks) backward_sink_kernel<<<p.heads, 256, 0, stream>>>(p, batch, sinks, stats, dsinks);
    return cudaGetLastError();
}

// The device is a Hopper GPU; `processors` of it.
bool hopper(int* processors) {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           major == 9 && cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
}

template <int D, int N>
cudaError_t launch_forward_hopper(const Problem& p, int batch, int processors, const bf16* qkv, const float* sinks, bf16* y, Rows rows,
                                  cudaStream_t stream) {
    constexpr int BYTES = sizeof(ForwardShared<D, N>);
    CUtensorMap qkv_map, y_map;
    if (cudaError_t e = tile_map(&qkv_map, qkv, batch, p.time, p.heads + 2 * p.kv_heads, p.dim, 64)) return e;
    if (cudaError_t e = tile_map(&y_map, y, batch, p.time, p.heads, p.dim, 64)) return e;
    if (cudaError_t e = reserve(forward_hopper_kernel<D, N>, BYTES)) return e;
    const int64_t units = int64_t((p.time + 127) / 128 + 1) / 2 * p.heads * batch;
    const int blocks = int(units < processors ? units : processors);
    forward_hopper_kernel<D, N><<<blocks, 384, BYTES, stream>>>(p, batch, qkv_map, y_map, sinks, rows);
    return cudaGetLastError();
}

// Few keys a row and little to multiply: many small blocks hide the latency of their loads better than one large one that stays
// (D = 64, window 64, forward: 0.079 ms against 0.094; at D = 128 the same time or worse).
bool small_window(const Problem& p) { return p.window <= 128 && p.window < p.time && p.dim <= 64; }

template <int D>
cudaError_t launch_backward_hopper(const Problem& p, int batch, int processors, const bf16* qkv, const float* sinks, const bf16* y,
                                   const bf16* dy, const float* lse, const float* dlse, float2* stats, bf16* dqkv, float* dsinks,
                                   cudaStream_t stream) {
    constexpr int BYTES = sizeof(BackwardShared<D>);
    CUtensorMap qkv_map, dqkv_map, dy_map;
    if (cudaError_t e = tile_map(&qkv_map, qkv, batch, p.time, p.heads + 2 * p.kv_heads, p.dim, 64)) return e;
    if (cudaError_t e = tile_map(&dqkv_map, dqkv, batch, p.time, p.heads + 2 * p.kv_heads, p.dim, 64)) return e;
    if (cudaError_t e = tile_map(&dy_map, dy, batch, p.time, p.heads, p.dim, 64)) return e;
    if (cudaError_t e = reserve(backward_hopper_kernel<D>, BYTES)) return e;
    const int64_t rows = Problem::padded(p.time) * p.heads * batch, units = Problem::padded(p.time) / 128 * p.kv_heads * batch;
    float* sums = reinterpret_cast<float*>(stats + rows);
    int* counts = reinterpret_cast<int*>(sums + rows * D);
    const Partials partials = {sums, counts, counts + rows / 32};
    // Heads under way at a time, in even groups of about two tickets for each processor: fewer, and blocks wait for those before them;
    // more, and their rows do not stay in the cache.
    const int64_t groups = std::max<int64_t>(1, (units + processors) / (2 * processors));
    const int spread = int((int64_t(p.kv_heads) * batch + groups - 1) / groups);
    backward_rows_kernel<D><<<dim3(Problem::padded(p.time) / 64, p.heads, batch), 128, 0, stream>>>(p, y, dy, lse, dlse, stats, partials);
    const int blocks = int(units < processors ? units : processors);
    backward_hopper_kernel<D><<<blocks, 384, BYTES, stream>>>(p, batch, spread, qkv_map, dy_map, dqkv_map, stats, partials);
    if (sinks && dsinks) backward_sink_kernel<<<p.heads, 256, 0, stream>>>(p, batch, sinks, stats, dsinks);
    return cudaGetLastError();
}

#ifdef MARGAY_PATHS
int path = 0;
#endif

bool supported(int batch, int time, int heads, int kv_heads, int dim) {
    return batch > 0 && batch < 65536 && time > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads < 32768 && dim > 0 &&
           dim <= 256 && dim % 8 == 0;
}

Problem problem(int time, int heads, int kv_heads, int dim, int window, float scale, float cap) {
    return {time, heads, kv_heads, dim, window > 0 && window < time ? window : time, scale, cap};
}

}  // namespace

// window 0: all earlier keys. softcap 0: none. sinks null: none. top and mass null: not asked for.
extern "C" int margay_softmax_attn_fwd(const void* qkv, const float* sinks, void* y, float* lse, float* top, float* mass, int batch, int time, int heads,
                                       int kv_heads, int dim, int window, float scale, float softcap, void* stream) {
    if (!supported(batch, time, heads, kv_heads, dim)) return cudaErrorInvalidValue;
    const Problem p = problem(time, heads, kv_heads, dim, window, scale, softcap);
    const auto in = static_cast<const bf16*>(qkv);
    const auto out = static_cast<bf16*>(y);
    const Rows rows = {lse, top, mass};
    const auto s = static_cast<cudaStream_t>(stream);
    int processors = 0;
    bool fast = hopper(&processors);
#ifdef MARGAY_PATHS
    fast &= !(path & 1);
#endif
    if (fast && dim <= 64 && !small_window(p)) return launch_forward_hopper<64, 128>(p, batch, processors, in, sinks, out, rows, s);
    if (fast && dim > 64 && dim <= 128) return launch_forward_hopper<128, 128>(p, batch, processors, in, sinks, out, rows, s);
    if (dim <= 64) return launch_forward<64, 2, 64>(p, batch, in, sinks, out, rows, s);
    if (dim <= 96) return launch_forward<96, 2, 64>(p, batch, in, sinks, out, rows, s);
    if (dim <= 128) return launch_forward<128, 2, 64>(p, batch, in, sinks, out, rows, s);
    return launch_forward<256, 1, 32>(p, batch, in, sinks, out, rows, s);
}

// Bytes the backward needs beside its results; on Hopper that is dq in f32 and little more.
extern "C" size_t margay_softmax_attn_bwd_scratch(int batch, int time, int heads, int dim) {
    int processors = 0;
    const size_t rows = size_t(batch) * heads * Problem::padded(time), stats = rows * sizeof(float2);
    if (dim > 128 || !hopper(&processors)) return stats;
    return stats + rows * (dim <= 64 ? 64 : 128) * sizeof(float) + (rows / 32 + 1) * sizeof(int);  // sums of dq, their counts, the tickets
}

// dlse [B, T, H] and dsinks may be null. dqkv is overwritten.
extern "C" int margay_softmax_attn_bwd(const void* qkv, const float* sinks, const void* y, const void* dy, const float* lse,
                                       const float* dlse, void* dqkv, float* dsinks, void* scratch, int batch, int time, int heads, int kv_heads,
                                       int dim, int window, float scale, float softcap, void* stream) {
    if (!supported(batch, time, heads, kv_heads, dim)) return cudaErrorInvalidValue;
    const Problem p = problem(time, heads, kv_heads, dim, window, scale, softcap);
    const auto run = [&](auto launch, auto... processors) {
        return launch(p, batch, processors..., static_cast<const bf16*>(qkv), sinks, static_cast<const bf16*>(y), static_cast<const bf16*>(dy), lse, dlse,
                      static_cast<float2*>(scratch), static_cast<bf16*>(dqkv), dsinks, static_cast<cudaStream_t>(stream));
    };
    int processors = 0;
    bool fast = hopper(&processors);
#ifdef MARGAY_PATHS
    fast &= !(path & 2);
#endif
    if (fast && dim <= 64) return run(launch_backward_hopper<64>, processors);
    if (fast && dim <= 128) return run(launch_backward_hopper<128>, processors);
    if (dim <= 64) return run(launch_backward<64, 64, 64>);
    if (dim <= 96) return run(launch_backward<96, 64, 96>);
    if (dim <= 128) return run(launch_backward<128, 64, 128>);
    return run(launch_backward<256, 32, 128>);
}

// Adds to dqkv what a gradient of the largest scores gives; best [B, H, T] is scratch.
extern "C" int margay_softmax_attn_top_bwd(const void* qkv, const float* top, const float* dtop, int* best, void* dqkv, int batch,
                                           int time, int heads, int kv_heads, int dim, int window, float scale, float softcap, void* stream) {
    if (!supported(batch, time, heads, kv_heads, dim)) return cudaErrorInvalidValue;
    const Problem p = problem(time, heads, kv_heads, dim, window, scale, softcap);
    const auto in = static_cast<const bf16*>(qkv);
    const auto out = static_cast<bf16*>(dqkv);
    const auto s = static_cast<cudaStream_t>(stream);
    top_rows_kernel<<<dim3((time + 3) / 4, heads, batch), 128, 0, s>>>(p, in, top, dtop, best, out);
    top_keys_kernel<<<dim3((time + 3) / 4, kv_heads, batch), 128, 0, s>>>(p, in, top, dtop, best, out);
    return cudaGetLastError();
}

#ifdef MARGAY_PATHS
extern "C" void margay_softmax_attn_path(int bits) { path = bits; }
#endif
