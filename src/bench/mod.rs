//! Speed without a checkpoint: kernels and stages on random weights of a named shape, beside the machine's own ceilings.
//!
//! Every figure is a median of synchronised repetitions. Work is counted, not assumed: a stage's floor is the products
//! that cannot be avoided, a kernel's the bytes it must move or the operations it must do, over the measured ceilings.

mod kernels;
pub mod shapes;
mod stages;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::families::Architecture;
use crate::progress::Progress;
use crate::recipe::Recipe;

pub use kernels::kernels;
pub use stages::{decode, prefill, recover, teacher, transfer};

/// What is measured.
pub struct Bench<'a> {
    pub architecture: Architecture,
    /// What the student is and how it trains.
    pub recipe: Recipe,
    pub device: Device,
    /// Precision of frozen weights and activations.
    pub dtype: DType,
    pub batch: usize,
    pub seq_len: usize,
    /// Sequences at once, of the `batch` of a training step; 0 is what the plan says.
    pub micro_batch: usize,
    /// Timed repetitions.
    pub repeats: usize,
    pub ceilings: Ceilings,
    pub progress: &'a dyn Progress,
}

/// What the machine reaches with nothing but copies or products.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a large copy on the device, in 10^9.
    pub copy_gb_s: f64,
    /// A large square product in the computing precision, in 10^12 operations per second.
    pub matmul_tflops: f64,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub what: String,
    pub milliseconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// 10^12 counted operations per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tflops: Option<f64>,
    /// 10^9 counted bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gb_s: Option<f64>,
    /// Floor over time: the share of the ceiling that binds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Most memory of the device in use, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

/// Counted work of one call.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    pub flops: f64,
    pub bytes: f64,
    pub tokens: f64,
}

impl Row {
    fn new(what: impl Into<String>, seconds: f64, work: Work, ceilings: Ceilings) -> Row {
        let some = |x: f64| (x > 0.0).then_some(x);
        let floor = (work.flops / (ceilings.matmul_tflops * 1e12)).max(work.bytes / (ceilings.copy_gb_s * 1e9));
        Row {
            what: what.into(),
            milliseconds: seconds * 1e3,
            tokens_per_second: some(work.tokens / seconds),
            tflops: some(work.flops / seconds / 1e12),
            gb_s: some(work.bytes / seconds / 1e9),
            share: some(floor / seconds),
            peak_bytes: None,
        }
    }
}

/// Median seconds of `f`, each timed over `calls` calls with the device idle before and after.
fn time(device: &Device, repeats: usize, calls: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?; // loads kernels, fills the memory pool
    f()?;
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats.max(1) {
        device.synchronize()?;
        let started = Instant::now();
        for _ in 0..calls {
            f()?;
        }
        device.synchronize()?;
        seconds.push(started.elapsed().as_secs_f64() / calls as f64);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Measures the ceilings of a device: far more data than its caches hold, random values.
pub fn ceilings(device: &Device, dtype: DType) -> Result<Ceilings> {
    let (elements, side) = if device.is_cpu() { (1 << 26, 1024) } else { (1 << 30, 8192) };
    let x = Tensor::zeros(elements, DType::F32, device)?;
    let copy = time(device, 7, 1, || x.copy().map(drop).map_err(Error::from))?;
    let copy_gb_s = 8.0 * elements as f64 / copy / 1e9;
    drop(x);
    let a = random(&[side, side], 1.0, dtype, device)?;
    let b = random(&[side, side], 1.0, dtype, device)?;
    let product = time(device, 7, 3, || a.matmul(&b).map(drop).map_err(Error::from))?;
    Ok(Ceilings { copy_gb_s, matmul_tflops: 2.0 * (side as f64).powi(3) / product / 1e12 })
}

/// Normal random values on the device.
fn random(shape: &[usize], deviation: f32, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, deviation, shape, device)?.to_dtype(dtype)?)
}
