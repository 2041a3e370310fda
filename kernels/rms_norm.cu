// RMSNorm, forward and backward: y = x r w with r = 1 / sqrt(mean(x²) + eps); w in the precision of x, or in f32.
//
// One block per row. A row is read twice and the second read comes from L1, so both directions move each element through
// device memory once. Sums are f32 in a fixed order.
//   dx = r (g w - x r² mean(g w x))

#include "common.cuh"

namespace margay {
namespace {

constexpr int THREADS = 256;

template <typename T, typename W, int N>
__global__ void __launch_bounds__(THREADS) forward(T* y, const T* x, const W* w, int n, float eps) {
    __shared__ float shared[32];
    using V = Vec<T, N>;
    const size_t row = (size_t)blockIdx.x * n;
    const V* in = reinterpret_cast<const V*>(x + row);
    const Vec<W, N>* scale = reinterpret_cast<const Vec<W, N>*>(w);
    V* out = reinterpret_cast<V*>(y + row);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i];
#pragma unroll
        for (int j = 0; j < N; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
    }
    const float r = rsqrtf(block_sum(sum, shared) / n + eps);
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i];
        const Vec<W, N> s = scale[i];
        V o;
#pragma unroll
        for (int j = 0; j < N; j++) o.at[j] = from_float<T>(to_float(v.at[j]) * r * to_float(s.at[j]));
        out[i] = o;
    }
}

template <typename T, typename W, int N>
__global__ void __launch_bounds__(THREADS) backward(T* dx, const T* x, const W* w, const T* g, int n, float eps) {
    __shared__ float shared[32];
    using V = Vec<T, N>;
    const size_t row = (size_t)blockIdx.x * n;
    const V* in = reinterpret_cast<const V*>(x + row);
    const V* grad = reinterpret_cast<const V*>(g + row);
    const Vec<W, N>* scale = reinterpret_cast<const Vec<W, N>*>(w);
    V* out = reinterpret_cast<V*>(dx + row);
    float squares = 0.0f, mixed = 0.0f;
    for (int i = threadIdx.x; i < n / N; i += THREADS) {
        const V v = in[i], d = grad[i];
        const Vec<W, N> s = scale[i];
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
        const V v = in[i], d = grad[i];
        const Vec<W, N> s = scale[i];
        V o;
#pragma unroll
        for (int j = 0; j < N; j++)
            o.at[j] = from_float<T>(r * (to_float(d.at[j]) * to_float(s.at[j]) - to_float(v.at[j]) * mean));
        out[i] = o;
    }
}

template <typename T, typename W, int N>
int launch(void* y, const void* x, const void* w, const void* g, int rows, int n, float eps, cudaStream_t s) {
    T* out = static_cast<T*>(y);
    const T *in = static_cast<const T*>(x), *grad = static_cast<const T*>(g);
    const W* scale = static_cast<const W*>(w);
    if (g == nullptr) forward<T, W, N><<<rows, THREADS, 0, s>>>(out, in, scale, n, eps);
    else backward<T, W, N><<<rows, THREADS, 0, s>>>(out, in, scale, grad, n, eps);
    return cudaGetLastError();
}

template <typename T, typename W>
int run(void* y, const void* x, const void* w, const void* g, int rows, int n, float eps, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    return n % N == 0 ? launch<T, W, N>(y, x, w, g, rows, n, eps, s) : launch<T, W, 1>(y, x, w, g, rows, n, eps, s);
}

}  // namespace
}  // namespace margay

// x, y, dx, g [rows, n] in f32 (dtype 0) or bf16 (1), w [n] in f32 (w_dtype 0) or bf16 (1, where x is); `g` null runs the
// forward pass.
extern "C" int margay_rms_norm(void* y, const void* x, const void* w, const void* g, int rows, int n, float eps,
                               int dtype, int w_dtype, void* stream) {
    using margay::bf16;
    if (rows == 0 || n == 0) return cudaSuccess;
    if (w_dtype > dtype) return cudaErrorInvalidValue;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (dtype == 0) return margay::run<float, float>(y, x, w, g, rows, n, eps, s);
    return w_dtype == 1 ? margay::run<bf16, bf16>(y, x, w, g, rows, n, eps, s)
                        : margay::run<bf16, float>(y, x, w, g, rows, n, eps, s);
}
