// What a softmax window and a linear branch weigh under one denominator, per row and head; forward and backward.
//
//   c = max(top, max_n t_n)      M = e^{top - c} mass      S = Σ_n e^{t_n - c}      σ = sigmoid(f)      λ = 1 or 1 - σ
//   N = σ (M + S) + λ count      w = σ M / N      l = λ / N
//
// top, mass, count [rows, H]; factors f [H]; sinks t [m], one for all heads, m = 0: none; result [rows, 2, H]; all f32.
// The shift's gradient goes to what it was taken from: top, or the largest sink.

#include "columns.cuh"

namespace margay {
namespace {

struct Cell {
    float mass, sunk, sigma, lambda, den, shift;  // M, S, σ, λ, N, c
};

__device__ __forceinline__ Cell cell(float top, float mass, float count, float factor, const float* sinks, int m, bool affine) {
    Cell s;
    s.shift = top;
    for (int n = 0; n < m; n++) s.shift = fmaxf(s.shift, sinks[n]);
    s.mass = m == 0 ? mass : expf(top - s.shift) * mass;
    s.sunk = 0.0f;
    for (int n = 0; n < m; n++) s.sunk += expf(sinks[n] - s.shift);
    s.sigma = 1.0f / (1.0f + expf(-factor));
    s.lambda = affine ? 1.0f / (1.0f + expf(factor)) : 1.0f;
    s.den = s.sigma * (s.mass + s.sunk) + s.lambda * count;
    return s;
}

__global__ void forward(float* shares, const float* top, const float* mass, const float* count, const float* factors,
                        const float* sinks, int m, bool affine, int rows, int heads) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / heads, head = i % heads;
    if (row >= rows) return;
    const Cell s = cell(top[i], mass[i], count[i], factors[head], sinks, m, affine);
    shares[(size_t)row * 2 * heads + head] = s.sigma * s.mass / s.den;
    shares[((size_t)row * 2 + 1) * heads + head] = s.lambda / s.den;
}

// dfactors [rows, H], dsinks [rows, H, m].
__global__ void backward(float* dtop, float* dmass, float* dcount, float* dfactors, float* dsinks, const float* grad, const float* top,
                         const float* mass, const float* count, const float* factors, const float* sinks, int m, bool affine, int rows,
                         int heads) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / heads, head = i % heads;
    if (row >= rows) return;
    const Cell s = cell(top[i], mass[i], count[i], factors[head], sinks, m, affine);
    const float dw = grad[(size_t)row * 2 * heads + head], dl = grad[((size_t)row * 2 + 1) * heads + head];
    const float w = s.sigma * s.mass / s.den, l = s.lambda / s.den;
    const float dden = -(dw * w + dl * l) / s.den;
    float dsigma = dw * s.mass / s.den + dden * (s.mass + s.sunk);
    if (affine) dsigma -= dl / s.den + dden * count[i];
    const float d_mass = s.sigma * (dw / s.den + dden), dsunk = s.sigma * dden;
    dcount[i] = dden * s.lambda;
    dfactors[i] = dsigma * s.sigma / (1.0f + expf(factors[head]));
    if (m == 0) {
        dmass[i] = d_mass;
        dtop[i] = 0.0f;
        return;
    }
    dmass[i] = d_mass * expf(top[i] - s.shift);
    float dshift = -d_mass * s.mass - dsunk * s.sunk, highest = -INFINITY;
    for (int n = 0; n < m; n++) highest = fmaxf(highest, sinks[n]);
    const float of_top = top[i] > highest ? 1.0f : top[i] < highest ? 0.0f : 0.5f;
    dtop[i] = d_mass * s.mass + of_top * dshift;
    for (int n = 0; n < m; n++) {
        const float own = sinks[n] == highest ? (1.0f - of_top) * dshift : 0.0f;
        dsinks[(size_t)i * m + n] = dsunk * expf(sinks[n] - s.shift) + own;
    }
}

unsigned blocks(int rows, int heads) { return (unsigned)(((size_t)rows * heads + 255) / 256); }

bool fits(int rows, int heads) { return rows > 0 && heads > 0 && (size_t)rows * heads < (1ull << 30); }

}  // namespace
}  // namespace margay

extern "C" int margay_shares(float* shares, const float* top, const float* mass, const float* count, const float* factors,
                             const float* sinks, int m, int affine, int rows, int heads, void* stream) {
    if (!margay::fits(rows, heads)) return cudaErrorInvalidValue;
    margay::forward<<<margay::blocks(rows, heads), 256, 0, static_cast<cudaStream_t>(stream)>>>(shares, top, mass, count, factors, sinks,
                                                                                              m, affine != 0, rows, heads);
    return cudaGetLastError();
}

// Bytes the backward needs beside its results.
extern "C" size_t margay_shares_scratch(int rows, int heads, int m) {
    return (size_t)rows * heads * (1 + m) * sizeof(float) + margay::column_scratch((size_t)heads * (m > 1 ? m : 1));
}

// dtop, dmass, dcount [rows, H], dfactors [H], dsinks [H, m]: what each head gives the sinks; null without sinks.
extern "C" int margay_shares_bwd(float* dtop, float* dmass, float* dcount, float* dfactors, float* dsinks, void* scratch,
                                 const float* grad, const float* top, const float* mass, const float* count, const float* factors,
                                 const float* sinks, int m, int affine, int rows, int heads, void* stream) {
    if (!margay::fits(rows, heads)) return cudaErrorInvalidValue;
    const auto s = static_cast<cudaStream_t>(stream);
    const size_t cells = (size_t)rows * heads;
    float *of_factors = static_cast<float*>(scratch), *of_sinks = of_factors + cells, *sums = of_sinks + cells * m;
    margay::backward<<<margay::blocks(rows, heads), 256, 0, s>>>(dtop, dmass, dcount, of_factors, of_sinks, grad, top, mass, count, factors,
                                                               sinks, m, affine != 0, rows, heads);
    int e = margay::sum_columns(dfactors, of_factors, sums, rows, heads, s);
    if (e == cudaSuccess && m > 0) e = margay::sum_columns(dsinks, of_sinks, sums, rows, heads * m, s);
    return e;
}
