// y = s x with a factor s that lies on the device: a gradient that is known but for the factor from above.
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

}  // namespace
}  // namespace margay

// x, y [count] in f32 (dtype 0) or bf16 (1), both aligned to 16 bytes; factor [1] f32.
extern "C" int margay_scale(void* y, const void* x, const float* factor, size_t count, int dtype, void* stream) {
    if (count == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(y, x, factor, count, s)
                      : margay::run<float>(y, x, factor, count, s);
}
