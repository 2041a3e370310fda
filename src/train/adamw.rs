//! AdamW over f32 masters, with global-norm clipping (arXiv 1711.05101).
//!
//! Decoupled decay, bias correction, `eps` outside the square root. On a GPU all tensors are updated by a few launches and
//! the norm never leaves the device before the update; see `kernels/adamw.cu`.

use candle_core::{DType, Result as TensorResult, Tensor};

use crate::error::{Error, Kind, Result};
use crate::params::Param;
use crate::recipe::Optimizer;

pub struct AdamW {
    settings: Optimizer,
    moments: Vec<(Tensor, Tensor)>,
    /// Updates done.
    pub steps: u64,
}

/// What an update saw. Where a gradient is not finite nothing was changed.
pub struct Update {
    /// Sum of squares of each parameter's gradient; 0 where there is none.
    pub gradients: Vec<f64>,
    /// Sum of squares of each parameter after the update.
    pub weights: Vec<f64>,
}

/// A trained tensor of this norm exploded: its loss may stay finite where softmax saturates, but nothing is learned.
const LARGEST: f64 = 1e8;

impl Update {
    /// Global gradient norm before clipping.
    pub fn gradient_norm(&self) -> f64 {
        self.gradients.iter().sum::<f64>().sqrt()
    }

    /// An error where a gradient is not finite or a parameter exploded.
    pub fn check(&self, params: &[Param], stage: &str, step: u64) -> Result<()> {
        if let Some((param, _)) = params.iter().zip(&self.gradients).find(|(_, g)| !g.is_finite()) {
            let message = format!("the gradient of `{}` is not finite at step {step} of stage `{stage}`", param.name);
            let hint = format!("lower `stage.{stage}.lr`; the last good checkpoint is kept");
            return Err(Error::new(Kind::Training, message).hint(hint));
        }
        for (param, square) in params.iter().zip(&self.weights) {
            let size = square.sqrt();
            if size.is_nan() || size > LARGEST {
                let message = format!("`{}` exploded to norm {size:.1e} at step {step} of stage `{stage}`", param.name);
                return Err(super::exploded(stage, message));
            }
        }
        Ok(())
    }
}

impl AdamW {
    pub fn new(params: &[Param], settings: &Optimizer) -> TensorResult<Self> {
        let zeros = |p: &Param| Ok((p.var.zeros_like()?, p.var.zeros_like()?));
        Ok(AdamW {
            settings: settings.clone(),
            moments: params.iter().map(zeros).collect::<TensorResult<_>>()?,
            steps: 0,
        })
    }

    /// First and second moment of a parameter.
    pub fn moments(&self, slot: usize) -> (&Tensor, &Tensor) {
        (&self.moments[slot].0, &self.moments[slot].1)
    }

    pub fn restore(&mut self, slot: usize, m: &Tensor, v: &Tensor) -> TensorResult<()> {
        self.moments[slot] = (m.copy()?, v.copy()?);
        Ok(())
    }

    /// One update at `lr` times each parameter's peak.
    pub fn update(
        &mut self,
        params: &[Param],
        grads: &[Option<Tensor>],
        lr: f64,
        peaks: &[f64],
    ) -> TensorResult<Update> {
        #[cfg(feature = "cuda")]
        if params.iter().all(|p| crate::ops::cuda::ready(p.var.as_tensor())) {
            return self.update_on_gpu(params, grads, lr, peaks);
        }
        let square = |x: &Tensor| x.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
        let gradients = grads.iter().map(|g| g.as_ref().map_or(Ok(0.0), square)).collect::<TensorResult<Vec<_>>>()?;
        let norm = gradients.iter().sum::<f64>().sqrt();
        if norm.is_finite() {
            let s = &self.settings;
            let shrink = if s.clip > 0.0 && norm > s.clip { s.clip / norm } else { 1.0 };
            self.steps += 1;
            let (b1, b2) = (s.beta1, s.beta2);
            let (correct1, correct2) = self.corrections();
            for (((param, grad), peak), (m, v)) in params.iter().zip(grads).zip(peaks).zip(&mut self.moments) {
                let Some(grad) = grad else { continue };
                let grad = (grad * shrink)?;
                *m = ((&*m * b1)? + (&grad * (1.0 - b1))?)?;
                *v = ((&*v * b2)? + (grad.sqr()? * (1.0 - b2))?)?;
                let lr = lr * peak;
                let change = ((&*m * (lr / correct1))? / ((&*v / correct2)?.sqrt()? + s.eps)?)?;
                let kept = (param.var.as_tensor() * (1.0 - lr * s.weight_decay))?;
                param.var.set(&(kept - change)?)?;
            }
        }
        let weights = params.iter().map(|p| square(p.var.as_tensor())).collect::<TensorResult<_>>()?;
        Ok(Update { gradients, weights })
    }

    /// 1 - beta^steps of both moments.
    fn corrections(&self) -> (f64, f64) {
        let correct = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        (correct(self.settings.beta1), correct(self.settings.beta2))
    }

    #[cfg(feature = "cuda")]
    fn update_on_gpu(
        &mut self,
        params: &[Param],
        grads: &[Option<Tensor>],
        lr: f64,
        peaks: &[f64],
    ) -> TensorResult<Update> {
        use crate::ops::cuda::{Output, device_of, launch, pointer};
        use std::ffi::{c_int, c_void};
        unsafe extern "C" {
            fn margay_adamw(
                table: *const c_void,
                tensors: c_int,
                blocks: c_int,
                partial: *mut c_void,
                shrink: *mut c_void,
                gradients: *mut c_void,
                weights: *mut c_void,
                beta1: f32,
                beta2: f32,
                correct1: f32,
                correct2: f32,
                eps: f32,
                decay: f32,
                clip: f32,
                stream: *mut c_void,
            ) -> c_int;
            fn margay_adamw_block() -> c_int;
        }
        let Some(first) = params.first() else { return Ok(Update { gradients: Vec::new(), weights: Vec::new() }) };
        let device = device_of(first.var.as_tensor())?;
        // SAFETY: gives a constant.
        let block = unsafe { margay_adamw_block() } as usize;
        // The entries of `kernels/adamw.cu`: four addresses, a count, a rate with the first block.
        let (mut table, mut blocks, mut present) = (Vec::new(), 0usize, Vec::new());
        for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
            let Some(grad) = grad else { continue };
            let weight = param.var.as_tensor();
            let count = weight.elem_count();
            if grad.elem_count() != count || grad.dtype() != DType::F32 || weight.dtype() != DType::F32 {
                candle_core::bail!("gradient {:?} of `{}` {:?}", grad.shape(), param.name, weight.shape());
            }
            let (m, v) = &self.moments[i];
            for x in [weight, m, v, grad] {
                table.push(pointer(x)? as i64);
            }
            table.push(count as i64);
            table.push((((lr * peaks[i]) as f32).to_bits() as u64 | (blocks as u64) << 32) as i64);
            blocks += count.div_ceil(block);
            present.push(i);
        }
        let tensors = present.len();
        let mut update = Update { gradients: vec![0.0; params.len()], weights: vec![0.0; params.len()] };
        if tensors == 0 {
            return Ok(update);
        }
        let table = Tensor::from_vec(table, tensors * 6, first.var.device())?;
        let scratch = Output::new(device, blocks + 1, DType::F32)?;
        let squares = Output::new(device, (2, tensors), DType::F32)?;
        self.steps += 1;
        let (correct1, correct2) = self.corrections();
        let s = &self.settings;
        let [b1, b2, c1, c2, eps, decay, clip] =
            [s.beta1, s.beta2, correct1, correct2, s.eps, s.weight_decay, s.clip].map(|x| x as f32);
        let (entries, partial, out) = (pointer(&table)?, scratch.pointer()?, squares.pointer()?);
        let (count, grid) = (tensors as c_int, blocks as c_int);
        // SAFETY: the table's addresses are of contiguous f32 tensors of the counts beside them, alive to the end of
        // this function and, in stream order, of the kernels; scratch and squares have the sizes the kernel names.
        launch(device, "adamw", |stream| unsafe {
            let shrink = partial.cast::<f32>().add(blocks).cast();
            let weights = out.cast::<f32>().add(tensors).cast();
            margay_adamw(entries, count, grid, partial, shrink, out, weights, b1, b2, c1, c2, eps, decay, clip, stream)
        })?;
        let squares = squares.tensor().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        for (n, i) in present.into_iter().enumerate() {
            update.gradients[i] = squares[0][n];
            update.weights[i] = squares[1][n];
        }
        if update.gradients.iter().any(|g| !g.is_finite()) {
            self.steps -= 1;
        }
        Ok(update)
    }
}
