//! CUDA form: launches of `kernels/hybrid_attn.cu`, alone and together with the feature maps.

use std::ffi::{c_float, c_int, c_void};
use std::ptr::{null, null_mut};

use candle_core::{DType, Result, Tensor};

use super::super::cuda::{Output, device_of, launch, pointer, ready};
use super::super::feature_map::{Activation, FeatureMap, cuda as maps};
use super::{HybridAttn, Window};

unsafe extern "C" {
    fn margay_hybrid_attn_scratch(
        kind: c_int,
        batch: c_int,
        time: c_int,
        heads: c_int,
        kv_heads: c_int,
        dim: c_int,
        width: c_int,
        window: c_int,
        terraced: c_int,
    ) -> usize;
    fn margay_hybrid_attn_fwd(
        qkv: *const c_void,
        features: *const c_void,
        factors: *const c_void,
        y: *mut c_void,
        saved: *mut c_void,
        batch: c_int,
        time: c_int,
        heads: c_int,
        kv_heads: c_int,
        dim: c_int,
        width: c_int,
        window: c_int,
        terraced: c_int,
        affine: c_int,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_hybrid_attn_bwd(
        qkv: *const c_void,
        features: *const c_void,
        factors: *const c_void,
        weight: *const c_void,
        y: *const c_void,
        saved: *const c_void,
        dy: *const c_void,
        dqkv: *mut c_void,
        dfeatures: *mut c_void,
        dfactors: *mut c_void,
        scratch: *mut c_void,
        batch: c_int,
        time: c_int,
        heads: c_int,
        kv_heads: c_int,
        dim: c_int,
        width: c_int,
        window: c_int,
        terraced: c_int,
        affine: c_int,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_hybrid_attn_mse(
        qkv: *const c_void,
        features: *const c_void,
        factors: *const c_void,
        weight: *const c_void,
        target: *const c_void,
        loss: *mut c_void,
        dfeatures: *mut c_void,
        dfactors: *mut c_void,
        scratch: *mut c_void,
        loss_weight: c_float,
        batch: c_int,
        time: c_int,
        heads: c_int,
        kv_heads: c_int,
        dim: c_int,
        width: c_int,
        window: c_int,
        terraced: c_int,
        affine: c_int,
        stream: *mut c_void,
    ) -> c_int;
}

/// Columns of the maps that gradients can go through in one pass: 128 features.
const MAP_COLUMNS: usize = 64;

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Call {
    batch: c_int,
    time: c_int,
    heads: c_int,
    kv_heads: c_int,
    dim: c_int,
    width: c_int,
    window: c_int,
    terraced: c_int,
    affine: c_int,
}

/// What the general backward gives; `inner` is ∂loss/∂φ, or ∂loss/∂z where it goes through the maps.
struct Grads {
    qkv: Option<Tensor>,
    inner: Tensor,
    factors: Tensor,
}

/// What stage 1 gives.
struct Loss {
    value: Output,
    inner: Tensor,
    factors: Tensor,
}

impl Call {
    /// None where no kernel takes these tensors.
    fn new(op: &HybridAttn, qkv: &Tensor, width: usize) -> Result<Option<Call>> {
        let (batch, time, packed, dim) = qkv.dims4()?;
        if !ready(qkv) || qkv.dtype() != DType::BF16 {
            return Ok(None);
        }
        if packed != op.heads + 2 * op.kv_heads {
            candle_core::bail!("attention of {} heads over {} got {packed} packed heads", op.heads, op.kv_heads);
        }
        let (window, terraced) = match op.window {
            // A longer window than the sequence holds the same keys.
            Window::Sliding(n) => (n.min(time), 0),
            Window::Terraced(n) => (n.min(time), 1),
        };
        let [batch, time, heads, kv_heads] = [batch, time, op.heads, op.kv_heads].map(|n| n as c_int);
        let (dim, width, window, affine) = (dim as c_int, width as c_int, window as c_int, op.affine as c_int);
        let call = Call { batch, time, heads, kv_heads, dim, width, window, terraced, affine };
        Ok((call.scratch(0) > 0).then_some(call))
    }

    /// Bytes: 0 what the forward leaves for the backward, 1 for the loss, 2 for the backward.
    fn scratch(&self, kind: c_int) -> usize {
        // SAFETY: arithmetic on sizes.
        unsafe {
            margay_hybrid_attn_scratch(
                kind,
                self.batch,
                self.time,
                self.heads,
                self.kv_heads,
                self.dim,
                self.width,
                self.window,
                self.terraced,
            )
        }
    }

    /// y and what the backward needs of the forward.
    fn forward(&self, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<(Output, Tensor)> {
        let device = device_of(qkv)?;
        let y = Output::new(device, &self.shape(self.heads, self.dim), DType::BF16)?;
        let saved = Output::scratch(device, self.scratch(0))?;
        let (x, phi, f) = (pointer(qkv)?, pointer(features)?, pointer(factors)?);
        let (y_at, saved_at) = (y.pointer()?, saved.pointer()?);
        // SAFETY: contiguous tensors of this device in the layouts and sizes of the call.
        launch(device, "hybrid_attn_fwd", |stream| unsafe {
            margay_hybrid_attn_fwd(
                x,
                phi,
                f,
                y_at,
                saved_at,
                self.batch,
                self.time,
                self.heads,
                self.kv_heads,
                self.dim,
                self.width,
                self.window,
                self.terraced,
                self.affine,
                stream,
            )
        })?;
        Ok((y, saved.tensor()))
    }

    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        qkv: &Tensor,
        features: &Tensor,
        factors: &Tensor,
        weight: Option<&Tensor>,
        y: &Tensor,
        saved: &Tensor,
        dy: &Tensor,
        qkv_grad: bool,
    ) -> Result<Grads> {
        let device = device_of(qkv)?;
        let dqkv = if qkv_grad { Some(Output::new(device, qkv.shape(), DType::BF16)?) } else { None };
        let (inner, dfactors) = self.gradients(qkv, weight)?;
        let scratch = Output::scratch(device, self.scratch(2))?;
        let dy = dy.to_dtype(DType::BF16)?.contiguous()?;
        let (x, phi, f, y) = (pointer(qkv)?, pointer(features)?, pointer(factors)?, pointer(y)?);
        let w = weight.map(pointer).transpose()?.unwrap_or(null());
        let (saved, dy) = (pointer(saved)?, pointer(&dy)?);
        let dx = dqkv.as_ref().map(Output::pointer).transpose()?.unwrap_or(null_mut());
        let (inner_at, df, scratch) = (inner.pointer()?, dfactors.pointer()?, scratch.pointer()?);
        // SAFETY: as above; a null gradient is not computed.
        launch(device, "hybrid_attn_bwd", |stream| unsafe {
            margay_hybrid_attn_bwd(
                x,
                phi,
                f,
                w,
                y,
                saved,
                dy,
                dx,
                inner_at,
                df,
                scratch,
                self.batch,
                self.time,
                self.heads,
                self.kv_heads,
                self.dim,
                self.width,
                self.window,
                self.terraced,
                self.affine,
                stream,
            )
        })?;
        Ok(Grads { qkv: dqkv.map(Output::tensor), inner: inner.tensor(), factors: dfactors.tensor() })
    }

    fn mse(
        &self,
        qkv: &Tensor,
        features: &Tensor,
        factors: &Tensor,
        weight: Option<&Tensor>,
        target: &Tensor,
        loss_weight: f64,
    ) -> Result<Loss> {
        let device = device_of(qkv)?;
        let target = target.to_dtype(DType::BF16)?.contiguous()?;
        if target.dims() != self.shape(self.heads, self.dim) {
            candle_core::bail!("attention against a target of shape {:?}", target.shape());
        }
        let value = Output::new(device, (), DType::F32)?;
        let (inner, dfactors) = self.gradients(qkv, weight)?;
        let scratch = Output::scratch(device, self.scratch(1))?;
        let (x, phi, f, target) = (pointer(qkv)?, pointer(features)?, pointer(factors)?, pointer(&target)?);
        let w = weight.map(pointer).transpose()?.unwrap_or(null());
        let (loss, inner_at, df) = (value.pointer()?, inner.pointer()?, dfactors.pointer()?);
        let scratch = scratch.pointer()?;
        // SAFETY: as above.
        launch(device, "hybrid_attn_mse", |stream| unsafe {
            margay_hybrid_attn_mse(
                x,
                phi,
                f,
                w,
                target,
                loss,
                inner_at,
                df,
                scratch,
                loss_weight as c_float,
                self.batch,
                self.time,
                self.heads,
                self.kv_heads,
                self.dim,
                self.width,
                self.window,
                self.terraced,
                self.affine,
                stream,
            )
        })?;
        Ok(Loss { value, inner: inner.tensor(), factors: dfactors.tensor() })
    }

    fn gradients(&self, qkv: &Tensor, weight: Option<&Tensor>) -> Result<(Output, Output)> {
        let device = device_of(qkv)?;
        let columns = if weight.is_some() { MAP_COLUMNS as c_int } else { self.width };
        let inner = Output::new(device, &self.shape(2 * self.heads, columns), DType::BF16)?;
        Ok((inner, Output::new(device, self.heads as usize, DType::F32)?))
    }

    fn shape(&self, heads: c_int, columns: c_int) -> [usize; 4] {
        [self.batch as usize, self.time as usize, heads as usize, columns as usize]
    }
}

/// [`HybridAttn::forward`]; None where no kernel takes these tensors.
pub fn forward(op: &HybridAttn, qkv: &Tensor, features: &Tensor, factors: &Tensor) -> Result<Option<Tensor>> {
    let Some(call) = Call::new(op, qkv, features.dim(3)?)?.filter(|_| features.dtype() == DType::BF16) else {
        return Ok(None);
    };
    let (qkv, features) = (qkv.contiguous()?, features.contiguous()?);
    let factors = factors.to_dtype(DType::F32)?.contiguous()?;
    let (y, saved) = call.forward(&qkv, &features, &factors)?;
    let qkv_grad = qkv.track_op();
    let backward = move |[qkv, features, factors]: &[&Tensor; 3], y: &Tensor, dy: &Tensor| {
        let grads = call.backward(qkv, features, factors, None, y, &saved, dy, qkv_grad)?;
        Ok([grads.qkv, Some(grads.inner), Some(grads.factors)])
    };
    y.node([&qkv, &features, &factors], "hybrid_attn", Box::new(backward)).map(Some)
}

/// [`HybridAttn::mse`] where `qkv` needs no gradient; None where no kernel takes these tensors.
pub fn mse(
    op: &HybridAttn,
    qkv: &Tensor,
    features: &Tensor,
    factors: &Tensor,
    target: &Tensor,
    weight: f64,
) -> Result<Option<Tensor>> {
    let Some(call) = Call::new(op, qkv, features.dim(3)?)?.filter(|_| features.dtype() == DType::BF16) else {
        return Ok(None);
    };
    let (qkv, features) = (qkv.contiguous()?, features.contiguous()?);
    let factors = factors.to_dtype(DType::F32)?.contiguous()?;
    let loss = call.mse(&qkv, &features, &factors, None, target, weight)?;
    let backward = move |_: &[&Tensor; 2], _: &Tensor, grad: &Tensor| {
        let inner = loss.inner.broadcast_mul(&grad.to_dtype(DType::BF16)?)?;
        Ok([Some(inner), Some(loss.factors.broadcast_mul(grad)?)])
    };
    loss.value.node([&features, &factors], "hybrid_attn_mse", Box::new(backward)).map(Some)
}

/// The maps of all heads as an op: queries, then for every query head its key head.
fn softmax_maps(op: &HybridAttn) -> FeatureMap {
    let group = op.heads / op.kv_heads;
    let sources = (0..op.heads).chain((0..op.heads).map(|h| op.heads + h / group)).collect();
    FeatureMap { activation: Activation::SoftmaxDim, sources }
}

/// Attention on the features of softmax maps `weight` [2 H, D, 64] of `qkv`, without bias; None where no kernel takes
/// these tensors. The gradient goes through maps and attention in the same passes.
pub fn with_maps(op: &HybridAttn, qkv: &Tensor, weight: &Tensor, factors: &Tensor) -> Result<Option<Tensor>> {
    let call = if weight.dim(2)? == MAP_COLUMNS { Call::new(op, qkv, 2 * MAP_COLUMNS)? } else { None };
    let Some(call) = call else { return Ok(None) };
    let (qkv, factors) = (qkv.contiguous()?, factors.to_dtype(DType::F32)?.contiguous()?);
    let maps = softmax_maps(op);
    let narrow = weight.detach().to_dtype(DType::BF16)?.contiguous()?;
    let features = maps::features(&maps, &qkv, &narrow, None)?.tensor();
    let (y, saved) = call.forward(&qkv, &features, &factors)?;
    let (qkv_grad, weight_grad) = (qkv.track_op(), weight.track_op());
    let backward = move |[qkv, weight, factors]: &[&Tensor; 3], y: &Tensor, dy: &Tensor| {
        let grads = call.backward(qkv, &features, factors, Some(&narrow), y, &saved, dy, qkv_grad)?;
        let dweight = if weight_grad {
            Some(maps::weight_gradient(&maps, qkv, &grads.inner)?.to_dtype(weight.dtype())?)
        } else {
            None
        };
        Ok([grads.qkv, dweight, Some(grads.factors)])
    };
    y.node([&qkv, weight, &factors], "hybrid_attn", Box::new(backward)).map(Some)
}

/// `loss_weight * mean((y - target)²)` of the same attention, with gradients to maps and factors alone; y is never
/// written.
pub fn mse_with_maps(
    op: &HybridAttn,
    qkv: &Tensor,
    weight: &Tensor,
    factors: &Tensor,
    target: &Tensor,
    loss_weight: f64,
) -> Result<Option<Tensor>> {
    let call = if weight.dim(2)? == MAP_COLUMNS { Call::new(op, qkv, 2 * MAP_COLUMNS)? } else { None };
    let Some(call) = call else { return Ok(None) };
    let (qkv, factors) = (qkv.contiguous()?, factors.to_dtype(DType::F32)?.contiguous()?);
    let maps = softmax_maps(op);
    let narrow = weight.detach().to_dtype(DType::BF16)?.contiguous()?;
    let features = maps::features(&maps, &qkv, &narrow, None)?.tensor();
    let loss = call.mse(&qkv, &features, &factors, Some(&narrow), target, loss_weight)?;
    drop(features);
    let dweight = maps::weight_gradient(&maps, &qkv, &loss.inner)?.to_dtype(weight.dtype())?;
    let dfactors = loss.factors;
    let backward = move |_: &[&Tensor; 2], _: &Tensor, grad: &Tensor| {
        let dweight = dweight.broadcast_mul(&grad.to_dtype(dweight.dtype())?)?;
        Ok([Some(dweight), Some(dfactors.broadcast_mul(grad)?)])
    };
    loss.value.node([weight, &factors], "hybrid_attn_mse", Box::new(backward)).map(Some)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor, Var};

    use super::super::super::check::{INPUTS, input};
    use super::*;

    /// ‖a - b‖ / ‖b‖.
    fn error(a: &Tensor, b: &Tensor) -> f64 {
        let flat = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (a, b) = (flat(a).expect("floats"), flat(b).expect("floats"));
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-30)
    }

    fn grads(y: &Tensor, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let store = y.backward()?;
        inputs.iter().map(|x| store.get(x).cloned().map_or_else(|| x.zeros_like(), Ok)).collect()
    }

    /// Runs the op on the GPU in bf16, in f64 by its plain form, and in bf16 by its plain form on the GPU. The kernels may
    /// err twice as much as the plain form of their precision; gradients of factors cancel more than any other.
    fn compare(what: &str, x: &[Tensor], f: impl Fn(&[Tensor], bool) -> Result<Tensor>) -> Result<()> {
        let gpu = super::super::super::gpu(0)?;
        let run = |device: &Device, dtype: DType, kernel: bool| -> Result<Vec<Tensor>> {
            let vars = x
                .iter()
                .map(|x| {
                    let x = x.to_dtype(DType::BF16)?.to_dtype(dtype)?;
                    Ok(Var::from_tensor(&x.to_device(device)?)?.into_inner())
                })
                .collect::<Result<Vec<_>>>()?;
            let y = f(&vars, kernel)?;
            let weights = input("randn", y.dims(), 99).to_dtype(DType::BF16)?.to_dtype(y.dtype())?.to_device(device)?;
            let mut out = vec![y.clone()];
            out.extend(grads(&(&y * weights)?.sum_all()?, &vars)?);
            Ok(out)
        };
        let oracle = run(&Device::Cpu, DType::F64, false)?;
        let plain = run(&gpu, DType::BF16, false)?;
        let kernel = run(&gpu, DType::BF16, true)?;
        for (i, (want, (plain, got))) in oracle.iter().zip(plain.iter().zip(&kernel)).enumerate() {
            let least = if want.rank() == 1 { 0.2 } else { 6e-3 };
            let (mine, theirs) = (error(got, want), error(plain, want));
            assert!(mine <= (2.0 * theirs).max(least), "{what}, tensor {i}: error {mine:e}, plain form {theirs:e}");
        }
        Ok(())
    }

    #[test]
    fn kernels_equal_plain() -> Result<()> {
        use super::super::Window::*;
        for (kind, time) in INPUTS.iter().flat_map(|k| [1, 63, 64, 65, 200].map(|t| (*k, t))) {
            for (window, dim) in
                [(Terraced(64), 128), (Sliding(64), 64), (Sliding(100), 128), (Terraced(16), 80), (Sliding(0), 128)]
            {
                // Attention to one token, or to tokens that are alike, has gradients that are nothing but rounding.
                if kind == "ones" || (time == 1 && window == Sliding(0)) {
                    continue;
                }
                for affine in [false, true] {
                    let op = HybridAttn { heads: 4, kv_heads: 2, window, affine, softcap: None };
                    let phi = (input("randn", &[2, time, 8, 128], 2).abs()? * 0.01)?;
                    let x = [input(kind, &[2, time, 8, dim], 1), phi, input("randn", &[4], 3)];
                    let what = format!("{kind}, {time}, {window:?}, affine {affine}");
                    compare(&what, &x, |x, kernel| match kernel {
                        true => Ok(forward(&op, &x[0], &x[1], &x[2])?.expect("a kernel for this shape")),
                        false => Ok(op.parallel(&x[0], &x[1], &x[2])?.0),
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Shapes without a kernel of the whole: a cap, wide heads, many features.
    #[test]
    fn branches_equal_plain() -> Result<()> {
        for (time, dim, width, softcap) in
            [(1, 64, 153, None), (200, 64, 153, None), (130, 256, 128, None), (200, 128, 128, Some(5.0))]
        {
            for affine in [false, true] {
                let op = HybridAttn { heads: 4, kv_heads: 2, window: Window::Sliding(64), affine, softcap };
                let phi = (input("randn", &[2, time, 8, width], 2).abs()? * 0.01)?;
                let x = [input("randn", &[2, time, 8, dim], 1), phi, input("randn", &[4], 3)];
                compare(&format!("{time}, {dim}, {width}, affine {affine}"), &x, |x, kernel| match kernel {
                    true => op.forward(&x[0], &x[1], &x[2]),
                    false => Ok(op.parallel(&x[0], &x[1], &x[2])?.0),
                })?;
            }
        }
        Ok(())
    }

    #[test]
    fn fused_maps_equal_plain() -> Result<()> {
        use super::super::Window::*;
        for (time, window, dim) in [(1, Terraced(64), 128), (200, Terraced(64), 128), (330, Sliding(64), 80)] {
            let op = HybridAttn { heads: 4, kv_heads: 2, window, affine: false, softcap: None };
            let maps = softmax_maps(&op);
            let weight = (input("randn", &[8, dim, 64], 2) * 0.1)?;
            let x = [input("randn", &[2, time, 8, dim], 1), weight, input("randn", &[4], 3)];
            let target = input("randn", &[2, time, 4, dim], 4).to_dtype(DType::BF16)?;
            let plain = |x: &[Tensor]| -> Result<Tensor> {
                let bias = Tensor::zeros((8, 64), x[0].dtype(), x[0].device())?;
                Ok(op.parallel(&x[0], &maps.plain(&x[0], &x[1], &bias)?, &x[2])?.0)
            };
            compare(&format!("maps, {time}, {window:?}"), &x, |x, kernel| match kernel {
                true => Ok(with_maps(&op, &x[0], &x[1], &x[2])?.expect("a kernel for this shape")),
                false => plain(x),
            })?;
            compare(&format!("loss, {time}, {window:?}"), &x[1..], |y, kernel| {
                let qkv = x[0].to_dtype(DType::BF16)?.to_dtype(y[0].dtype())?.to_device(y[0].device())?;
                let target = target.to_dtype(y[0].dtype())?.to_device(y[0].device())?;
                match kernel {
                    true => {
                        let loss = mse_with_maps(&op, &qkv, &y[0], &y[1], &target, 1000.0)?;
                        Ok(loss.expect("a kernel for this shape"))
                    }
                    false => crate::ops::loss::mse(&plain(&[qkv, y[0].clone(), y[1].clone()])?, &target, 1000.0),
                }
            })?;
        }
        Ok(())
    }

    #[test]
    fn same_twice() -> Result<()> {
        let gpu = super::super::super::gpu(0)?;
        let op = HybridAttn { heads: 8, kv_heads: 2, window: Window::Sliding(64), affine: false, softcap: None };
        let on = |x: Tensor| x.to_dtype(DType::BF16)?.to_device(&gpu);
        let (qkv, weight) = (on(input("randn", &[2, 1000, 12, 128], 1))?, on(input("randn", &[16, 128, 64], 2))?);
        let (factors, target) = (on(input("randn", &[8], 3))?, on(input("randn", &[2, 1000, 8, 128], 4))?);
        let run = || -> Result<Vec<Vec<f32>>> {
            let vars = [Var::from_tensor(&weight)?.into_inner(), Var::from_tensor(&factors)?.into_inner()];
            let loss = mse_with_maps(&op, &qkv, &vars[0], &vars[1], &target, 1000.0)?.expect("a kernel");
            let mut all = grads(&loss, &vars)?;
            all.push(loss);
            all.iter().map(|x| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()).collect()
        };
        assert_eq!(run()?, run()?);
        Ok(())
    }
}
