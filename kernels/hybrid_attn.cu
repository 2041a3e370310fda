// Softmax window and linear attention under one denominator (LoLCATs), forward and backward.
//
//   s_ij = q_i.k_j / sqrt(D)      a_ij = sigma exp(s_ij - max_j s_ij) inside the window of i, lambda phi_q_i.phi_k_j before it
//   y_i  = sum_j a_ij v_j / sum_j a_ij
//
// qkv [B, T, H + 2 Hkv, D], features [B, T, 2 H, F], factors [H] (f32, before the sigmoid), y [B, T, H, D].
//
// Tiles of 64 rows. A chunk n of 64 queries meets the key tiles reach(n)..n one by one; all tiles before reach(n) are in
// the state S = sum phi_k [v, 1]. One pass writes the state before every tile (`states`, sequential along T, split over
// heads and features, f32 sums in registers, bf16 out because that is what the tensor cores read next); then chunks are
// independent of each other. The backward is the mirror image: with dnum_i = dy_i / den_i and dden_i = -dy_i.y_i / den_i,
//   dphi_q_i = lambda [dnum_i, dden_i] S^T,   dphi_k_j = lambda [v_j, 1] dS^T,   dS_j = sum of phi_q_i [dnum_i, dden_i]
// over the chunks i that read key tile j through the state. Pairs within reach go through 64 x 64 tiles of weights.
//
//   states<false>     S before each tile, from phi_k and v
//   forward<false>    y
//   forward<true>     stage 1: loss against a target, dphi_q, [dnum, dden]; y itself is never written
//   query_side        general backward: dq, dphi_q, [dnum, dden], per-row statistics
//   states<true>      dS after each tile, from phi_q and [dnum, dden]
//   key_features      dphi_k
//   key_side          dk, dv of a key head, summed over its query heads in registers
//   sums              loss and the window factors' gradients, in a fixed order
//
// A sum z = S's last column is kept as two bf16 columns (high, low part) in the padding of each row, so that the product
// with S gives the denominator too and z keeps 16 bits. 128 threads, 4 warps of 16 rows; every product is
// mma.m16n8k16 on bf16. D <= 128 and F <= 256 are padded with zeros to 64 / 128 / 256 in shared memory.
#include "tiles.cuh"

namespace margay {
namespace {

constexpr float MIN_DENOMINATOR = 1e-12f, FLOOR = 1e-12f, LOG2E = 1.4426950408889634f;

struct Problem {
    const bf16* qkv;
    const bf16* features;
    const float* factors;
    int batch, time, heads, kv_heads, dim, width, window, terraced, affine;
    int chunks, slots;  // tiles of rows, and of those the ones some chunk reads through the state

    __host__ __device__ int start(int i) const {  // first key in the window of row i
        const int s = terraced ? (i / window - 1) * window : i + 1 - window;
        return s > 0 ? s : 0;
    }
    __host__ __device__ int reach(int chunk) const {  // first key tile that chunk meets directly
        const int i = chunk * ROWS, s = start(i);
        return (s < i ? s : i) / ROWS;
    }
    __host__ __device__ int first(int tile) const {  // first chunk that reads this key tile through the state
        const int end = (tile + 1) * ROWS;
        if (!terraced) return (end + window - 1 + ROWS - 1) / ROWS;
        return ((1 + (end + window - 1) / window) * window + ROWS - 1) / ROWS;
    }
    // Whether some row of the chunk has a key of the tile in its linear part.
    __device__ bool linear(int chunk, int tile) const { return start(min(chunk * ROWS + ROWS, time) - 1) > tile * ROWS; }

    __device__ const bf16* rows(int b, int head, int tile) const {
        return qkv + ((int64_t)b * time + (int64_t)tile * ROWS) * packed() + (int64_t)head * dim;
    }
    __device__ const bf16* phi(int b, int head, int tile) const {
        return features + ((int64_t)b * time + (int64_t)tile * ROWS) * phi_row() + (int64_t)head * width;
    }
    __device__ int64_t packed() const { return (int64_t)(heads + 2 * kv_heads) * dim; }
    __device__ int64_t phi_row() const { return (int64_t)2 * heads * width; }
    __device__ int key_head(int h) const { return heads + h / (heads / kv_heads); }
    __device__ int value_head(int h) const { return key_head(h) + kv_heads; }
    __device__ float sigma(int h) const { return 1.0f / (1.0f + expf(-factors[h])); }
    // Kept off zero so that sums can be divided by it and multiplied again.
    __device__ float lambda(int h) const { return affine ? fmaxf(1.0f / (1.0f + expf(factors[h])), 1e-30f) : 1.0f; }
    __device__ float score_scale() const { return rsqrtf((float)dim) * LOG2E; }
};

// Rows stored with their padding: straight copies.
template <int COLS>
__device__ __forceinline__ void load_padded(bf16* to, const bf16* from, int rows, int count) {
    constexpr int PARTS = COLS / 8 + 1;
    for (int i = threadIdx.x; i < rows * PARTS; i += THREADS) {
        const bool valid = i / PARTS < count;
        copy16(to + i * 8, valid ? from + i * 8 : from, valid);
    }
}

__device__ __forceinline__ uint32_t split(float x) {  // high and low bf16 part
    const float high = to_float(from_float<bf16>(x));
    return pack(high, x - high);
}
__device__ __forceinline__ float joined(const bf16* x) {
    const float2 parts = unpack(*reinterpret_cast<const uint32_t*>(x));
    return parts.x + parts.y;
}

// ---- states ----

// Forward: slot i = sum of phi_k^T [v, 1] over tiles 0..i. Backward: slot j = sum of phi_q^T [dnum, dden] over chunks
// first(j).. . One block per (64 features, head, sequence).
template <int DP, int FP, int FS, bool BACK>
__global__ void __launch_bounds__(THREADS, FS == 64 ? 4 : 2) states(Problem p, const bf16* rows_in, bf16* out) {
    extern __shared__ uint4 smem[];
    constexpr int LD = DP + SIDE, LA = FS + SIDE, STAGE = 64 * (LD + LA), STAGES = FS == 64 ? 2 : 4;
    constexpr int SPLIT = 64 / FS, N = DP / 8 / SPLIT;  // warps beside each other share the columns
    bf16* shared = reinterpret_cast<bf16*>(smem);
    const int f0 = blockIdx.x * FS, h = blockIdx.y, b = blockIdx.z;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int row = warp / SPLIT * 16, col = warp % SPLIT * N * 8;
    const int count = BACK ? p.chunks - p.first(0) : p.slots;
    const int64_t plane = (int64_t)b * p.heads + h;

    auto load = [&](int i) {
        if (i < count) {
            const int tile = BACK ? p.chunks - 1 - i : i, left = p.time - tile * ROWS;
            bf16* a = shared + i % STAGES * STAGE;
            load_tile<FS>(a, p.phi(b, BACK ? h : p.heads + h, tile) + f0, p.phi_row(), left, p.width - f0);
            if (BACK) load_padded<DP>(a + 64 * LA, rows_in + (plane * p.time + (int64_t)tile * ROWS) * LD, ROWS, left);
            else load_tile<DP>(a + 64 * LA, p.rows(b, p.value_head(h), tile), p.packed(), left, p.dim);
        }
        copy_commit();
    };
    if (!BACK && threadIdx.x < 64) {
        for (int stage = 0; stage < STAGES; stage++) {
            uint4* side = reinterpret_cast<uint4*>(shared + stage * STAGE + 64 * LA + threadIdx.x * LD + DP);
            *side = make_uint4(pack(1.0f, 0.0f), 0, 0, 0);
        }
    }
    float acc[N][4], z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    clear(acc);
    int slot = BACK ? p.slots - 1 : 0;
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int i = 0; i < count; i++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        load(i + STAGES - 1);
        const bf16 *a = shared + i % STAGES * STAGE, *x = a + 64 * LA;
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
            uint32_t fa[4], fb[4];
            frag_a_t(fa, a, LA, row, k);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                frag_b_t(fb, x, LD, k, col + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
            if (col == 0) {
                load_tiles_t(fb, x + (k + (lane & 15)) * LD + DP);
                mma(z, fa, fb[0], fb[1]);
            }
        }
        while (slot >= 0 && (BACK ? p.first(slot) == p.chunks - 1 - i : slot == i)) {
            bf16* upper = out + ((plane * p.slots + slot) * FP + f0 + row + g) * LD;
            bf16* lower = upper + 8 * LD;
            store_rows(upper + col, lower + col, N * 8, acc);
            if (t == 0 && col == 0) {
                *reinterpret_cast<uint4*>(upper + DP) = make_uint4(split(z[0] + z[1]), 0, 0, 0);
                *reinterpret_cast<uint4*>(lower + DP) = make_uint4(split(z[2] + z[3]), 0, 0, 0);
            }
            slot += BACK ? -1 : 1;
        }
    }
    copy_wait<0>();
}

// ---- chunks of queries ----

// Scores of 16 rows against the keys from `first` on, in units of log 2, -inf outside the window.
template <int DP, int N>
__device__ __forceinline__ void scores(float (&s)[N][4], const Problem& p, const bf16* q, const bf16* k, int row, int i,
                                       int first) {
    const int t = threadIdx.x & 3;
    const float scale = p.score_scale();
    const int from[2] = {p.start(i), p.start(i + 8)};
    clear(s);
    product<DP>(s, q, DP + SIDE, row, k, DP + SIDE);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int j = first + n * 8 + t * 2 + (c & 1), r = c >> 1;
            s[n][c] = j <= i + 8 * r && j >= from[r] ? s[n][c] * scale : -INFINITY;
        }
}

// Linear products of 16 rows with the keys from `first` on, 0 where the pair is not linear.
template <int FP, int N>
__device__ __forceinline__ void linear_products(float (&s)[N][4], const Problem& p, const bf16* fq, const bf16* fk, int row,
                                                int i, int first) {
    const int t = threadIdx.x & 3;
    const int from[2] = {p.start(i), p.start(i + 8)};
    clear(s);
    product<FP>(s, fq, FP + SIDE, row, fk, FP + SIDE);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (first + n * 8 + t * 2 + (c & 1) >= from[c >> 1]) s[n][c] = 0.0f;
}

// dz of 16 rows of a softmax map from their features, a tile in shared memory, and the features' gradient, [16, 128] in
// accumulator layout: the first half of the columns is softmax(z), the second softmax(-z).
template <int N> __device__ __forceinline__ void through_map(float (&dz)[8][4], const float (&grad)[N][4], const bf16* phi, int ld, int row) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    static_assert(N == 16, "64 columns, two sides");
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bf16* at = phi + (row + g + 8 * r) * ld + t * 2;
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int side = 0; side < 2; side++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 x = unpack(*reinterpret_cast<const uint32_t*>(at + side * 64 + n * 8));
                sum[side] += (x.x > FLOOR ? x.x * grad[side * 8 + n][2 * r] : 0.0f) + (x.y > FLOOR ? x.y * grad[side * 8 + n][2 * r + 1] : 0.0f);
            }
            sum[side] = quad_sum(sum[side]);
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 up = unpack(*reinterpret_cast<const uint32_t*>(at + n * 8));
            const float2 down = unpack(*reinterpret_cast<const uint32_t*>(at + 64 + n * 8));
            const float u[2] = {up.x, up.y}, d[2] = {down.x, down.y};
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float gu = u[c] > FLOOR ? grad[n][2 * r + c] : 0.0f, gd = d[c] > FLOOR ? grad[8 + n][2 * r + c] : 0.0f;
                dz[n][2 * r + c] = u[c] * (gu - sum[0]) - d[c] * (gd - sum[1]);
            }
        }
    }
}

// Shared memory of the query-side kernels: q (or the target), phi_q, then the state, or phi_k (k) and v in its place.
template <int DP, int FP> struct QueryTiles {
    static constexpr int LD = DP + SIDE, LF = FP + SIDE, LK = LD > LF ? LD : LF;
    static constexpr int STATE = FP * LD + 8, PAIR = ROWS * (LK + LD);
    static constexpr int BYTES = 2 * (ROWS * LD + ROWS * LF + (STATE > PAIR ? STATE : PAIR));
    bf16 *q, *fq, *state, *k, *v;
    __device__ QueryTiles(void* shared) {
        q = reinterpret_cast<bf16*>(shared);
        fq = q + ROWS * LD;
        state = k = fq + ROWS * LF;
        v = k + ROWS * LK;
    }
};

// phi_q z of 16 rows: the denominator's share of the state, in every lane of a row.
template <int DP, int FP>
__device__ __forceinline__ void state_denominator(float (&den)[2], const bf16* fq, const bf16* state, int row) {
    const int lane = threadIdx.x % WARP;
    float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < FP; k += 16) {
        uint32_t fa[4], fb[4];
        frag_a(fa, fq, FP + SIDE, row, k);
        load_tiles_t(fb, state + (k + (lane & 15)) * (DP + SIDE) + DP);
        mma(z, fa, fb[0], fb[1]);
    }
    den[0] = __shfl_sync(0xffffffffu, z[0] + z[1], lane & ~3);
    den[1] = __shfl_sync(0xffffffffu, z[2] + z[3], lane & ~3);
}

// [dnum, dden] of 16 rows to `grads` [T, DP + SIDE] of this head.
template <int DP>
__device__ __forceinline__ void store_grads(bf16* grads, int i, int time, const uint32_t (&dn)[DP / 16][4],
                                            const float (&dden)[2]) {
    constexpr int LD = DP + SIDE;
    bf16* upper = i < time ? grads + (int64_t)i * LD : nullptr;
    bf16* lower = i + 8 < time ? grads + (int64_t)(i + 8) * LD : nullptr;
    store_rows<DP / 8>(upper, lower, DP, [&](int n, int half) { return dn[n / 2][n % 2 * 2 + half]; });
    if ((threadIdx.x & 3) == 0) {
        if (upper) *reinterpret_cast<uint4*>(upper + DP) = make_uint4(split(dden[0]), 0, 0, 0);
        if (lower) *reinterpret_cast<uint4*>(lower + DP) = make_uint4(split(dden[1]), 0, 0, 0);
    }
}

// dphi_q of a chunk, or, through the maps, dz. The state's share reads `tiles.state` as it stands; pairs within reach load phi_k and v over it.
template <int DP, int FP, bool MAPS>
__device__ __forceinline__ void query_features(const Problem& p, const QueryTiles<DP, FP>& s, const bf16* state, int b, int h,
                                               int chunk, const uint32_t (&dn)[DP / 16][4], const float (&dden)[2],
                                               bf16* dfeatures, float (&dz)[8][4]) {
    constexpr int LD = DP + SIDE, LF = FP + SIDE, PART = FP < 128 ? FP : 128, N = PART / 8;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int row = warp * 16, i = chunk * ROWS + row + g, reach = p.reach(chunk);
    const float lambda = p.lambda(h);
    const bool within = p.linear(chunk, reach);
    for (int part = 0; part < FP / PART; part++) {
        float acc[N][4];
        clear(acc);
        if (reach > 0) {
            if (part > 0 && within) {
                __syncthreads();
                load_padded<DP>(s.state, state, FP, FP);
                copy_commit();
                copy_wait<0>();
                __syncthreads();
            }
            product(acc, dn, s.state + part * PART * LD, LD);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    acc[n][c] += dden[c >> 1] * joined(s.state + (part * PART + n * 8 + t * 2 + (c & 1)) * LD + DP);
        }
        for (int tile = reach; tile <= chunk && p.linear(chunk, tile); tile++) {
            __syncthreads();
            load_tile<FP>(s.k, p.phi(b, p.heads + h, tile), p.phi_row(), p.time - tile * ROWS, p.width);
            load_tile<DP>(s.v, p.rows(b, p.value_head(h), tile), p.packed(), p.time - tile * ROWS, p.dim);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            const int from[2] = {p.start(i), p.start(i + 8)};
            for (int half = 0; half < 2; half++) {
                float da[4][4];
                clear(da);
                product(da, dn, s.v + half * 32 * LD, LD);
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int j = tile * ROWS + half * 32 + n * 8 + t * 2 + (c & 1);
                        da[n][c] = j < from[c >> 1] ? da[n][c] + dden[c >> 1] : 0.0f;
                    }
                weighted(acc, da, s.k + half * 32 * LF + part * PART, LF);
            }
        }
        scale_all(acc, lambda, lambda);
        const int64_t at = (int64_t)b * p.time;
        if constexpr (MAPS) {
            clear(dz);
            if (reach > 0 || within) through_map(dz, acc, s.fq, LF, row);
            const int64_t stride = (int64_t)2 * p.heads * 64;
            bf16* upper = i < p.time ? dfeatures + (at + i) * stride + h * 64 : nullptr;
            store_rows(upper, i + 8 < p.time ? upper + 8 * stride : nullptr, 64, dz);
        } else {
            bf16* upper = i < p.time ? dfeatures + (at + i) * p.phi_row() + (int64_t)h * p.width + part * PART : nullptr;
            bf16* lower = i + 8 < p.time ? upper + 8 * p.phi_row() : nullptr;
            store_rows(upper, lower, p.width - part * PART, acc);
        }
    }
}

// A row without linear keys keeps its denominator with a minus sign.
__device__ __forceinline__ float mixed_sign(float den, float linear) { return linear > 0.0f ? den : -den; }

struct Mse {
    const bf16* target;
    bf16* dfeatures;
    bf16* grads;      // [B, H, T, DP + SIDE]
    float* partials;  // [2, B, H, chunks]: squared error, window share of the factors' gradient
    float slope;
};

template <int DP, int FP, bool MSE, bool MAPS>
__global__ void __launch_bounds__(THREADS, 3) forward(Problem p, const bf16* all_states, bf16* y, float* saved, Mse m) {
    extern __shared__ uint4 smem[];
    using Tiles = QueryTiles<DP, FP>;
    constexpr int LD = Tiles::LD, LF = Tiles::LF, N = DP / 8;
    const Tiles s(smem);
    const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int row = warp * 16, i = chunk * ROWS + row + g;
    const int reach = p.reach(chunk), left = p.time - chunk * ROWS;
    const int64_t plane = (int64_t)b * p.heads + h;
    const bf16* state = all_states + (plane * p.slots + reach - 1) * FP * LD;  // read only where reach > 0
    const bool within = p.linear(chunk, reach);

    float acc[N][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    clear(acc);
    if (p.window > 0) {
        load_tile<DP>(s.q, p.rows(b, h, chunk), p.packed(), left, p.dim);
        for (int tile = reach; tile <= chunk; tile++) {
            const int keys = p.time - tile * ROWS;
            load_tile<DP>(s.k, p.rows(b, p.key_head(h), tile), p.packed(), keys, p.dim);
            copy_commit();
            load_tile<DP>(s.v, p.rows(b, p.value_head(h), tile), p.packed(), keys, p.dim);
            if (tile == reach && (reach > 0 || within))
                load_tile<FP>(s.fq, p.phi(b, h, chunk), p.phi_row(), left, p.width);
            copy_commit();
            copy_wait<1>();
            __syncthreads();
            float w[8][4];
            scores<DP>(w, p, s.q, s.k, row, i, tile * ROWS);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float best = top[r];
#pragma unroll
                for (int n = 0; n < 8; n++) best = fmaxf(best, fmaxf(w[n][2 * r], w[n][2 * r + 1]));
                best = warp_max<4>(best);
                const float shift = best == -INFINITY ? 0.0f : best, keep = exp2f(top[r] - shift);
                top[r] = best;
                sum[r] *= keep;
#pragma unroll
                for (int n = 0; n < N; n++) acc[n][2 * r] *= keep, acc[n][2 * r + 1] *= keep;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    w[n][2 * r] = exp2f(w[n][2 * r] - shift);
                    w[n][2 * r + 1] = exp2f(w[n][2 * r + 1] - shift);
                    sum[r] += w[n][2 * r] + w[n][2 * r + 1];
                }
            }
            copy_wait<0>();
            __syncthreads();
            weighted(acc, w, s.v, LD);
            __syncthreads();
        }
    } else if (reach > 0 || within) {
        load_tile<FP>(s.fq, p.phi(b, h, chunk), p.phi_row(), left, p.width);
        copy_commit();
    }
    // q is no longer needed: the target takes its place.
    if (MSE) load_tile<DP>(s.q, m.target + ((int64_t)b * p.time + chunk * ROWS) * p.heads * p.dim + (int64_t)h * p.dim,
                           (int64_t)p.heads * p.dim, left, p.dim);
    copy_commit();
    const float sigma = p.sigma(h), lambda = p.lambda(h);
    const float den_window[2] = {sigma * quad_sum(sum[0]), sigma * quad_sum(sum[1])};
    uint32_t num_window[N][2];
    if (MSE) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            num_window[n][0] = pack(sigma * acc[n][0], sigma * acc[n][1]);
            num_window[n][1] = pack(sigma * acc[n][2], sigma * acc[n][3]);
        }
    }
    scale_all(acc, sigma / lambda, sigma / lambda);  // linear sums join unscaled, lambda multiplies the whole
    float den_linear[2] = {0.0f, 0.0f};
    for (int tile = reach; tile <= chunk && p.linear(chunk, tile); tile++) {
        load_tile<FP>(s.k, p.phi(b, p.heads + h, tile), p.phi_row(), p.time - tile * ROWS, p.width);
        load_tile<DP>(s.v, p.rows(b, p.value_head(h), tile), p.packed(), p.time - tile * ROWS, p.dim);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            float w[4][4];
            linear_products<FP>(w, p, s.fq, s.k + half * 32 * LF, row, i, tile * ROWS + half * 32);
#pragma unroll
            for (int n = 0; n < 4; n++) den_linear[0] += w[n][0] + w[n][1], den_linear[1] += w[n][2] + w[n][3];
            weighted(acc, w, s.v + half * 32 * LD, LD);
        }
        __syncthreads();
    }
    den_linear[0] = quad_sum(den_linear[0]), den_linear[1] = quad_sum(den_linear[1]);
    if (reach > 0) load_padded<DP>(s.state, state, FP, FP);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    if (reach > 0) {
        product_t<FP>(acc, s.fq, LF, row, s.state, LD);
        float den[2];
        state_denominator<DP, FP>(den, s.fq, s.state, row);
        den_linear[0] += den[0], den_linear[1] += den[1];
    }
    float inverse[2];
    bool live[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float den = den_window[r] + lambda * den_linear[r];
        if (!MSE && t == 0 && i + 8 * r < p.time) {
            saved[plane * p.time + i + 8 * r] = top[r];
            saved[((int64_t)p.batch * p.heads + plane) * p.time + i + 8 * r] = mixed_sign(den, den_linear[r]);
        }
        live[r] = den >= MIN_DENOMINATOR;
        inverse[r] = 1.0f / fmaxf(den, MIN_DENOMINATOR);
    }
    scale_all(acc, lambda * inverse[0], lambda * inverse[1]);  // y
    if constexpr (!MSE) {
        const int64_t stride = (int64_t)p.heads * p.dim;
        bf16* upper = i < p.time ? y + ((int64_t)b * p.time + i) * stride + (int64_t)h * p.dim : nullptr;
        store_rows(upper, i + 8 < p.time ? upper + 8 * stride : nullptr, p.dim, acc);
    } else {
        float error = 0.0f, window = 0.0f, dden[2] = {0.0f, 0.0f};
        uint32_t dn[DP / 16][4];
        const float mixed[2] = {den_linear[0] > 0.0f ? 1.0f : 0.0f, den_linear[1] > 0.0f ? 1.0f : 0.0f};  // a row of window alone has no gradient
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 wanted = unpack(*reinterpret_cast<const uint32_t*>(s.q + (row + g + 8 * r) * LD + n * 8 + t * 2));
                float2 d = make_float2(acc[n][2 * r] - wanted.x, acc[n][2 * r + 1] - wanted.y);
                if (i + 8 * r >= p.time) d = make_float2(0.0f, 0.0f);
                error += d.x * d.x + d.y * d.y;
                dden[r] += d.x * acc[n][2 * r] + d.y * acc[n][2 * r + 1];
                const float by = m.slope * inverse[r];
                const float2 num = unpack(num_window[n][r]);
                window += mixed[r] * by * (d.x * num.x + d.y * num.y);
                dn[n / 2][n % 2 * 2 + r] = pack(by * d.x, by * d.y);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            dden[r] = quad_sum(dden[r]);
            dden[r] = live[r] ? -m.slope * inverse[r] * dden[r] : 0.0f;
            if (t == 0) window += mixed[r] * dden[r] * den_window[r];
        }
        store_grads<DP>(m.grads + plane * p.time * LD, i, p.time, dn, dden);
        float dz[8][4];
        query_features<DP, FP, MAPS>(p, s, state, b, h, chunk, dn, dden, m.dfeatures, dz);
        __syncthreads();
        float* space = reinterpret_cast<float*>(smem);
        error = block_sum(error, space);
        window = block_sum(window, space + 32);
        if (threadIdx.x == 0) {
            m.partials[plane * p.chunks + chunk] = error;
            m.partials[((int64_t)p.batch * p.heads + plane) * p.chunks + chunk] = window;
        }
    }
}

struct Backward {
    const bf16* y;
    const bf16* dy;
    const bf16* weight;  // of the maps [2 H, D, 64], where gradients go through them
    const float* saved;  // [2, B, H, T]: maximum (log 2 units) and denominator, as the forward left them
    bf16* dqkv;          // null: not wanted
    bf16* dfeatures;     // through the maps: dz [B, T, 2 H, 64]
    bf16* grads;
    float* partials;     // second half as in `Mse`
    float* rows;         // [2, B, H, T]: window total of a da, index of the maximum
};

template <int DP, int FP, bool MAPS>
__global__ void __launch_bounds__(THREADS, 3) query_side(Problem p, const bf16* all_states, Backward m) {
    extern __shared__ uint4 smem[];
    using Tiles = QueryTiles<DP, FP>;
    constexpr int LD = Tiles::LD, N = DP / 8;
    const Tiles s(smem);
    const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int row = warp * 16, i = chunk * ROWS + row + g;
    const int reach = p.reach(chunk), left = p.time - chunk * ROWS;
    const int64_t plane = (int64_t)b * p.heads + h, rows_all = (int64_t)p.batch * p.heads * p.time;
    const bf16* state = all_states + (plane * p.slots + reach - 1) * FP * LD;
    const float sigma = p.sigma(h);
    const int64_t stride = (int64_t)p.heads * p.dim;
    const int64_t at = ((int64_t)b * p.time + chunk * ROWS) * stride + (int64_t)h * p.dim;

    // dy.y and dy, before the buffers serve keys and values.
    load_tile<DP>(s.k, m.dy + at, stride, left, p.dim);
    load_tile<DP>(s.v, m.y + at, stride, left, p.dim);
    copy_commit();
    if (p.window > 0) load_tile<DP>(s.q, p.rows(b, h, chunk), p.packed(), left, p.dim);
    if (MAPS && (reach > 0 || p.linear(chunk, reach))) load_tile<FP>(s.fq, p.phi(b, h, chunk), p.phi_row(), left, p.width);
    copy_commit();
    float top[2], inverse[2], dden[2] = {0.0f, 0.0f};
    bool live[2], mixed[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool valid = i + 8 * r < p.time;
        const float den = valid ? m.saved[rows_all + plane * p.time + i + 8 * r] : 1.0f;
        top[r] = valid ? m.saved[plane * p.time + i + 8 * r] : 0.0f;
        mixed[r] = valid && den > 0.0f;
        live[r] = fabsf(den) >= MIN_DENOMINATOR;
        inverse[r] = 1.0f / fmaxf(fabsf(den), MIN_DENOMINATOR);
    }
    copy_wait<1>();
    __syncthreads();
    uint32_t dn[DP / 16][4];
#pragma unroll
    for (int k = 0; k < DP / 16; k++) {
        uint32_t fy[4];
        frag_a(dn[k], s.k, LD, row, k * 16);
        frag_a(fy, s.v, LD, row, k * 16);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float2 a = unpack(dn[k][c]), v = unpack(fy[c]);
            dden[c & 1] += a.x * v.x + a.y * v.y;
            dn[k][c] = pack(a.x * inverse[c & 1], a.y * inverse[c & 1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        dden[r] = quad_sum(dden[r]);
        dden[r] = live[r] ? -dden[r] * inverse[r] : 0.0f;
    }
    __syncthreads();
    if (reach > 0) load_padded<DP>(s.state, state, FP, FP);
    copy_commit();
    store_grads<DP>(m.grads + plane * p.time * LD, i, p.time, dn, dden);
    copy_wait<0>();
    __syncthreads();
    float dz[8][4], total[2] = {0.0f, 0.0f}, dq[N][4];
    query_features<DP, FP, MAPS>(p, s, state, b, h, chunk, dn, dden, m.dfeatures, dz);
    clear(dq);
    if (MAPS && m.dqkv) {
        __syncthreads();
        load_tile<64, DP>(s.k, m.weight + (int64_t)h * p.dim * 64, 64, p.dim, 64);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        weighted_rows(dq, dz, s.k, 64 + SIDE);
    }

    // Through the window's exponentials.
    int best[2] = {0x7fffffff, 0x7fffffff};  // the first key that holds the maximum
    const float scale = rsqrtf((float)p.dim);
    if (p.window > 0) {
        for (int tile = reach; tile <= chunk; tile++) {
            __syncthreads();
            load_tile<DP>(s.k, p.rows(b, p.key_head(h), tile), p.packed(), p.time - tile * ROWS, p.dim);
            load_tile<DP>(s.v, p.rows(b, p.value_head(h), tile), p.packed(), p.time - tile * ROWS, p.dim);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            for (int half = 0; half < 2; half++) {
                const int first = tile * ROWS + half * 32;
                float w[4][4], da[4][4];
                scores<DP>(w, p, s.q, s.k + half * 32 * LD, row, i, first);
                clear(da);
                product(da, dn, s.v + half * 32 * LD, LD);
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int r = c >> 1;
                        if (w[n][c] == top[r]) best[r] = min(best[r], first + n * 8 + t * 2 + (c & 1));
                        w[n][c] = sigma * exp2f(w[n][c] - top[r]) * (da[n][c] + dden[r]);
                        total[r] += w[n][c];
                        w[n][c] *= scale;
                    }
                if (m.dqkv) weighted(dq, w, s.k + half * 32 * LD, LD);
            }
        }
    }
    float window = (mixed[0] ? total[0] : 0.0f) + (mixed[1] ? total[1] : 0.0f);
    if (m.dqkv) {
        bf16* out[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] = quad_sum(total[r]);
            best[r] = min(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
            best[r] = min(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
            const bool valid = i + 8 * r < p.time;
            out[r] = valid ? m.dqkv + ((int64_t)b * p.time + i + 8 * r) * p.packed() + (int64_t)h * p.dim : nullptr;
            if (valid && best[r] <= i + 8 * r) {
                // What the other keys lose goes to the key that holds the maximum.
                const bf16* k = p.rows(b, p.key_head(h), 0) + best[r] * p.packed();
#pragma unroll
                for (int n = 0; n < N; n++) {
                    if (n * 8 >= p.dim) break;
                    const float2 x = unpack(*reinterpret_cast<const uint32_t*>(k + n * 8 + t * 2));
                    dq[n][2 * r] -= total[r] * scale * x.x;
                    dq[n][2 * r + 1] -= total[r] * scale * x.y;
                }
                if (t == 0) {
                    float* stats = m.rows + plane * p.time + i + 8 * r;
                    stats[0] = total[r];
                    stats[rows_all] = __int_as_float(best[r]);
                }
            }
        }
        store_rows(out[0], out[1], p.dim, dq);
    }
    __syncthreads();
    window = block_sum(window, reinterpret_cast<float*>(smem));
    if (threadIdx.x == 0) m.partials[((int64_t)p.batch * p.heads + plane) * p.chunks + chunk] = window;
}

// ---- tiles of keys ----

// Shared memory of `key_features`: v, then dS, or [dnum, dden] and phi_q in its place; through the maps phi_k besides.
template <int DP, int FP, bool MAPS> struct KeyTiles {
    static constexpr int LD = DP + SIDE, LF = FP + SIDE;
    static constexpr int PAIR = ROWS * (LD + LF), STATE = FP * LD;
    static constexpr int REST = STATE > PAIR ? STATE : PAIR;
    static constexpr int BYTES = 2 * (ROWS * LD + REST + (MAPS ? ROWS * LF : 0));
};

template <int DP, int FP, bool MAPS>
__global__ void __launch_bounds__(THREADS, MAPS ? 3 : 4) key_features(Problem p, const bf16* all_states, const bf16* all_grads,
                                                            bf16* dfeatures) {
    extern __shared__ uint4 smem[];
    using Tiles = KeyTiles<DP, FP, MAPS>;
    constexpr int LD = Tiles::LD, LF = Tiles::LF, PART = FP < 128 ? FP : 128, N = PART / 8;
    bf16* v = reinterpret_cast<bf16*>(smem);
    bf16 *state = v + ROWS * LD, *grads = state, *fq = grads + ROWS * LD, *fk = state + Tiles::REST;
    const int tile = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int row = warp * 16, j = tile * ROWS + row + g, end = min(p.first(tile), p.chunks);
    const int64_t plane = (int64_t)b * p.heads + h;
    const float lambda = p.lambda(h);
    load_tile<DP>(v, p.rows(b, p.value_head(h), tile), p.packed(), p.time - tile * ROWS, p.dim);
    if (MAPS) load_tile<FP>(fk, p.phi(b, p.heads + h, tile), p.phi_row(), p.time - tile * ROWS, p.width);
    copy_commit();
    for (int part = 0; part < FP / PART; part++) {
        float acc[N][4];
        clear(acc);
        for (int chunk = tile; chunk < end; chunk++) {
            if (!p.linear(chunk, tile)) continue;
            const int left = p.time - chunk * ROWS;
            __syncthreads();
            load_padded<DP>(grads, all_grads + (plane * p.time + (int64_t)chunk * ROWS) * LD, ROWS, left);
            load_tile<FP>(fq, p.phi(b, h, chunk), p.phi_row(), left, p.width);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            float da[8][4];
            clear(da);
            product<DP>(da, v, LD, row, grads, LD);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int col = n * 8 + t * 2 + (c & 1), i = chunk * ROWS + col;
                    da[n][c] = j + 8 * (c >> 1) < p.start(i) ? da[n][c] + joined(grads + col * LD + DP) : 0.0f;
                }
            weighted(acc, da, fq + part * PART, LF);
        }
        if (tile < p.slots) {
            __syncthreads();
            // Only this part's rows, so that the parts' loads do not repeat.
            load_padded<DP>(state, all_states + ((plane * p.slots + tile) * FP + part * PART) * LD, PART, PART);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            product<DP>(acc, v, LD, row, state, LD);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[n][c] += joined(state + (n * 8 + t * 2 + (c & 1)) * LD + DP);
        }
        scale_all(acc, lambda, lambda);
        if constexpr (MAPS) {
            copy_wait<0>();
            __syncthreads();
            float dz[8][4];
            through_map(dz, acc, fk, LF, row);
            const int64_t stride = (int64_t)2 * p.heads * 64;
            bf16* upper = j < p.time ? dfeatures + ((int64_t)b * p.time + j) * stride + (p.heads + h) * 64 : nullptr;
            store_rows(upper, j + 8 < p.time ? upper + 8 * stride : nullptr, 64, dz);
        } else {
            const int64_t at = ((int64_t)b * p.time + j) * p.phi_row() + (int64_t)(p.heads + h) * p.width + part * PART;
            bf16* upper = j < p.time ? dfeatures + at : nullptr;
            store_rows(upper, j + 8 < p.time ? upper + 8 * p.phi_row() : nullptr, p.width - part * PART, acc);
        }
    }
    copy_wait<0>();
}

// Shared memory of `key_side`: k, v, phi_k, then q (or phi_q) and [dnum, dden], or dS in their place, then row statistics.
template <int DP, int FP> struct KeySideTiles {
    static constexpr int LD = DP + SIDE, LF = FP + SIDE, LX = LD > LF ? LD : LF;
    static constexpr int PAIR = ROWS * (LD + LX), STATE = FP * LD;
    static constexpr int REST = STATE > PAIR ? STATE : PAIR;
    static constexpr int BYTES = 2 * (ROWS * (2 * LD + LF) + REST) + 5 * ROWS * 4;
};

template <int DP, int FP, bool MAPS>
__global__ void __launch_bounds__(THREADS, 2) key_side(Problem p, const bf16* all_states, Backward m) {
    extern __shared__ uint4 smem[];
    using Tiles = KeySideTiles<DP, FP>;
    constexpr int LD = Tiles::LD, LF = Tiles::LF, N = DP / 8;
    bf16* k = reinterpret_cast<bf16*>(smem);
    bf16 *v = k + ROWS * LD, *fk = v + ROWS * LD, *state = fk + ROWS * LF, *grads = state, *q = grads + ROWS * LD;
    float* stats = reinterpret_cast<float*>(state + Tiles::REST);  // [5, ROWS]
    const int tile = blockIdx.x, head = blockIdx.y, b = blockIdx.z, group = p.heads / p.kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int row = warp * 16, j = tile * ROWS + row + g, end = min(p.first(tile), p.chunks), keys = p.time - tile * ROWS;
    const int64_t rows_all = (int64_t)p.batch * p.heads * p.time;
    const float scale = p.score_scale(), by = rsqrtf((float)p.dim);
    load_tile<DP>(k, p.rows(b, p.heads + head, tile), p.packed(), keys, p.dim);
    load_tile<DP>(v, p.rows(b, p.heads + p.kv_heads + head, tile), p.packed(), keys, p.dim);
    float dk[N][4], dv[N][4];
    clear(dk);
    clear(dv);
    for (int h = head * group; h < (head + 1) * group; h++) {
        const int64_t plane = (int64_t)b * p.heads + h;
        const float sigma = p.sigma(h), lambda = p.lambda(h);
        __syncthreads();
        load_tile<FP>(fk, p.phi(b, p.heads + h, tile), p.phi_row(), keys, p.width);
        if (MAPS) {  // dk's share through the maps
            bf16 *w = state, *z = w + DP * (64 + SIDE);
            load_tile<64, DP>(w, m.weight + (int64_t)(p.heads + h) * p.dim * 64, 64, p.dim, 64);
            load_tile<64>(z, m.dfeatures + (((int64_t)b * p.time + tile * ROWS) * 2 * p.heads + p.heads + h) * 64,
                          (int64_t)2 * p.heads * 64, keys, 64);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
            product<64>(dk, z, 64 + SIDE, row, w, 64 + SIDE);
            __syncthreads();
        }
        if (tile < p.slots) {
            load_padded<DP>(state, all_states + (plane * p.slots + tile) * FP * LD, FP, FP);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
#pragma unroll
            for (int f = 0; f < FP; f += 16) {
                uint32_t fa[4];
                frag_a(fa, fk, LF, row, f);
                if (p.affine)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float2 x = unpack(fa[c]);
                        fa[c] = pack(lambda * x.x, lambda * x.y);
                    }
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    uint32_t fb[4];
                    frag_b_t(fb, state, LD, f, n * 8);
                    mma(dv[n], fa, fb[0], fb[1]);
                    mma(dv[n + 1], fa, fb[2], fb[3]);
                }
            }
        }
        for (int chunk = tile; chunk < end; chunk++) {
            const int left = p.time - chunk * ROWS;
            const bool window = p.window > 0 && p.start(chunk * ROWS) < (tile + 1) * ROWS, linear = p.linear(chunk, tile);
            __syncthreads();
            load_padded<DP>(grads, m.grads + (plane * p.time + (int64_t)chunk * ROWS) * LD, ROWS, left);
            if (window) load_tile<DP>(q, p.rows(b, h, chunk), p.packed(), left, p.dim);
            copy_commit();
            if (threadIdx.x < ROWS) {
                const int i = chunk * ROWS + threadIdx.x;
                const float* from = m.rows + plane * p.time + i;
                const bool valid = i < p.time && p.window > 0;
                stats[threadIdx.x] = valid ? m.saved[plane * p.time + i] : 0.0f;
                stats[ROWS + threadIdx.x] = valid ? from[0] : 0.0f;
                stats[2 * ROWS + threadIdx.x] = valid ? from[rows_all] : __int_as_float(-1);
                stats[3 * ROWS + threadIdx.x] = __int_as_float(i < p.time ? p.start(i) : 0);
            }
            copy_wait<0>();
            __syncthreads();
            if (threadIdx.x < ROWS) stats[4 * ROWS + threadIdx.x] = joined(grads + threadIdx.x * LD + DP);
            __syncthreads();
            if (window) {
                float w[8][4], da[8][4];
                clear(w);
                product<DP>(w, k, LD, row, q, LD);
#pragma unroll
                for (int n = 0; n < 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int col = n * 8 + t * 2 + (c & 1), i = chunk * ROWS + col, key = j + 8 * (c >> 1);
                        const bool inside = key <= i && i < p.time && key >= __float_as_int(stats[3 * ROWS + col]);
                        w[n][c] = inside ? sigma * exp2f(w[n][c] * scale - stats[col]) : 0.0f;
                    }
                weighted(dv, w, grads, LD);
                clear(da);
                product<DP>(da, v, LD, row, grads, LD);
#pragma unroll
                for (int n = 0; n < 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int col = n * 8 + t * 2 + (c & 1);
                        w[n][c] *= da[n][c] + stats[4 * ROWS + col];
                        if (j + 8 * (c >> 1) == __float_as_int(stats[2 * ROWS + col])) w[n][c] -= stats[ROWS + col];
                        w[n][c] *= by;
                    }
                weighted(dk, w, q, LD);
            }
            if (linear) {
                __syncthreads();
                load_tile<FP>(q, p.phi(b, h, chunk), p.phi_row(), left, p.width);
                copy_commit();
                copy_wait<0>();
                __syncthreads();
                float w[8][4];
                clear(w);
                product<FP>(w, fk, LF, row, q, LF);
#pragma unroll
                for (int n = 0; n < 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int col = n * 8 + t * 2 + (c & 1);
                        w[n][c] = j + 8 * (c >> 1) < __float_as_int(stats[3 * ROWS + col]) ? lambda * w[n][c] : 0.0f;
                    }
                weighted(dv, w, grads, LD);
            }
        }
    }
    bf16* out = m.dqkv + ((int64_t)b * p.time + j) * p.packed() + (int64_t)(p.heads + head) * p.dim;
    bf16 *upper = j < p.time ? out : nullptr, *lower = j + 8 < p.time ? out + 8 * p.packed() : nullptr;
    store_rows(upper, lower, p.dim, dk);
    const int64_t values = (int64_t)p.kv_heads * p.dim;
    store_rows(upper ? upper + values : nullptr, lower ? lower + values : nullptr, p.dim, dv);
    copy_wait<0>();
}

// Block h < heads: the factor's gradient. Block `heads`: the loss.
__global__ void __launch_bounds__(THREADS) sums(Problem p, const float* partials, float* dfactors, float* loss,
                                                 float loss_scale) {
    extern __shared__ uint4 smem[];
    const int h = blockIdx.x;
    const int64_t all = (int64_t)p.batch * p.heads * p.chunks;
    float sum = 0.0f;
    if (h < p.heads) {
        for (int n = threadIdx.x; n < p.batch * p.chunks; n += THREADS)
            sum += partials[all + ((int64_t)(n / p.chunks) * p.heads + h) * p.chunks + n % p.chunks];
        sum = block_sum(sum, reinterpret_cast<float*>(smem));
        // sum = sigma dL/dsigma; a row's sum of a da is zero, so lambda = 1 - sigma adds the same sum times sigma.
        if (threadIdx.x == 0) dfactors[h] = p.affine ? sum : sum * (1.0f / (1.0f + expf(p.factors[h])));
    } else {
        for (int64_t n = threadIdx.x; n < all; n += THREADS) sum += partials[n];
        sum = block_sum(sum, reinterpret_cast<float*>(smem));
        if (threadIdx.x == 0) *loss = sum * loss_scale;
    }
}

// ---- launchers ----

// kind 0: what the forward leaves for the backward; 1: for the loss; 2: for the backward.
struct Scratch {
    bf16 *states, *grads;
    float *partials, *rows;
    size_t bytes;
    Scratch(void* base, const Problem& p, int dp, int fp, int kind) {
        size_t at = 0;
        auto take = [&](size_t bytes) {
            char* x = (char*)base + at;
            at += (bytes + 255) / 256 * 256;
            return x;
        };
        const size_t planes = (size_t)p.batch * p.heads;
        states = (bf16*)take(planes * p.slots * fp * (dp + SIDE) * 2);
        grads = (bf16*)take(kind > 0 ? planes * p.time * (dp + SIDE) * 2 : 0);
        partials = (float*)take(kind > 0 ? planes * p.chunks * 2 * 4 : 0);
        rows = (float*)take(kind != 1 ? planes * p.time * 2 * 4 : 0);
        bytes = at;
    }
};

int padded_dim(int dim) { return dim <= 64 ? 64 : 128; }
int padded_width(int width) { return width <= 128 ? 128 : 256; }

bool problem(Problem& p, const void* qkv, const void* features, const void* factors, int batch, int time, int heads,
             int kv_heads, int dim, int width, int window, int terraced, int affine) {
    if (batch < 1 || time < 1 || kv_heads < 1 || heads % kv_heads != 0 || dim < 8 || dim > 128 || dim % 8 != 0 || width < 8 ||
        width > (dim > 64 ? 256 : 128) || width % 8 != 0 || window < 0 || (terraced && window == 0) || batch > 65535 || heads > 65535)
        return false;
    p.qkv = (const bf16*)qkv, p.features = (const bf16*)features, p.factors = (const float*)factors;
    p.batch = batch, p.time = time, p.heads = heads, p.kv_heads = kv_heads, p.dim = dim, p.width = width;
    p.window = window, p.terraced = terraced, p.affine = affine;
    p.chunks = (time + ROWS - 1) / ROWS;
    p.slots = p.reach(p.chunks - 1);
    return true;
}

template <class K> cudaError_t reserve(K kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <int DP, int FP, int FS, bool BACK>
cudaError_t launch_states(const Problem& p, const Scratch& s, cudaStream_t stream) {
    const int bytes = (FS == 64 ? 2 : 4) * 2 * 64 * (DP + FS + 2 * SIDE) + 64;
    cudaError_t error = reserve(states<DP, FP, FS, BACK>, bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(FP / FS, p.heads, p.batch);
    states<DP, FP, FS, BACK><<<grid, THREADS, bytes, stream>>>(p, s.grads, s.states);
    return cudaGetLastError();
}

// Few heads: narrower slices of the features, so that more blocks run.
template <int DP, int FP, bool BACK>
cudaError_t launch_states(const Problem& p, const Scratch& s, cudaStream_t stream) {
    if (p.slots == 0) return cudaSuccess;
    constexpr int NARROW = DP == 128 ? 16 : 32;
    if (p.batch * p.heads * (FP / 64) < 264) return launch_states<DP, FP, NARROW, BACK>(p, s, stream);
    return launch_states<DP, FP, 64, BACK>(p, s, stream);
}

struct Call {
    Problem p;
    void *y, *dy, *target, *weight, *loss, *dqkv, *dfeatures, *dfactors, *saved, *scratch;
    float loss_weight;
    cudaStream_t stream;
};

#define MARGAY_TRY(x)                                   \
    do {                                                \
        const cudaError_t error = (x);                  \
        if (error != cudaSuccess) return error;         \
    } while (0)

template <int DP, int FP> cudaError_t run_forward(const Call& c) {
    const Problem& p = c.p;
    const Scratch s(c.saved, p, DP, FP, 0);
    MARGAY_TRY((launch_states<DP, FP, false>(p, s, c.stream)));
    constexpr int bytes = QueryTiles<DP, FP>::BYTES;
    MARGAY_TRY((reserve(forward<DP, FP, false, false>, bytes)));
    const dim3 grid(p.chunks, p.heads, p.batch);
    forward<DP, FP, false, false><<<grid, THREADS, bytes, c.stream>>>(p, s.states, (bf16*)c.y, s.rows, Mse{});
    return cudaGetLastError();
}

template <int DP, int FP, bool MAPS> cudaError_t run_key_features(const Call& c, const Scratch& s) {
    const Problem& p = c.p;
    MARGAY_TRY((launch_states<DP, FP, true>(p, s, c.stream)));
    constexpr int bytes = KeyTiles<DP, FP, MAPS>::BYTES;
    MARGAY_TRY((reserve(key_features<DP, FP, MAPS>, bytes)));
    const dim3 grid(p.chunks, p.heads, p.batch);
    key_features<DP, FP, MAPS><<<grid, THREADS, bytes, c.stream>>>(p, s.states, s.grads, (bf16*)c.dfeatures);
    return cudaGetLastError();
}

template <int DP, int FP, bool MAPS> cudaError_t mse(const Call& c) {
    const Problem& p = c.p;
    const Scratch s(c.scratch, p, DP, FP, 1);
    MARGAY_TRY((launch_states<DP, FP, false>(p, s, c.stream)));
    constexpr int bytes = QueryTiles<DP, FP>::BYTES;
    MARGAY_TRY((reserve(forward<DP, FP, true, MAPS>, bytes)));
    const float mean = c.loss_weight / ((float)p.batch * p.time * p.heads * p.dim);
    const dim3 grid(p.chunks, p.heads, p.batch);
    const Mse m{(const bf16*)c.target, (bf16*)c.dfeatures, s.grads, s.partials, 2.0f * mean};
    forward<DP, FP, true, MAPS><<<grid, THREADS, bytes, c.stream>>>(p, s.states, nullptr, nullptr, m);
    MARGAY_TRY(cudaGetLastError());
    MARGAY_TRY((run_key_features<DP, FP, MAPS>(c, s)));
    sums<<<p.heads + 1, THREADS, 256, c.stream>>>(p, s.partials, (float*)c.dfactors, (float*)c.loss, mean);
    return cudaGetLastError();
}

template <int DP, int FP, bool MAPS> cudaError_t backward(const Call& c) {
    const Problem& p = c.p;
    const Scratch before(c.saved, p, DP, FP, 0), s(c.scratch, p, DP, FP, 2);
    constexpr int bytes = QueryTiles<DP, FP>::BYTES;
    MARGAY_TRY((reserve(query_side<DP, FP, MAPS>, bytes)));
    const dim3 grid(p.chunks, p.heads, p.batch);
    const Backward m{(const bf16*)c.y, (const bf16*)c.dy,      (const bf16*)c.weight, before.rows, (bf16*)c.dqkv,
                     (bf16*)c.dfeatures, s.grads, s.partials, s.rows};
    query_side<DP, FP, MAPS><<<grid, THREADS, bytes, c.stream>>>(p, before.states, m);
    MARGAY_TRY(cudaGetLastError());
    MARGAY_TRY((run_key_features<DP, FP, MAPS>(c, s)));
    if (c.dqkv) {
        constexpr int side = KeySideTiles<DP, FP>::BYTES;
        MARGAY_TRY((reserve(key_side<DP, FP, MAPS>, side)));
        const dim3 tiles(p.chunks, p.kv_heads, p.batch);
        key_side<DP, FP, MAPS><<<tiles, THREADS, side, c.stream>>>(p, s.states, m);
        MARGAY_TRY(cudaGetLastError());
    }
    sums<<<p.heads, THREADS, 256, c.stream>>>(p, s.partials, (float*)c.dfactors, nullptr, 0.0f);
    return cudaGetLastError();
}

template <int DP, int FP> cudaError_t run_mse(const Call& c) {
    if constexpr (FP == 128)
        if (c.weight) return mse<DP, FP, true>(c);
    return c.weight ? cudaErrorInvalidValue : mse<DP, FP, false>(c);
}

template <int DP, int FP> cudaError_t run_backward(const Call& c) {
    if constexpr (FP == 128)
        if (c.weight) return backward<DP, FP, true>(c);
    return c.weight ? cudaErrorInvalidValue : backward<DP, FP, false>(c);
}

#define MARGAY_DISPATCH(run, c)                                                                  \
    const int dp = padded_dim(c.p.dim), fp = padded_width(c.p.width);                            \
    if (dp == 128 && fp == 128) return run<128, 128>(c);                                         \
    MARGAY_REST(run, c)                                                                          \
    return cudaErrorInvalidValue;

#ifdef MARGAY_ONLY_128  // quicker to compile while working on this file
#define MARGAY_REST(run, c)
#else
#define MARGAY_REST(run, c)                                                                      \
    if (dp == 64 && fp == 128) return run<64, 128>(c);                                           \
    if (dp == 128 && fp == 256) return run<128, 256>(c);
#endif

}  // namespace
}  // namespace margay

using namespace margay;

// Bytes of kind 0: what the forward leaves for the backward (scratch where there is none); 1: scratch of the loss; 2: scratch of
// the backward. 0: this shape is not supported.
extern "C" size_t margay_hybrid_attn_scratch(int kind, int batch, int time, int heads, int kv_heads, int dim, int width,
                                             int window, int terraced) {
    Problem p;
    if (!problem(p, nullptr, nullptr, nullptr, batch, time, heads, kv_heads, dim, width, window, terraced, 0)) return 0;
    int device, most;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        most < (width > 128 ? KeySideTiles<128, 256>::BYTES : KeySideTiles<128, 128>::BYTES))
        return 0;
    return Scratch(nullptr, p, padded_dim(dim), padded_width(width), kind).bytes;
}

extern "C" int margay_hybrid_attn_fwd(const void* qkv, const void* features, const void* factors, void* y, void* saved,
                                      int batch, int time, int heads, int kv_heads, int dim, int width, int window,
                                      int terraced, int affine, void* stream) {
    Call c{};
    if (!problem(c.p, qkv, features, factors, batch, time, heads, kv_heads, dim, width, window, terraced, affine))
        return cudaErrorInvalidValue;
    c.y = y, c.saved = saved, c.stream = (cudaStream_t)stream;
    MARGAY_DISPATCH(run_forward, c)
}

// Gradients of `y` for `dy`, both `y` and `saved` as the forward left them; `dqkv` may be null. With `weight` [2 H, D, 64], the
// softmax maps the features come from, `dfeatures` receives dz [B, T, 2 H, 64] instead, and `dqkv` the maps' share too.
extern "C" int margay_hybrid_attn_bwd(const void* qkv, const void* features, const void* factors, const void* weight,
                                      const void* y, const void* saved, const void* dy, void* dqkv, void* dfeatures,
                                      void* dfactors, void* scratch, int batch, int time, int heads, int kv_heads, int dim,
                                      int width, int window, int terraced, int affine, void* stream) {
    Call c{};
    if (!problem(c.p, qkv, features, factors, batch, time, heads, kv_heads, dim, width, window, terraced, affine) ||
        (weight && width != 128))
        return cudaErrorInvalidValue;
    c.weight = (void*)weight, c.y = (void*)y, c.saved = (void*)saved, c.dy = (void*)dy;
    c.dqkv = dqkv, c.dfeatures = dfeatures, c.dfactors = dfactors;
    c.scratch = scratch, c.stream = (cudaStream_t)stream;
    MARGAY_DISPATCH(run_backward, c)
}

// loss = loss_weight mean((y - target)^2) with its gradients to features (or to z, as above) and factors.
extern "C" int margay_hybrid_attn_mse(const void* qkv, const void* features, const void* factors, const void* weight,
                                      const void* target, void* loss, void* dfeatures, void* dfactors, void* scratch,
                                      float loss_weight, int batch, int time, int heads, int kv_heads, int dim, int width,
                                      int window, int terraced, int affine, void* stream) {
    Call c{};
    if (!problem(c.p, qkv, features, factors, batch, time, heads, kv_heads, dim, width, window, terraced, affine) ||
        (weight && width != 128))
        return cudaErrorInvalidValue;
    c.weight = (void*)weight, c.target = (void*)target, c.loss = loss, c.dfeatures = dfeatures, c.dfactors = dfactors;
    c.scratch = scratch, c.loss_weight = loss_weight, c.stream = (cudaStream_t)stream;
    MARGAY_DISPATCH(run_mse, c)
}
