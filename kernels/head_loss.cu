// Cross-entropy and KL against the teacher of a block of logit rows, value and gradient in one launch.
//
//   z [rows, V] student logits, replaced by their gradient; t [rows, V] teacher logits or null
//   grad = m_i per_row (ce (p - onehot) + kl (p - p'))      p = softmax z, p' = softmax t
//   stats [rows, 5] = m, m nll, m KL(p' || p), m [argmax z = argmax t], m nll'
//
// One block per row: a first pass keeps running maximum and sum of exponentials (and of e^t (t - z), which gives the KL),
// a second writes the gradient. The second pass finds the row in L2. Reductions have a fixed order.

#include "common.cuh"

namespace margay {
namespace {

constexpr int THREADS = 512;

// The smallest index among those that hold the maximum.
__device__ __forceinline__ int block_first(float value, int index, float top, float* shared) {
    // Indices below 2^24 are exact in f32; vocabularies are.
    return (int)-block_max(value == top ? -(float)index : -16777216.0f, shared);
}

template <typename T, int N, bool TAUGHT>
__global__ void __launch_bounds__(THREADS) head_loss(T* z, const T* t, const uint32_t* tokens, const float* mask,
                                                     float* stats, int vocab, float ce, float kl, float per_row,
                                                     bool gradient) {
    __shared__ float shared[32];
    using V = Vec<T, N>;
    const int row = blockIdx.x, count = vocab / N;
    const float m = mask == nullptr ? 1.0f : mask[row];
    const int token = (int)tokens[row];
    V* zs = reinterpret_cast<V*>(z + (size_t)row * vocab);
    const V* ts = reinterpret_cast<const V*>(t + (TAUGHT ? (size_t)row * vocab : 0));
    if (m == 0.0f) {
        if (threadIdx.x < 5) stats[row * 5 + threadIdx.x] = 0.0f;
        if (gradient)
            for (int i = threadIdx.x; i < count; i += THREADS) {
                V o;
#pragma unroll
                for (int j = 0; j < N; j++) o.at[j] = from_float<T>(0.0f);
                zs[i] = o;
            }
        return;
    }
    float top_z = -INFINITY, top_t = -INFINITY, at_token = -INFINITY, t_at_token = -INFINITY;
    int best_z = 0, best_t = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const V v = zs[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float x = to_float(v.at[j]);
            if (x > top_z) top_z = x, best_z = i * N + j;
            if (i * N + j == token) at_token = x;
        }
        if (TAUGHT) {
            const V u = ts[i];
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float x = to_float(u.at[j]);
                if (x > top_t) top_t = x, best_t = i * N + j;
                if (i * N + j == token) t_at_token = x;
            }
        }
    }
    const float max_z = block_max(top_z, shared);
    const float max_t = TAUGHT ? block_max(top_t, shared) : 0.0f;
    at_token = block_max(at_token, shared);
    if (TAUGHT) t_at_token = block_max(t_at_token, shared);
    float agree = 0.0f;
    if (TAUGHT)
        agree = block_first(top_z, best_z, max_z, shared) == block_first(top_t, best_t, max_t, shared) ? 1.0f : 0.0f;

    float sum_z = 0.0f, sum_t = 0.0f, cross = 0.0f;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const V v = zs[i];
        V u;
        if (TAUGHT) u = ts[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float x = to_float(v.at[j]);
            sum_z += __expf(x - max_z);
            if (TAUGHT) {
                const float y = to_float(u.at[j]), e = __expf(y - max_t);
                sum_t += e;
                cross += e * (y - x);
            }
        }
    }
    sum_z = block_sum(sum_z, shared);
    const float log_z = logf(sum_z) + max_z;
    float log_t = 0.0f;
    if (TAUGHT) {
        sum_t = block_sum(sum_t, shared);
        cross = block_sum(cross, shared);
        log_t = logf(sum_t) + max_t;
    }
    if (threadIdx.x == 0) {
        float* s = stats + (size_t)row * 5;
        s[0] = m;
        s[1] = m * (log_z - at_token);
        s[2] = TAUGHT ? m * (cross / sum_t - log_t + log_z) : 0.0f;
        s[3] = m * agree;
        s[4] = TAUGHT ? m * (log_t - t_at_token) : 0.0f;
    }
    if (!gradient) return;
    const float from_z = m * per_row * (ce + (TAUGHT ? kl : 0.0f)) / sum_z;
    const float from_t = TAUGHT ? m * per_row * kl / sum_t : 0.0f, hot = m * per_row * ce;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const V v = zs[i];
        V u, o;
        if (TAUGHT) u = ts[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            float g = from_z * __expf(to_float(v.at[j]) - max_z);
            if (TAUGHT) g -= from_t * __expf(to_float(u.at[j]) - max_t);
            if (i * N + j == token) g -= hot;
            o.at[j] = from_float<T>(g);
        }
        zs[i] = o;
    }
}

template <typename T, int N>
int launch(T* z, const T* t, const uint32_t* tokens, const float* mask, float* stats, int rows, int vocab, float ce,
           float kl, float per_row, bool gradient, cudaStream_t s) {
    if (t == nullptr)
        head_loss<T, N, false>
            <<<rows, THREADS, 0, s>>>(z, t, tokens, mask, stats, vocab, ce, kl, per_row, gradient);
    else
        head_loss<T, N, true><<<rows, THREADS, 0, s>>>(z, t, tokens, mask, stats, vocab, ce, kl, per_row, gradient);
    return cudaGetLastError();
}

template <typename T>
int run(void* z, const void* t, const uint32_t* tokens, const float* mask, float* stats, int rows, int vocab, float ce,
        float kl, float per_row, bool gradient, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    T* student = static_cast<T*>(z);
    const T* teacher = static_cast<const T*>(t);
    return vocab % N == 0
               ? launch<T, N>(student, teacher, tokens, mask, stats, rows, vocab, ce, kl, per_row, gradient, s)
               : launch<T, 1>(student, teacher, tokens, mask, stats, rows, vocab, ce, kl, per_row, gradient, s);
}

}  // namespace
}  // namespace margay

// z, t [rows, vocab] in f32 (dtype 0) or bf16 (1), tokens [rows] u32 below vocab, mask [rows] f32 or null, stats
// [rows, 5] f32. z becomes its gradient where `gradient` is not 0.
extern "C" int margay_head_loss(void* z, const void* t, const void* tokens, const float* mask, float* stats, int rows,
                                int vocab, float ce, float kl, float per_row, int gradient, int dtype, void* stream) {
    if (rows == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const uint32_t* ids = static_cast<const uint32_t*>(tokens);
    return dtype == 1 ? margay::run<margay::bf16>(z, t, ids, mask, stats, rows, vocab, ce, kl, per_row, gradient, s)
                      : margay::run<float>(z, t, ids, mask, stats, rows, vocab, ce, kl, per_row, gradient, s);
}
