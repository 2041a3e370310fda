// Rotary position embedding in the half-split layout over packed heads x [rows, heads, D]; rows run over batch and time.
//
// The first `rotated` heads turn by the angle of the row's position (`sign` -1 turns back: the gradient), the others are
// copied. One thread turns the same few pairs of every head it visits, so each element moves through memory once.

#include "common.cuh"

namespace margay {
namespace {

template <typename T>
__global__ void turn(T* y, const T* x, const float* cos, const float* sin, size_t pairs, int time, int heads, int half,
                     int rotated, float sign) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < pairs; i += (size_t)gridDim.x * blockDim.x) {
        // Two neighbouring pairs per thread: 4-byte accesses in bf16.
        const int d = (int)(i % (half / 2)) * 2;
        const size_t head_row = i / (half / 2);
        const int head = (int)(head_row % heads);
        const int t = (int)((head_row / heads) % time);
        const size_t at = head_row * 2 * half + d;
        float a0 = to_float(x[at]), a1 = to_float(x[at + 1]);
        float b0 = to_float(x[at + half]), b1 = to_float(x[at + half + 1]);
        if (head < rotated) {
            const float2 c = *reinterpret_cast<const float2*>(cos + (size_t)t * half + d);
            float2 s = *reinterpret_cast<const float2*>(sin + (size_t)t * half + d);
            s.x *= sign, s.y *= sign;
            const float u0 = a0 * c.x - b0 * s.x, u1 = a1 * c.y - b1 * s.y;
            b0 = b0 * c.x + a0 * s.x, b1 = b1 * c.y + a1 * s.y;
            a0 = u0, a1 = u1;
        }
        y[at] = from_float<T>(a0), y[at + 1] = from_float<T>(a1);
        y[at + half] = from_float<T>(b0), y[at + half + 1] = from_float<T>(b1);
    }
}

template <typename T>
int run(void* y, const void* x, const float* cos, const float* sin, int rows, int time, int heads, int dim, int rotated,
        float sign, cudaStream_t s) {
    const size_t pairs = (size_t)rows * heads * (dim / 4);
    const size_t blocks = (pairs + 255) / 256;
    turn<T><<<blocks < (1u << 20) ? (unsigned)blocks : 1u << 20, 256, 0, s>>>(
        static_cast<T*>(y), static_cast<const T*>(x), cos, sin, pairs, time, heads, dim / 2, rotated, sign);
    return cudaGetLastError();
}

}  // namespace
}  // namespace margay

// x, y [rows, heads, dim] in f32 (dtype 0) or bf16 (1), cos and sin [time, dim / 2] f32; row r has position r % time.
// `dim` must be a multiple of 4.
extern "C" int margay_rope(void* y, const void* x, const float* cos, const float* sin, int rows, int time, int heads,
                           int dim, int rotated, float sign, int dtype, void* stream) {
    if (dim % 4 != 0) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    return dtype == 1 ? margay::run<margay::bf16>(y, x, cos, sin, rows, time, heads, dim, rotated, sign, s)
                      : margay::run<float>(y, x, cos, sin, rows, time, heads, dim, rotated, sign, s);
}
