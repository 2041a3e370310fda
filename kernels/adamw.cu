// AdamW over many f32 tensors in three launches, the norm and the clipping on the device.
//
//   1. sums of squares of every gradient, by fixed blocks of BLOCK elements
//   2. one block adds them per tensor, in order: squares [tensors], and the clip factor; where a sum is not finite the
//      update is refused and nothing changes
//   3. m, v and the weights, and the sums of squares of the new weights, which tell an exploded tensor
//
// The table holds one entry per tensor: addresses, element count, learning rate, first block.

#include "common.cuh"

namespace margay {
namespace {

constexpr int BLOCK = 4096, THREADS = 256;

struct Entry {
    float* weight;
    float* m;
    float* v;
    const float* gradient;
    uint64_t count;
    float rate;
    uint32_t first_block;
};

struct Scalars {
    float beta1, beta2, correct1, correct2, eps, decay, clip;
};

// The tensor that block `block` belongs to: the last whose first block is not after it.
__device__ __forceinline__ int owner(const Entry* table, int tensors, uint32_t block) {
    int low = 0, high = tensors - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table[middle].first_block <= block) low = middle;
        else high = middle - 1;
    }
    return low;
}

__global__ void __launch_bounds__(THREADS) squares_of_gradients(const Entry* table, int tensors, float* partial) {
    __shared__ float shared[32];
    const Entry e = table[owner(table, tensors, blockIdx.x)];
    const uint64_t from = (uint64_t)(blockIdx.x - e.first_block) * BLOCK;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < BLOCK && from + i < e.count; i += THREADS) {
        const float g = e.gradient[from + i];
        sum += g * g;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One thread per tensor adds its blocks in order; thread 0 adds the tensors.
__global__ void __launch_bounds__(1024) add_blocks(const Entry* table, int tensors, int blocks, const float* partial,
                                                   float* squares, float clip, float* shrink) {
    for (int n = threadIdx.x; n < tensors; n += blockDim.x) {
        const uint32_t end = n + 1 < tensors ? table[n + 1].first_block : blocks;
        double sum = 0.0;
        for (uint32_t b = table[n].first_block; b < end; b++) sum += partial[b];
        squares[n] = (float)sum;
    }
    __syncthreads();
    if (shrink != nullptr && threadIdx.x == 0) {
        double total = 0.0;
        for (int n = 0; n < tensors; n++) total += squares[n];
        const float norm = (float)sqrt(total);
        shrink[0] = !isfinite(norm) ? 0.0f : clip > 0.0f && norm > clip ? clip / norm : 1.0f;
    }
}

__global__ void __launch_bounds__(THREADS) update(const Entry* table, int tensors, Scalars s, const float* shrink,
                                                  float* partial) {
    __shared__ float shared[32];
    const Entry e = table[owner(table, tensors, blockIdx.x)];
    const uint64_t from = (uint64_t)(blockIdx.x - e.first_block) * BLOCK;
    const float scale = *shrink;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < BLOCK && from + i < e.count; i += THREADS) {
        const uint64_t at = from + i;
        float w = e.weight[at];
        if (scale > 0.0f) {
            const float g = e.gradient[at] * scale;
            const float m = s.beta1 * e.m[at] + (1.0f - s.beta1) * g;
            const float v = s.beta2 * e.v[at] + (1.0f - s.beta2) * g * g;
            e.m[at] = m;
            e.v[at] = v;
            w = w * (1.0f - e.rate * s.decay) - e.rate / s.correct1 * m / (sqrtf(v / s.correct2) + s.eps);
            e.weight[at] = w;
        }
        sum += w * w;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

}  // namespace
}  // namespace margay

// `table` holds `tensors` entries on the device, `blocks` blocks in all; `partial` [blocks] and `shrink` [1] are scratch;
// `gradients` and `weights` [tensors] receive sums of squares. Not finite: `shrink` is 0 and nothing else changes.
extern "C" int margay_adamw(const void* table, int tensors, int blocks, float* partial, float* shrink, float* gradients,
                            float* weights, float beta1, float beta2, float correct1, float correct2, float eps,
                            float decay, float clip, void* stream) {
    using namespace margay;
    if (tensors == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const Entry* entries = static_cast<const Entry*>(table);
    const Scalars scalars{beta1, beta2, correct1, correct2, eps, decay, clip};
    squares_of_gradients<<<blocks, THREADS, 0, s>>>(entries, tensors, partial);
    add_blocks<<<1, 1024, 0, s>>>(entries, tensors, blocks, partial, gradients, clip, shrink);
    update<<<blocks, THREADS, 0, s>>>(entries, tensors, scalars, shrink, partial);
    add_blocks<<<1, 1024, 0, s>>>(entries, tensors, blocks, partial, weights, 0.0f, nullptr);
    return cudaGetLastError();
}

// Elements per block of the table's `first_block`.
extern "C" int margay_adamw_block() { return margay::BLOCK; }
