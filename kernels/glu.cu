// act(gate) * up with gate and up side by side: x [rows, 2 n] -> y [rows, n]; forward and backward.
//
// Memory-bound: 16-byte accesses, every element once.

#include "common.cuh"

namespace margay {
namespace {

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

// The activation's value and derivative.
template <Activation A> __device__ __forceinline__ float2 activate(float x) {
    if (A == SILU) {
        const float s = 1.0f / (1.0f + __expf(-x));
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    if (A == GELU) {
        const float p = 0.5f * (1.0f + erff(x * 0.70710678f));
        return {x * p, p + x * 0.39894228f * __expf(-0.5f * x * x)};
    }
    const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
    return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x)};
}

template <Activation A, typename T, int N> __global__ void forward(T* y, const T* x, size_t count, int n) {
    using V = Vec<T, N>;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / (n / N), col = i % (n / N) * N;
        const V g = *reinterpret_cast<const V*>(x + row * 2 * n + col);
        const V u = *reinterpret_cast<const V*>(x + row * 2 * n + n + col);
        V o;
#pragma unroll
        for (int j = 0; j < N; j++) {
            o.at[j] = from_float<T>(activate<A>(to_float(g.at[j])).x * to_float(u.at[j]));
        }
        *reinterpret_cast<V*>(y + row * n + col) = o;
    }
}

template <Activation A, typename T, int N> __global__ void backward(T* dx, const T* x, const T* dy, size_t count, int n) {
    using V = Vec<T, N>;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / (n / N), col = i % (n / N) * N;
        const V g = *reinterpret_cast<const V*>(x + row * 2 * n + col);
        const V u = *reinterpret_cast<const V*>(x + row * 2 * n + n + col);
        const V d = *reinterpret_cast<const V*>(dy + row * n + col);
        V dg, du;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float2 a = activate<A>(to_float(g.at[j]));
            const float grad = to_float(d.at[j]);
            du.at[j] = from_float<T>(grad * a.x);
            dg.at[j] = from_float<T>(grad * to_float(u.at[j]) * a.y);
        }
        *reinterpret_cast<V*>(dx + row * 2 * n + col) = dg;
        *reinterpret_cast<V*>(dx + row * 2 * n + n + col) = du;
    }
}

template <Activation A, typename T, int N> int launch(T* y, const T* x, const T* dy, size_t rows, int n, cudaStream_t s) {
    const size_t count = rows * (n / N), blocks = (count + 255) / 256;
    const unsigned grid = blocks < (1u << 20) ? (unsigned)blocks : 1u << 20;
    if (dy == nullptr) forward<A, T, N><<<grid, 256, 0, s>>>(y, x, count, n);
    else backward<A, T, N><<<grid, 256, 0, s>>>(y, x, dy, count, n);
    return cudaGetLastError();
}

template <Activation A, typename T> int wide(T* y, const T* x, const T* dy, size_t rows, int n, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    return n % N == 0 ? launch<A, T, N>(y, x, dy, rows, n, s) : launch<A, T, 1>(y, x, dy, rows, n, s);
}

template <typename T> int run(void* y, const void* x, const void* dy, size_t rows, int n, int activation, cudaStream_t s) {
    T* out = static_cast<T*>(y);
    const T *in = static_cast<const T*>(x), *grad = static_cast<const T*>(dy);
    switch (activation) {
        case SILU: return wide<SILU>(out, in, grad, rows, n, s);
        case GELU: return wide<GELU>(out, in, grad, rows, n, s);
        case GELU_TANH: return wide<GELU_TANH>(out, in, grad, rows, n, s);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace margay

// Forward where `dy` is null: y [rows, n] from x [rows, 2 n]. Else y is dx [rows, 2 n] from x and dy [rows, n].
// f32 (dtype 0) or bf16 (1); the gate goes through SiLU (activation 0), GELU (1) or GELU by tanh (2).
extern "C" int margay_glu(void* y, const void* x, const void* dy, int rows, int n, int activation, int dtype, void* stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(y, x, dy, rows, n, activation, s)
                      : margay::run<float>(y, x, dy, rows, n, activation, s);
}
