//! Fast form against plain form for the tests of this folder: outputs and gradients.
//!
//! Every op takes its plain form in f64, so the same call in f64 is the oracle of the call in f32.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Named hostile and ordinary inputs.
pub const INPUTS: [&str; 4] = ["randn", "ones", "one_hot", "large"];

/// A seeded f64 tensor of the named kind.
pub fn input(kind: &str, shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count: usize = shape.iter().product();
    let last = shape.last().copied().unwrap_or(1);
    let normal = |rng: &mut ChaCha8Rng| (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
    let data: Vec<f64> = (0..count)
        .map(|i| match kind {
            "ones" => 1.0 + 1e-3 * normal(&mut rng), // exact ties have no single gradient
            "one_hot" => (i % last == (i / last) % last) as u8 as f64 + 1e-3 * normal(&mut rng),
            "large" => 8.0 * normal(&mut rng),
            _ => normal(&mut rng),
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).expect("sizes agree")
}

/// Runs `f` on `inputs` in f64 and f32 and compares its result and the gradients of a random linear function of it.
pub fn check(what: &str, inputs: &[Tensor], tolerance: f64, f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let run = |dtype: DType| -> Result<Vec<Tensor>> {
        let vars = inputs.iter().map(|x| Var::from_tensor(&x.to_dtype(dtype)?)).collect::<Result<Vec<_>>>()?;
        let y = f(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
        let weights = input("randn", y.dims(), 99).to_dtype(y.dtype())?;
        let grads = (&y * weights)?.sum_all()?.backward()?;
        let mut out = vec![y];
        for (i, v) in vars.iter().enumerate() {
            out.push(grads.get(v).unwrap_or_else(|| panic!("{what}: input {i} has no gradient")).clone());
        }
        Ok(out)
    };
    let (oracle, fast) = (run(DType::F64).expect(what), run(DType::F32).expect(what));
    // Where terms cancel to nearly nothing, rounding is relative to the terms: a tenth of the largest input.
    let size = inputs.iter().map(largest).fold(1e-6, f64::max) * 0.1;
    for (i, (a, b)) in oracle.iter().zip(&fast).enumerate() {
        let name = if i == 0 { "output".into() } else { format!("gradient of input {}", i - 1) };
        close(&format!("{what}: {name}"), b, a, tolerance, size);
    }
}

/// Every element of `x` within `tolerance` of `wanted`, relative to the largest wanted element or to `size`.
fn close(what: &str, x: &Tensor, wanted: &Tensor, tolerance: f64, size: f64) {
    assert_eq!(x.dims(), wanted.dims(), "{what}");
    let scale = largest(wanted).max(size);
    for (i, (a, b)) in flat(x).iter().zip(&flat(wanted)).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{what}: element {i} is {a:e}, not {b:e} (scale {scale:e})");
    }
}

fn flat(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1::<f64>()).expect("a tensor of floats")
}

fn largest(x: &Tensor) -> f64 {
    flat(x).iter().fold(0f64, |m, v| m.max(v.abs()))
}

/// The CUDA form against the definition: inputs rounded to bf16 (and to f32 where `wide`), the oracle `plain` in f64 on
/// exactly these values. Its error, as a relative norm, may be at most twice that of the plain form in the same precision,
/// or the rounding of the result. Fresh memory is poisoned with NaN before, so an element that is never written shows.
/// Without a GPU nothing runs, which is said.
#[cfg(feature = "cuda")]
pub fn check_gpu(
    what: &str,
    inputs: &[Tensor],
    wide: bool,
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
    plain: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    check_gpu_within(3e-3, what, inputs, wide, op, plain);
}

/// The same where rounding to bf16 may cost `rounding`.
#[cfg(feature = "cuda")]
pub fn check_gpu_within(
    rounding: f64,
    what: &str,
    inputs: &[Tensor],
    wide: bool,
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
    plain: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let Ok(gpu) = super::gpu(0) else {
        eprintln!("skipped: no GPU for {what}");
        return;
    };
    let run = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>, rounded: DType, dtype: DType, device: &Device| {
        let var = |x: &Tensor| Var::from_tensor(&x.to_dtype(rounded)?.to_dtype(dtype)?.to_device(device)?);
        let vars = inputs.iter().map(var).collect::<Result<Vec<_>>>()?;
        if device.is_cuda() {
            for x in inputs.iter().chain([&inputs[0]; 4]) {
                drop(Tensor::full(f32::NAN, x.shape(), device)?.to_dtype(dtype)?);
            }
        }
        let y = f(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
        let weights = input("randn", y.dims(), 99).to_dtype(rounded)?.to_dtype(y.dtype())?.to_device(device)?;
        let zero = Tensor::zeros((), DType::F32, device)?.to_dtype(super::wide(y.dtype()))?;
        let grads = super::loss::with_gradient(&y, zero, weights)?.backward()?;
        let mut out = vec![y];
        for (i, v) in vars.iter().enumerate() {
            out.push(grads.get(v).unwrap_or_else(|| panic!("{what}: input {i} has no gradient")).clone());
        }
        Ok::<_, candle_core::Error>(out)
    };
    for dtype in if wide { &[DType::BF16, DType::F32][..] } else { &[DType::BF16] } {
        let what = format!("{what} in {dtype:?}");
        let oracle = run(&plain, *dtype, DType::F64, &Device::Cpu).expect(&what);
        let simple = run(&plain, *dtype, *dtype, &gpu).expect(&what);
        let fast = run(&op, *dtype, *dtype, &gpu).expect(&what);
        let again = run(&op, *dtype, *dtype, &gpu).expect(&what);
        for (i, (((wanted, plain), fast), again)) in oracle.iter().zip(&simple).zip(&fast).zip(&again).enumerate() {
            let name = if i == 0 { "output".into() } else { format!("gradient of input {}", i - 1) };
            let (allowed, found) = (relative(plain, wanted), relative(fast, wanted));
            let floor = if *dtype == DType::BF16 { rounding } else { 2e-6 };
            assert!(
                found <= (2.0 * allowed).max(floor),
                "{what}: {name} is off by {found:e}, the plain form by {allowed:e}"
            );
            assert_eq!(flat(fast), flat(again), "{what}: {name} differs between two runs");
        }
    }
}

/// ‖x - wanted‖ / ‖wanted‖; NaN where either holds one.
#[cfg(feature = "cuda")]
fn relative(x: &Tensor, wanted: &Tensor) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let (x, wanted) = (flat(x), flat(wanted));
    norm(&mut x.iter().zip(&wanted).map(|(a, b)| a - b)) / norm(&mut wanted.iter().copied()).max(1e-30)
}
