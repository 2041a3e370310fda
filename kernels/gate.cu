// Gates: y = s f(x + b) of logits x [rows, G, W], bias b and factor s one per channel of G W, each of the G groups written
// for the `group` heads that share it: y [rows, G group, W] in f32; forward and backward.
//
//   f   log σ(z) | ln(1 + e^z) | σ(z) | z σ(z)
//   dz = s f'(z) Σ dy over the heads of the group      db = Σ dz, ds = Σ f(z) Σ dy over the rows
//
// Memory-bound: every element once, 16 bytes of the results at a time.

#include "columns.cuh"

namespace margay {
namespace {

enum Curve { LOG_SIGMOID, SOFTPLUS, SIGMOID, SILU };

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }
__device__ __forceinline__ float softplus(float z) { return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))); }

__device__ __forceinline__ float value(int curve, float z) {
    switch (curve) {
        case LOG_SIGMOID: return -softplus(-z);
        case SOFTPLUS: return softplus(z);
        case SIGMOID: return sigmoid(z);
        default: return z * sigmoid(z);
    }
}

__device__ __forceinline__ float slope(int curve, float z) {
    const float s = sigmoid(z);
    switch (curve) {
        case LOG_SIGMOID: return sigmoid(-z);
        case SOFTPLUS: return s;
        case SIGMOID: return s * sigmoid(-z);
        default: return s * (1.0f + z * sigmoid(-z));
    }
}

struct Shape {
    uint32_t rows, groups, width, group;
    int curve;
    float scale;  // of every channel, beside its own factor
};

// bias, factor [G W] may be null.
template <typename T, int N> __global__ void forward(Shape p, float* y, const T* x, const float* bias, const float* factor) {
    const uint32_t units = p.width / N, count = p.rows * p.groups * units;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const uint32_t cell = i / units, at = i % units * N, channel = cell % p.groups * p.width + at;
        const Vec<T, N> v = reinterpret_cast<const Vec<T, N>*>(x)[i];
        Vec<float, N> o;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float z = to_float(v.at[j]) + (bias ? bias[channel + j] : 0.0f);
            o.at[j] = p.scale * (factor ? factor[channel + j] : 1.0f) * value(p.curve, z);
        }
        for (uint32_t h = 0; h < p.group; h++)
            *reinterpret_cast<Vec<float, N>*>(y + ((size_t)cell * p.group + h) * p.width + at) = o;
    }
}

// dz [rows, G W] and, where not null, the summands of ds.
template <typename T, int N>
__global__ void backward(Shape p, float* dz, float* ds, const T* x, const float* bias, const float* factor, const float* dy) {
    const uint32_t units = p.width / N, count = p.rows * p.groups * units;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const uint32_t cell = i / units, at = i % units * N, channel = cell % p.groups * p.width + at;
        const Vec<T, N> v = reinterpret_cast<const Vec<T, N>*>(x)[i];
        Vec<float, N> sum = {}, of_factor;
        for (uint32_t h = 0; h < p.group; h++) {
            const Vec<float, N> g = *reinterpret_cast<const Vec<float, N>*>(dy + ((size_t)cell * p.group + h) * p.width + at);
#pragma unroll
            for (int j = 0; j < N; j++) sum.at[j] += g.at[j];
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float z = to_float(v.at[j]) + (bias ? bias[channel + j] : 0.0f);
            of_factor.at[j] = p.scale * value(p.curve, z) * sum.at[j];
            sum.at[j] *= p.scale * (factor ? factor[channel + j] : 1.0f) * slope(p.curve, z);
        }
        reinterpret_cast<Vec<float, N>*>(dz)[i] = sum;
        if (ds) reinterpret_cast<Vec<float, N>*>(ds)[i] = of_factor;
    }
}

unsigned blocks(const Shape& p, int n) {
    const size_t count = ((size_t)p.rows * p.groups * (p.width / n) + 255) / 256;
    return count < (1u << 16) ? (unsigned)count : 1u << 16;
}

template <typename T>
int run(const Shape& p, float* y, const void* x, const float* bias, const float* factor, cudaStream_t s) {
    const T* in = static_cast<const T*>(x);
    if (p.width % 4 == 0) forward<T, 4><<<blocks(p, 4), 256, 0, s>>>(p, y, in, bias, factor);
    else forward<T, 1><<<blocks(p, 1), 256, 0, s>>>(p, y, in, bias, factor);
    return cudaGetLastError();
}

template <typename T>
int back(const Shape& p, float* dz, float* ds, const void* x, const float* bias, const float* factor, const float* dy, cudaStream_t s) {
    const T* in = static_cast<const T*>(x);
    if (p.width % 4 == 0) backward<T, 4><<<blocks(p, 4), 256, 0, s>>>(p, dz, ds, in, bias, factor, dy);
    else backward<T, 1><<<blocks(p, 1), 256, 0, s>>>(p, dz, ds, in, bias, factor, dy);
    return cudaGetLastError();
}

bool fits(int rows, int groups, int width) { return (size_t)rows * groups * width < (1ull << 31); }

}  // namespace
}  // namespace margay

// x in f32 (dtype 0) or bf16 (1), everything else f32; bias and factor may be null.
extern "C" int margay_gate(float* y, const void* x, const float* bias, const float* factor, int rows, int groups, int width, int group,
                           int curve, float scale, int dtype, void* stream) {
    if (rows == 0 || groups == 0 || width == 0) return cudaSuccess;
    if (!margay::fits(rows, groups, width)) return cudaErrorInvalidValue;
    const margay::Shape p = {(uint32_t)rows, (uint32_t)groups, (uint32_t)width, (uint32_t)group, curve, scale};
    const auto s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(p, y, x, bias, factor, s) : margay::run<float>(p, y, x, bias, factor, s);
}

// Bytes the backward needs beside its results.
extern "C" size_t margay_gate_scratch(int rows, int groups, int width) {
    const size_t channels = (size_t)groups * width;
    return rows * channels * sizeof(float) + margay::column_scratch(channels);
}

// dz [rows, G W]; dbias, dfactor [G W] may be null.
extern "C" int margay_gate_bwd(float* dz, float* dbias, float* dfactor, void* scratch, const void* x, const float* bias,
                               const float* factor, const float* dy, int rows, int groups, int width, int group, int curve, float scale,
                               int dtype, void* stream) {
    if (rows == 0 || groups == 0 || width == 0) return cudaSuccess;
    if (!margay::fits(rows, groups, width)) return cudaErrorInvalidValue;
    const margay::Shape p = {(uint32_t)rows, (uint32_t)groups, (uint32_t)width, (uint32_t)group, curve, scale};
    const auto s = static_cast<cudaStream_t>(stream);
    const int channels = groups * width;
    float *ds = static_cast<float*>(scratch), *sums = ds + (size_t)rows * channels;
    float* of_factor = dfactor ? ds : nullptr;
    int e = dtype == 1 ? margay::back<margay::bf16>(p, dz, of_factor, x, bias, factor, dy, s)
                       : margay::back<float>(p, dz, of_factor, x, bias, factor, dy, s);
    if (e == cudaSuccess && dbias) e = margay::sum_columns(dbias, dz, sums, rows, channels, s);
    if (e == cudaSuccess && dfactor) e = margay::sum_columns(dfactor, ds, sums, rows, channels, s);
    return e;
}
