// What weights of gated linear attention sum to: a state with one column of values, all 1.
//
//   z_t = e^{g_t} z_{t-1} + k_t      c_t = scale q_t·z_t                                          g below -128 counts as that
//   u_t = scale dc_t q_t + e^{g_{t+1}} u_{t+1}
//   dq_t = scale dc_t z_t      dk_t = u_t      dg_t = u_t e^{g_t} z_{t-1}, summed over the channels where a head has one gate
//
// q, k, dq, dk [B, T, H, K] bf16; gates, dgates [B, T, H, K] or [B, T, H] f32; c [B, T, H] f32. K is 64 or 128.
//
// Memory-bound, so the sequence is cut in chunks of 32 rows that run side by side, one thread per channel: `ends` walks each
// from nothing, `starts` joins them along T, then each is walked again from where it starts. Backwards the same from behind.

#include "common.cuh"

namespace margay {
namespace {

constexpr int ROWS = 32;
constexpr int AHEAD = 8;  // rows that are loaded at once

struct Problem {
    const bf16 *q, *k;
    const float* gates;
    int time, heads, chunks;
    bool per_channel;
    float scale;
};

// One thread's channel of one chunk.
template <int K> struct Place {
    int64_t row;  // of [B T, H], its stride is `heads`
    int rows;
    int64_t chunk;  // of the chunk's summary [2, K]

    __device__ Place(const Problem& p)
        : row(((int64_t)blockIdx.z * p.time + blockIdx.x * ROWS) * p.heads + blockIdx.y),
          rows(min(ROWS, p.time - (int)blockIdx.x * ROWS)),
          chunk((((int64_t)blockIdx.z * p.heads + blockIdx.y) * p.chunks + blockIdx.x) * 2 * K) {}

    __device__ int64_t at(const Problem& p, int i) const { return (row + (int64_t)i * p.heads) * K + threadIdx.x; }
    __device__ float gate(const Problem& p, int i) const {
        const int64_t head = row + (int64_t)i * p.heads;
        return fmaxf(p.gates[p.per_channel ? head * K + threadIdx.x : head], -128.0f);
    }
};

// The state that a chunk makes of nothing and the sum of its gates, or the same from behind for the gradient of the state.
template <int K, bool BACK> __global__ void __launch_bounds__(K) ends(Problem p, const float* dc, float* summary) {
    const Place<K> at(p);
    float state = 0.0f, sum = 0.0f;
    for (int base = 0; base < ROWS; base += AHEAD) {
        float g[AHEAD], x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int i = BACK ? at.rows - 1 - base - j : base + j;
            const bool valid = base + j < at.rows;
            g[j] = valid ? at.gate(p, i) : 0.0f;
            x[j] = !valid ? 0.0f : BACK ? p.scale * dc[at.row + (int64_t)i * p.heads] * to_float(p.q[at.at(p, i)]) : to_float(p.k[at.at(p, i)]);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const float decay = expf(g[j]);
            state = BACK ? decay * (state + x[j]) : fmaf(decay, state, x[j]);
            sum += g[j];
        }
    }
    summary[at.chunk + threadIdx.x] = state;
    summary[at.chunk + K + threadIdx.x] = sum;
}

// Each chunk's state becomes the one it starts from.
template <int K, bool BACK> __global__ void __launch_bounds__(K) starts(int chunks, float* summary) {
    float* all = summary + (int64_t)blockIdx.x * chunks * 2 * K + threadIdx.x;
    float state = 0.0f;
    for (int base = 0; base < chunks; base += AHEAD) {
        float end[AHEAD], sum[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int n = BACK ? chunks - 1 - base - j : base + j;
            const bool valid = base + j < chunks;
            end[j] = valid ? all[(int64_t)n * 2 * K] : 0.0f;
            sum[j] = valid ? all[(int64_t)n * 2 * K + K] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int n = BACK ? chunks - 1 - base - j : base + j;
            if (base + j < chunks) all[(int64_t)n * 2 * K] = state;
            state = fmaf(expf(sum[j]), state, end[j]);
        }
    }
}

// Sums over the channels of the rows in `cells` [rows, K].
template <int K> __device__ __forceinline__ void row_sums(float (*cells)[K], int rows, float* out, int stride, float factor, bool add) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    for (int i = warp; i < rows; i += K / WARP) {
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < K; c += WARP) sum += cells[i][c + lane];
        sum = warp_sum(sum);
        if (lane == 0) out[(int64_t)i * stride] = (add ? out[(int64_t)i * stride] : 0.0f) + factor * sum;
    }
}

template <int K> __global__ void __launch_bounds__(K) count(Problem p, const float* summary, float* c) {
    __shared__ float cells[ROWS][K];
    const Place<K> at(p);
    float z = summary[at.chunk + threadIdx.x];
    for (int base = 0; base < at.rows; base += AHEAD) {
        float g[AHEAD], k[AHEAD], q[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const bool valid = base + j < at.rows;
            g[j] = valid ? at.gate(p, base + j) : 0.0f;
            k[j] = valid ? to_float(p.k[at.at(p, base + j)]) : 0.0f;
            q[j] = valid ? to_float(p.q[at.at(p, base + j)]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            z = fmaf(expf(g[j]), z, k[j]);
            cells[base + j][threadIdx.x] = q[j] * z;
        }
    }
    row_sums<K>(cells, at.rows, c + at.row, p.heads, p.scale, false);
}

// Adds to dq, dk and, where it is not null, dgates.
template <int K>
__global__ void __launch_bounds__(K)
    grad(Problem p, const float* before, const float* behind, const float* dc, bf16* dq, bf16* dk, float* dgates) {
    __shared__ float cells[ROWS][K];  // z, then what a row's gates get
    const Place<K> at(p);
    const float start = before[at.chunk + threadIdx.x];
    float z = start;
    for (int base = 0; base < at.rows; base += AHEAD) {
        float g[AHEAD], k[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const bool valid = base + j < at.rows;
            g[j] = valid ? at.gate(p, base + j) : 0.0f;
            k[j] = valid ? to_float(p.k[at.at(p, base + j)]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            z = fmaf(expf(g[j]), z, k[j]);
            cells[base + j][threadIdx.x] = z;
        }
    }
    float u = behind[at.chunk + threadIdx.x];  // e^{g} u of the row behind
    constexpr int FEW = 4;
    for (int base = at.rows - 1; base >= 0; base -= FEW) {
        float g[FEW], d[FEW], q[FEW], of_q[FEW], of_k[FEW], of_g[FEW];
#pragma unroll
        for (int j = 0; j < FEW; j++) {
            if (base - j < 0) break;
            const int64_t here = at.at(p, base - j);
            g[j] = at.gate(p, base - j);
            d[j] = p.scale * dc[at.row + (int64_t)(base - j) * p.heads];
            q[j] = to_float(p.q[here]);
            of_q[j] = to_float(dq[here]);
            of_k[j] = to_float(dk[here]);
            of_g[j] = dgates && p.per_channel ? dgates[here] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < FEW; j++) {
            const int i = base - j;
            if (i < 0) break;
            const int64_t here = at.at(p, i);
            u = fmaf(d[j], q[j], u);
            dq[here] = from_float<bf16>(fmaf(d[j], cells[i][threadIdx.x], of_q[j]));
            dk[here] = from_float<bf16>(of_k[j] + u);
            u *= expf(g[j]);
            const float of_gate = u * (i > 0 ? cells[i - 1][threadIdx.x] : start);
            if (dgates && p.per_channel) dgates[here] = of_g[j] + of_gate;
            cells[i][threadIdx.x] = of_gate;
        }
    }
    if (dgates && !p.per_channel) row_sums<K>(cells, at.rows, dgates + at.row, p.heads, 1.0f, true);
}

template <int K> int forward(const Problem& p, int batch, float* c, float* summary, cudaStream_t s) {
    const dim3 grid(p.chunks, p.heads, batch);
    ends<K, false><<<grid, K, 0, s>>>(p, nullptr, summary);
    starts<K, false><<<batch * p.heads, K, 0, s>>>(p.chunks, summary);
    count<K><<<grid, K, 0, s>>>(p, summary, c);
    return cudaGetLastError();
}

template <int K>
int backward(const Problem& p, int batch, const float* dc, const float* before, float* behind, bf16* dq, bf16* dk, float* dgates, cudaStream_t s) {
    const dim3 grid(p.chunks, p.heads, batch);
    ends<K, true><<<grid, K, 0, s>>>(p, dc, behind);
    starts<K, true><<<batch * p.heads, K, 0, s>>>(p.chunks, behind);
    grad<K><<<grid, K, 0, s>>>(p, before, behind, dc, dq, dk, dgates);
    return cudaGetLastError();
}

Problem problem(const void* q, const void* k, const float* gates, int time, int heads, int per_channel, float scale) {
    return {static_cast<const bf16*>(q), static_cast<const bf16*>(k), gates, time, heads, (time + ROWS - 1) / ROWS, per_channel != 0, scale};
}

bool supported(int batch, int time, int heads, int dim) {
    return batch > 0 && batch < 65536 && time > 0 && heads > 0 && heads < 65536 && (dim == 64 || dim == 128);
}

}  // namespace
}  // namespace margay

// Floats of the chunks' starts, which the forward leaves for the backward, and of the backward's own.
extern "C" size_t margay_gated_count_starts(int batch, int time, int heads, int dim) {
    return (size_t)batch * heads * ((time + margay::ROWS - 1) / margay::ROWS) * 2 * dim;
}

extern "C" int margay_gated_count(const void* q, const void* k, const float* gates, float* c, float* starts, int batch, int time, int heads,
                                  int dim, int per_channel, float scale, void* stream) {
    if (!margay::supported(batch, time, heads, dim)) return cudaErrorInvalidValue;
    const auto p = margay::problem(q, k, gates, time, heads, per_channel, scale);
    const auto s = static_cast<cudaStream_t>(stream);
    return dim == 64 ? margay::forward<64>(p, batch, c, starts, s) : margay::forward<128>(p, batch, c, starts, s);
}

// Adds to dq, dk and dgates; dgates may be null.
extern "C" int margay_gated_count_bwd(const void* q, const void* k, const float* gates, const float* dc, const float* starts, float* behind,
                                      void* dq, void* dk, float* dgates, int batch, int time, int heads, int dim, int per_channel, float scale,
                                      void* stream) {
    if (!margay::supported(batch, time, heads, dim)) return cudaErrorInvalidValue;
    const auto p = margay::problem(q, k, gates, time, heads, per_channel, scale);
    const auto s = static_cast<cudaStream_t>(stream);
    auto *to_q = static_cast<margay::bf16*>(dq), *to_k = static_cast<margay::bf16*>(dk);
    return dim == 64 ? margay::backward<64>(p, batch, dc, starts, behind, to_q, to_k, dgates, s)
                     : margay::backward<128>(p, batch, dc, starts, behind, to_q, to_k, dgates, s);
}
