// RMSNorm, forward and backward: y = x r w with r = 1 / sqrt(mean(x²) + eps).
//
// One block per row. A row is read twice and the second read comes from L1, so both directions move each element through
// device memory once. Sums are f32 in a fixed order.
//   dx = r (g w - x r² mean(g w x))

#include "common.cuh"

namespace margay {
namespace {

constexpr int THREADS = 256;

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) forward(T* y, const T* x, const T* w, int n, float eps) {
    __shared__ float shared[32];
    using V = Vec<T, N>;
    const size_t row = (size_t)blockIdx.x * n;
    const V* in = reinterpret_cast<const V*>(x + row);
    const V* scale = reinterpret_cast<const V*>(w);
    V* out = reinterpret_cast<V*>(y + row);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i];
#pragma unroll
        for (int j = 0; j < N; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
    }
    const float r = rsqrtf(block_sum(sum, shared) / n + eps);
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i], s = scale[i];
        V o;
#pragma unroll
        for (int j = 0; j < N; j++) o.at[j] = from_float<T>(to_float(v.at[j]) * r * to_float(s.at[j]));
        out[i] = o;
    }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) backward(T* dx, const T* x, const T* w, const T* g, int n, float eps) {
    __shared__ float shared[32];
    using V = Vec<T, N>;
    const size_t row = (size_t)blockIdx.x * n;
    const V* in = reinterpret_cast<const V*>(x + row);
    const V* grad = reinterpret_cast<const V*>(g + row);
    const V* scale = reinterpret_cast<const V*>(w);
    V* out = reinterpret_cast<V*>(dx + row);
    float squares = 0.0f, mixed = 0.0f;
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i], d = grad[i], s = scale[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float a = to_float(v.at[j]);
            squares += a * a;
            mixed += a * to_float(d.at[j]) * to_float(s.at[j]);
        }
    }
    const float r = rsqrtf(block_sum(squares, shared) / n + eps);
    const float mean = block_sum(mixed, shared) / n * r * r;
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i], d = grad[i], s = scale[i];
        V o;
#pragma unroll
        for (int j = 0; j < N; j++)
            o.at[j] = from_float<T>(r * (to_float(d.at[j]) * to_float(s.at[j]) - to_float(v.at[j]) * mean));
        out[i] = o;
    }
}

template <typename T> int run(void* y, const void* x, const void* w, const void* g, int rows, int n, float eps, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    T* out = static_cast<T*>(y);
    const T *in = static_cast<const T*>(x), *scale = static_cast<const T*>(w), *grad = static_cast<const T*>(g);
    const bool wide = n % N == 0;
    if (g == nullptr) {
        if (wide) forward<T, N><<<rows, THREADS, 0, s>>>(out, in, scale, n, eps);
        else forward<T, 1><<<rows, THREADS, 0, s>>>(out, in, scale, n, eps);
    } else {
        if (wide) backward<T, N><<<rows, THREADS, 0, s>>>(out, in, scale, grad, n, eps);
        else backward<T, 1><<<rows, THREADS, 0, s>>>(out, in, scale, grad, n, eps);
    }
    return cudaGetLastError();
}

}  // namespace
}  // namespace margay

// x, y, dx, g [rows, n] and w [n] in f32 (dtype 0) or bf16 (1); `g` null runs the forward pass.
extern "C" int margay_rms_norm(void* y, const void* x, const void* w, const void* g, int rows, int n, float eps,
                               int dtype, void* stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(y, x, w, g, rows, n, eps, s)
                      : margay::run<float>(y, x, w, g, rows, n, eps, s);
}
