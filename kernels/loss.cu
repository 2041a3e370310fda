// scale: y = s x with a factor s that lies on the device: a gradient that is known but for the factor from above.
// mse:   weight mean((x - target)²) and its gradient by x, the sum in a fixed order.
//
// Memory-bound: 16-byte accesses, every element once.

#include "common.cuh"

namespace margay {
namespace {

template <typename T, int N> __global__ void scale(T* y, const T* x, const float* factor, size_t count) {
    using V = Vec<T, N>;
    const float s = *factor;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        const V v = reinterpret_cast<const V*>(x)[i];
        V o;
#pragma unroll
        for (int j = 0; j < N; j++) o.at[j] = from_float<T>(s * to_float(v.at[j]));
        reinterpret_cast<V*>(y)[i] = o;
    }
}

template <typename T> int run(void* y, const void* x, const float* factor, size_t count, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    T* out = static_cast<T*>(y);
    const T* in = static_cast<const T*>(x);
    const size_t units = count % N == 0 ? count / N : count, blocks = (units + 255) / 256;
    const unsigned grid = blocks < 8192 ? (unsigned)blocks : 8192;
    if (count % N == 0) scale<T, N><<<grid, 256, 0, s>>>(out, in, factor, units);
    else scale<T, 1><<<grid, 256, 0, s>>>(out, in, factor, units);
    return cudaGetLastError();
}

constexpr int MSE_BLOCKS = 1024;

template <typename T, int N>
__global__ void __launch_bounds__(256) mse_parts(float* parts, T* grad, const T* x, const T* target, float slope, size_t count) {
    using V = Vec<T, N>;
    __shared__ float shared[32];
    float sum = 0.0f;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        const V a = reinterpret_cast<const V*>(x)[i], b = reinterpret_cast<const V*>(target)[i];
        V g;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float d = to_float(a.at[j]) - to_float(b.at[j]);
            sum = fmaf(d, d, sum);
            g.at[j] = from_float<T>(slope * d);
        }
        reinterpret_cast<V*>(grad)[i] = g;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(256) mse_end(float* value, const float* parts, int count, float factor) {
    __shared__ float shared[32];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *value = factor * sum;
}

template <typename T>
int mse(float* value, void* grad, const void* x, const void* target, float* parts, float weight, size_t count, cudaStream_t s) {
    constexpr int N = 16 / sizeof(T);
    T* out = static_cast<T*>(grad);
    const T *a = static_cast<const T*>(x), *b = static_cast<const T*>(target);
    const float factor = weight / count;
    const size_t units = count % N == 0 ? count / N : count, wanted = (units + 255) / 256;
    const int blocks = wanted < MSE_BLOCKS ? (int)wanted : MSE_BLOCKS;
    if (count % N == 0) mse_parts<T, N><<<blocks, 256, 0, s>>>(parts, out, a, b, 2.0f * factor, units);
    else mse_parts<T, 1><<<blocks, 256, 0, s>>>(parts, out, a, b, 2.0f * factor, units);
    mse_end<<<1, 256, 0, s>>>(value, parts, blocks, factor);
    return cudaGetLastError();
}

}  // namespace
}  // namespace margay

// value [1] f32; grad, x, target [count] in f32 (dtype 0) or bf16 (1), aligned to 16 bytes; scratch of 1024 floats.
extern "C" int margay_mse(float* value, void* grad, const void* x, const void* target, void* scratch, float weight, size_t count,
                          int dtype, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    float* parts = static_cast<float*>(scratch);
    if (count == 0) return cudaErrorInvalidValue;
    return dtype == 1 ? margay::mse<margay::bf16>(value, grad, x, target, parts, weight, count, s)
                      : margay::mse<float>(value, grad, x, target, parts, weight, count, s);
}

// x, y [count] in f32 (dtype 0) or bf16 (1), both aligned to 16 bytes; factor [1] f32.
extern "C" int margay_scale(void* y, const void* x, const float* factor, size_t count, int dtype, void* stream) {
    if (count == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(y, x, factor, count, s)
                      : margay::run<float>(y, x, factor, count, s);
}
