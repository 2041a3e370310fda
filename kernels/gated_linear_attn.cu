// Gated linear attention, chunk by chunk, forward and backward.
//
//   S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale q_t^T S_t        g_t <= 0 per key channel, or one per head
//
// Shapes: q, k [tokens, H, K], v, o [tokens, H, V] in bf16; gates (natural logs) [tokens, H, K] in bf16 or f32, or
// [tokens, H] in f32; states [sequences, H, K, V] in f32. Tokens are `sequences` stretches of equal length, or packed
// stretches whose bounds are in `starts`. K and V are 64 or 128. With G the sums of the gates inside a chunk of 64 rows:
//
//   o_i = scale (q_i e^{G_i})^T S + sum_{j <= i} A_ij v_j,   A_ij = scale sum_d q_i[d] k_j[d] e^{G_i[d] - G_j[d]}
//   S  <- e^{G_C} S + sum_j (k_j e^{G_C - G_j}) v_j^T
//
//   states_kernel        walks the chunks of one 64 x 64 tile of a head's state and writes the state before each chunk as
//                        bf16 (what the tensor cores read); with q and dy in place of k and v, from the last chunk to the
//                        first, the gradient of the state after each chunk. Both directions go in one launch.
//   *_out_kernel         one block per chunk: A and the result.
//   *_grad_kernel        one block per chunk: all gradients of its rows from the two states at its ends.
//
// Gates are clamped at -128 (e^-128 is 0 in f32) so that their sums stay exact enough, and every exponent formed is a
// difference <= 0. For one gate per head that is e^{G_i - G_j} on the product q k^T. For gates per channel the factor
// does not leave the sum over channels, so rows and keys are split by the highest bit h in which their places in the
// chunk differ: row i in the upper half of a block of 2h, key j in its lower half, and with a the last row of the lower
// half e^{G_i - G_j} = e^{G_i - G_a} e^{G_a - G_j}, both factors at most 1. One scaled copy of the rows per h (queries in
// upper halves, keys in lower halves) then gives all pairs of that level by a plain tensor-core product; the same
// copies give the gradients. The pair i = j needs no factor, and is kept out of the gates' gradient, where it cancels.
#include "common.cuh"

namespace margay {
namespace {

constexpr int CHUNK = 64;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -128.0f;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A gate as a base-2 logarithm.
template <typename G> __device__ __forceinline__ float gate2(G gate) { return fmaxf(to_float(gate), LOWEST) * LOG2E; }

__device__ __forceinline__ float2 load2(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load2(const bf16* p) { return unpack(*reinterpret_cast<const uint32_t*>(p)); }
__device__ __forceinline__ void store2(float* p, float2 x) { *reinterpret_cast<float2*>(p) = x; }
__device__ __forceinline__ void store2(bf16* p, float2 x) { *reinterpret_cast<uint32_t*>(p) = pack(x.x, x.y); }

// ---------------------------------------------------------------------------------------------- sequences and chunks

struct Sequences {
    const int* starts;  // count + 1 bounds, or null: `count` sequences of `time` tokens
    int count;
    int64_t time;  // of one sequence, or of all packed ones
};

struct Span {
    int64_t token;
    int rows;
};

__device__ __forceinline__ Span chunk_span(const Sequences& s, int chunk) {
    if (s.starts == nullptr) {
        const int per = (s.time + CHUNK - 1) / CHUNK;
        const int n = chunk % per;
        return {static_cast<int64_t>(chunk / per) * s.time + n * CHUNK, static_cast<int>(min(static_cast<int64_t>(CHUNK), s.time - n * CHUNK))};
    }
    int from = s.starts[0];
    for (int i = 0; i < s.count; i++) {
        const int to = s.starts[i + 1], chunks = (to - from + CHUNK - 1) / CHUNK;
        if (chunk < chunks) return {from + chunk * CHUNK, min(CHUNK, to - from - chunk * CHUNK)};
        chunk -= chunks;
        from = to;
    }
    return {0, 0};
}

// Chunks there can be: exact without `starts`.
int64_t chunk_bound(const Sequences& s) {
    if (s.starts == nullptr) return s.count * ((s.time + CHUNK - 1) / CHUNK);
    return s.time / CHUNK + s.count;
}

// --------------------------------------------------------------------------------------------------- tiles, fragments

// Tiles are rows of COLS bf16 whose 16-byte pieces are permuted by the row, so that eight rows of one column, and eight
// pieces of one row, lie in different banks.
template <int COLS> __device__ __forceinline__ bf16* at(bf16* tile, int row, int col) {
    return tile + row * COLS + ((((col >> 3) ^ (row & 7))) << 3) + (col & 7);
}

template <int ROWS, int COLS, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* from, int64_t stride, int rows) {
    constexpr int PIECES = COLS / 8;
#pragma unroll
    for (int i = 0; i < ROWS * PIECES; i += THREADS) {
        const int n = i + threadIdx.x, row = n / PIECES, piece = n % PIECES;
        if (ROWS * PIECES % THREADS != 0 && n >= ROWS * PIECES) break;
        const bool valid = row < rows;
        copy16(at<COLS>(tile, row, piece * 8), from + (valid ? row : 0) * stride + piece * 8, valid);
    }
}

// A (16 x 16) from rows m0.., columns k0.. of a tile.
template <int COLS> __device__ __forceinline__ void frag_a(uint32_t (&r)[4], bf16* tile, int m0, int k0) {
    const int l = threadIdx.x & 31;
    load_tiles(r, at<COLS>(tile, m0 + (l & 15), k0 + (l >> 4) * 8));
}

// A = tile^T: rows of A are columns m0.. of the tile.
template <int COLS> __device__ __forceinline__ void frag_a_t(uint32_t (&r)[4], bf16* tile, int k0, int m0) {
    const int l = threadIdx.x & 31;
    load_tiles_t(r, at<COLS>(tile, k0 + (l & 7) + (l >> 4) * 8, m0 + ((l >> 3) & 1) * 8));
}

// B for columns n0..n0+15 (two products: r[0], r[1] and r[2], r[3]); the tile holds B^T: rows n, columns k.
template <int COLS> __device__ __forceinline__ void frag_b_t(uint32_t (&r)[4], bf16* tile, int n0, int k0) {
    const int l = threadIdx.x & 31;
    load_tiles(r, at<COLS>(tile, n0 + (l & 7) + (l >> 4) * 8, k0 + ((l >> 3) & 1) * 8));
}

// The same from a tile with rows k, columns n.
template <int COLS> __device__ __forceinline__ void frag_b(uint32_t (&r)[4], bf16* tile, int k0, int n0) {
    const int l = threadIdx.x & 31;
    load_tiles_t(r, at<COLS>(tile, k0 + (l & 15), n0 + (l >> 4) * 8));
}

// The lower triangle of a 64 x 64 matrix in ten blocks of 16 x 16.
constexpr int LOWER = 10 * 256;
__device__ __forceinline__ bf16* lower_block(bf16* m, int r, int c) { return m + (r * (r + 1) / 2 + c) * 256; }
__device__ __forceinline__ bf16* lower_at(bf16* block, int row, int col) {
    return block + row * 16 + (((col >> 3) ^ ((row >> 2) & 1)) << 3) + (col & 7);
}
__device__ __forceinline__ void lower_a(uint32_t (&r)[4], bf16* block) {
    const int l = threadIdx.x & 31;
    load_tiles(r, lower_at(block, l & 15, (l >> 4) * 8));
}
__device__ __forceinline__ void lower_a_t(uint32_t (&r)[4], bf16* block) {
    const int l = threadIdx.x & 31;
    load_tiles_t(r, lower_at(block, (l & 7) + (l >> 4) * 8, ((l >> 3) & 1) * 8));
}

// Rows g and g + 8 of two neighbouring 8-column products to global memory, full sectors at a time.
__device__ __forceinline__ void store_rows(bf16* at_row, int64_t stride, int row, int rows, const float (&a)[4],
                                           const float (&b)[4]) {
    const int t = threadIdx.x & 3;
    const bool odd = t & 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t x = pack(a[2 * half], a[2 * half + 1]), y = pack(b[2 * half], b[2 * half + 1]);
        const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? x : y, 1);
        if (row + 8 * half < rows) {
            bf16* to = at_row + 8 * half * stride + (odd ? 8 + 2 * (t - 1) : 2 * t);
            *reinterpret_cast<uint2*>(to) = odd ? make_uint2(got, y) : make_uint2(x, got);
        }
    }
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float x, float y) {
    const float2 v = unpack(pair);
    return pack(v.x * x, v.y * y);
}

// A number as a type, for lambdas.
template <int N> struct Width {
    static constexpr int value = N;
};

__device__ __forceinline__ void zero(float (&c)[4]) { c[0] = c[1] = c[2] = c[3] = 0.0f; }

// ------------------------------------------------------------------------------------------------------------- states

struct Pass {
    const bf16* x;       // k, or q
    const bf16* y;       // v, or dy
    const float* start;  // state at the walk's begin, or null
    float* end;          // state at its end, or null
    bf16* states;        // [chunk, H, K, V]: the state where the walk enters the chunk
};

template <typename G> struct StateArgs {
    Pass pass[2];  // forward, backward in time
    int passes;
    const G* gates;
    int64_t gate_stride;  // elements from token to token
    Sequences sequences;
    int heads;
    float scale;
};

// Four warps, each 16 rows of the tile. Eight warps with half the columns each were slower at every shape: the steps of a
// walk are bound by their chain of barriers, not by the products.
template <typename G> constexpr int states_shared(bool vector) {
    return 3 * (2 * 64 * 64 * 2 + (vector ? 64 * 64 * int(sizeof(G)) : 0)) + 64 * 64 * 2 + 4 * 64 * 4 + 64 * 4 + 2 * 64 * 4;
}

template <int K, int V, bool VECTOR, typename G> __global__ void __launch_bounds__(128) states_kernel(const StateArgs<G> a) {
    constexpr int STAGES = 3;
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* xs = reinterpret_cast<bf16*>(shared);
    bf16* ys = xs + STAGES * 4096;
    bf16* out = ys + STAGES * 4096;
    float* sums = reinterpret_cast<float*>(out + 4096);  // [4][64]
    float* decay = sums + 256;                            // [64]
    float* row_gates = decay + 64;                        // [2][64]
    G* gs = reinterpret_cast<G*>(row_gates + 128);        // [STAGES][64][64]

    const int k0 = blockIdx.x % (K / 64) * 64, v0 = blockIdx.x / (K / 64) * 64, head = blockIdx.y;
    const int which = blockIdx.z % a.passes, sequence = blockIdx.z / a.passes;
    const bool reverse = which == 1;
    const Pass pass = a.pass[which];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;

    int64_t first, chunk0, length;
    if (a.sequences.starts == nullptr) {
        length = a.sequences.time;
        first = sequence * length;
        chunk0 = sequence * ((length + CHUNK - 1) / CHUNK);
    } else {
        chunk0 = 0;
        for (int i = 0; i < sequence; i++) chunk0 += (a.sequences.starts[i + 1] - a.sequences.starts[i] + CHUNK - 1) / CHUNK;
        first = a.sequences.starts[sequence];
        length = a.sequences.starts[sequence + 1] - first;
    }
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const auto order = [&](int i) { return reverse ? chunks - 1 - i : i; };
    const auto load = [&](int i) {
        const int n = order(i), stage = i % STAGES;
        const int64_t token = first + static_cast<int64_t>(n) * CHUNK;
        const int rows = min(static_cast<int64_t>(CHUNK), length - static_cast<int64_t>(n) * CHUNK);
        load_tile<64, 64, 128>(xs + stage * 4096, pass.x + (token * a.heads + head) * K + k0, a.heads * K, rows);
        load_tile<64, 64, 128>(ys + stage * 4096, pass.y + (token * a.heads + head) * V + v0, a.heads * V, rows);
        if constexpr (VECTOR) {
            constexpr int PIECE = 16 / sizeof(G), PIECES = 64 / PIECE;
            const G* from = a.gates + token * a.gate_stride + head * K + k0;
#pragma unroll
            for (int j = 0; j < 64 * PIECES; j += 128) {
                const int row = (j + tid) / PIECES, piece = (j + tid) % PIECES;
                copy16(gs + stage * 4096 + row * 64 + piece * PIECE, from + (row < rows ? row : 0) * a.gate_stride + piece * PIECE, row < rows);
            }
        }
    };
    const auto row_gate = [&](int i) {  // gates per head are few: straight through a register, one chunk ahead
        const int64_t place = static_cast<int64_t>(order(i)) * CHUNK + tid;
        return tid < CHUNK && i < chunks && place < length ? a.gates[(first + place) * a.gate_stride + head] : G(0.0f);
    };

    float s[8][4];
    const int64_t side = (static_cast<int64_t>(sequence) * a.heads + head) * K * V;
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2 x = make_float2(0.0f, 0.0f);
            if (pass.start != nullptr) x = load2(pass.start + side + (k0 + warp * 16 + g + 8 * half) * V + v0 + n * 8 + 2 * t);
            s[n][2 * half] = x.x, s[n][2 * half + 1] = x.y;
        }
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < chunks) load(i);
        copy_commit();
    }
    G next = VECTOR ? G(0.0f) : row_gate(0);

    for (int i = 0; i < chunks; i++) {
        bf16* x = xs + i % STAGES * 4096;
        bf16* y = ys + i % STAGES * 4096;
        // The state as it enters the chunk: every warp turns its own 16 rows through shared memory into whole lines.
        __syncwarp();
#pragma unroll
        for (int n = 0; n < 8; n++) {
            store2(at<64>(out, warp * 16 + g, n * 8 + 2 * t), make_float2(s[n][0], s[n][1]));
            store2(at<64>(out, warp * 16 + g + 8, n * 8 + 2 * t), make_float2(s[n][2], s[n][3]));
        }
        __syncwarp();
        bf16* to = pass.states + (((chunk0 + order(i)) * a.heads + head) * K + k0) * V + v0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = warp * 16 + j * 4 + lane / 8, piece = lane % 8;
            *reinterpret_cast<uint4*>(to + row * V + piece * 8) = *reinterpret_cast<uint4*>(at<64>(out, row, piece * 8));
        }
        if (!VECTOR && tid < CHUNK) row_gates[i % 2 * 64 + tid] = gate2(next);
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (i + STAGES - 1 < chunks) load(i + STAGES - 1);
        copy_commit();

        float factor[4][4];  // of one gate per head: what the A fragments' columns are scaled by
        float down[2];
        if constexpr (VECTOR) {
            const G* gate = gs + i % STAGES * 4096;
            float2 sum[16];
#pragma unroll
            for (int r = 0; r < 16; r++) {
                const float2 one = load2(gate + (warp * 16 + r) * 64 + 2 * lane);
                sum[r] = make_float2(gate2(one.x), gate2(one.y));
                if (r > 0) sum[r].x += sum[r - 1].x, sum[r].y += sum[r - 1].y;
            }
            store2(sums + warp * 64 + 2 * lane, sum[15]);
            __syncthreads();
            float2 before = make_float2(0.0f, 0.0f), all = before;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const float2 one = load2(sums + w * 64 + 2 * lane);
                if (w < warp) before.x += one.x, before.y += one.y;
                all.x += one.x, all.y += one.y;
            }
            if (warp == 0) store2(decay + 2 * lane, make_float2(exp2_fast(all.x), exp2_fast(all.y)));
            const float2 rest = make_float2(all.x - before.x, all.y - before.y);
#pragma unroll
            for (int r = 0; r < 16; r++) {
                bf16* p = at<64>(x, warp * 16 + r, 2 * lane);
                const float2 v = load2(p);
                if (reverse) {
                    store2(p, make_float2(v.x * a.scale * exp2_fast(before.x + sum[r].x), v.y * a.scale * exp2_fast(before.y + sum[r].y)));
                } else {
                    store2(p, make_float2(v.x * exp2_fast(fminf(rest.x - sum[r].x, 0.0f)), v.y * exp2_fast(fminf(rest.y - sum[r].y, 0.0f))));
                }
            }
            __syncthreads();
            down[0] = decay[warp * 16 + g], down[1] = decay[warp * 16 + g + 8];
        } else {
            next = row_gate(i + 1);
            const float2 own = load2(row_gates + i % 2 * 64 + 2 * lane);
            float sum = own.x + own.y;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const float other = __shfl_up_sync(0xffffffffu, sum, step);
                if (lane >= step) sum += other;
            }
            const float all = __shfl_sync(0xffffffffu, sum, 31);
            const float hi = reverse ? a.scale * exp2_fast(sum) : exp2_fast(fminf(all - sum, 0.0f));
            const float lo = reverse ? a.scale * exp2_fast(sum - own.y) : exp2_fast(fminf(all - sum + own.y, 0.0f));
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    factor[j][2 * half] = __shfl_sync(0xffffffffu, lo, j * 8 + half * 4 + t);
                    factor[j][2 * half + 1] = __shfl_sync(0xffffffffu, hi, j * 8 + half * 4 + t);
                }
            }
            down[0] = down[1] = exp2_fast(all);
        }
#pragma unroll
        for (int n = 0; n < 8; n++) s[n][0] *= down[0], s[n][1] *= down[0], s[n][2] *= down[1], s[n][3] *= down[1];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t fa[4];
            frag_a_t<64>(fa, x, j * 16, warp * 16);
            if constexpr (!VECTOR) {
                fa[0] = scale_pair(fa[0], factor[j][0], factor[j][1]), fa[1] = scale_pair(fa[1], factor[j][0], factor[j][1]);
                fa[2] = scale_pair(fa[2], factor[j][2], factor[j][3]), fa[3] = scale_pair(fa[3], factor[j][2], factor[j][3]);
            }
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t fb[4];
                frag_b<64>(fb, y, j * 16, n * 8);
                mma(s[n], fa, fb[0], fb[1]);
                mma(s[n + 1], fa, fb[2], fb[3]);
            }
        }
    }
    if (pass.end != nullptr) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                store2(pass.end + side + (k0 + warp * 16 + g + 8 * half) * V + v0 + n * 8 + 2 * t,
                       make_float2(s[n][2 * half], s[n][2 * half + 1]));
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------ one gate a head

template <typename G> struct ChunkArgs {
    const bf16 *q, *k, *v;
    const G* gates;
    int64_t gate_stride;
    const bf16 *states, *grad_states;  // [chunk, H, K, V]: before the chunk; of the gradient after it, or null
    const bf16* grad;                  // dy
    bf16 *out, *dq, *dk, *dv;
    G* dgates;  // or null; with gates per channel dq may be null, or all but dq
    Sequences sequences;
    int heads;
    float scale;
};

// Sums of a chunk's gates, by one warp.
template <typename G>
__device__ __forceinline__ void sum_gates(float* sums, const G* gates, int64_t stride, int rows) {
    const int lane = threadIdx.x & 31;
    const float lo = 2 * lane < rows ? gate2(gates[2 * lane * stride]) : 0.0f;
    const float hi = 2 * lane + 1 < rows ? gate2(gates[(2 * lane + 1) * stride]) : 0.0f;
    float sum = lo + hi;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    store2(sums + 2 * lane, make_float2(sum - hi, sum));
}

template <int K, int V> constexpr int scalar_out_shared() { return (128 * K + 64 * V + K * V) * 2 + 64 * 4; }

template <int K, int V, typename G>
__global__ void __launch_bounds__(128, 2) scalar_out_kernel(const ChunkArgs<G> a) {
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* q = reinterpret_cast<bf16*>(shared);
    bf16* k = q + 64 * K;
    bf16* v = k + 64 * K;
    bf16* state = v + 64 * V;
    float* sums = reinterpret_cast<float*>(state + K * V);

    const int head = blockIdx.x % a.heads, chunk = blockIdx.x / a.heads;
    const Span span = chunk_span(a.sequences, chunk);
    if (span.rows == 0) return;
    const int64_t row0 = span.token * a.heads + head;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    load_tile<64, K, 128>(q, a.q + row0 * K, a.heads * K, span.rows);
    load_tile<64, K, 128>(k, a.k + row0 * K, a.heads * K, span.rows);
    copy_commit();
    load_tile<K, V, 128>(state, a.states + (static_cast<int64_t>(chunk) * a.heads + head) * K * V, V, K);
    load_tile<64, V, 128>(v, a.v + row0 * V, a.heads * V, span.rows);
    copy_commit();
    if (warp == 0) sum_gates(sums, a.gates + span.token * a.gate_stride + head, a.gate_stride, span.rows);
    copy_wait<1>();
    __syncthreads();

    const int row = warp * 16 + g;
    const float down[2] = {sums[row], sums[row + 8]};
    uint32_t weights[4][4];
#pragma unroll
    for (int kb = 0; kb < 4; kb++) {
        if (kb > warp) break;
        float p[2][4];
        zero(p[0]), zero(p[1]);
#pragma unroll
        for (int d = 0; d < K; d += 16) {
            uint32_t fa[4], fb[4];
            frag_a<K>(fa, q, warp * 16, d);
            frag_b_t<K>(fb, k, kb * 16, d);
            mma(p[0], fa, fb[0], fb[1]);
            mma(p[1], fa, fb[2], fb[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int key = kb * 16 + n * 8 + 2 * t;
            const float2 of = load2(sums + key);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = row + 8 * (e / 2), j = key + e % 2;
                p[n][e] = j <= i ? p[n][e] * a.scale * exp2_fast(fminf(down[e / 2] - (e % 2 ? of.y : of.x), 0.0f)) : 0.0f;
            }
        }
        weights[kb][0] = pack(p[0][0], p[0][1]), weights[kb][1] = pack(p[0][2], p[0][3]);
        weights[kb][2] = pack(p[1][0], p[1][1]), weights[kb][3] = pack(p[1][2], p[1][3]);
    }
    copy_wait<0>();
    __syncthreads();

    float o[V / 8][4];
#pragma unroll
    for (int n = 0; n < V / 8; n++) zero(o[n]);
#pragma unroll
    for (int d = 0; d < K; d += 16) {
        uint32_t fa[4];
        frag_a<K>(fa, q, warp * 16, d);
#pragma unroll
        for (int n = 0; n < V / 8; n += 2) {
            uint32_t fb[4];
            frag_b<V>(fb, state, d, n * 8);
            mma(o[n], fa, fb[0], fb[1]);
            mma(o[n + 1], fa, fb[2], fb[3]);
        }
    }
    const float lo = a.scale * exp2_fast(down[0]), hi = a.scale * exp2_fast(down[1]);
#pragma unroll
    for (int n = 0; n < V / 8; n++) o[n][0] *= lo, o[n][1] *= lo, o[n][2] *= hi, o[n][3] *= hi;
#pragma unroll
    for (int kb = 0; kb < 4; kb++) {
        if (kb > warp) break;
#pragma unroll
        for (int n = 0; n < V / 8; n += 2) {
            uint32_t fb[4];
            frag_b<V>(fb, v, kb * 16, n * 8);
            mma(o[n], weights[kb], fb[0], fb[1]);
            mma(o[n + 1], weights[kb], fb[2], fb[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < V / 8; n += 2) {
        store_rows(a.out + (row0 + static_cast<int64_t>(row) * a.heads) * V + n * 8, a.heads * V, row, span.rows, o[n], o[n + 1]);
    }
}

template <int K, int V> constexpr int scalar_grad_shared() {
    return (128 * K + 128 * V + K * V + 2 * LOWER) * 2 + (64 + 128 + 256 + 32) * 4;
}

template <int K, int V, typename G>
__global__ void __launch_bounds__(256, 2) scalar_grad_kernel(const ChunkArgs<G> a) {
    constexpr int DK = K / 2, DV = V / 2;  // channels of one warp; warps are 4 blocks of rows x 2 halves
    constexpr int PIECES = K * V / 8 / 256;
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* q = reinterpret_cast<bf16*>(shared);
    bf16* k = q + 64 * K;
    bf16* v = k + 64 * K;
    bf16* dy = v + 64 * V;
    bf16* state = dy + 64 * V;      // before the chunk, then the gradient after it
    bf16* weights = state + K * V;  // scale L q k^T
    bf16* dweights = weights + LOWER;  // scale L dy v^T
    float* sums = reinterpret_cast<float*>(dweights + LOWER);
    float* by_row = sums + 64;   // [2][64]
    float* by_key = by_row + 128;  // [4][64]
    float* scratch = by_key + 256;  // [32]

    const int head = blockIdx.x % a.heads, chunk = blockIdx.x / a.heads;
    const Span span = chunk_span(a.sequences, chunk);
    if (span.rows == 0) return;
    const int64_t row0 = span.token * a.heads + head, side = (static_cast<int64_t>(chunk) * a.heads + head) * K * V;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int r = warp % 4, c = warp / 4, row = r * 16 + g;
    load_tile<64, K, 256>(q, a.q + row0 * K, a.heads * K, span.rows);
    load_tile<64, K, 256>(k, a.k + row0 * K, a.heads * K, span.rows);
    load_tile<64, V, 256>(v, a.v + row0 * V, a.heads * V, span.rows);
    load_tile<64, V, 256>(dy, a.grad + row0 * V, a.heads * V, span.rows);
    copy_commit();
    load_tile<K, V, 256>(state, a.states + side, V, K);
    copy_commit();
    uint4 coming[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) coming[i] = reinterpret_cast<const uint4*>(a.grad_states + side)[i * 256 + threadIdx.x];
    if (warp == 0) sum_gates(sums, a.gates + span.token * a.gate_stride + head, a.gate_stride, span.rows);
    copy_wait<1>();
    __syncthreads();

    const float down[2] = {sums[row], sums[row + 8]};
    const float last = sums[63];
    float turn[2] = {0.0f, 0.0f};  // q dq - k dk of rows `row` and `row + 8`, this warp's share
    float keyed[4][2];
#pragma unroll
    for (int n = 0; n < 4; n++) keyed[n][0] = keyed[n][1] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int kb = 2 * c + half;
        if (kb > r) break;
        float p[2][4], dp[2][4];
        zero(p[0]), zero(p[1]), zero(dp[0]), zero(dp[1]);
#pragma unroll
        for (int d = 0; d < K; d += 16) {
            uint32_t fa[4], fb[4];
            frag_a<K>(fa, q, r * 16, d);
            frag_b_t<K>(fb, k, kb * 16, d);
            mma(p[0], fa, fb[0], fb[1]);
            mma(p[1], fa, fb[2], fb[3]);
        }
#pragma unroll
        for (int d = 0; d < V; d += 16) {
            uint32_t fa[4], fb[4];
            frag_a<V>(fa, dy, r * 16, d);
            frag_b_t<V>(fb, v, kb * 16, d);
            mma(dp[0], fa, fb[0], fb[1]);
            mma(dp[1], fa, fb[2], fb[3]);
        }
        bf16* w = lower_block(weights, r, kb);
        bf16* dw = lower_block(dweights, r, kb);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int key = kb * 16 + n * 8 + 2 * t;
            const float2 of = load2(sums + key);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = row + 8 * (e / 2), j = key + e % 2;
                const float decay = j <= i ? a.scale * exp2_fast(fminf(down[e / 2] - (e % 2 ? of.y : of.x), 0.0f)) : 0.0f;
                const float both = j < i ? p[n][e] * decay * dp[n][e] : 0.0f;
                turn[e / 2] += both;
                keyed[2 * half + n][e % 2] += both;
                p[n][e] *= decay;
                dp[n][e] *= decay;
            }
            store2(lower_at(w, g, n * 8 + 2 * t), make_float2(p[n][0], p[n][1]));
            store2(lower_at(w, g + 8, n * 8 + 2 * t), make_float2(p[n][2], p[n][3]));
            store2(lower_at(dw, g, n * 8 + 2 * t), make_float2(dp[n][0], dp[n][1]));
            store2(lower_at(dw, g + 8, n * 8 + 2 * t), make_float2(dp[n][2], dp[n][3]));
        }
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float x = keyed[n][e];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
            if (g == 0) by_key[r * 64 + c * 32 + n * 8 + 2 * t + e] = x;
        }
    }
    copy_wait<0>();
    __syncthreads();

    {  // dq
        float acc[DK / 8][4];
#pragma unroll
        for (int n = 0; n < DK / 8; n++) zero(acc[n]);
#pragma unroll
        for (int d = 0; d < V; d += 16) {
            uint32_t fa[4];
            frag_a<V>(fa, dy, r * 16, d);
#pragma unroll
            for (int n = 0; n < DK / 8; n += 2) {
                uint32_t fb[4];
                frag_b_t<V>(fb, state, c * DK + n * 8, d);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
        const float f[2] = {a.scale * exp2_fast(down[0]), a.scale * exp2_fast(down[1])};
#pragma unroll
        for (int n = 0; n < DK / 8; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 x = load2(at<K>(q, row + 8 * half, c * DK + n * 8 + 2 * t));
                acc[n][2 * half] *= f[half], acc[n][2 * half + 1] *= f[half];
                turn[half] += x.x * acc[n][2 * half] + x.y * acc[n][2 * half + 1];
            }
        }
#pragma unroll
        for (int kb = 0; kb < 4; kb++) {
            if (kb > r) break;
            uint32_t fa[4];
            lower_a(fa, lower_block(dweights, r, kb));
#pragma unroll
            for (int n = 0; n < DK / 8; n += 2) {
                uint32_t fb[4];
                frag_b<K>(fb, k, kb * 16, c * DK + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < DK / 8; n += 2) {
            store_rows(a.dq + (row0 + static_cast<int64_t>(row) * a.heads) * K + c * DK + n * 8, a.heads * K, row, span.rows, acc[n], acc[n + 1]);
        }
    }
    __syncthreads();
    float through = 0.0f;  // <state, its gradient>
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int n = i * 256 + threadIdx.x;
        uint4* place = reinterpret_cast<uint4*>(at<V>(state, n / (V / 8), n % (V / 8) * 8));
        if (a.dgates != nullptr) {
            const uint4 x = *place;
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {coming[i].x, coming[i].y, coming[i].z, coming[i].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 u = unpack(xs[e]), w = unpack(ys[e]);
                through += u.x * w.x + u.y * w.y;
            }
        }
        *place = coming[i];
    }
    through *= exp2_fast(last);
    __syncthreads();

    const float back[2] = {exp2_fast(fminf(last - down[0], 0.0f)), exp2_fast(fminf(last - down[1], 0.0f))};
    {  // dk
        float acc[DK / 8][4];
#pragma unroll
        for (int n = 0; n < DK / 8; n++) zero(acc[n]);
#pragma unroll
        for (int d = 0; d < V; d += 16) {
            uint32_t fa[4];
            frag_a<V>(fa, v, r * 16, d);
#pragma unroll
            for (int n = 0; n < DK / 8; n += 2) {
                uint32_t fb[4];
                frag_b_t<V>(fb, state, c * DK + n * 8, d);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < DK / 8; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 x = load2(at<K>(k, row + 8 * half, c * DK + n * 8 + 2 * t));
                acc[n][2 * half] *= back[half], acc[n][2 * half + 1] *= back[half];
                const float both = x.x * acc[n][2 * half] + x.y * acc[n][2 * half + 1];
                turn[half] -= both;
                through += both;
            }
        }
#pragma unroll
        for (int qb = 0; qb < 4; qb++) {
            if (qb < r) continue;
            uint32_t fa[4];
            lower_a_t(fa, lower_block(dweights, qb, r));
#pragma unroll
            for (int n = 0; n < DK / 8; n += 2) {
                uint32_t fb[4];
                frag_b<K>(fb, q, qb * 16, c * DK + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < DK / 8; n += 2) {
            store_rows(a.dk + (row0 + static_cast<int64_t>(row) * a.heads) * K + c * DK + n * 8, a.heads * K, row, span.rows, acc[n], acc[n + 1]);
        }
    }
    {  // dv
        float acc[DV / 8][4];
#pragma unroll
        for (int n = 0; n < DV / 8; n++) zero(acc[n]);
#pragma unroll
        for (int d = 0; d < K; d += 16) {
            uint32_t fa[4];
            frag_a<K>(fa, k, r * 16, d);
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                uint32_t fb[4];
                frag_b<V>(fb, state, d, c * DV + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < DV / 8; n++) acc[n][0] *= back[0], acc[n][1] *= back[0], acc[n][2] *= back[1], acc[n][3] *= back[1];
#pragma unroll
        for (int qb = 0; qb < 4; qb++) {
            if (qb < r) continue;
            uint32_t fa[4];
            lower_a_t(fa, lower_block(weights, qb, r));
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                uint32_t fb[4];
                frag_b<V>(fb, dy, qb * 16, c * DV + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < DV / 8; n += 2) {
            store_rows(a.dv + (row0 + static_cast<int64_t>(row) * a.heads) * V + c * DV + n * 8, a.heads * V, row, span.rows, acc[n], acc[n + 1]);
        }
    }
    if (a.dgates == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        turn[half] = warp_sum<4>(turn[half]);
        if (t == 0) by_row[c * 64 + row + 8 * half] = turn[half];
    }
    through = block_sum(through, scratch);  // its barriers also publish `by_row`
    if (warp == 0) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int i = 2 * lane + e;
            x[e] = by_row[i] + by_row[64 + i];
            // Rows before the key's own block have no weights there.
            for (int b = i / 16; b < 4; b++) x[e] -= by_key[b * 64 + i];
        }
        float sum = x[0] + x[1];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float other = __shfl_down_sync(0xffffffffu, sum, step);
            if (lane + step < 32) sum += other;
        }
        G* to = a.dgates + row0;
        if (2 * lane < span.rows) to[2 * lane * static_cast<int64_t>(a.heads)] = from_float<G>(sum + through);
        if (2 * lane + 1 < span.rows) to[(2 * lane + 1) * static_cast<int64_t>(a.heads)] = from_float<G>(sum - x[0] + through);
    }
}

// --------------------------------------------------------------------------------------------------- gates per channel

// Sums of a chunk's gates, [64][K + 8] so that rows' pairs of channels lie in different banks; ends before a barrier.
template <int K, int THREADS, typename G>
__device__ __forceinline__ void sum_gates(float* sums, float* parts, const G* gates, int64_t stride, int rows) {
    constexpr int PAIRS = K / 2, PARTS = THREADS / PAIRS, ROWS = 64 / PARTS;
    const int col = threadIdx.x % PAIRS * 2, part = threadIdx.x / PAIRS;
    float2 sum[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = part * ROWS + i;
        sum[i] = row < rows ? load2(gates + row * stride + col) : make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        sum[i].x = gate2(sum[i].x), sum[i].y = gate2(sum[i].y);
        if (i > 0) sum[i].x += sum[i - 1].x, sum[i].y += sum[i - 1].y;
    }
    store2(parts + part * K + col, sum[ROWS - 1]);
    __syncthreads();
    float2 before = make_float2(0.0f, 0.0f);
    for (int p = 0; p < part; p++) {
        const float2 one = load2(parts + p * K + col);
        before.x += one.x, before.y += one.y;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) store2(sums + (part * ROWS + i) * (K + 8) + col, make_float2(sum[i].x + before.x, sum[i].y + before.y));
}

// An A fragment of rows m0.. scaled by e^{-|G_row - G_anchor|}, anchors of rows g and g + 8 given.
template <int K>
__device__ __forceinline__ void scaled(uint32_t (&x)[4], const uint32_t (&f)[4], const float2 (&own)[4], const float* sums,
                                       int anchor, int anchor8, int d) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 at_anchor = load2(sums + (i % 2 ? anchor8 : anchor) * (K + 8) + d + 2 * t + (i / 2) * 8);
        x[i] = scale_pair(f[i], exp2_fast(-fabsf(own[i].x - at_anchor.x)), exp2_fast(-fabsf(own[i].y - at_anchor.y)));
    }
}

template <int K> __device__ __forceinline__ void own_sums(float2 (&own)[4], const float* sums, int m0, int d) {
    const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] = load2(sums + (m0 + g + i % 2 * 8) * (K + 8) + d + 2 * t + (i / 2) * 8);
}

// The weights inside block (r, r): levels 8, 4, 2, 1 and the diagonal. An A fragment of 16 rows is also the B fragment of
// the same rows as keys, so scaled rows stay in registers.
template <int K> __device__ __forceinline__ void weigh_diagonal(bf16* weights, bf16* q, bf16* k, const float* sums, int r, float scale) {
    const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
    float same[2][4], c8[4], c4[2][4], c2[2][4], c1[2][4];
    zero(same[0]), zero(same[1]), zero(c8), zero(c4[0]), zero(c4[1]), zero(c2[0]), zero(c2[1]), zero(c1[0]), zero(c1[1]);
#pragma unroll 2
    for (int d = 0; d < K; d += 16) {
        uint32_t fq[4], fk[4], base[4], x[4];
        float2 own[4];
        frag_a<K>(fq, q, r * 16, d);
        frag_a<K>(fk, k, r * 16, d);
        own_sums<K>(own, sums, r * 16, d);
        mma(same[0], fq, fk[0], fk[2]);
        mma(same[1], fq, fk[1], fk[3]);
        base[0] = fk[0], base[1] = fq[1], base[2] = fk[2], base[3] = fq[3];
        scaled<K>(x, base, own, sums, r * 16 + 7, r * 16 + 7, d);
        mma(c8, x, x[0], x[2]);
        const auto level = [&](int h, float (&c)[2][4]) {
            const int anchor = r * 16 + (g & ~(2 * h - 1)) + h - 1;
#pragma unroll
            for (int i = 0; i < 4; i++) base[i] = g & h ? fq[i] : fk[i];
            scaled<K>(x, base, own, sums, anchor, anchor + 8, d);
            mma(c[0], x, x[0], x[2]);
            mma(c[1], x, x[1], x[3]);
        };
        level(4, c4);
        level(2, c2);
        level(1, c1);
    }
    bf16* block = lower_block(weights, r, r);
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = g + 8 * (e / 2), j = n * 8 + 2 * t + e % 2, x = i ^ j;
            const float eight = n == 0 ? c8[e] : 0.0f;
            w[e] = j > i ? 0.0f : scale * (x == 0 ? same[n][e] : x >= 8 ? eight : x >= 4 ? c4[n][e] : x >= 2 ? c2[n][e] : c1[n][e]);
        }
        store2(lower_at(block, g, n * 8 + 2 * t), make_float2(w[0], w[1]));
        store2(lower_at(block, g + 8, n * 8 + 2 * t), make_float2(w[2], w[3]));
    }
}

// The weights of rows of block r for keys of earlier blocks: levels 32 and 16.
template <int K> __device__ __forceinline__ void weigh_earlier(bf16* weights, bf16* q, bf16* k, const float* sums, int r, float scale) {
    const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
    float c[3][2][4];
#pragma unroll
    for (int b = 0; b < 3; b++) zero(c[b][0]), zero(c[b][1]);
#pragma unroll 2
    for (int d = 0; d < K; d += 16) {
        uint32_t fq[4], fk[4], x[4], y[4];
        float2 own[4], keys[4];
        frag_a<K>(fq, q, r * 16, d);
        own_sums<K>(own, sums, r * 16, d);
        const auto block = [&](int kb, int anchor, float (&to)[2][4]) {
            frag_a<K>(fk, k, kb * 16, d);
            own_sums<K>(keys, sums, kb * 16, d);
            scaled<K>(y, fk, keys, sums, anchor, anchor, d);
            mma(to[0], x, y[0], y[2]);
            mma(to[1], x, y[1], y[3]);
        };
        if (r >= 2) {
            scaled<K>(x, fq, own, sums, 31, 31, d);
            block(0, 31, c[0]);
            block(1, 31, c[1]);
        }
        if (r & 1) {
            scaled<K>(x, fq, own, sums, r * 16 - 1, r * 16 - 1, d);
            block(r - 1, r * 16 - 1, c[2]);
        }
    }
#pragma unroll
    for (int b = 0; b < 3; b++) {
        if (b < 2 ? r < 2 : !(r & 1)) continue;
        bf16* block = lower_block(weights, r, b < 2 ? b : r - 1);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            store2(lower_at(block, g, n * 8 + 2 * t), make_float2(scale * c[b][n][0], scale * c[b][n][1]));
            store2(lower_at(block, g + 8, n * 8 + 2 * t), make_float2(scale * c[b][n][2], scale * c[b][n][3]));
        }
    }
}

template <int K, int V> constexpr int vector_out_shared() {
    const int sums = 64 * (K + 8) * 4, state = K * V * 2;
    return (64 * K + 64 * (K > V ? K : V) + LOWER) * 2 + 4 * 128 * 4 + (sums > state ? sums : state);
}

// Shared memory is used twice, for three blocks on a multiprocessor: values follow the keys, the state follows the sums.
template <int K, int V, typename G>
__global__ void __launch_bounds__(256, 3) vector_out_kernel(const ChunkArgs<G> a) {
    constexpr int DV = V / 2;
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* q = reinterpret_cast<bf16*>(shared);
    bf16* k = q + 64 * K;
    bf16* v = k;
    bf16* weights = k + 64 * (K > V ? K : V);
    float* parts = reinterpret_cast<float*>(weights + LOWER);
    float* sums = parts + 4 * 128;
    bf16* state = reinterpret_cast<bf16*>(sums);

    const int head = blockIdx.x % a.heads, chunk = blockIdx.x / a.heads;
    const Span span = chunk_span(a.sequences, chunk);
    if (span.rows == 0) return;
    const int64_t row0 = span.token * a.heads + head;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    const int r = warp % 4, c = warp / 4, row = r * 16 + g;
    load_tile<64, K, 256>(q, a.q + row0 * K, a.heads * K, span.rows);
    load_tile<64, K, 256>(k, a.k + row0 * K, a.heads * K, span.rows);
    copy_commit();
    sum_gates<K, 256>(sums, parts, a.gates + span.token * a.gate_stride + head * K, a.gate_stride, span.rows);
    copy_wait<0>();
    __syncthreads();
    if (c == 0) {
        weigh_diagonal<K>(weights, q, k, sums, r, a.scale);
    } else if (r > 0) {
        weigh_earlier<K>(weights, q, k, sums, r, a.scale);
    }
    __syncthreads();
    load_tile<64, V, 256>(v, a.v + row0 * V, a.heads * V, span.rows);
    copy_commit();
#pragma unroll 4
    for (int i = threadIdx.x; i < 64 * K / 2; i += 256) {
        const int y = i / (K / 2), d = i % (K / 2) * 2;
        bf16* p = at<K>(q, y, d);
        const float2 x = load2(p), sum = load2(sums + y * (K + 8) + d);
        store2(p, make_float2(x.x * a.scale * exp2_fast(sum.x), x.y * a.scale * exp2_fast(sum.y)));
    }
    __syncthreads();
    load_tile<K, V, 256>(state, a.states + (static_cast<int64_t>(chunk) * a.heads + head) * K * V, V, K);
    copy_commit();
    copy_wait<1>();
    __syncthreads();

    float o[DV / 8][4];
#pragma unroll
    for (int n = 0; n < DV / 8; n++) zero(o[n]);
#pragma unroll
    for (int kb = 0; kb < 4; kb++) {
        if (kb > r) break;
        uint32_t fa[4];
        lower_a(fa, lower_block(weights, r, kb));
#pragma unroll
        for (int n = 0; n < DV / 8; n += 2) {
            uint32_t fb[4];
            frag_b<V>(fb, v, kb * 16, c * DV + n * 8);
            mma(o[n], fa, fb[0], fb[1]);
            mma(o[n + 1], fa, fb[2], fb[3]);
        }
    }
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int d = 0; d < K; d += 16) {
        uint32_t fa[4];
        frag_a<K>(fa, q, r * 16, d);
#pragma unroll
        for (int n = 0; n < DV / 8; n += 2) {
            uint32_t fb[4];
            frag_b<V>(fb, state, d, c * DV + n * 8);
            mma(o[n], fa, fb[0], fb[1]);
            mma(o[n + 1], fa, fb[2], fb[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < DV / 8; n += 2) {
        store_rows(a.out + (row0 + static_cast<int64_t>(row) * a.heads) * V + c * DV + n * 8, a.heads * V, row, span.rows, o[n], o[n + 1]);
    }
}

template <int K, int V> constexpr int vector_grad_shared() {
    // What levels leave behind lies where the state was, if that is large enough.
    return (128 * K + 128 * V + 2 * K * V + 128 * K + 2 * LOWER) * 2 + (64 * (K + 8) + 16 * 64 + 5 * K + 64 + (V < 128 ? 64 * K : 0)) * 4;
}

template <int K, int V, typename G>
__global__ void __launch_bounds__(512, 1) vector_grad_kernel(const ChunkArgs<G> a) {
    constexpr int THREADS = 512, DK = K / 4, DV = V / 4;  // warps are 4 blocks of rows x 4 quarters of channels
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* q = reinterpret_cast<bf16*>(shared);
    bf16* k = q + 64 * K;
    bf16* v = k + 64 * K;
    bf16* dy = v + 64 * V;
    bf16* state = dy + 64 * V;
    bf16* dstate = state + K * V;
    bf16* scaled32 = dstate + K * V;  // [64][K]: rows scaled for level 32, later keys as the state takes them
    bf16* scaled16 = scaled32 + 64 * K;  // rows scaled for level 16 and lower
    bf16* weights = scaled16 + 64 * K;
    bf16* dweights = weights + LOWER;  // diagonal blocks hold both triangles
    float* sums = reinterpret_cast<float*>(dweights + LOWER);  // later q dq - k dk
    float* parts = sums + 64 * (K + 8);                        // [THREADS / (K / 2)][K], at most [16][64]
    float* tail = parts + 1024;                                // [4][K]: k dk of the state's part, summed over 16 rows
    float* through = tail + 4 * K;                             // [K]: state times its gradient
    float* same = through + K;                                 // [64]: the diagonal of dweights
    float* left = V < 128 ? same + 64 : reinterpret_cast<float*>(state);  // [64][K]

    const int head = blockIdx.x % a.heads, chunk = blockIdx.x / a.heads;
    const Span span = chunk_span(a.sequences, chunk);
    if (span.rows == 0) return;
    const int64_t row0 = span.token * a.heads + head, side = (static_cast<int64_t>(chunk) * a.heads + head) * K * V;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int r = warp % 4, c = warp / 4, row = r * 16 + g;
    load_tile<64, K, THREADS>(q, a.q + row0 * K, a.heads * K, span.rows);
    load_tile<64, K, THREADS>(k, a.k + row0 * K, a.heads * K, span.rows);
    load_tile<64, V, THREADS>(v, a.v + row0 * V, a.heads * V, span.rows);
    load_tile<64, V, THREADS>(dy, a.grad + row0 * V, a.heads * V, span.rows);
    copy_commit();
    load_tile<K, V, THREADS>(state, a.states + side, V, K);
    if (a.grad_states != nullptr) load_tile<K, V, THREADS>(dstate, a.grad_states + side, V, K);
    copy_commit();
    sum_gates<K, THREADS>(sums, parts, a.gates + span.token * a.gate_stride + head * K, a.gate_stride, span.rows);
    copy_wait<1>();
    __syncthreads();

    // Rows scaled for levels 32 and 16, by all threads together.
    const auto fill = [&](int h, bf16* to) {
#pragma unroll
        for (int i = 0; i < 64 * K / 2; i += THREADS) {
            const int y = (i + threadIdx.x) / (K / 2), d = (i + threadIdx.x) % (K / 2) * 2;
            const float2 x = load2(at<K>(y & h ? q : k, y, d)), own = load2(sums + y * (K + 8) + d);
            const float2 far = load2(sums + ((y & ~(2 * h - 1)) + h - 1) * (K + 8) + d);
            store2(at<K>(to, y, d), make_float2(x.x * exp2_fast(-fabsf(own.x - far.x)), x.y * exp2_fast(-fabsf(own.y - far.y))));
        }
    };
    fill(32, scaled32);
    fill(16, scaled16);
    copy_wait<0>();
    __syncthreads();

    // The ten blocks of dweights and the six of weights off the diagonal, each by one warp.
    const auto block_product = [&](int task) {
        float p[2][4];
        zero(p[0]), zero(p[1]);
        const auto multiply = [&](auto width, bf16* x, int m0, bf16* y, int n0) {
            constexpr int W = decltype(width)::value;
#pragma unroll
            for (int d = 0; d < W; d += 16) {
                uint32_t fa[4], fb[4];
                frag_a<W>(fa, x, m0, d);
                frag_b_t<W>(fb, y, n0, d);
                mma(p[0], fa, fb[0], fb[1]);
                mma(p[1], fa, fb[2], fb[3]);
            }
        };
        if (task < 10) {
            const int b = task < 1 ? 0 : task < 3 ? 1 : task < 6 ? 2 : 3, kb = task - b * (b + 1) / 2;
            multiply(Width<V>{}, dy, b * 16, v, kb * 16);
            bf16* block = lower_block(dweights, b, kb);
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = g + 8 * (e / 2), j = n * 8 + 2 * t + e % 2;
                    const float x = a.scale * p[n][e];
                    if (kb < b) {
                        *lower_at(block, i, j) = from_float<bf16>(x);
                    } else if (j < i) {
                        *lower_at(block, i, j) = *lower_at(block, j, i) = from_float<bf16>(x);
                    } else if (j == i) {
                        *lower_at(block, i, j) = from_float<bf16>(x);
                        same[b * 16 + i] = x;
                    }
                }
            }
        } else if (a.dv != nullptr) {
            // (2, 0), (2, 1), (3, 0), (3, 1) of level 32, (1, 0), (3, 2) of level 16
            const int n = task - 10, b = n < 4 ? 2 + n / 2 : n == 4 ? 1 : 3, kb = n < 4 ? n % 2 : b - 1;
            bf16* x = n < 4 ? scaled32 : scaled16;
            multiply(Width<K>{}, x, b * 16, x, kb * 16);
            bf16* block = lower_block(weights, b, kb);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                store2(lower_at(block, g, n * 8 + 2 * t), make_float2(a.scale * p[n][0], a.scale * p[n][1]));
                store2(lower_at(block, g + 8, n * 8 + 2 * t), make_float2(a.scale * p[n][2], a.scale * p[n][3]));
            }
        }
    };
    if (c == 0) {
        if (a.dv != nullptr) weigh_diagonal<K>(weights, q, k, sums, r, a.scale);
    } else {
        block_product(warp - 4);
        if (warp < 8) block_product(warp + 8);
    }

    const bool all = a.dk != nullptr;  // else dq alone
    float dq[DK / 8][4], dk[DK / 8][4];
#pragma unroll
    for (int n = 0; n < DK / 8; n++) zero(dq[n]), zero(dk[n]);
#pragma unroll
    for (int d = 0; d < V; d += 16) {
        uint32_t fa[4], fb[4], fc[4];
        frag_a<V>(fa, dy, r * 16, d);
        frag_a<V>(fc, v, r * 16, d);
#pragma unroll
        for (int n = 0; n < DK / 8; n += 2) {
            frag_b_t<V>(fb, state, c * DK + n * 8, d);
            mma(dq[n], fa, fb[0], fb[1]);
            mma(dq[n + 1], fa, fb[2], fb[3]);
            if (!all) continue;
            frag_b_t<V>(fb, dstate, c * DK + n * 8, d);
            mma(dk[n], fc, fb[0], fb[1]);
            mma(dk[n + 1], fc, fb[2], fb[3]);
        }
    }
    float2 own[DK / 8][2];  // sums of gates where this thread has elements of dq and dk
#pragma unroll
    for (int n = 0; n < DK / 8; n++) {
        const int d = c * DK + n * 8 + 2 * t;
        const float2 last = load2(sums + 63 * (K + 8) + d);
        float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 mine = own[n][half] = load2(sums + (row + 8 * half) * (K + 8) + d);
            const float2 key = load2(at<K>(k, row + 8 * half, d));
            dq[n][2 * half] *= a.scale * exp2_fast(mine.x), dq[n][2 * half + 1] *= a.scale * exp2_fast(mine.y);
            dk[n][2 * half] *= exp2_fast(fminf(last.x - mine.x, 0.0f)), dk[n][2 * half + 1] *= exp2_fast(fminf(last.y - mine.y, 0.0f));
            total.x += key.x * dk[n][2 * half], total.y += key.y * dk[n][2 * half + 1];
        }
        if (a.dgates == nullptr) continue;
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            total.x += __shfl_xor_sync(0xffffffffu, total.x, step);
            total.y += __shfl_xor_sync(0xffffffffu, total.y, step);
        }
        if (g == 0) store2(tail + r * K + d, total);
    }
    if (a.dgates != nullptr) {  // state times its gradient, per key channel
        constexpr int LANES = V / 8;
#pragma unroll
        for (int i = 0; i < K * LANES; i += THREADS) {
            const int y = (i + threadIdx.x) / LANES, piece = (i + threadIdx.x) % LANES;
            const uint4 x = *reinterpret_cast<uint4*>(at<V>(state, y, piece * 8)), z = *reinterpret_cast<uint4*>(at<V>(dstate, y, piece * 8));
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, zs[4] = {z.x, z.y, z.z, z.w};
            float sum = 0.0f;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 u = unpack(xs[e]), w = unpack(zs[e]);
                sum += u.x * w.x + u.y * w.y;
            }
            sum = warp_sum<LANES>(sum);
            if (piece == 0) through[y] = sum * exp2_fast(sums[63 * (K + 8) + y]);
        }
    }
    __syncthreads();

    float acc[DK / 8][4];
    const auto clear = [&] {
#pragma unroll
        for (int n = 0; n < DK / 8; n++) zero(acc[n]);
    };
    const auto product = [&](const uint32_t(&fa)[4], bf16* x, int kb) {
#pragma unroll
        for (int n = 0; n < DK / 8; n += 2) {
            uint32_t fb[4];
            frag_b<K>(fb, x, kb * 16, c * DK + n * 8);
            mma(acc[n], fa, fb[0], fb[1]);
            mma(acc[n + 1], fa, fb[2], fb[3]);
        }
    };
    const auto add_far = [&](int anchor, bool upper) {
#pragma unroll
        for (int n = 0; n < DK / 8; n++) {
            const float2 far = load2(sums + anchor * (K + 8) + c * DK + n * 8 + 2 * t);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float lo = acc[n][2 * half] * exp2_fast(-fabsf(own[n][half].x - far.x));
                const float hi = acc[n][2 * half + 1] * exp2_fast(-fabsf(own[n][half].y - far.y));
                if (upper) {
                    dq[n][2 * half] += lo, dq[n][2 * half + 1] += hi;
                } else {
                    dk[n][2 * half] += lo, dk[n][2 * half + 1] += hi;
                }
            }
        }
    };
    uint32_t fa[4];
    clear();
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (r >= 2) {
            lower_a(fa, lower_block(dweights, r, j));
        } else {
            lower_a_t(fa, lower_block(dweights, 2 + j, r));
        }
        product(fa, scaled32, r >= 2 ? j : 2 + j);
    }
    add_far(31, r >= 2);
    clear();
    if (r & 1) {
        lower_a(fa, lower_block(dweights, r, r - 1));
    } else {
        lower_a_t(fa, lower_block(dweights, r + 1, r));
    }
    product(fa, scaled16, r ^ 1);
    add_far((r | 1) * 16 - 1, r & 1);
    __syncthreads();

    // The other levels stay inside the warp's rows and channels, in its part of one buffer.
    const auto near = [&](auto height) {
        constexpr int h = decltype(height)::value;
        float2 f[DK / 8][2];
        const bool low_upper = h < 8 && (g & h), high_upper = h == 8 || (g & h);
        const int anchor = h == 8 ? 7 : (g & ~(2 * h - 1)) + h - 1, anchor8 = h == 8 ? 7 : anchor + 8;
#pragma unroll
        for (int n = 0; n < DK / 8; n++) {
            const int d = c * DK + n * 8 + 2 * t;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 far = load2(sums + (r * 16 + (half ? anchor8 : anchor)) * (K + 8) + d);
                f[n][half] = make_float2(exp2_fast(-fabsf(own[n][half].x - far.x)), exp2_fast(-fabsf(own[n][half].y - far.y)));
                const float2 x = load2(at<K>((half ? high_upper : low_upper) ? q : k, row + 8 * half, d));
                store2(at<K>(scaled16, row + 8 * half, d), make_float2(x.x * f[n][half].x, x.y * f[n][half].y));
            }
        }
        __syncwarp();
        lower_a(fa, lower_block(dweights, r, r));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int y = g + i % 2 * 8, z = 2 * t + i / 2 * 8, lo = y ^ z, hi = y ^ (z + 1);
            fa[i] &= (lo >= h && lo < 2 * h ? 0xffffu : 0u) | (hi >= h && hi < 2 * h ? 0xffff0000u : 0u);
        }
        clear();
        product(fa, scaled16, r);
        __syncwarp();
#pragma unroll
        for (int n = 0; n < DK / 8; n++) {
            const int d = c * DK + n * 8 + 2 * t;
            float2 off[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool upper = half ? high_upper : low_upper;
                const float lo = acc[n][2 * half] * f[n][half].x, hi = acc[n][2 * half + 1] * f[n][half].y;
                dq[n][2 * half] += upper ? lo : 0.0f, dq[n][2 * half + 1] += upper ? hi : 0.0f;
                dk[n][2 * half] += upper ? 0.0f : lo, dk[n][2 * half + 1] += upper ? 0.0f : hi;
                const float2 x = load2(at<K>(upper ? q : k, row + 8 * half, d));
                off[half] = upper ? make_float2(-x.x * lo, -x.y * hi) : make_float2(x.x * lo, x.y * hi);
            }
            // Of a block's pairs, k dk over the lower half and q dq over the upper half are equal but for rounding. Summed over
            // all earlier rows that would drown small gradients of gates, so the anchor takes back the difference.
            if (a.dgates == nullptr) continue;
            if (h == 8) off[0].x += off[1].x, off[0].y += off[1].y;
#pragma unroll
            for (int half = 0; half < (h == 8 ? 1 : 2); half++) {
#pragma unroll
                for (int bit = 1; bit < 8 && bit < 2 * h; bit *= 2) {
                    off[half].x += __shfl_xor_sync(0xffffffffu, off[half].x, 4 * bit);
                    off[half].y += __shfl_xor_sync(0xffffffffu, off[half].y, 4 * bit);
                }
                if ((g & (2 * h - 1)) == h - 1) store2(left + (row + 8 * half) * K + d, off[half]);
            }
        }
    };
    near(Width<8>{});
    near(Width<4>{});
    near(Width<2>{});
    near(Width<1>{});
    // Keys as the state takes them, for dv.
#pragma unroll
    for (int n = 0; n < DK / 8; n++) {
        const int d = c * DK + n * 8 + 2 * t;
        const float2 last = load2(sums + 63 * (K + 8) + d);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 x = load2(at<K>(k, row + 8 * half, d));
            store2(at<K>(scaled32, row + 8 * half, d), make_float2(x.x * exp2_fast(fminf(last.x - own[n][half].x, 0.0f)),
                                                                   x.y * exp2_fast(fminf(last.y - own[n][half].y, 0.0f))));
        }
    }
    __syncthreads();

    // q dq - k dk over the sums of gates, which are no longer needed; then the pair i = j joins.
#pragma unroll
    for (int n = 0; n < DK / 8; n++) {
        const int d = c * DK + n * 8 + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int y = row + 8 * half;
            const float2 xq = load2(at<K>(q, y, d)), xk = load2(at<K>(k, y, d));
            float* u = &dq[n][2 * half];
            float* w = &dk[n][2 * half];
            if (a.dgates != nullptr) {
                const float2 back = y % 16 < 15 ? load2(left + y * K + d) : make_float2(0.0f, 0.0f);
                store2(sums + y * (K + 8) + d, make_float2(xq.x * u[0] - xk.x * w[0] + back.x, xq.y * u[1] - xk.y * w[1] + back.y));
            }
            const float pair = same[y];
            u[0] += pair * xk.x, u[1] += pair * xk.y;
            w[0] += pair * xq.x, w[1] += pair * xq.y;
        }
    }
#pragma unroll
    for (int n = 0; n < DK / 8; n += 2) {
        const int64_t to = (row0 + static_cast<int64_t>(row) * a.heads) * K + c * DK + n * 8;
        if (a.dq != nullptr) store_rows(a.dq + to, a.heads * K, row, span.rows, dq[n], dq[n + 1]);
        if (all) store_rows(a.dk + to, a.heads * K, row, span.rows, dk[n], dk[n + 1]);
    }
    if (a.dv != nullptr) {
        float acc[DV / 8][4];
#pragma unroll
        for (int n = 0; n < DV / 8; n++) zero(acc[n]);
#pragma unroll
        for (int d = 0; d < K; d += 16) {
            uint32_t fa[4];
            frag_a<K>(fa, scaled32, r * 16, d);
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                uint32_t fb[4];
                frag_b<V>(fb, dstate, d, c * DV + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int qb = 0; qb < 4; qb++) {
            if (qb < r) continue;
            uint32_t fa[4];
            lower_a_t(fa, lower_block(weights, qb, r));
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                uint32_t fb[4];
                frag_b<V>(fb, dy, qb * 16, c * DV + n * 8);
                mma(acc[n], fa, fb[0], fb[1]);
                mma(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < DV / 8; n += 2) {
            store_rows(a.dv + (row0 + static_cast<int64_t>(row) * a.heads) * V + c * DV + n * 8, a.heads * V, row, span.rows, acc[n], acc[n + 1]);
        }
    }
    if (a.dgates == nullptr) return;
    __syncthreads();
    constexpr int PAIRS = K / 2, PARTS = THREADS / PAIRS, ROWS = 64 / PARTS;
    const int col = threadIdx.x % PAIRS * 2, part = threadIdx.x / PAIRS;
    float2 sum[ROWS];
#pragma unroll
    for (int i = ROWS - 1; i >= 0; i--) {
        sum[i] = load2(sums + (part * ROWS + i) * (K + 8) + col);
        if (i < ROWS - 1) sum[i].x += sum[i + 1].x, sum[i].y += sum[i + 1].y;
    }
    store2(parts + part * K + col, sum[0]);
    __syncthreads();
    float2 after = load2(through + col);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 one = load2(tail + i * K + col);
        after.x += one.x, after.y += one.y;
    }
    for (int p = PARTS - 1; p > part; p--) {
        const float2 one = load2(parts + p * K + col);
        after.x += one.x, after.y += one.y;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int y = part * ROWS + i;
        if (y < span.rows) store2(a.dgates + (row0 + static_cast<int64_t>(y) * a.heads) * K + col, make_float2(sum[i].x + after.x, sum[i].y + after.y));
    }
}

// ------------------------------------------------------------------------------------------------------------ launching

template <typename Kernel> cudaError_t allow(Kernel kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

#define TRY(call)                                  \
    do {                                           \
        const cudaError_t error = (call);          \
        if (error != cudaSuccess) return error;    \
    } while (0)

template <int K, int V, bool VECTOR, typename G>
cudaError_t run_states(const StateArgs<G>& args, cudaStream_t stream) {
    constexpr int bytes = states_shared<G>(VECTOR);
    TRY(allow(states_kernel<K, V, VECTOR, G>, bytes));
    const dim3 grid(K / 64 * (V / 64), args.heads, args.sequences.count * args.passes);
    states_kernel<K, V, VECTOR, G><<<grid, 128, bytes, stream>>>(args);
    return cudaGetLastError();
}

template <int K, int V, bool VECTOR, typename G>
cudaError_t run_out(const ChunkArgs<G>& args, cudaStream_t stream) {
    const unsigned blocks = chunk_bound(args.sequences) * args.heads;
    if constexpr (VECTOR) {
        constexpr int bytes = vector_out_shared<K, V>();
        TRY(allow(vector_out_kernel<K, V, G>, bytes));
        vector_out_kernel<K, V, G><<<blocks, 256, bytes, stream>>>(args);
    } else {
        constexpr int bytes = scalar_out_shared<K, V>();
        TRY(allow(scalar_out_kernel<K, V, G>, bytes));
        scalar_out_kernel<K, V, G><<<blocks, 128, bytes, stream>>>(args);
    }
    return cudaGetLastError();
}

template <int K, int V, bool VECTOR, typename G>
cudaError_t run_grad(const ChunkArgs<G>& args, cudaStream_t stream) {
    const unsigned blocks = chunk_bound(args.sequences) * args.heads;
    if constexpr (VECTOR) {
        constexpr int bytes = vector_grad_shared<K, V>();
        TRY(allow(vector_grad_kernel<K, V, G>, bytes));
        vector_grad_kernel<K, V, G><<<blocks, 512, bytes, stream>>>(args);
    } else {
        constexpr int bytes = scalar_grad_shared<K, V>();
        TRY(allow(scalar_grad_kernel<K, V, G>, bytes));
        scalar_grad_kernel<K, V, G><<<blocks, 256, bytes, stream>>>(args);
    }
    return cudaGetLastError();
}

// What a caller passes, before the types are fixed.
struct Call {
    const bf16 *q, *k, *v;
    const void* gates;
    const float *initial, *dfinal;
    const bf16* dy;
    bf16 *y, *dq, *dk, *dv;
    void* dgates;
    float *final, *dinitial;
    bf16* scratch;
    Sequences sequences;
    int heads;
    int64_t gate_stride;
    float scale;
    cudaStream_t stream;
};

template <int K, int V, bool VECTOR, typename G> cudaError_t forward(const Call& c) {
    StateArgs<G> s{};
    s.pass[0] = {c.k, c.v, c.initial, c.final, c.scratch};
    s.passes = 1;
    s.gates = static_cast<const G*>(c.gates), s.gate_stride = c.gate_stride;
    s.sequences = c.sequences, s.heads = c.heads, s.scale = c.scale;
    TRY((run_states<K, V, VECTOR, G>(s, c.stream)));
    ChunkArgs<G> a{};
    a.q = c.q, a.k = c.k, a.v = c.v, a.gates = s.gates, a.gate_stride = c.gate_stride, a.states = c.scratch, a.out = c.y;
    a.sequences = c.sequences, a.heads = c.heads, a.scale = c.scale;
    return run_out<K, V, VECTOR, G>(a, c.stream);
}

template <int K, int V, bool VECTOR, typename G> cudaError_t backward(const Call& c) {
    bf16* grad_states = c.scratch + chunk_bound(c.sequences) * c.heads * K * V;
    StateArgs<G> s{};
    s.pass[0] = {c.k, c.v, c.initial, nullptr, c.scratch};
    s.pass[1] = {c.q, c.dy, c.dfinal, c.dinitial, grad_states};
    s.passes = 2;
    s.gates = static_cast<const G*>(c.gates), s.gate_stride = c.gate_stride;
    s.sequences = c.sequences, s.heads = c.heads, s.scale = c.scale;
    TRY((run_states<K, V, VECTOR, G>(s, c.stream)));
    ChunkArgs<G> a{};
    a.q = c.q, a.k = c.k, a.v = c.v, a.gates = s.gates, a.gate_stride = c.gate_stride;
    a.states = c.scratch, a.grad_states = grad_states, a.grad = c.dy;
    a.dq = c.dq, a.dk = c.dk, a.dv = c.dv, a.dgates = static_cast<G*>(c.dgates);
    a.sequences = c.sequences, a.heads = c.heads, a.scale = c.scale;
    return run_grad<K, V, VECTOR, G>(a, c.stream);
}

// Gates on the values' channels, S_t = S_{t-1} exp(g_t) + k_t v_t^T. The sum
//   F = scale sum_{j <= i} (sum_d q_i[d] k_j[d] e^{G_i[d] - G_j[d]}) (v_j . y_i)
// gives gated attention as its derivative by y, and by q the form with gated values: there y, v, k are the queries, keys
// and values. So the result is a `dq`, and gradients are a result and the other gradients.
template <int K, int V, typename G> cudaError_t values_forward(const Call& c) {
    StateArgs<G> s{};
    s.pass[0] = {c.v, c.k, c.initial, c.final, c.scratch};
    s.passes = 1;
    s.gates = static_cast<const G*>(c.gates), s.gate_stride = c.gate_stride;
    s.sequences = c.sequences, s.heads = c.heads, s.scale = c.scale;
    TRY((run_states<K, V, true, G>(s, c.stream)));
    ChunkArgs<G> a{};
    a.q = c.v, a.k = c.v, a.v = c.k, a.grad = c.q, a.gates = s.gates, a.gate_stride = c.gate_stride;
    a.states = c.scratch, a.dq = c.y;
    a.sequences = c.sequences, a.heads = c.heads, a.scale = c.scale;
    return run_grad<K, V, true, G>(a, c.stream);
}

template <int K, int V, typename G> cudaError_t values_backward(const Call& c) {
    Call inner = c;
    inner.q = c.dy, inner.k = c.v, inner.v = c.k, inner.dy = c.q;
    inner.dq = nullptr, inner.dk = c.dv, inner.dv = c.dk;
    TRY((backward<K, V, true, G>(inner)));
    ChunkArgs<G> a{};
    a.q = inner.q, a.k = inner.k, a.v = inner.v, a.gates = static_cast<const G*>(c.gates), a.gate_stride = c.gate_stride;
    a.states = c.scratch, a.out = c.dq;
    a.sequences = c.sequences, a.heads = c.heads, a.scale = c.scale;
    return run_out<K, V, true, G>(a, c.stream);
}

// Which form of the op a call is.
enum Gates { PER_HEAD, PER_CHANNEL, PER_VALUE };

template <int K, int V, bool BACKWARD, typename G> cudaError_t dispatch(const Call& c, int gates) {
    if (gates == PER_HEAD) {
        // There are few of them, so they come as f32.
        if constexpr (sizeof(G) == 4) return BACKWARD ? backward<K, V, false, G>(c) : forward<K, V, false, G>(c);
        return cudaErrorInvalidValue;
    }
    if constexpr (BACKWARD) return gates == PER_VALUE ? values_backward<K, V, G>(c) : backward<K, V, true, G>(c);
    return gates == PER_VALUE ? values_forward<K, V, G>(c) : forward<K, V, true, G>(c);
}

// `key_dim` is the side of the state that decays.
template <bool BACKWARD> int dispatch(const Call& c, int key_dim, int value_dim, int gates, bool wide) {
    if (c.sequences.count <= 0 || c.sequences.time <= 0 || c.heads <= 0) return cudaErrorInvalidValue;
#define SIZE(K, V) \
    if (key_dim == K && value_dim == V) return wide ? dispatch<K, V, BACKWARD, float>(c, gates) : dispatch<K, V, BACKWARD, bf16>(c, gates)
    SIZE(128, 128);
    SIZE(64, 64);
    SIZE(64, 128);
    SIZE(128, 64);
#undef SIZE
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace margay

using namespace margay;

// Whether the current device has the shared memory for both directions.
extern "C" int margay_gated_linear_attn_fits(int key_dim, int value_dim, int gates) {
    int device = 0, most = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    const int k = key_dim > 64 ? 128 : 64, v = value_dim > 64 ? 128 : 64;
    const int scalar = k == 128 ? (v == 128 ? scalar_grad_shared<128, 128>() : scalar_grad_shared<128, 64>())
                                : (v == 128 ? scalar_grad_shared<64, 128>() : scalar_grad_shared<64, 64>());
    const int vector = k == 128 ? (v == 128 ? vector_grad_shared<128, 128>() : vector_grad_shared<128, 64>())
                                : (v == 128 ? vector_grad_shared<64, 128>() : vector_grad_shared<64, 64>());
    const int states = gates == PER_HEAD ? states_shared<float>(false) : states_shared<float>(true);
    return states <= most && (gates == PER_HEAD ? scalar : vector) <= most;
}

// Bytes of scratch for a forward or a backward call.
extern "C" size_t margay_gated_linear_attn_scratch(int sequences, long long time, int packed, int heads, int key_dim,
                                                   int value_dim, int backward) {
    static const int some = 0;
    const Sequences s{packed ? &some : nullptr, sequences, time};
    return static_cast<size_t>(chunk_bound(s)) * heads * key_dim * value_dim * sizeof(bf16) * (backward ? 2 : 1);
}

// `starts`: null for `sequences` stretches of `time` tokens each; else their bounds on the device, `time` the sum.
// `gate_stride`: elements from token to token (H or H K), or 0 for one constant gate per head. `initial` and `final_state`
// may be null. `gates_on`: 0 heads, 1 the keys' channels, 2 the values' channels; in the last case `key_dim` counts the
// channels of `v` and `value_dim` those of `q` and `k`, and states are [sequences, H, channels of v, channels of k].
extern "C" int margay_gated_linear_attn_fwd(const void* q, const void* k, const void* v, const void* gates,
                                            const float* initial, void* y, float* final_state, void* scratch,
                                            const int* starts, int sequences, long long time, int heads, int key_dim,
                                            int value_dim, int gates_on, int f32_gates, long long gate_stride, float scale,
                                            void* stream) {
    Call c{};
    c.q = static_cast<const bf16*>(q), c.k = static_cast<const bf16*>(k), c.v = static_cast<const bf16*>(v);
    c.gates = gates, c.initial = initial, c.y = static_cast<bf16*>(y), c.final = final_state;
    c.scratch = static_cast<bf16*>(scratch), c.sequences = {starts, sequences, time}, c.heads = heads;
    c.gate_stride = gate_stride, c.scale = scale, c.stream = static_cast<cudaStream_t>(stream);
    return dispatch<false>(c, key_dim, value_dim, gates_on, f32_gates);
}

// Gradients; `dfinal`, `dgates` and `dinitial` may be null. `dgates` has the gates' type and one entry per token.
extern "C" int margay_gated_linear_attn_bwd(const void* q, const void* k, const void* v, const void* gates,
                                            const float* initial, const void* dy, const float* dfinal, void* dq, void* dk,
                                            void* dv, void* dgates, float* dinitial, void* scratch, const int* starts,
                                            int sequences, long long time, int heads, int key_dim, int value_dim,
                                            int gates_on, int f32_gates, long long gate_stride, float scale, void* stream) {
    Call c{};
    c.q = static_cast<const bf16*>(q), c.k = static_cast<const bf16*>(k), c.v = static_cast<const bf16*>(v);
    c.gates = gates, c.initial = initial, c.dy = static_cast<const bf16*>(dy), c.dfinal = dfinal;
    c.dq = static_cast<bf16*>(dq), c.dk = static_cast<bf16*>(dk), c.dv = static_cast<bf16*>(dv);
    c.dgates = dgates, c.dinitial = dinitial, c.scratch = static_cast<bf16*>(scratch);
    c.sequences = {starts, sequences, time}, c.heads = heads, c.gate_stride = gate_stride, c.scale = scale;
    c.stream = static_cast<cudaStream_t>(stream);
    return dispatch<true>(c, key_dim, value_dim, gates_on, f32_gates);
}
