//! What the CPU forms share: f32 slices of tensors, strided matrix views, one-thread products, a vectorisable `exp`.
//!
//! Work is split over threads by output (batch, head, row block) and every sum runs in a fixed order, so results do
//! not depend on the number of threads.

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// The elements of a contiguous f32 CPU storage.
pub fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        (CpuStorage::F32(_), None) => bail!("a fast op needs contiguous memory, got strides {:?}", layout.stride()),
        _ => bail!("a fast op needs f32, got {:?}", storage_dtype(storage)),
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor.
pub fn with<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => f(elements(cpu, layout)?),
        _ => bail!("a CPU op got a tensor on {:?}", tensor.device().location()),
    }
}

/// Compiles `f` for the widest vector instructions of this machine.
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// e^x to about 2 ulp, written so that loops over it become vector code; below -87.3 it gives about 1e-38.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 split in two so that n ln 2 is exact enough.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    let x = x.clamp(-87.3, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    f32::from_bits(y.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sums and extremes keep this many running values: they become vector code and have a fixed order.
const LANES: usize = 16;

/// Σ x_i.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    dot_with(x, x, |a, _| a)
}

/// y += scale x.
#[inline(always)]
pub fn add(y: &mut [f32], scale: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += scale * x);
}

/// Σ x_i y_i.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    dot_with(x, y, |a, b| a * b)
}

/// Σ f(x_i, y_i).
#[inline(always)]
pub fn dot_with(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| f(*a, *b)).sum();
    for (a, b) in xs.zip(ys) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// The largest element; -inf when empty.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    extreme(x, f32::NEG_INFINITY, |a, b| a > b)
}

/// The smallest element; inf when empty.
#[inline(always)]
pub fn min(x: &[f32]) -> f32 {
    extreme(x, f32::INFINITY, |a, b| a < b)
}

#[inline(always)]
fn extreme(x: &[f32], start: f32, beats: impl Fn(f32, f32) -> bool) -> f32 {
    let best = |m: f32, v: f32| if beats(v, m) { v } else { m };
    let mut lanes = [start; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(start, |m, v| best(m, *v));
    for a in chunks {
        for i in 0..LANES {
            lanes[i] = best(lanes[i], a[i]);
        }
    }
    lanes.iter().fold(tail, |m, v| best(m, *v))
}

/// A strided matrix inside a buffer: `rows` x `cols`, element (i, j) at `i * row + j * col`.
#[derive(Clone, Copy)]
pub struct Mat {
    data: *const f32,
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl Mat {
    /// Rows of `cols` adjacent elements, `row` apart, the first at `start`.
    pub fn new(data: &[f32], start: usize, rows: usize, cols: usize, row: usize) -> Mat {
        assert!(rows == 0 || cols == 0 || start + (rows - 1) * row + cols <= data.len(), "matrix outside its buffer");
        Mat { data: data[start.min(data.len())..].as_ptr(), rows, cols, row, col: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Mat {
        Mat { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }
}

/// A strided matrix that is written: rows of `cols` adjacent elements, `row` apart.
pub struct MatMut<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row: usize,
    lifetime: std::marker::PhantomData<&'a mut [f32]>,
}

impl<'a> MatMut<'a> {
    pub fn new(data: &'a mut [f32], start: usize, rows: usize, cols: usize, row: usize) -> Self {
        // SAFETY: the whole buffer is borrowed mutably for as long as the view lives.
        unsafe { Shared::new(data).mat(start, rows, cols, row) }
    }
}

/// The transpose of `a`, row after row.
pub fn transpose(a: Mat, out: &mut Vec<f32>) {
    const TILE: usize = 16;
    out.resize(a.rows * a.cols, 0.0);
    // SAFETY: the constructors bound every element of the view.
    let read = |i: usize, j: usize| unsafe { *a.data.add(i * a.row + j * a.col) };
    for i in (0..a.rows).step_by(TILE) {
        for j in (0..a.cols).step_by(TILE) {
            for j in j..a.cols.min(j + TILE) {
                let column = &mut out[j * a.rows..(j + 1) * a.rows];
                for (i, x) in column.iter_mut().enumerate().skip(i).take(TILE) {
                    *x = read(i, j);
                }
            }
        }
    }
}

thread_local! {
    static ROWS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out = out (where `keep`) + scale * a b`, on this thread.
pub fn gemm(out: MatMut, keep: bool, scale: f32, a: Mat, b: Mat) {
    if b.col == 1 {
        return product(out, keep, scale, a, b);
    }
    // The product wants adjacent rows of b; its own way of getting them takes longer than multiplying.
    ROWS.with_borrow_mut(|rows| {
        transpose(b.t(), rows);
        product(out, keep, scale, a, Mat::new(rows, 0, b.rows, b.cols, b.cols));
    });
}

fn product(out: MatMut, keep: bool, scale: f32, a: Mat, b: Mat) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    assert_eq!((out.rows, out.cols), (a.rows, b.cols), "outer dimensions");
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    // SAFETY: the views' constructors bound every element that is read or written; the buffers behind `a` and `b` are
    // borrowed by their callers, and `out` is exclusive, so it overlaps neither.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data,
            1,
            out.row as isize,
            keep,
            a.data,
            a.col as isize,
            a.row as isize,
            b.data,
            b.col as isize,
            b.row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A buffer that several threads fill, each its own elements.
pub struct Shared<'a> {
    data: *mut f32,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: memory is only handed out by the unsafe methods, whose callers promise disjoint use.
unsafe impl Send for Shared<'_> {}
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(data: &'a mut [f32]) -> Self {
        Shared { data: data.as_mut_ptr(), len: data.len(), lifetime: std::marker::PhantomData }
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// No other thread may touch these elements while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.len, "row outside its buffer");
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// Rows of `cols` elements, `row` apart, the first at `start`.
    ///
    /// # Safety
    /// No other thread may touch these elements while the view lives.
    pub unsafe fn mat(&self, start: usize, rows: usize, cols: usize, row: usize) -> MatMut<'a> {
        assert!(rows == 0 || cols == 0 || start + (rows - 1) * row + cols <= self.len, "matrix outside its buffer");
        // SAFETY: in bounds by the assertion (a start past the end is only possible for an empty matrix, clamped here).
        let data = unsafe { self.data.add(start.min(self.len)) };
        MatMut { data, rows, cols, row, lifetime: std::marker::PhantomData }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            worst = worst.max((super::exp(x) as f64 / (x as f64).exp() - 1.0).abs());
        }
        assert!(worst < 3e-7, "relative error {worst:e}");
        assert!(super::exp(-1e9) < 2e-38);
        assert_eq!(super::exp(0.0), 1.0);
    }
}
