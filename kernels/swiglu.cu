// silu(gate) * up with gate and up side by side: x [rows, 2 n] -> y [rows, n]; forward and backward.
//
// Memory-bound: 16-byte accesses, every element once.

#include "common.cuh"

namespace margay {
namespace {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

template <typename T, int N> __global__ void forward(T* y, const T* x, size_t count, int n) {
    using V = Vec<T, N>;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / (n / N), col = i % (n / N) * N;
        const V g = *reinterpret_cast<const V*>(x + row * 2 * n + col);
        const V u = *reinterpret_cast<const V*>(x + row * 2 * n + n + col);
        V o;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float a = to_float(g.at[j]);
            o.at[j] = from_float<T>(a * sigmoid(a) * to_float(u.at[j]));
        }
        *reinterpret_cast<V*>(y + row * n + col) = o;
    }
}

template <typename T, int N> __global__ void backward(T* dx, const T* x, const T* dy, size_t count, int n) {
    using V = Vec<T, N>;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / (n / N), col = i % (n / N) * N;
        const V g = *reinterpret_cast<const V*>(x + row * 2 * n + col);
        const V u = *reinterpret_cast<const V*>(x + row * 2 * n + n + col);
        const V d = *reinterpret_cast<const V*>(dy + row * n + col);
        V dg, du;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float a = to_float(g.at[j]), s = sigmoid(a), grad = to_float(d.at[j]);
            du.at[j] = from_float<T>(grad * a * s);
            dg.at[j] = from_float<T>(grad * to_float(u.at[j]) * s * (1.0f + a * (1.0f - s)));
        }
        *reinterpret_cast<V*>(dx + row * 2 * n + col) = dg;
        *reinterpret_cast<V*>(dx + row * 2 * n + n + col) = du;
    }
}

template <typename T, int N> int launch(T* y, const T* x, const T* dy, size_t rows, int n, cudaStream_t s) {
    const size_t count = rows * (n / N), blocks = (count + 255) / 256;
    const unsigned grid = blocks < (1u << 20) ? (unsigned)blocks : 1u << 20;
    if (dy == nullptr) forward<T, N><<<grid, 256, 0, s>>>(y, x, count, n);
    else backward<T, N><<<grid, 256, 0, s>>>(y, x, dy, count, n);
    return cudaGetLastError();
}

template <typename T> int run(void* y, const void* x, const void* dy, size_t rows, int n, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    T* out = static_cast<T*>(y);
    const T *in = static_cast<const T*>(x), *grad = static_cast<const T*>(dy);
    return n % N == 0 ? launch<T, N>(out, in, grad, rows, n, s) : launch<T, 1>(out, in, grad, rows, n, s);
}

}  // namespace
}  // namespace margay

// Forward where `dy` is null: y [rows, n] from x [rows, 2 n]. Else y is dx [rows, 2 n] from x and dy [rows, n].
// f32 (dtype 0) or bf16 (1).
extern "C" int margay_swiglu(void* y, const void* x, const void* dy, int rows, int n, int dtype, void* stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(y, x, dy, rows, n, s) : margay::run<float>(y, x, dy, rows, n, s);
}
