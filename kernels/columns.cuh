// Sums over the rows of f32 [rows, columns], in a fixed order: what gradients of parameters per head or channel end in.
#pragma once

#include "common.cuh"

namespace margay {

constexpr int STRETCHES = 64;  // parts that the rows are summed in first

// Bytes of scratch for `columns` sums.
inline size_t column_scratch(size_t columns) { return STRETCHES * columns * sizeof(float); }

// 32 columns and one stretch of rows a block; each of its eight warps takes every eighth row.
static __global__ void column_parts(float* parts, const float* x, size_t rows, int columns) {
    __shared__ float shared[8][WARP];
    const int column = blockIdx.x * WARP + threadIdx.x;
    const size_t stretch = (rows + STRETCHES - 1) / STRETCHES, first = blockIdx.y * stretch;
    const size_t last = first + stretch < rows ? first + stretch : rows;
    float sum = 0.0f;
    if (column < columns)
        for (size_t row = first + threadIdx.y; row < last; row += 8) sum += x[row * columns + column];
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        for (int i = 1; i < 8; i++) sum += shared[i][threadIdx.x];
        parts[(size_t)blockIdx.y * columns + column] = sum;
    }
}

static __global__ void column_ends(float* sums, const float* parts, int columns) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = 0.0f;
    for (int i = 0; i < STRETCHES; i++) sum += parts[(size_t)i * columns + column];
    sums[column] = sum;
}

// sums [columns] of x [rows, columns]; `scratch` as large as column_scratch says.
static inline cudaError_t sum_columns(float* sums, const float* x, void* scratch, size_t rows, int columns, cudaStream_t s) {
    float* parts = static_cast<float*>(scratch);
    column_parts<<<dim3((columns + WARP - 1) / WARP, STRETCHES), dim3(WARP, 8), 0, s>>>(parts, x, rows, columns);
    column_ends<<<(columns + 255) / 256, 256, 0, s>>>(sums, parts, columns);
    return cudaGetLastError();
}

}  // namespace margay
