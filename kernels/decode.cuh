// What the one-token kernels share: overlapping launches and the features of one row.
#pragma once

#include "common.cuh"

namespace margay {
namespace {

// Waits for the kernel before this one, and lets the next start.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

#ifndef CARVEOUT
#define CARVEOUT 100
#endif

template <typename... P, typename... A>
int start(void (*kernel)(P...), dim3 grid, int threads, size_t shared, bool overlap, cudaStream_t stream, A... args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        if (error != cudaSuccess) return error;
    }
    // All kernels divide the SM's memory alike: a change of the division would wait for the SM to run dry.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, CARVEOUT);
    if (error != cudaSuccess) return error;
    error = cudaLaunchKernelEx(&config, kernel, args...);
    return error != cudaSuccess ? error : cudaGetLastError();
}

constexpr int STEP = 512;       // threads of an attention block
constexpr float FLOOR = 1e-12f; // of features; also the smallest denominator

// Pre-activations of one map become features; one warp. Up to 32 * 8 columns, `COLS` of them where it is not 0.
template <int COLS, int PARTS>
__device__ __forceinline__ void activate(float* out, const float* parts, int part_count, int stride, const float* bias,
                                         int columns, int activation) {
    constexpr int EACH = COLS > 0 ? COLS / WARP : 8;
    const int lane = threadIdx.x % WARP, cols = COLS > 0 ? COLS : columns;
    float u[EACH];
    float top = -INFINITY, low = INFINITY;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = lane + WARP * i;
        if (COLS == 0 && c >= cols) continue;
        float z = bias == nullptr ? 0.0f : bias[c];
        if constexpr (PARTS > 0) {
#pragma unroll
            for (int n = 0; n < PARTS; n++) z += parts[n * stride + c];
        } else {
            for (int n = 0; n < part_count; n++) z += parts[n * stride + c];
        }
        u[i] = z;
        top = fmaxf(top, z), low = fminf(low, z);
    }
    if (activation == 2 || activation == 3) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int c = lane + WARP * i;
            if (COLS == 0 && c >= cols) continue;
            out[c] = activation == 2 ? fmaxf(u[i], 0.0f) : u[i] > 0.0f ? u[i] + 1.0f : __expf(u[i]);
        }
        return;
    }
    top = warp_max(top), low = -warp_max(-low);
    if (activation == 9) top = low = 0.0f;  // exponentials without a shift
    float up = 0.0f, down = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (COLS == 0 && lane + WARP * i >= cols) continue;
        up += __expf(u[i] - top), down += __expf(low - u[i]);
    }
    up = activation == 0 ? 1.0f / warp_sum(up) : 1.0f, down = activation == 0 ? 1.0f / warp_sum(down) : 1.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int c = lane + WARP * i;
        if (COLS == 0 && c >= cols) continue;
        out[c] = fmaxf(__expf(u[i] - top) * up, FLOOR), out[cols + c] = fmaxf(__expf(low - u[i]) * down, FLOOR);
    }
}

}  // namespace
}  // namespace margay
