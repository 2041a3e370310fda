// RMSNorm of the queries and keys among packed heads x [rows, heads, D], each over its own D channels; other heads are
// copied. Forward and backward, with the formulas of rms_norm.cu.
//
// One warp per head of a row, four channels a lane at a time; sums are f32 in a fixed order.

#include "common.cuh"

namespace margay {
namespace {

constexpr int THREADS = 256, N = 4;

// `w` is [2, D]: the scale of queries, then of keys.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    heads_of(T* y, const T* x, const float* w, const T* g, size_t count, int heads, int queries, int keys, int dim, float eps) {
    using V = Vec<T, N>;
    const size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP, cells = dim / N;
    if (at >= count) return;
    const int head = (int)(at % heads);
    const V* in = reinterpret_cast<const V*>(x + at * dim);
    const V* grad = reinterpret_cast<const V*>(g + at * dim);
    V* out = reinterpret_cast<V*>(y + at * dim);
    if (head >= queries + keys) {
        for (int i = lane; i < cells; i += WARP) out[i] = g == nullptr ? in[i] : grad[i];
        return;
    }
    const Vec<float, N>* scale = reinterpret_cast<const Vec<float, N>*>(w + (head < queries ? 0 : dim));
    float squares = 0.0f, mixed = 0.0f;
    for (int i = lane; i < cells; i += WARP) {
        const V v = in[i];
#pragma unroll
        for (int j = 0; j < N; j++) squares += to_float(v.at[j]) * to_float(v.at[j]);
        if (g == nullptr) continue;
        const V d = grad[i];
        const Vec<float, N> s = scale[i];
#pragma unroll
        for (int j = 0; j < N; j++) mixed += to_float(v.at[j]) * to_float(d.at[j]) * s.at[j];
    }
    const float r = rsqrtf(warp_sum(squares) / dim + eps);
    const float mean = warp_sum(mixed) / dim * r * r;
    for (int i = lane; i < cells; i += WARP) {
        const V v = in[i];
        const Vec<float, N> s = scale[i];
        V o;
        if (g == nullptr) {
#pragma unroll
            for (int j = 0; j < N; j++) o.at[j] = from_float<T>(to_float(v.at[j]) * r * s.at[j]);
        } else {
            const V d = grad[i];
#pragma unroll
            for (int j = 0; j < N; j++) o.at[j] = from_float<T>(r * (to_float(d.at[j]) * s.at[j] - to_float(v.at[j]) * mean));
        }
        out[i] = o;
    }
}

template <typename T>
int run(void* y, const void* x, const float* w, const void* g, size_t count, int heads, int queries, int keys, int dim,
        float eps, cudaStream_t s) {
    const size_t blocks = (count * WARP + THREADS - 1) / THREADS;
    heads_of<T><<<(unsigned)blocks, THREADS, 0, s>>>(static_cast<T*>(y), static_cast<const T*>(x), w,
                                                     static_cast<const T*>(g), count, heads, queries, keys, dim, eps);
    return cudaGetLastError();
}

}  // namespace
}  // namespace margay

// x, y, dx, g [rows, heads, dim] in f32 (dtype 0) or bf16 (1), w [2, dim] in f32; `g` null runs the forward pass. `dim` must
// be a multiple of 4.
extern "C" int margay_head_norm(void* y, const void* x, const void* w, const void* g, int rows, int heads, int queries,
                                int keys, int dim, float eps, int dtype, void* stream) {
    if (dim % margay::N != 0) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const float* scale = static_cast<const float*>(w);
    const size_t count = (size_t)rows * heads;
    return dtype == 1 ? margay::run<margay::bf16>(y, x, scale, g, count, heads, queries, keys, dim, eps, s)
                      : margay::run<float>(y, x, scale, g, count, heads, queries, keys, dim, eps, s);
}
