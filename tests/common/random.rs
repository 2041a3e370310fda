//! Seeded tensors and their comparison.

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Nearly normal numbers of unit variance in f64; the same seed gives the same values.
pub fn randn(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product::<usize>();
    let data: Vec<f64> = (0..count).map(|_| (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// All elements, in order.
pub fn flat(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Every element of `got` within `tolerance` of `wanted`, relative to the largest wanted one.
#[track_caller]
pub fn close(what: &str, got: &Tensor, wanted: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), wanted.dims(), "{what}");
    close_slices(what, &flat(got), &flat(wanted), tolerance);
}

/// The same for plain arrays.
#[track_caller]
pub fn close_slices(what: &str, got: &[f64], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let scale = wanted.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    for (i, (a, b)) in got.iter().zip(wanted).enumerate() {
        // Written so that a NaN fails.
        let near = (a - b).abs() <= tolerance * scale;
        assert!(near, "{what}: element {i} is {a:e}, not {b:e} (largest {scale:e})");
    }
}
