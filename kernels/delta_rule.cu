// Delta rule, gated delta rule and KDA, chunkwise in WY form: forward and backward.
//
//   S_t = D_t S_{t-1} + k_t u_tᵀ,  u_t = β_t (v_t - (D_t S_{t-1})ᵀ k_t),  o_t = scale S_tᵀ q_t,  D_t = exp(g_t)
//
// g is absent (delta rule), one number per head (gated delta rule) or one per key channel (KDA). With G the inclusive
// sum of g inside a chunk of 64 rows, S the state before it, E_ij = exp(G_i - G_j) for i >= j:
//
//   M = stril(k kᵀ E),  P = scale tril(q kᵀ E),  τ = -M - M β τ  (strictly lower, so forward substitution)
//   R = v - (k e^G) S,  Y = R + τ (β R),  U = β Y,  o = scale (q e^G) S + P U,  S' = e^{G_C} S + (k e^{G_C - G})ᵀ U
//
// (I + τ β) is the inverse of (I + M β): its unit diagonal stays exact, only τ is rounded to bf16, and β = 0 is as good
// as any other value. Backwards, with dS' the gradient of the state after the chunk:
//
//   dU = Pᵀ do + (k e^{G_C - G}) dS',  X = dU + τᵀ (β dU),  dR = dv = β X,  dβ = Σ_v X Y
//   dS = e^{G_C} dS' + scale (q e^G)ᵀ do - (k e^G)ᵀ dR,  dP = scale tril(do Uᵀ),  dM = -stril(dR Uᵀ)
//
// and dq, dk from dP, dM, do Sᵀ, dR Sᵀ, U dS'ᵀ; dG_i = q_i·dq_i + k_i·dk_i (as row) - k_i·dk_i (as column).
//
// Four kernels, each walking chunks of 64 rows with bf16 tensor-core products and f32 sums:
//   prepare    per chunk and head: sums of the gates, row norms, P and τ; the solve is f32.
//   scan       per head and block of value columns, chunk after chunk: S in registers; writes o, and for the backward
//              pass S before each chunk and Y.
//   scan_back  the same from the last chunk to the first: dS in registers; writes dS' of each chunk and X.
//   local_back per chunk and head: everything else.
// KDA has its own `prepare` and `local_back`: decays per channel do not factor out of the products. Blocks of 16 rows
// do: k_i e^{G_i - r} against k_j e^{r - G_j}, r the sum at the boundary between them, so that both exponents are
// negative; inside a block of 16 the exponents are taken pair by pair.
//
// Layout: q, k, v bf16 [B, T, heads, D] with a common distance `row` of positions, k and v heads shared by H / Hkv query
// heads; KDA's g bf16 [B, T, H, D]; β and the scalar g f32 [B, T, H]; o, do bf16 [B, T, H, D]; states f32 [B, H, D, D]. Gradients of k
// and v are per query head. D is 64 or 128. Everything between kernels lies chunk after chunk of each head.
#include "common.cuh"

namespace margay {
namespace delta {

constexpr int C = 64;        // rows of a chunk
constexpr int LC = C + 8;    // distance of rows of a C-wide tile: 16 bytes off a multiple of 128, no bank conflicts
constexpr float LOG2E = 1.4426950408889634f;
enum Gate { NONE = 0, SCALAR = 1, CHANNEL = 2 };

// 2^x in one instruction; every exponent here is at most 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rows of `vec`, f32 per chunk.
enum Vec { V_G = 0, V_RQ = 1, V_RK = 2, V_BETA = 3, V_ROWS = 4 };

struct Shape {
    int batch, time, heads, kv_heads, chunks;
    long row;   // distance of positions of q, k, v
    long drow;  // of their gradients
    float scale;
    int normalize;
};

// What the forward pass leaves for the backward pass.
struct Saved {
    float* vec;   // [BH, N, 4, C]
    bf16* tau;    // [BH, N, C, C]
    bf16* p;      // [BH, N, C, C]
    bf16* y;      // [BH, N, C, D]
    bf16* h;      // [BH, N, D, D] state before the chunk
    bf16* qd;     // KDA: scale q e^G   [BH, N, C, D]
    bf16* kd;     // KDA: k e^G
    bf16* ke;     // KDA: k e^{G_C - G}
    float* decay; // KDA: e^{G_C} [BH, N, D]
};

// A tile of `ROWS` rows by all `THREADS` threads; rows from `valid` on become zeros.
template <int COLS, int LD, int THREADS, int ROWS = C>
__device__ __forceinline__ void load_rows(bf16* to, const bf16* from, long row, int valid) {
    constexpr int COUNT = ROWS * (COLS / 8);
#pragma unroll
    for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; n++) {
        const int i = threadIdx.x + n * THREADS, r = i / (COLS / 8), c = i % (COLS / 8) * 8;
        if (COUNT % THREADS == 0 || i < COUNT) copy16(to + r * LD + c, from + (r < valid ? r * row : 0) + c, r < valid);
    }
}

template <int COLS, int LD, int THREADS>
__device__ __forceinline__ void store_rows(bf16* to, const bf16* from, long row, int valid) {
    constexpr int COUNT = C * (COLS / 8);
#pragma unroll
    for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; n++) {
        const int i = threadIdx.x + n * THREADS, r = i / (COLS / 8), c = i % (COLS / 8) * 8;
        if (r < valid && (COUNT % THREADS == 0 || i < COUNT))
            *reinterpret_cast<uint4*>(to + r * row + c) = *reinterpret_cast<const uint4*>(from + r * LD + c);
    }
}

// Fragments of A (16 x 16 at m, k) from a tile stored [m][k], or [k][m] where `T`.
template <bool T, int LD> __device__ __forceinline__ void frag_a(uint32_t (&a)[4], const bf16* tile, int m, int k) {
    const int l = threadIdx.x % WARP;
    if constexpr (T)
        load_tiles_t(a, tile + (k + l % 8 + l / 16 * 8) * LD + m + l / 8 % 2 * 8);
    else
        load_tiles(a, tile + (m + l % 16) * LD + k + l / 16 * 8);
}

// Fragments of B (16 x 16 at k, n: two column tiles) from a tile stored [k][n], or [n][k] where `T`.
template <bool T, int LD> __device__ __forceinline__ void frag_b(uint32_t (&b)[4], const bf16* tile, int k, int n) {
    const int l = threadIdx.x % WARP;
    if constexpr (T)
        load_tiles(b, tile + (n + l % 8 + l / 16 * 8) * LD + k + l / 8 % 2 * 8);
    else
        load_tiles_t(b, tile + (k + l % 16) * LD + n + l / 16 * 8);
}

// acc [16, 8 NT] += A[m.., k] B[k, n..] for k in [from, to), steps of 16. `AT`, `BT`: stored transposed.
template <int NT, bool AT, bool BT, int LDA, int LDB>
__device__ __forceinline__ void product(float (&acc)[NT][4], const bf16* a, const bf16* b, int m, int n, int from, int to,
                                        int shift_a = 0) {
#pragma unroll 4
    for (int k = from; k < to; k += 16) {
        uint32_t fa[4], fb[4];
        frag_a<AT, LDA>(fa, a, m, k + shift_a);
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            frag_b<BT, LDB>(fb, b, k, n + j * 8);
            mma(acc[j], fa, fb[0], fb[1]);
            mma(acc[j + 1], fa, fb[2], fb[3]);
        }
    }
}

template <int NT> __device__ __forceinline__ void clear(float (&acc)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[j][e] = 0.0f;
}

// Row scales of the two rows a lane holds.
template <int NT> __device__ __forceinline__ void scale_rows(float (&acc)[NT][4], float lo, float hi) {
#pragma unroll
    for (int j = 0; j < NT; j++) {
        acc[j][0] *= lo, acc[j][1] *= lo;
        acc[j][2] *= hi, acc[j][3] *= hi;
    }
}

// acc to a bf16 tile at (m, n), rows scaled.
template <int NT, int LD>
__device__ __forceinline__ void put(bf16* tile, const float (&acc)[NT][4], int m, int n, float lo = 1, float hi = 1) {
    const int l = threadIdx.x % WARP, g = l / 4, t = l % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        *reinterpret_cast<uint32_t*>(tile + (m + g) * LD + n + j * 8 + 2 * t) = pack(acc[j][0] * lo, acc[j][1] * lo);
        *reinterpret_cast<uint32_t*>(tile + (m + g + 8) * LD + n + j * 8 + 2 * t) = pack(acc[j][2] * hi, acc[j][3] * hi);
    }
}

// Like `put`, and acc becomes what the tile holds over the row's factor: the rows of Y or X that meet in (I + τ β) must be
// the same numbers in both terms, or near-equal keys, whose differences are what counts, lose them to rounding.
template <int NT, int LD>
__device__ __forceinline__ void put_rounded(bf16* tile, float (&acc)[NT][4], int m, int n, float lo, float hi) {
    const int l = threadIdx.x % WARP, g = l / 4, t = l % 4;
    const float over_lo = 1.0f / lo, over_hi = 1.0f / hi;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const uint32_t a = pack(acc[j][0] * lo, acc[j][1] * lo), b = pack(acc[j][2] * hi, acc[j][3] * hi);
        *reinterpret_cast<uint32_t*>(tile + (m + g) * LD + n + j * 8 + 2 * t) = a;
        *reinterpret_cast<uint32_t*>(tile + (m + g + 8) * LD + n + j * 8 + 2 * t) = b;
        const float2 x = unpack(a), y = unpack(b);
        if (lo > 1e-6f) acc[j][0] = x.x * over_lo, acc[j][1] = x.y * over_lo;
        if (hi > 1e-6f) acc[j][2] = y.x * over_hi, acc[j][3] = y.y * over_hi;
    }
}

// acc to global memory where the row is valid.
template <int NT>
__device__ __forceinline__ void put_global(bf16* to, long row, const float (&acc)[NT][4], int m, int n, int valid) {
    const int l = threadIdx.x % WARP, g = l / 4, t = l % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        if (m + g < valid)
            *reinterpret_cast<uint32_t*>(to + (m + g) * row + n + j * 8 + 2 * t) = pack(acc[j][0], acc[j][1]);
        if (m + g + 8 < valid)
            *reinterpret_cast<uint32_t*>(to + (m + g + 8) * row + n + j * 8 + 2 * t) = pack(acc[j][2], acc[j][3]);
    }
}

// ---------------------------------------------------------------------------------------------------------- prepare

constexpr int LM = C + 4;  // distance of rows of the f32 matrix that is solved

__device__ __forceinline__ void add(float4& x, float f, float4 y) {
    x.x += f * y.x, x.y += f * y.y, x.z += f * y.z, x.w += f * y.w;
}

// τ from M in place, by 128 threads; `beta` [C], `tmp` [32, 36].
// Blocks of 16 column by column, then pairs of blocks: τ21 = -(I + τ22 β2) M21 (I + β1 τ11).
__device__ __forceinline__ void solve(float* m, const float* beta, float* tmp) {
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    if (tid < 128 && lane < 16) {
        float* block = m + warp * 16 * LM + warp * 16;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) x[i] = -block[i * LM + lane];
#pragma unroll
        for (int k = 0; k < 15; k++) {
            const float bx = beta[warp * 16 + k] * x[k];
#pragma unroll
            for (int i = k + 1; i < 16; i++) x[i] -= block[i * LM + k] * bx;
        }
        __syncwarp(0xffff);
#pragma unroll
        for (int i = 0; i < 16; i++) block[i * LM + lane] = x[i];
    }
    __syncthreads();
    {   // 16 -> 32, two pairs; 64 threads each, four columns of one row
        const int pair = tid / 64 % 2, r = tid % 64 / 4, c = tid % 4 * 4, base = pair * 32;
        float* block = m + base * LM + base;
        float4 x;
        if (tid < 128) {
            x = *reinterpret_cast<float4*>(block + (16 + r) * LM + c);
#pragma unroll
            for (int k = 0; k < 16; k++)
                add(x, block[(16 + r) * LM + k] * beta[base + k], *reinterpret_cast<float4*>(block + k * LM + c));
            *reinterpret_cast<float4*>(tmp + (pair * 16 + r) * 36 + c) = x;
        }
        __syncthreads();
        if (tid < 128) {
#pragma unroll
            for (int k = 0; k < 16; k++)
                add(x, block[(16 + r) * LM + 16 + k] * beta[base + 16 + k],
                    *reinterpret_cast<float4*>(tmp + (pair * 16 + k) * 36 + c));
            *reinterpret_cast<float4*>(block + (16 + r) * LM + c) = make_float4(-x.x, -x.y, -x.z, -x.w);
        }
        __syncthreads();
    }
    {   // 32 -> 64: 128 threads, eight columns of one row
        const int r = tid / 4 % 32, c = tid % 4 * 8;
        float4 x, y;
        if (tid < 128) {
            x = *reinterpret_cast<float4*>(m + (32 + r) * LM + c);
            y = *reinterpret_cast<float4*>(m + (32 + r) * LM + c + 4);
#pragma unroll 8
            for (int k = 0; k < 32; k++) {
                const float f = m[(32 + r) * LM + k] * beta[k];
                add(x, f, *reinterpret_cast<float4*>(m + k * LM + c));
                add(y, f, *reinterpret_cast<float4*>(m + k * LM + c + 4));
            }
            *reinterpret_cast<float4*>(tmp + r * 36 + c) = x;
            *reinterpret_cast<float4*>(tmp + r * 36 + c + 4) = y;
        }
        __syncthreads();
        if (tid < 128) {
#pragma unroll 8
            for (int k = 0; k < 32; k++) {
                const float f = m[(32 + r) * LM + 32 + k] * beta[32 + k];
                add(x, f, *reinterpret_cast<float4*>(tmp + k * 36 + c));
                add(y, f, *reinterpret_cast<float4*>(tmp + k * 36 + c + 4));
            }
            *reinterpret_cast<float4*>(m + (32 + r) * LM + c) = make_float4(-x.x, -x.y, -x.z, -x.w);
            *reinterpret_cast<float4*>(m + (32 + r) * LM + c + 4) = make_float4(-y.x, -y.y, -y.z, -y.w);
        }
        __syncthreads();
    }
}

// 1 / sqrt(|x|² + 1e-6) of each row of a tile, four lanes a row, or 1.
template <int D, int LD> __device__ __forceinline__ void row_norms(float* out, const bf16* tile, int normalize) {
    for (int i = threadIdx.x; i < C * 4; i += blockDim.x) {
        const bf16* row = tile + i / 4 * LD;
        float sum = 0;
        if (normalize) {
#pragma unroll
            for (int c = 0; c < D / 8; c++) {
                const int at = (c * 4 + i % 4) * 2;
                const float2 x = unpack(*reinterpret_cast<const uint32_t*>(row + at));
                sum += x.x * x.x + x.y * x.y;
            }
        }
        sum = warp_sum<4>(sum);
        if (i % 4 == 0) out[i / 4] = normalize ? rsqrtf(sum + 1e-6f) : 1.0f;
    }
}

template <int D> struct PrepareShared {
    float vec[V_ROWS * C];
    union {
        struct {
            bf16 q[C * (D + 8)], k[C * (D + 8)];
        };
        struct {
            float m[C * LM], tmp[32 * 36];
        };
    };
};

template <int D, int GATE>
__global__ void __launch_bounds__(128) prepare(const bf16* q, const bf16* k, const float* beta, const float* gate, Saved out,
                                               Shape s) {
    extern __shared__ __align__(16) unsigned char raw[];
    auto& sh = *reinterpret_cast<PrepareShared<D>*>(raw);
    constexpr int LD = D + 8;
    const int chunk = blockIdx.x, bh = blockIdx.y, b = bh / s.heads, h = bh % s.heads;
    const int hk = h / (s.heads / s.kv_heads), start = chunk * C, valid = min(C, s.time - start);
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const long at = (long)b * s.time + start;
    load_rows<D, LD, 128>(sh.q, q + at * s.row + h * D, s.row, valid);
    load_rows<D, LD, 128>(sh.k, k + at * s.row + hk * D, s.row, valid);
    copy_commit();
    if (tid < C) {
        const bool in = tid < valid;
        const long i = (at + tid) * s.heads + h;
        sh.vec[V_BETA * C + tid] = in ? beta[i] : 0.0f;
        sh.vec[V_G * C + tid] = GATE == SCALAR && in ? gate[i] : 0.0f;
    }
    __syncthreads();
    if (GATE == SCALAR && warp == 0) {  // inclusive sums, two rows a lane
        const float a = sh.vec[2 * lane], c = sh.vec[2 * lane + 1];
        float sum = a + c;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const float up = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += up;
        }
        sh.vec[2 * lane] = sum - c;
        sh.vec[2 * lane + 1] = sum;
    }
    copy_wait<0>();
    __syncthreads();
    row_norms<D, LD>(sh.vec + V_RQ * C, sh.q, s.normalize);
    row_norms<D, LD>(sh.vec + V_RK * C, sh.k, s.normalize);
    __syncthreads();

    const long ch = (long)bh * s.chunks + chunk;
    for (int i = tid; i < V_ROWS * C; i += 128) out.vec[ch * V_ROWS * C + i] = sh.vec[i];
    const float *sum = sh.vec, *rq = sh.vec + V_RQ * C, *rk = sh.vec + V_RK * C;
    const int g = lane / 4, t = lane % 4, m0 = warp * 16;
    float kk[8][4], qk[8][4];
    clear(kk), clear(qk);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t fk[4], fq[4], fb[4];
        frag_a<false, LD>(fk, sh.k, m0, d);
        frag_a<false, LD>(fq, sh.q, m0, d);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            if (j > 2 * warp) continue;
            frag_b<true, LD>(fb, sh.k, d, j * 8);
            mma(kk[j], fk, fb[0], fb[1]), mma(kk[j + 1], fk, fb[2], fb[3]);
            mma(qk[j], fq, fb[0], fb[1]), mma(qk[j + 1], fq, fb[2], fb[3]);
        }
    }
    bf16* p = out.p + ch * C * C;
    __syncthreads();  // m lies where q and k were
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = m0 + g + e / 2 * 8, c = j * 8 + 2 * t + e % 2;
            if (j > 2 * warp + 1) {
                sh.m[i * LM + c] = 0.0f;
                continue;
            }
            const float decay = (GATE == SCALAR ? exp2_fast(fminf(sum[i] - sum[c], 0.0f) * LOG2E) : 1.0f) * rk[c];
            sh.m[i * LM + c] = c < i ? kk[j][e] * decay * rk[i] : 0.0f;
            qk[j][e] = c <= i ? qk[j][e] * decay * rq[i] * s.scale : 0.0f;
        }
        *reinterpret_cast<uint32_t*>(p + (m0 + g) * C + j * 8 + 2 * t) = pack(qk[j][0], qk[j][1]);
        *reinterpret_cast<uint32_t*>(p + (m0 + g + 8) * C + j * 8 + 2 * t) = pack(qk[j][2], qk[j][3]);
    }
    __syncthreads();
    solve(sh.m, sh.vec + V_BETA * C, sh.tmp);
    uint32_t* tau = reinterpret_cast<uint32_t*>(out.tau + ch * C * C);
    for (int i = tid; i < C * C / 2; i += 128) {
        const float* x = sh.m + i / 32 * LM + i % 32 * 2;
        tau[i] = pack(x[0], x[1]);
    }
}

// ---------------------------------------------------------------------------------------------------------- scans

template <int D, int BV, int GATE, bool BACK> struct Stage {
    bf16 k[C * (D + 8)], q[C * (D + 8)], v[C * (BV + 8)], tau[C * LC], p[C * LC];
    bf16 ke[GATE == CHANNEL ? C * (D + 8) : 8];
    float vec[V_ROWS * C], decay[GATE == CHANNEL ? D : 4];
};

// One stage of loads where two blocks fit on a multiprocessor and hide each other's waits, two stages else.
template <int D, int BV, int GATE> constexpr int STAGES = BV == 64 && GATE != CHANNEL ? 1 : 2;

template <int D, int BV, int GATE, bool BACK> struct ScanShared {
    Stage<D, BV, GATE, BACK> stage[STAGES<D, BV, GATE>];
    bf16 s[D * (BV + 8)], r[C * (BV + 8)], u[C * (BV + 8)], ue[C * (BV + 8)];
};

// What a chunk's scan step reads. `v` is v in the forward pass, do in the backward pass.
template <int D, int BV, int GATE, bool BACK>
__device__ __forceinline__ void load_stage(Stage<D, BV, GATE, BACK>& st, const bf16* q, const bf16* k, const bf16* v, long vrow,
                                           const Saved& a, const Shape& s, int bh, int chunk) {
    constexpr int LD = D + 8, LV = BV + 8;
    const int b = bh / s.heads, start = chunk * C, valid = min(C, s.time - start);
    const long at = (long)b * s.time + start, ch = (long)bh * s.chunks + chunk;
    if constexpr (GATE == CHANNEL) {
        load_rows<D, LD, D * 2>(st.k, a.kd + ch * C * D, D, C);
        load_rows<D, LD, D * 2>(st.ke, a.ke + ch * C * D, D, C);
        load_rows<D, LD, D * 2>(st.q, a.qd + ch * C * D, D, C);
        for (int i = threadIdx.x; i < D / 4; i += blockDim.x) copy16(st.decay + i * 4, a.decay + ch * D + i * 4);
    } else {
        load_rows<D, LD, D * 2>(st.k, k + at * s.row, s.row, valid);
        load_rows<D, LD, D * 2>(st.q, q + at * s.row, s.row, valid);
    }
    load_rows<BV, LV, D * 2>(st.v, v + at * vrow, vrow, valid);
    load_rows<C, LC, D * 2>(st.tau, a.tau + ch * C * C, C, C);
    load_rows<C, LC, D * 2>(st.p, a.p + ch * C * C, C, C);
    if (threadIdx.x < V_ROWS * C / 4) {
        const int i = threadIdx.x;
        copy16(st.vec + i * 4, a.vec + ch * V_ROWS * C + i * 4);
    }
    copy_commit();
}

// Factors of one row: of scale q e^G, k e^G and k e^{G_C - G} over the stored q and k.
struct RowScales {
    float q, kd, ke, beta;
};

template <int GATE> __device__ __forceinline__ RowScales row_scales(const float* vec, int i, float scale) {
    RowScales r{1, 1, 1, vec[V_BETA * C + i]};
    if (GATE == CHANNEL) return r;
    const float rq = vec[V_RQ * C + i], rk = vec[V_RK * C + i];
    r.q = scale * rq, r.kd = r.ke = rk;
    if (GATE == SCALAR) {
        const float g = vec[i], e = exp2_fast(g * LOG2E);
        r.q *= e, r.kd *= e, r.ke *= exp2_fast((vec[C - 1] - g) * LOG2E);
    }
    return r;
}

template <int D, int BV, int GATE, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, STAGES<D, BV, GATE> == 1 ? 2 : 1) scan(const bf16* q, const bf16* k, const bf16* v, const float* first, bf16* o,
                                                   float* last, Saved a, Shape s, int keep) {
    extern __shared__ __align__(16) unsigned char raw[];
    auto& sh = *reinterpret_cast<ScanShared<D, BV, GATE, false>*>(raw);
    constexpr int LD = D + 8, LV = BV + 8, GROUPS = WARPS / 4, NT = BV / 8 / GROUPS, NS = BV / 8;
    constexpr int N = STAGES<D, BV, GATE>;
    static_assert(WARPS * 16 == D, "a warp holds 16 rows of the state");
    const int col = blockIdx.x * BV, bh = blockIdx.y, b = bh / s.heads, h = bh % s.heads;
    const int hk = h / (s.heads / s.kv_heads);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int m0 = warp % 4 * 16, n0 = warp / 4 * NT * 8, d0 = warp * 16;
    q += h * D, k += hk * D, v += hk * D + col;
    load_stage<D, BV, GATE, false>(sh.stage[0], q, k, v, s.row, a, s, bh, 0);

    float state[NS][4];
    clear(state);
    if (first) {
        const float* from = first + ((long)bh * D + d0) * D + col;
#pragma unroll
        for (int j = 0; j < NS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[j][e] = from[(g + e / 2 * 8) * D + j * 8 + 2 * t + e % 2];
    }
    put<NS, LV>(sh.s, state, d0, 0);
    for (int chunk = 0; chunk < s.chunks; chunk++) {
        auto& st = sh.stage[chunk % N];
        copy_wait<0>();
        __syncthreads();
        if (N > 1 && chunk + 1 < s.chunks)
            load_stage<D, BV, GATE, false>(sh.stage[(chunk + 1) % N], q, k, v, s.row, a, s, bh, chunk + 1);
        const long ch = (long)bh * s.chunks + chunk;
        const int valid = min(C, s.time - chunk * C);
        if (keep) {
            for (int i = threadIdx.x; i < D * BV / 8; i += WARPS * 32) {
                const int r = i / (BV / 8), c = i % (BV / 8) * 8;
                *reinterpret_cast<uint4*>(a.h + (ch * D + r) * D + col + c) =
                    *reinterpret_cast<const uint4*>(sh.s + r * LV + c);
            }
        }
        float y[NT][4], out[NT][4];
        clear(y), clear(out);
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            uint32_t fk[4], fq[4], fb[4];
            frag_a<false, LD>(fk, st.k, m0, d);
            frag_a<false, LD>(fq, st.q, m0, d);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                frag_b<false, LV>(fb, sh.s, d, n0 + j * 8);
                mma(y[j], fk, fb[0], fb[1]), mma(y[j + 1], fk, fb[2], fb[3]);
                mma(out[j], fq, fb[0], fb[1]), mma(out[j + 1], fq, fb[2], fb[3]);
            }
        }
        const RowScales lo = row_scales<GATE>(st.vec, m0 + g, s.scale), hi = row_scales<GATE>(st.vec, m0 + g + 8, s.scale);
        scale_rows(out, lo.q, hi.q);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const bf16* at = st.v + (m0 + g) * LV + n0 + j * 8 + 2 * t;
            const float2 v0 = unpack(*reinterpret_cast<const uint32_t*>(at));
            const float2 v1 = unpack(*reinterpret_cast<const uint32_t*>(at + 8 * LV));
            y[j][0] = v0.x - lo.kd * y[j][0], y[j][1] = v0.y - lo.kd * y[j][1];
            y[j][2] = v1.x - hi.kd * y[j][2], y[j][3] = v1.y - hi.kd * y[j][3];
        }
        put_rounded<NT, LV>(sh.r, y, m0, n0, lo.beta, hi.beta);
        __syncthreads();
        product<NT, false, false, LC, LV>(y, st.tau, sh.r, m0, n0, 0, m0 + 16);
        if (keep) put_global<NT>(a.y + ch * C * D + col, D, y, m0, n0, C);
        put<NT, LV>(sh.u, y, m0, n0, lo.beta, hi.beta);
        if (GATE != CHANNEL) put<NT, LV>(sh.ue, y, m0, n0, lo.beta * lo.ke, hi.beta * hi.ke);
        __syncthreads();
        if (GATE == SCALAR) {
            const float decay = exp2_fast(st.vec[C - 1] * LOG2E);
            scale_rows(state, decay, decay);
        } else if (GATE == CHANNEL) {
            scale_rows(state, st.decay[d0 + g], st.decay[d0 + g + 8]);
        }
        product<NS, true, false, LD, LV>(state, GATE == CHANNEL ? st.ke : st.k, GATE == CHANNEL ? sh.u : sh.ue, d0, 0, 0, C);
        put<NS, LV>(sh.s, state, d0, 0);
        product<NT, false, false, LC, LV>(out, st.p, sh.u, m0, n0, 0, m0 + 16);
        const long at = (long)b * s.time + chunk * C;
        put_global<NT>(o + (at * s.heads + h) * D + col, (long)s.heads * D, out, m0, n0, valid);
        if (N == 1) {
            __syncthreads();
            if (chunk + 1 < s.chunks) load_stage<D, BV, GATE, false>(st, q, k, v, s.row, a, s, bh, chunk + 1);
        }
    }
    if (last) {
        float* to = last + ((long)bh * D + d0) * D + col;
#pragma unroll
        for (int j = 0; j < NS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[(g + e / 2 * 8) * D + j * 8 + 2 * t + e % 2] = state[j][e];
    }
}

template <int D, int BV, int GATE, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, STAGES<D, BV, GATE> == 1 ? 2 : 1) scan_back(const bf16* q, const bf16* k, const bf16* grad, const float* last,
                                                        float* first, bf16* dh, bf16* x_out, Saved a, Shape s) {
    extern __shared__ __align__(16) unsigned char raw[];
    auto& sh = *reinterpret_cast<ScanShared<D, BV, GATE, true>*>(raw);
    constexpr int LD = D + 8, LV = BV + 8, GROUPS = WARPS / 4, NT = BV / 8 / GROUPS, NS = BV / 8;
    constexpr int N = STAGES<D, BV, GATE>;
    const int col = blockIdx.x * BV, bh = blockIdx.y, h = bh % s.heads;
    const int hk = h / (s.heads / s.kv_heads);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int m0 = warp % 4 * 16, n0 = warp / 4 * NT * 8, d0 = warp * 16, end = s.chunks - 1;
    const long grow = (long)s.heads * D;
    q += h * D, k += hk * D, grad += h * D + col;
    load_stage<D, BV, GATE, true>(sh.stage[0], q, k, grad, grow, a, s, bh, end);

    float state[NS][4];
    clear(state);
    if (last) {
        const float* from = last + ((long)bh * D + d0) * D + col;
#pragma unroll
        for (int j = 0; j < NS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[j][e] = from[(g + e / 2 * 8) * D + j * 8 + 2 * t + e % 2];
    }
    put<NS, LV>(sh.s, state, d0, 0);
    for (int step = 0; step <= end; step++) {
        const int chunk = end - step;
        auto& st = sh.stage[step % N];
        copy_wait<0>();
        __syncthreads();
        if (N > 1 && chunk > 0)
            load_stage<D, BV, GATE, true>(sh.stage[(step + 1) % N], q, k, grad, grow, a, s, bh, chunk - 1);
        const long ch = (long)bh * s.chunks + chunk;
        for (int i = threadIdx.x; i < D * BV / 8; i += WARPS * 32) {
            const int r = i / (BV / 8), c = i % (BV / 8) * 8;
            *reinterpret_cast<uint4*>(dh + (ch * D + r) * D + col + c) = *reinterpret_cast<const uint4*>(sh.s + r * LV + c);
        }
        float x[NT][4];
        clear(x);
        product<NT, false, false, LD, LV>(x, GATE == CHANNEL ? st.ke : st.k, sh.s, m0, n0, 0, D);
        const RowScales lo = row_scales<GATE>(st.vec, m0 + g, s.scale), hi = row_scales<GATE>(st.vec, m0 + g + 8, s.scale);
        scale_rows(x, lo.ke, hi.ke);
        product<NT, true, false, LC, LV>(x, st.p, st.v, m0, n0, m0, C);
        put_rounded<NT, LV>(sh.r, x, m0, n0, lo.beta, hi.beta);
        if (GATE != CHANNEL) {
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const int at = (m0 + g) * LV + n0 + j * 8 + 2 * t;
                const float2 v0 = unpack(*reinterpret_cast<const uint32_t*>(st.v + at));
                const float2 v1 = unpack(*reinterpret_cast<const uint32_t*>(st.v + at + 8 * LV));
                *reinterpret_cast<uint32_t*>(sh.u + at) = pack(v0.x * lo.q, v0.y * lo.q);
                *reinterpret_cast<uint32_t*>(sh.u + at + 8 * LV) = pack(v1.x * hi.q, v1.y * hi.q);
            }
        }
        __syncthreads();
        product<NT, true, false, LC, LV>(x, st.tau, sh.r, m0, n0, m0, C);
        put_global<NT>(x_out + ch * C * D + col, D, x, m0, n0, C);
        put<NT, LV>(sh.ue, x, m0, n0, -lo.beta * lo.kd, -hi.beta * hi.kd);
        __syncthreads();
        if (GATE == SCALAR) {
            const float decay = exp2_fast(st.vec[C - 1] * LOG2E);
            scale_rows(state, decay, decay);
        } else if (GATE == CHANNEL) {
            scale_rows(state, st.decay[d0 + g], st.decay[d0 + g + 8]);
        }
        product<NS, true, false, LD, LV>(state, st.q, GATE == CHANNEL ? st.v : sh.u, d0, 0, 0, C);
        product<NS, true, false, LD, LV>(state, st.k, sh.ue, d0, 0, 0, C);
        put<NS, LV>(sh.s, state, d0, 0);
        if (N == 1) {
            __syncthreads();
            if (chunk > 0) load_stage<D, BV, GATE, true>(st, q, k, grad, grow, a, s, bh, chunk - 1);
        }
    }
    if (first) {
        float* to = first + ((long)bh * D + d0) * D + col;
#pragma unroll
        for (int j = 0; j < NS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[(g + e / 2 * 8) * D + j * 8 + 2 * t + e % 2] = state[j][e];
    }
}

// ---------------------------------------------------------------------------------------------------------- local_back

struct Grads {
    bf16 *q, *k, *v, *g;  // g only for KDA
    float *beta, *gate;   // gate only for scalar decay
};

// What a chunk's pass over 64 value columns reads.
template <int D> struct Half {
    bf16 grad[C * LC], x[C * LC], y[C * LC], h[D * LC], dh[D * LC];
};

template <int D> struct LocalShared {
    Half<D> half[2];  // one is loaded while the other is used, across chunks
    bf16 q[C * (D + 8)], k[C * (D + 8)];
    bf16 dp[C * LC], dm[C * LC];
    float vec[2][V_ROWS * C], dots[4][4][C], sums[32], beta[C];
};

// Sums of acc ⊙ tile over this warp's columns, one per row, to `out` [C].
template <int NT, int LD>
__device__ __forceinline__ void row_dots(float* out, const float (&acc)[NT][4], const bf16* tile, int m, int n) {
    const int l = threadIdx.x % WARP, g = l / 4, t = l % 4;
    float lo = 0, hi = 0;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const bf16* at = tile + (m + g) * LD + n + j * 8 + 2 * t;
        const float2 a = unpack(*reinterpret_cast<const uint32_t*>(at));
        const float2 b = unpack(*reinterpret_cast<const uint32_t*>(at + 8 * LD));
        lo += acc[j][0] * a.x + acc[j][1] * a.y;
        hi += acc[j][2] * b.x + acc[j][3] * b.y;
    }
    lo = warp_sum<4>(lo), hi = warp_sum<4>(hi);
    if (t == 0) out[m + g] = lo, out[m + g + 8] = hi;
}

// tile = acc - c tile, rows m + g and m + g + 8.
template <int NT, int LD>
__device__ __forceinline__ void put_projected(bf16* tile, const float (&acc)[NT][4], int m, int n, float lo, float hi) {
    const int l = threadIdx.x % WARP, g = l / 4, t = l % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        uint32_t* at = reinterpret_cast<uint32_t*>(tile + (m + g) * LD + n + j * 8 + 2 * t);
        uint32_t* bt = reinterpret_cast<uint32_t*>(tile + (m + g + 8) * LD + n + j * 8 + 2 * t);
        const float2 a = unpack(*at), b = unpack(*bt);
        *at = pack(acc[j][0] - lo * a.x, acc[j][1] - lo * a.y);
        *bt = pack(acc[j][2] - hi * b.x, acc[j][3] - hi * b.y);
    }
}

template <int D, int GATE>
__global__ void __launch_bounds__(512, 1) local_back(const bf16* q, const bf16* k, const bf16* grad, const bf16* x,
                                                     const bf16* dh, Saved a, Grads to, Shape s, int tiles) {
    extern __shared__ __align__(16) unsigned char raw[];
    auto& sh = *reinterpret_cast<LocalShared<D>*>(raw);
    constexpr int LD = D + 8, NT = D / 32, HALVES = D / C;
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP, g = lane / 4, t = lane % 4;
    const int m0 = warp % 4 * 16, group = warp / 4, n0 = group * NT * 8, c0 = group * 16;
    const int i0 = m0 + g, i1 = i0 + 8;
    // Step `n` of this block: value columns 64 (n % HALVES).. of its chunk n / HALVES.
    const auto load_half = [&](int n) {
        const int ch = blockIdx.x + n / HALVES * gridDim.x, col = n % HALVES * C;
        if (ch < tiles) {
            const int bh = ch / s.chunks, start = ch % s.chunks * C, b = bh / s.heads, h = bh % s.heads;
            const long own = (((long)b * s.time + start) * s.heads + h) * D + col, at = (long)ch * C * D + col;
            const long state = (long)ch * D * D + col;
            Half<D>& half = sh.half[n % 2];
            load_rows<C, LC, 512>(half.grad, grad + own, (long)s.heads * D, s.time - start);
            load_rows<C, LC, 512>(half.x, x + at, D, C);
            load_rows<C, LC, 512>(half.y, a.y + at, D, C);
            load_rows<C, LC, 512, D>(half.h, a.h + state, D, D);
            load_rows<C, LC, 512, D>(half.dh, dh + state, D, D);
            if (col == 0 && tid < V_ROWS * C / 4)
                copy16(sh.vec[n / HALVES % 2] + tid * 4, a.vec + (long)ch * V_ROWS * C + tid * 4);
        }
        copy_commit();
    };
    load_half(0);
    int step = 0;
    for (int ch = blockIdx.x; ch < tiles; ch += gridDim.x) {
    const int bh = ch / s.chunks, chunk = ch % s.chunks, b = bh / s.heads, h = bh % s.heads;
    const int hk = h / (s.heads / s.kv_heads), start = chunk * C, valid = min(C, s.time - start);
    const long at = (long)b * s.time + start;
    load_rows<D, LD, 512>(sh.q, q + at * s.row + h * D, s.row, valid);
    load_rows<D, LD, 512>(sh.k, k + at * s.row + hk * D, s.row, valid);
    copy_commit();
    const float* vec = sh.vec[step / HALVES % 2];
    const float *sum = vec, *rq = vec + V_RQ * C, *rk = vec + V_RK * C, *beta = vec + V_BETA * C;

    float aq[NT][4], row[NT][4], col[NT][4], dp[2][4], dm[2][4], state_dot = 0;
    clear(aq), clear(row), clear(col), clear(dp), clear(dm);
    for (int part = 0; part < HALVES; part++, step++) {
        load_half(step + 1);
        if (part == 0) copy_wait<2>();  // q and k, and the next half, may still be under way
        else copy_wait<1>();
        __syncthreads();
        const Half<D>& half = sh.half[step % 2];
#pragma unroll
        for (int d = 0; d < C; d += 16) {
            uint32_t fg[4], fx[4], fy[4], fb[4];
            frag_a<false, LC>(fg, half.grad, m0, d);
            frag_a<false, LC>(fx, half.x, m0, d);
            frag_a<false, LC>(fy, half.y, m0, d);
            if (c0 <= m0) {
                frag_b<true, LC>(fb, half.y, d, c0);
                mma(dp[0], fg, fb[0], fb[1]), mma(dp[1], fg, fb[2], fb[3]);
                mma(dm[0], fx, fb[0], fb[1]), mma(dm[1], fx, fb[2], fb[3]);
            }
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                frag_b<true, LC>(fb, half.h, d, n0 + j * 8);
                mma(aq[j], fg, fb[0], fb[1]), mma(aq[j + 1], fg, fb[2], fb[3]);
                mma(row[j], fx, fb[0], fb[1]), mma(row[j + 1], fx, fb[2], fb[3]);
                frag_b<true, LC>(fb, half.dh, d, n0 + j * 8);
                mma(col[j], fy, fb[0], fb[1]), mma(col[j + 1], fy, fb[2], fb[3]);
            }
        }
        {   // dv = β X: one access a thread
            const int r = tid / 8, c = tid % 8 * 8;
            if (r < valid) {
                uint4 w = *reinterpret_cast<const uint4*>(half.x + r * LC + c);
                uint32_t* e = reinterpret_cast<uint32_t*>(&w);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 f = unpack(e[j]);
                    e[j] = pack(f.x * beta[r], f.y * beta[r]);
                }
                *reinterpret_cast<uint4*>(to.v + (at + r) * s.drow + h * D + part * C + c) = w;
            }
        }
        if (GATE == SCALAR) {  // of the two states: the gradient of e^{G_C}
#pragma unroll
            for (int n = 0; n < D * 8 / 512; n++) {
                const int i = tid + n * 512, r = i / 8, c = i % 8 * 8;
                const uint4 p = *reinterpret_cast<const uint4*>(half.h + r * LC + c);
                const uint4 w = *reinterpret_cast<const uint4*>(half.dh + r * LC + c);
                const uint32_t u[4] = {p.x, p.y, p.z, p.w}, v[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 f = unpack(u[e]), o = unpack(v[e]);
                    state_dot += f.x * o.x + f.y * o.y;
                }
            }
        }
        __syncthreads();
    }
    // dP and dM with everything that makes them multiply the stored q and k
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = m0 + g + e / 2 * 8, c = c0 + j * 8 + 2 * t + e % 2;
            if (i == c) sh.beta[i] = dm[j][e];
            const float f = (GATE == SCALAR ? exp2_fast(fminf(sum[i] - sum[c], 0.0f) * LOG2E) : 1.0f) * beta[c] * rk[c];
            dp[j][e] = c <= i ? dp[j][e] * f * rq[i] * s.scale : 0.0f;
            dm[j][e] = c < i ? -dm[j][e] * f * rk[i] * beta[i] : 0.0f;
        }
    put<2, LC>(sh.dp, dp, m0, c0);
    put<2, LC>(sh.dm, dm, m0, c0);
    {
        const RowScales lo = row_scales<GATE>(vec, i0, s.scale), hi = row_scales<GATE>(vec, i1, s.scale);
        scale_rows(aq, lo.q, hi.q);
        scale_rows(row, -lo.kd * lo.beta, -hi.kd * hi.beta);
        scale_rows(col, lo.ke * lo.beta, hi.ke * hi.beta);
    }
    if (GATE == SCALAR) {
        state_dot = warp_sum(state_dot);
        if (lane == 0) sh.sums[warp] = state_dot;
    }
    copy_wait<1>();
    __syncthreads();
    if (GATE == SCALAR) row_dots<NT, LD>(sh.dots[3][group], col, sh.k, m0, n0);
    product<NT, false, false, LC, LD>(aq, sh.dp, sh.k, m0, n0, 0, m0 + 16);
    product<NT, false, false, LC, LD>(row, sh.dm, sh.k, m0, n0, 0, m0 + 16);
    product<NT, true, false, LC, LD>(col, sh.dm, sh.k, m0, n0, m0, C);
    product<NT, true, false, LC, LD>(col, sh.dp, sh.q, m0, n0, m0, C);
    row_dots<NT, LD>(sh.dots[0][group], aq, sh.q, m0, n0);
    row_dots<NT, LD>(sh.dots[1][group], row, sh.k, m0, n0);
    row_dots<NT, LD>(sh.dots[2][group], col, sh.k, m0, n0);
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) row[j][e] += col[j][e];
    __syncthreads();

    const auto dot = [&](int which, int i) {
        return sh.dots[which][0][i] + sh.dots[which][1][i] + sh.dots[which][2][i] + sh.dots[which][3][i];
    };
    const float on = s.normalize ? 1.0f : 0.0f;
    put_projected<NT, LD>(sh.q, aq, m0, n0, on * rq[i0] * rq[i0] * dot(0, i0), on * rq[i1] * rq[i1] * dot(0, i1));
    put_projected<NT, LD>(sh.k, row, m0, n0, on * rk[i0] * rk[i0] * (dot(1, i0) + dot(2, i0)),
                          on * rk[i1] * rk[i1] * (dot(1, i1) + dot(2, i1)));
    if (warp == 0) {
        const int r0 = 2 * lane, r1 = r0 + 1;
        const long i = (at + r0) * s.heads + h;
        if (r0 < valid) to.beta[i] = sh.beta[r0];
        if (r1 < valid) to.beta[i + s.heads] = sh.beta[r1];
        if (GATE == SCALAR) {
            const float decay = exp2_fast(sum[C - 1] * LOG2E);
            const float total = warp_sum(dot(3, r0) + dot(3, r1)) + decay * warp_sum(lane < 16 ? sh.sums[lane] : 0.0f);
            const float d0 = dot(0, r0) + dot(1, r0) - dot(2, r0);
            const float d1 = dot(0, r1) + dot(1, r1) - dot(2, r1);
            float back = d0 + d1;  // sums over this row and all later ones
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                const float down = __shfl_down_sync(0xffffffffu, back, d);
                if (lane + d < WARP) back += down;
            }
            if (r0 < valid) to.gate[i] = back + total;
            if (r1 < valid) to.gate[i + s.heads] = back - d0 + total;
        }
    }
    __syncthreads();
    store_rows<D, LD, 512>(to.q + at * s.drow + h * D, sh.q, s.drow, valid);
    store_rows<D, LD, 512>(to.k + at * s.drow + h * D, sh.k, s.drow, valid);
    __syncthreads();
    }
}

// ---------------------------------------------------------------------------------------------------------- KDA

constexpr int BLOCK = 16;                    // rows inside which exponents are taken pair by pair
constexpr int TRIANGLE = BLOCK * (1 + 2 + 3);  // rows of the scaled tiles of all off-diagonal blocks

// First row of the tile of `rows before block a` (a = 1, 2, 3).
__device__ __forceinline__ int before(int a) { return BLOCK * (a * (a - 1) / 2); }
// First row of the tile of `rows after block b` (b = 0, 1, 2).
__device__ __forceinline__ int after(int b) { return b == 0 ? 0 : b == 1 ? 48 : 80; }

// Inclusive sums along time of a bf16 tile of log decays into `sum` [C][D + 4], in units of log 2.
template <int D, int THREADS> __device__ __forceinline__ void sum_gates(float* sum, const bf16* gate) {
    constexpr int PARTS = THREADS / D, ROWS = C / PARTS, LG = D + 4;
    const int d = threadIdx.x % D, part = threadIdx.x / D;
    float total = 0;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        total += to_float(gate[(part * ROWS + i) * (D + 8) + d]) * LOG2E;
        sum[(part * ROWS + i) * LG + d] = total;
    }
    __syncthreads();
    float offset = 0;
    for (int p = 0; p < part; p++) offset += sum[(p * ROWS + ROWS - 1) * LG + d];
    __syncthreads();
    if (part > 0)
#pragma unroll
        for (int i = 0; i < ROWS; i++) sum[(part * ROWS + i) * LG + d] += offset;
    __syncthreads();
}

// Two bf16 values of a tile times e^{sign (sum - at)}.
template <int SIGN> __device__ __forceinline__ uint32_t scaled(uint32_t pair, const float* sum, const float* at) {
    const float2 x = unpack(pair);
    return pack(x.x * exp2_fast(SIGN * (sum[0] - at[0])), x.y * exp2_fast(SIGN * (sum[1] - at[1])));
}

// N (2 or 4) adjacent values in one access.
template <int N> __device__ __forceinline__ void load_lane(float (&x)[N], const bf16* from) {
    uint32_t w[N / 2];
    if constexpr (N == 4) *reinterpret_cast<uint2*>(w) = *reinterpret_cast<const uint2*>(from);
    else w[0] = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int e = 0; e < N / 2; e++) {
        const float2 f = unpack(w[e]);
        x[2 * e] = f.x, x[2 * e + 1] = f.y;
    }
}

template <int N> __device__ __forceinline__ void load_lane(float (&x)[N], const float* from) {
    if constexpr (N == 4) *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(from);
    else *reinterpret_cast<float2*>(x) = *reinterpret_cast<const float2*>(from);
}

template <int D> struct PrepareKda {
    bf16 q[C * (D + 8)], k[C * (D + 8)];
    float sum[C * (D + 4)], vec[V_ROWS * C];
    union {
        bf16 gate[C * (D + 8)];
        bf16 b[TRIANGLE * (D + 8)];
        struct {
            float m[C * LM], tmp[32 * 36];
            bf16 p[C * LC];
        };
    };
};

template <int D>
__global__ void __launch_bounds__(256) prepare_kda(const bf16* q, const bf16* k, const bf16* gate, const float* beta, Saved out,
                                                   Shape s) {
    extern __shared__ __align__(16) unsigned char raw[];
    auto& sh = *reinterpret_cast<PrepareKda<D>*>(raw);
    constexpr int LD = D + 8, LG = D + 4, PER = D / WARP;
    const int chunk = blockIdx.x, bh = blockIdx.y, b = bh / s.heads, h = bh % s.heads;
    const int hk = h / (s.heads / s.kv_heads), start = chunk * C, valid = min(C, s.time - start);
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP, g = lane / 4, t = lane % 4;
    const long at = (long)b * s.time + start, ch = (long)bh * s.chunks + chunk;
    load_rows<D, LD, 256>(sh.gate, gate + (at * s.heads + h) * D, (long)s.heads * D, valid);
    load_rows<D, LD, 256>(sh.q, q + at * s.row + h * D, s.row, valid);
    load_rows<D, LD, 256>(sh.k, k + at * s.row + hk * D, s.row, valid);
    copy_commit();
    if (tid < C) {
        sh.vec[V_BETA * C + tid] = tid < valid ? beta[(at + tid) * s.heads + h] : 0.0f;
        sh.vec[V_G * C + tid] = 0.0f;
    }
    copy_wait<0>();
    __syncthreads();
    row_norms<D, LD>(sh.vec + V_RQ * C, sh.q, s.normalize);
    row_norms<D, LD>(sh.vec + V_RK * C, sh.k, s.normalize);
    sum_gates<D, 256>(sh.sum, sh.gate);
    const float *rq = sh.vec + V_RQ * C, *rk = sh.vec + V_RK * C;
    for (int i = tid; i < V_ROWS * C; i += 256) out.vec[ch * V_ROWS * C + i] = sh.vec[i];
    for (int i = tid; i < D; i += 256) out.decay[ch * D + i] = exp2_fast(sh.sum[(C - 1) * LG + i]);

    // What the scans multiply with.
    for (int i = tid; i < C * D / 8; i += 256) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        const float fq = rq[r] * s.scale, fk = rk[r];
        uint32_t wq[4], wd[4], we[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 xq = unpack(*reinterpret_cast<const uint32_t*>(sh.q + r * LD + c + 2 * j));
            const float2 xk = unpack(*reinterpret_cast<const uint32_t*>(sh.k + r * LD + c + 2 * j));
            const float s0 = sh.sum[r * LG + c + 2 * j], s1 = sh.sum[r * LG + c + 2 * j + 1];
            const float e0 = exp2_fast(s0), e1 = exp2_fast(s1);
            wq[j] = pack(xq.x * fq * e0, xq.y * fq * e1);
            wd[j] = pack(xk.x * fk * e0, xk.y * fk * e1);
            we[j] = pack(xk.x * fk * exp2_fast(sh.sum[(C - 1) * LG + c + 2 * j] - s0),
                         xk.y * fk * exp2_fast(sh.sum[(C - 1) * LG + c + 2 * j + 1] - s1));
        }
        const long to = ch * C * D + r * D + c;
        *reinterpret_cast<uint4*>(out.qd + to) = *reinterpret_cast<uint4*>(wq);
        *reinterpret_cast<uint4*>(out.kd + to) = *reinterpret_cast<uint4*>(wd);
        *reinterpret_cast<uint4*>(out.ke + to) = *reinterpret_cast<uint4*>(we);
    }
    // Off-diagonal blocks: k_j e^{r - G_j} for the rows before each block, r the sum at its last row.
    for (int i = tid; i < TRIANGLE * D / 2; i += 256) {
        const int r = i / (D / 2), c = i % (D / 2) * 2, a = r < before(2) ? 1 : r < before(3) ? 2 : 3, j = r - before(a);
        *reinterpret_cast<uint32_t*>(sh.b + r * LD + c) =
            scaled<-1>(*reinterpret_cast<const uint32_t*>(sh.k + j * LD + c), sh.sum + j * LG + c,
                       sh.sum + (a * BLOCK - 1) * LG + c);
    }
    __syncthreads();
    const int a = warp / 2, half = warp % 2;  // two warps a block row, taking its pairs of column tiles in turn
    float kk[4][4], qk[4][4];                 // at most two pairs of column tiles each
    clear(kk), clear(qk);
    if (a > 0) {
        const float* r = sh.sum + (a * BLOCK - 1) * LG;
#pragma unroll 2
        for (int d = 0; d < D; d += 16) {
            uint32_t fk[4], fq[4], fb[4];
            frag_a<false, LD>(fk, sh.k, a * BLOCK, d);
            frag_a<false, LD>(fq, sh.q, a * BLOCK, d);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = a * BLOCK + g + e % 2 * 8, c = d + 2 * t + e / 2 * 8;
                const float e0 = exp2_fast(sh.sum[row * LG + c] - r[c]), e1 = exp2_fast(sh.sum[row * LG + c + 1] - r[c + 1]);
                const float2 xk = unpack(fk[e]), xq = unpack(fq[e]);
                fk[e] = pack(xk.x * e0, xk.y * e1);
                fq[e] = pack(xq.x * e0, xq.y * e1);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int n = (half + 2 * j) * 16;
                if (n >= a * BLOCK) continue;
                frag_b<true, LD>(fb, sh.b + before(a) * LD, d, n);
                mma(kk[2 * j], fk, fb[0], fb[1]), mma(kk[2 * j + 1], fk, fb[2], fb[3]);
                mma(qk[2 * j], fq, fb[0], fb[1]), mma(qk[2 * j + 1], fq, fb[2], fb[3]);
            }
        }
    }
    __syncthreads();
    for (int i = tid; i < C * LM; i += 256) sh.m[i] = 0.0f;
    for (int i = tid; i < C * LC / 2; i += 256) reinterpret_cast<uint32_t*>(sh.p)[i] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int n = (half + j / 2 * 2) * 16 + j % 2 * 8 + 2 * t;
        if (n >= a * BLOCK) continue;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = a * BLOCK + g + e / 2 * 8, c = n + e % 2;
            sh.m[i * LM + c] = kk[j][e] * rk[i] * rk[c];
            sh.p[i * LC + c] = from_float<bf16>(qk[j][e] * rq[i] * rk[c] * s.scale);
        }
    }
    // Diagonal blocks: lanes hold channels, each lane ends with one sum: k_i k_j in lane j, q_i k_j in lane 16 + j.
    for (int i = half; i < BLOCK; i += 2) {
        const int row = a * BLOCK + i;
        float ki[PER], qi[PER], gi[PER], v[32];
        load_lane(ki, sh.k + row * LD + lane * PER);
        load_lane(qi, sh.q + row * LD + lane * PER);
        load_lane(gi, sh.sum + row * LG + lane * PER);
#pragma unroll
        for (int j = 0; j < BLOCK; j++) {
            v[j] = v[j + 16] = 0.0f;
            if (j > i) continue;
            const int other = a * BLOCK + j;
            float kj[PER], gj[PER];
            load_lane(kj, sh.k + other * LD + lane * PER);
            load_lane(gj, sh.sum + other * LG + lane * PER);
#pragma unroll
            for (int e = 0; e < PER; e += 2) {
                const float x0 = kj[e] * exp2_fast(gi[e] - gj[e]), x1 = kj[e + 1] * exp2_fast(gi[e + 1] - gj[e + 1]);
                v[j] += ki[e] * x0 + ki[e + 1] * x1;
                v[j + 16] += qi[e] * x0 + qi[e + 1] * x1;
            }
        }
#pragma unroll
        for (int halving = 0; halving < 5; halving++) {
            const int w = 16 >> halving;
            const bool up = lane & w;
#pragma unroll
            for (int e = 0; e < 16; e++) {
                if (e >= w) continue;
                const float send = up ? v[e] : v[e + w];
                v[e] = (up ? v[e + w] : v[e]) + __shfl_xor_sync(0xffffffffu, send, w);
            }
        }
        const int j = lane % 16, c = a * BLOCK + j;
        if (lane < 16) {
            if (j < i) sh.m[row * LM + c] = v[0] * rk[row] * rk[c];
        } else if (j <= i) {
            sh.p[row * LC + c] = from_float<bf16>(v[0] * rq[row] * rk[c] * s.scale);
        }
    }
    __syncthreads();
    store_rows<C, LC, 256>(out.p + ch * C * C, sh.p, C, C);
    solve(sh.m, sh.vec + V_BETA * C, sh.tmp);
    uint32_t* tau = reinterpret_cast<uint32_t*>(out.tau + ch * C * C);
    for (int i = tid; i < C * C / 2; i += 256) {
        const float* x = sh.m + i / 32 * LM + i % 32 * 2;
        tau[i] = pack(x[0], x[1]);
    }
}

template <int D> struct LocalKda {
    bf16 q[C * (D + 8)], k[C * (D + 8)];
    union {
        struct {
            bf16 grad[C * (D + 8)], x[C * (D + 8)], y[C * (D + 8)], h[D * (D + 8)], dh[D * (D + 8)];
        };
        struct {
            bf16 kb[TRIANGLE * (D + 8)], qa[TRIANGLE * (D + 8)], ka[TRIANGLE * (D + 8)];
        };
        float acc[3][C * (D + 4)];
    };
    union {
        struct {
            bf16 dp[C * LC], dm[C * LC];
        };
        bf16 gate[C * (D + 8)];
    };
    float sum[C * (D + 4)], vec[V_ROWS * C], end[4][D], later[4][D], states[D], beta[C];
};

// acc *= e^{sum - at} per element (or e^{at - sum} where SIGN is -1), `at` one row; plain e^sum without `at`.
template <int NT, int LG, int SIGN>
__device__ __forceinline__ void scale_channels(float (&acc)[NT][4], const float* sum, const float* at, int m, int n) {
    const int l = threadIdx.x % WARP, g = l / 4, t = l % 4;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int c = n + j * 8 + 2 * t + e % 2;
            const float x = sum[(m + g + e / 2 * 8) * LG + c] - (at ? at[c] : 0.0f);
            acc[j][e] *= exp2_fast(SIGN * x);
        }
}

template <int NT> __device__ __forceinline__ void add(float (&acc)[NT][4], const float (&x)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[j][e] += x[j][e];
}

template <int D>
__global__ void __launch_bounds__(512) local_back_kda(const bf16* q, const bf16* k, const bf16* gate, const bf16* grad,
                                                      const bf16* x, const bf16* dh, Saved a, Grads to, Shape s) {
    extern __shared__ __align__(16) unsigned char raw[];
    auto& sh = *reinterpret_cast<LocalKda<D>*>(raw);
    constexpr int LD = D + 8, LG = D + 4, NT = D / 32;
    const int chunk = blockIdx.x, bh = blockIdx.y, b = bh / s.heads, h = bh % s.heads;
    const int hk = h / (s.heads / s.kv_heads), start = chunk * C, valid = min(C, s.time - start);
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP, g = lane / 4, t = lane % 4;
    const int blk = warp % 4, m0 = blk * 16, group = warp / 4, n0 = group * NT * 8;
    const long at = (long)b * s.time + start, ch = (long)bh * s.chunks + chunk, own = (at * s.heads + h) * D;
    load_rows<D, LD, 512>(sh.grad, grad + own, (long)s.heads * D, valid);
    load_rows<D, LD, 512>(sh.x, x + ch * C * D, D, C);
    load_rows<D, LD, 512>(sh.y, a.y + ch * C * D, D, C);
    load_rows<D, LD, 512>(sh.gate, gate + (at * s.heads + h) * D, (long)s.heads * D, valid);
    for (int i = tid; i < V_ROWS * C / 4; i += 512) copy16(sh.vec + i * 4, a.vec + ch * V_ROWS * C + i * 4);
    copy_commit();
    load_rows<D, LD, 512, D>(sh.h, a.h + ch * D * D, D, D);
    load_rows<D, LD, 512, D>(sh.dh, dh + ch * D * D, D, D);
    load_rows<D, LD, 512>(sh.q, q + at * s.row + h * D, s.row, valid);
    load_rows<D, LD, 512>(sh.k, k + at * s.row + hk * D, s.row, valid);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    sum_gates<D, 512>(sh.sum, sh.gate);

    const float *rq = sh.vec + V_RQ * C, *rk = sh.vec + V_RK * C, *beta = sh.vec + V_BETA * C;
    const int i0 = m0 + g, i1 = i0 + 8;
    {
        float dp[2][4], dm[2][4];
        clear(dp), clear(dm);
        const int c0 = group * 16;
        if (c0 <= m0) {
#pragma unroll 4
            for (int d = 0; d < D; d += 16) {
                uint32_t fg[4], fx[4], fb[4];
                frag_a<false, LD>(fg, sh.grad, m0, d);
                frag_a<false, LD>(fx, sh.x, m0, d);
                frag_b<true, LD>(fb, sh.y, d, c0);
                mma(dp[0], fg, fb[0], fb[1]), mma(dp[1], fg, fb[2], fb[3]);
                mma(dm[0], fx, fb[0], fb[1]), mma(dm[1], fx, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = m0 + g + e / 2 * 8, c = c0 + j * 8 + 2 * t + e % 2;
                if (i == c) sh.beta[i] = dm[j][e];
                const float f = beta[c] * rk[c];
                dp[j][e] = c <= i ? dp[j][e] * f * rq[i] * s.scale : 0.0f;
                dm[j][e] = c < i ? -dm[j][e] * f * rk[i] * beta[i] : 0.0f;
            }
        put<2, LC>(sh.dp, dp, m0, c0);
        put<2, LC>(sh.dm, dm, m0, c0);
    }
    for (int i = tid; i < C * D / 8; i += 512) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        if (r < valid) {
            uint4 w = *reinterpret_cast<const uint4*>(sh.x + r * LD + c);
            uint32_t* e = reinterpret_cast<uint32_t*>(&w);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 f = unpack(e[j]);
                e[j] = pack(f.x * beta[r], f.y * beta[r]);
            }
            *reinterpret_cast<uint4*>(to.v + (at + r) * s.drow + h * D + c) = w;
        }
    }
    copy_wait<0>();
    __syncthreads();

    float aq[NT][4], row[NT][4], col[NT][4];
    clear(aq), clear(row), clear(col);
#pragma unroll 2
    for (int d = 0; d < D; d += 16) {
        uint32_t fg[4], fx[4], fy[4], fb[4];
        frag_a<false, LD>(fg, sh.grad, m0, d);
        frag_a<false, LD>(fx, sh.x, m0, d);
        frag_a<false, LD>(fy, sh.y, m0, d);
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            frag_b<true, LD>(fb, sh.h, d, n0 + j * 8);
            mma(aq[j], fg, fb[0], fb[1]), mma(aq[j + 1], fg, fb[2], fb[3]);
            mma(row[j], fx, fb[0], fb[1]), mma(row[j + 1], fx, fb[2], fb[3]);
            frag_b<true, LD>(fb, sh.dh, d, n0 + j * 8);
            mma(col[j], fy, fb[0], fb[1]), mma(col[j + 1], fy, fb[2], fb[3]);
        }
    }
    const float* final_sum = sh.sum + (C - 1) * LG;
    scale_rows(aq, rq[i0] * s.scale, rq[i1] * s.scale);
    scale_rows(row, -rk[i0] * beta[i0], -rk[i1] * beta[i1]);
    scale_rows(col, rk[i0] * beta[i0], rk[i1] * beta[i1]);
    scale_channels<NT, LG, 1>(aq, sh.sum, nullptr, m0, n0);
    scale_channels<NT, LG, 1>(row, sh.sum, nullptr, m0, n0);
    scale_channels<NT, LG, -1>(col, sh.sum, final_sum, m0, n0);
    // The gradient of the chunk's last sum: of k e^{G_C - G} and of e^{G_C}.
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int c = n0 + j * 8 + 2 * t + e;
            float x = col[j][e] * to_float(sh.k[i0 * LD + c]) + col[j][e + 2] * to_float(sh.k[i1 * LD + c]);
            x += __shfl_xor_sync(0xffffffffu, x, 4);
            x += __shfl_xor_sync(0xffffffffu, x, 8);
            x += __shfl_xor_sync(0xffffffffu, x, 16);
            if (g == 0) sh.end[blk][c] = x;
        }
    if (tid < 4 * D) {
        const int d = tid / 4;
        float dot = 0;
#pragma unroll 4
        for (int i = 0; i < D / 8; i++) {
            const int c = (i * 4 + tid % 4) * 2;
            const float2 p = unpack(*reinterpret_cast<const uint32_t*>(sh.h + d * LD + c));
            const float2 w = unpack(*reinterpret_cast<const uint32_t*>(sh.dh + d * LD + c));
            dot += p.x * w.x + p.y * w.y;
        }
        dot = warp_sum<4>(dot);
        if (tid % 4 == 0) sh.states[d] = dot * exp2_fast(final_sum[d]);
    }
    __syncthreads();

    // Off-diagonal blocks. Before block i: k_j e^{r - G_j}; after block i: q, k e^{G - r'}; r, r' the sums at its edges.
    for (int i = tid; i < TRIANGLE * D / 2; i += 512) {
        const int r = i / (D / 2), c = i % (D / 2) * 2, n = r < before(2) ? 1 : r < before(3) ? 2 : 3, j = r - before(n);
        *reinterpret_cast<uint32_t*>(sh.kb + r * LD + c) =
            scaled<-1>(*reinterpret_cast<const uint32_t*>(sh.k + j * LD + c), sh.sum + j * LG + c,
                       sh.sum + (n * BLOCK - 1) * LG + c);
        const int f = r < after(1) ? 0 : r < after(2) ? 1 : 2, l = r - after(f) + (f + 1) * BLOCK;
        const float* edge = sh.sum + (f * BLOCK + BLOCK - 1) * LG + c;
        const float e0 = exp2_fast(sh.sum[l * LG + c] - edge[0]), e1 = exp2_fast(sh.sum[l * LG + c + 1] - edge[1]);
        const float2 xq = unpack(*reinterpret_cast<const uint32_t*>(sh.q + l * LD + c));
        const float2 xk = unpack(*reinterpret_cast<const uint32_t*>(sh.k + l * LD + c));
        *reinterpret_cast<uint32_t*>(sh.qa + r * LD + c) = pack(xq.x * e0, xq.y * e1);
        *reinterpret_cast<uint32_t*>(sh.ka + r * LD + c) = pack(xk.x * e0, xk.y * e1);
    }
    __syncthreads();
    {
        float part[NT][4];
        if (blk > 0) {
            const float* edge = sh.sum + (m0 - 1) * LG;
            const bf16* tile = sh.kb + before(blk) * LD;
            clear(part);
            product<NT, false, false, LC, LD>(part, sh.dp, tile, m0, n0, 0, m0);
            scale_channels<NT, LG, 1>(part, sh.sum, edge, m0, n0);
            add(aq, part);
            clear(part);
            product<NT, false, false, LC, LD>(part, sh.dm, tile, m0, n0, 0, m0);
            scale_channels<NT, LG, 1>(part, sh.sum, edge, m0, n0);
            add(row, part);
        }
        if (blk < 3) {
            const int rows = C - m0 - BLOCK;
            clear(part);
            product<NT, true, false, LC, LD>(part, sh.dp, sh.qa + after(blk) * LD, m0, n0, 0, rows, m0 + BLOCK);
            product<NT, true, false, LC, LD>(part, sh.dm, sh.ka + after(blk) * LD, m0, n0, 0, rows, m0 + BLOCK);
            scale_channels<NT, LG, -1>(part, sh.sum, sh.sum + (m0 + BLOCK - 1) * LG, m0, n0);
            add(col, part);
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = (m0 + g + e / 2 * 8) * LG + n0 + j * 8 + 2 * t;
            *reinterpret_cast<float2*>(sh.acc[0] + i) = make_float2(aq[j][e], aq[j][e + 1]);
            *reinterpret_cast<float2*>(sh.acc[1] + i) = make_float2(row[j][e], row[j][e + 1]);
            *reinterpret_cast<float2*>(sh.acc[2] + i) = make_float2(col[j][e], col[j][e + 1]);
        }
    __syncthreads();

    // Diagonal blocks: a thread takes one channel of one block.
    const int d = tid % D, base = tid / D * BLOCK;
    float back = 0;
    if (tid < 4 * D) {
        float kj[BLOCK], sj[BLOCK], cj[BLOCK];
#pragma unroll
        for (int j = 0; j < BLOCK; j++) {
            kj[j] = to_float(sh.k[(base + j) * LD + d]);
            sj[j] = sh.sum[(base + j) * LG + d];
            cj[j] = sh.acc[2][(base + j) * LG + d];
        }
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            const float qi = to_float(sh.q[(base + i) * LD + d]);
            float xq = 0, xr = 0;
            uint32_t pi[8], mi[8];
#pragma unroll
            for (int w = 0; w <= i / 8; w++) {
                *reinterpret_cast<uint4*>(pi + 4 * w) = *reinterpret_cast<const uint4*>(sh.dp + (base + i) * LC + base + 8 * w);
                *reinterpret_cast<uint4*>(mi + 4 * w) = *reinterpret_cast<const uint4*>(sh.dm + (base + i) * LC + base + 8 * w);
            }
#pragma unroll
            for (int j = 0; j <= i; j++) {
                const float2 p2 = unpack(pi[j / 2]), m2 = unpack(mi[j / 2]);
                const float p = j % 2 ? p2.y : p2.x, m = j % 2 ? m2.y : m2.x;
                const float e = j < i ? exp2_fast(sj[i] - sj[j]) : 1.0f, ke = kj[j] * e;
                xq += p * ke, xr += m * ke;
                cj[j] += (p * qi + m * kj[i]) * e;
            }
            sh.acc[0][(base + i) * LG + d] += xq;
            sh.acc[1][(base + i) * LG + d] += xr;
        }
#pragma unroll
        for (int i = BLOCK - 1; i >= 0; i--) {  // sums over this row and the later ones of the block, kept in sj
            const int n = (base + i) * LG + d;
            const float r = sh.acc[1][n];
            back += to_float(sh.q[(base + i) * LD + d]) * sh.acc[0][n] + kj[i] * (r - cj[i]);
            sh.acc[1][n] = r + cj[i];
            sj[i] = back;
        }
        sh.later[tid / D][d] = back;
#pragma unroll
        for (int i = 0; i < BLOCK; i++) sh.sum[(base + i) * LG + d] = sj[i];
    }
    __syncthreads();
    if (tid < 4 * D) {
        float total = sh.states[d] + sh.end[0][d] + sh.end[1][d] + sh.end[2][d] + sh.end[3][d];
        for (int n = tid / D + 1; n < 4; n++) total += sh.later[n][d];
#pragma unroll
        for (int i = 0; i < BLOCK; i++)
            if (base + i < valid)
                to.g[((at + base + i) * s.heads + h) * D + d] = from_float<bf16>(sh.sum[(base + i) * LG + d] + total);
    }
    // Through the norms, a warp per row.
    for (int i = warp; i < valid; i += 16) {
        float dq = 0, dk = 0;
#pragma unroll
        for (int c = lane * 2; c < D; c += 64) {
            const float2 xq = unpack(*reinterpret_cast<const uint32_t*>(sh.q + i * LD + c));
            const float2 xk = unpack(*reinterpret_cast<const uint32_t*>(sh.k + i * LD + c));
            dq += xq.x * sh.acc[0][i * LG + c] + xq.y * sh.acc[0][i * LG + c + 1];
            dk += xk.x * sh.acc[1][i * LG + c] + xk.y * sh.acc[1][i * LG + c + 1];
        }
        dq = s.normalize ? warp_sum(dq) * rq[i] * rq[i] : 0.0f;
        dk = s.normalize ? warp_sum(dk) * rk[i] * rk[i] : 0.0f;
#pragma unroll
        for (int c = lane * 2; c < D; c += 64) {
            const float2 xq = unpack(*reinterpret_cast<const uint32_t*>(sh.q + i * LD + c));
            const float2 xk = unpack(*reinterpret_cast<const uint32_t*>(sh.k + i * LD + c));
            const long n = (at + i) * s.drow + h * D + c;
            *reinterpret_cast<uint32_t*>(to.q + n) =
                pack(sh.acc[0][i * LG + c] - dq * xq.x, sh.acc[0][i * LG + c + 1] - dq * xq.y);
            *reinterpret_cast<uint32_t*>(to.k + n) =
                pack(sh.acc[1][i * LG + c] - dk * xk.x, sh.acc[1][i * LG + c + 1] - dk * xk.y);
        }
    }
    if (tid < valid) to.beta[(at + tid) * s.heads + h] = sh.beta[tid];
}

// ---------------------------------------------------------------------------------------------------------- launches

size_t align(size_t n) { return (n + 255) / 256 * 256; }

// Places the buffers of `Saved`; returns the bytes they take.
size_t place(Saved& a, void* at, int batch, int time, int heads, int dim, int gate, int keep) {
    const size_t n = (size_t)batch * heads * ((time + C - 1) / C);
    char* p = static_cast<char*>(at);
    size_t used = 0;
    auto take = [&](auto*& field, size_t count) {
        using T = std::remove_reference_t<decltype(*field)>;
        field = reinterpret_cast<T*>(p + used);
        used += align(count * sizeof(T));
    };
    take(a.vec, n * V_ROWS * C);
    take(a.tau, n * C * C);
    take(a.p, n * C * C);
    if (gate == CHANNEL) {
        take(a.qd, n * C * dim);
        take(a.kd, n * C * dim);
        take(a.ke, n * C * dim);
        take(a.decay, n * dim);
    }
    if (keep) {
        take(a.y, n * C * dim);
        take(a.h, n * dim * dim);
    }
    return used;
}

// Raises the limit of dynamic shared memory and launches.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream, A... args) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return e;
    kernel<<<grid, threads, shared, stream>>>(args...);
    return cudaGetLastError();
}

int processors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

#define TRY(x)                                  \
    do {                                        \
        const cudaError_t e_ = (x);             \
        if (e_ != cudaSuccess) return e_;       \
    } while (0)

template <int D, int BV, int GATE>
cudaError_t run_scan(const bf16* q, const bf16* k, const bf16* v, const float* first, bf16* o, float* last, Saved a, Shape s,
                     int keep, cudaStream_t stream) {
    return launch(scan<D, BV, GATE, D / 16>, dim3(D / BV, s.batch * s.heads), D * 2, sizeof(ScanShared<D, BV, GATE, false>),
                  stream, q, k, v, first, o, last, a, s, keep);
}

template <int D, int BV, int GATE>
cudaError_t run_scan_back(const bf16* q, const bf16* k, const bf16* grad, const float* last, float* first, bf16* dh, bf16* x,
                          Saved a, Shape s, cudaStream_t stream) {
    return launch(scan_back<D, BV, GATE, D / 16>, dim3(D / BV, s.batch * s.heads), D * 2,
                  sizeof(ScanShared<D, BV, GATE, true>), stream, q, k, grad, last, first, dh, x, a, s);
}

// Narrow blocks of value columns where there are few heads: the scan is as parallel as there are blocks.
constexpr int FEW = 100;

template <int D, int GATE>
cudaError_t forward(const bf16* q, const bf16* k, const bf16* v, const bf16* gk, const float* beta, const float* gate,
                    const float* first, bf16* o, float* last, Saved a, Shape s, int keep, cudaStream_t stream) {
    const dim3 grid(s.chunks, s.batch * s.heads);
    if constexpr (GATE == CHANNEL) {
        TRY(launch(prepare_kda<D>, grid, 256, sizeof(PrepareKda<D>), stream, q, k, gk, beta, a, s));
    } else {
        TRY(launch(prepare<D, GATE>, grid, 128, sizeof(PrepareShared<D>), stream, q, k, beta, gate, a, s));
    }
    if (D > 32 && s.batch * s.heads < FEW) return run_scan<D, 32, GATE>(q, k, v, first, o, last, a, s, keep, stream);
    return run_scan<D, 64, GATE>(q, k, v, first, o, last, a, s, keep, stream);
}

template <int D, int GATE>
cudaError_t backward(const bf16* q, const bf16* k, const bf16* gk, const bf16* grad, const float* last, float* first, bf16* dh,
                     bf16* x, Grads to, Saved a, Shape s, cudaStream_t stream) {
    if (s.batch * s.heads < FEW) TRY((run_scan_back<D, 32, GATE>(q, k, grad, last, first, dh, x, a, s, stream)));
    else TRY((run_scan_back<D, 64, GATE>(q, k, grad, last, first, dh, x, a, s, stream)));
    const int tiles = s.chunks * s.batch * s.heads;
    const dim3 grid(s.chunks, s.batch * s.heads);
    if constexpr (GATE == CHANNEL)
        return launch(local_back_kda<D>, grid, 512, sizeof(LocalKda<D>), stream, q, k, gk, grad, x, dh, a, to, s);
    else
        return launch(local_back<D, GATE>, dim3(min(tiles, processors())), 512, sizeof(LocalShared<D>), stream, q, k, grad, x, dh,
                      a, to, s, tiles);
}

// The most shared memory that a kernel of this case asks for.
template <int D, int GATE> size_t shared_memory() {
    const size_t scans = max(sizeof(ScanShared<D, 32, GATE, false>), sizeof(ScanShared<D, 64, GATE, false>));
    if constexpr (GATE == CHANNEL) return max(scans, max(sizeof(PrepareKda<D>), sizeof(LocalKda<D>)));
    else return max(scans, max(sizeof(PrepareShared<D>), sizeof(LocalShared<D>)));
}

bool fits(int batch, int time, int heads, int kv_heads, int dim, int gate) {
    return batch > 0 && time > 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && (dim == 64 || dim == 128) &&
           gate >= NONE && gate <= CHANNEL && (long)batch * heads < 65536;
}

}  // namespace delta
}  // namespace margay

#define MARGAY_DELTA_CASES(CALL)                                 \
    switch (dim * 4 + gate) {                                    \
        case 64 * 4 + 0: return CALL(64, 0);                     \
        case 64 * 4 + 1: return CALL(64, 1);                     \
        case 64 * 4 + 2: return CALL(64, 2);                     \
        case 128 * 4 + 0: return CALL(128, 0);                   \
        case 128 * 4 + 1: return CALL(128, 1);                   \
        case 128 * 4 + 2: return CALL(128, 2);                   \
    }                                                            \
    return cudaErrorInvalidValue;

static int margay_delta_rule_shared(int dim, int gate) {
    using namespace margay::delta;
#define CALL(D, G) (int)shared_memory<D, G>()
    MARGAY_DELTA_CASES(CALL)
#undef CALL
}

// Whether this device has the shared memory that the kernels need (Hopper does; with heads of 64, Ampere's A100 too).
extern "C" int margay_delta_rule_ready(int dim, int gate) {
    if ((dim != 64 && dim != 128) || gate < 0 || gate > 2) return 0;
    int device = 0, most = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    return margay_delta_rule_shared(dim, gate) <= most;
}

// Bytes that pass from the forward to the backward pass; without `keep`, bytes the forward pass works in.
extern "C" size_t margay_delta_rule_saved(int batch, int time, int heads, int dim, int gate, int keep) {
    margay::delta::Saved a;
    return margay::delta::place(a, nullptr, batch, time, heads, dim, gate, keep);
}

// Bytes the backward pass works in.
extern "C" size_t margay_delta_rule_scratch(int batch, int time, int heads, int dim) {
    using namespace margay::delta;
    const size_t n = (size_t)batch * heads * ((time + C - 1) / C) * dim * sizeof(margay::bf16);
    return align(n * dim) + align(n * C);
}

// gate: 0 none, 1 scalar (`gate_head`, f32 [B, T, H]), 2 per channel (`gate_key`, bf16 [B, T, H, D]). `first`, `last` may be null.
extern "C" int margay_delta_rule_fwd(const void* q, const void* k, const void* v, const void* gate_key, const float* beta,
                                     const float* gate_head, const float* first, void* o, float* last, void* saved, int keep,
                                     int batch, int time, int heads, int kv_heads, int dim, long row, int gate, float scale,
                                     int normalize, void* stream) {
    using namespace margay;
    using namespace margay::delta;
    if (!fits(batch, time, heads, kv_heads, dim, gate)) return cudaErrorInvalidValue;
    Saved a{};
    place(a, saved, batch, time, heads, dim, gate, keep);
    const Shape s{batch, time, heads, kv_heads, (time + C - 1) / C, row, 0, scale, normalize};
#define CALL(D, G)                                                                                                         \
    forward<D, G>((const bf16*)q, (const bf16*)k, (const bf16*)v, (const bf16*)gate_key, beta, gate_head, first, (bf16*)o, \
                  last, a, s, keep, (cudaStream_t)stream)
    MARGAY_DELTA_CASES(CALL)
#undef CALL
}

// Gradients; `saved` from the forward pass with `keep`. dk and dv are per query head; `dlast`, `dfirst` may be null.
extern "C" int margay_delta_rule_bwd(const void* q, const void* k, const void* gate_key, const void* grad, const float* dlast,
                                     const void* saved, void* scratch, void* dq, void* dk, void* dv, void* dgate_key,
                                     float* dbeta, float* dgate_head, float* dfirst, int batch, int time, int heads,
                                     int kv_heads, int dim, long row, long drow, int gate, float scale, int normalize,
                                     void* stream) {
    using namespace margay;
    using namespace margay::delta;
    if (!fits(batch, time, heads, kv_heads, dim, gate)) return cudaErrorInvalidValue;
    Saved a{};
    place(a, const_cast<void*>(saved), batch, time, heads, dim, gate, 1);
    const Shape s{batch, time, heads, kv_heads, (time + C - 1) / C, row, drow, scale, normalize};
    bf16* dh = (bf16*)scratch;
    const size_t states = (size_t)batch * heads * s.chunks * dim * dim * sizeof(bf16);
    bf16* x = (bf16*)((char*)scratch + align(states));
    const Grads to{(bf16*)dq, (bf16*)dk, (bf16*)dv, (bf16*)dgate_key, dbeta, dgate_head};
#define CALL(D, G)                                                                                                     \
    backward<D, G>((const bf16*)q, (const bf16*)k, (const bf16*)gate_key, (const bf16*)grad, dlast, dfirst, dh, x, to, \
                   a, s, (cudaStream_t)stream)
    MARGAY_DELTA_CASES(CALL)
#undef CALL
}
