//! The launches of `kernels/delta_rule.cu`.

use std::ffi::{c_int, c_long, c_void};
use std::ptr::null;

use candle_core::{CudaDevice, DType, Result, Tensor};

use super::super::cuda::{Output, device_of, launch, pointer};
use super::{Kind, Op};

unsafe extern "C" {
    fn margay_delta_rule_ready(dim: c_int, gate: c_int) -> c_int;
    fn margay_delta_rule_saved(batch: c_int, time: c_int, heads: c_int, dim: c_int, gate: c_int, keep: c_int) -> usize;
    fn margay_delta_rule_scratch(batch: c_int, time: c_int, heads: c_int, dim: c_int) -> usize;
    fn margay_delta_rule_fwd(
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        gate_key: *const c_void,
        beta: *const c_void,
        gate_head: *const c_void,
        first: *const c_void,
        o: *mut c_void,
        last: *mut c_void,
        saved: *mut c_void,
        keep: c_int,
        batch: c_int,
        time: c_int,
        heads: c_int,
        kv_heads: c_int,
        dim: c_int,
        row: c_long,
        gate: c_int,
        scale: f32,
        normalize: c_int,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_delta_rule_bwd(
        q: *const c_void,
        k: *const c_void,
        gate_key: *const c_void,
        grad: *const c_void,
        dlast: *const c_void,
        saved: *const c_void,
        scratch: *mut c_void,
        dq: *mut c_void,
        dk: *mut c_void,
        dv: *mut c_void,
        dgate_key: *mut c_void,
        dbeta: *mut c_void,
        dgate_head: *mut c_void,
        dfirst: *mut c_void,
        batch: c_int,
        time: c_int,
        heads: c_int,
        kv_heads: c_int,
        dim: c_int,
        row: c_long,
        drow: c_long,
        gate: c_int,
        scale: f32,
        normalize: c_int,
        stream: *mut c_void,
    ) -> c_int;
}

/// Whether there are kernels for heads of this size, and the current device has the shared memory they need.
pub(super) fn ready(dim: usize, kind: Kind) -> bool {
    // SAFETY: numbers in, number out.
    unsafe { margay_delta_rule_ready(dim as c_int, kind as c_int) != 0 }
}

/// Where the parts of one allocation begin, `size` bytes an element.
fn part(base: *const c_void, elements: usize, size: usize) -> *const c_void {
    base.wrapping_byte_add(elements * size)
}

impl Op {
    /// Result and last state, each a node of the graph that keeps what the other one does.
    pub(super) fn on_gpu(self, qkv: &Tensor, small: &Tensor, key: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let device = device_of(qkv)?;
        let (rule, d) = (self.rule, self.dim);
        let keep = qkv.track_op() || small.track_op() || key.track_op();
        let [b, t, h, hkv, dim] = [self.batch, self.time, rule.heads, rule.kv_heads, d].map(|n| n as c_int);
        // SAFETY: arithmetic on sizes.
        let bytes = unsafe { margay_delta_rule_saved(b, t, h, dim, self.kind as c_int, keep as c_int) };
        let saved = Output::scratch(device, bytes)?;
        let o = Output::new(device, (self.batch, self.time, rule.heads, d), DType::BF16)?;
        let last = match self.last {
            true => Some(Output::new(device, (self.batch, rule.heads, d, d), DType::F32)?),
            false => None,
        };
        let (beta, head, first) = self.small_parts(pointer(small)?);
        let (x, key_at) = (pointer(qkv)?, pointer(key)?);
        let row = ((rule.heads + 2 * rule.kv_heads) * d) as c_long;
        let last_at = last.as_ref().map(|l| l.pointer()).transpose()?.unwrap_or(std::ptr::null_mut());
        let (o_at, saved_at) = (o.pointer()?, saved.pointer()?);
        // SAFETY: contiguous operands of the checked shapes on this device; outputs and scratch of the sizes asked for.
        launch(device, "delta_rule", |stream| unsafe {
            margay_delta_rule_fwd(
                x,
                part(x, rule.heads * d, 2),
                part(x, (rule.heads + rule.kv_heads) * d, 2),
                key_at,
                beta,
                head,
                first,
                o_at,
                last_at,
                saved_at,
                keep as c_int,
                b,
                t,
                h,
                hkv,
                dim,
                row,
                self.kind as c_int,
                rule.scale as f32,
                rule.normalize as c_int,
                stream,
            )
        })?;
        if !keep {
            return Ok((o.tensor(), last.map(|l| l.tensor())));
        }
        let saved = saved.tensor();
        let of_last = saved.clone();
        let inputs = [qkv, small, key];
        // The backward pass is linear: a gradient of the last state goes through it on its own.
        let last = last.map(|last| {
            let shape = (self.batch, self.time, rule.heads, d);
            last.node(
                inputs,
                "delta_rule",
                Box::new(move |x, _, grad| {
                    let none = Tensor::zeros(shape, DType::BF16, grad.device())?;
                    self.back_on_gpu(x, &of_last, &none, Some(grad))
                }),
            )
        });
        let back = Box::new(move |x: &[&Tensor; 3], _: &Tensor, grad: &Tensor| self.back_on_gpu(x, &saved, grad, None));
        Ok((o.node(inputs, "delta_rule", back)?, last.transpose()?))
    }

    /// Of the small inputs: β, decay per head, first state.
    fn small_parts(&self, at: *const c_void) -> (*const c_void, *const c_void, *const c_void) {
        let (n, _) = self.sizes();
        let per_head = self.kind == Kind::Head;
        let first = if self.first { part(at, if per_head { 2 * n } else { n }, 4) } else { null() };
        (at, if per_head { part(at, n, 4) } else { null() }, first)
    }

    fn back_on_gpu(
        &self,
        [qkv, small, key]: &[&Tensor; 3],
        saved: &Tensor,
        grad: &Tensor,
        dlast: Option<&Tensor>,
    ) -> Result<[Option<Tensor>; 3]> {
        let device: &CudaDevice = device_of(qkv)?;
        let (rule, d) = (self.rule, self.dim);
        let [b, t, h, hkv, dim] = [self.batch, self.time, rule.heads, rule.kv_heads, d].map(|n| n as c_int);
        // SAFETY: arithmetic on sizes.
        let scratch = Output::scratch(device, unsafe { margay_delta_rule_scratch(b, t, h, dim) })?;
        let dx = Output::new(device, (self.batch, self.time, 3 * rule.heads, d), DType::BF16)?;
        let dsmall = Output::new(device, small.shape(), DType::F32)?;
        let dkey = Output::new(device, key.shape(), DType::BF16)?;
        let (x, dx_at, key_at, grad_at) = (pointer(qkv)?, dx.pointer()?, pointer(key)?, pointer(grad)?);
        let (dbeta, dhead, dfirst) = self.small_parts(dsmall.pointer()?);
        let dlast_at = dlast.map(pointer).transpose()?.unwrap_or(null());
        let (saved_at, scratch_at, dkey_at) = (pointer(saved)?, scratch.pointer()?, dkey.pointer()?);
        let row = ((rule.heads + 2 * rule.kv_heads) * d) as c_long;
        let own = rule.heads * d;
        // SAFETY: contiguous operands of the checked shapes on this device; outputs and scratch of the sizes asked for.
        launch(device, "delta_rule backward", |stream| unsafe {
            margay_delta_rule_bwd(
                x,
                part(x, own, 2),
                key_at,
                grad_at,
                dlast_at,
                saved_at,
                scratch_at,
                dx_at,
                part(dx_at, own, 2).cast_mut(),
                part(dx_at, 2 * own, 2).cast_mut(),
                dkey_at,
                dbeta.cast_mut(),
                dhead.cast_mut(),
                dfirst.cast_mut(),
                b,
                t,
                h,
                hkv,
                dim,
                row,
                3 * own as c_long,
                self.kind as c_int,
                rule.scale as f32,
                rule.normalize as c_int,
                stream,
            )
        })?;
        let mut dx = dx.tensor();
        if rule.heads != rule.kv_heads {
            // Query heads of a group share key and value.
            let shape = (self.batch, self.time, 2 * rule.kv_heads, rule.heads / rule.kv_heads, d);
            let shared = dx.narrow(2, rule.heads, 2 * rule.heads)?.to_dtype(DType::F32)?.reshape(shape)?.sum(3)?;
            dx = Tensor::cat(&[&dx.narrow(2, 0, rule.heads)?, &shared.to_dtype(DType::BF16)?], 2)?;
        }
        let dkey = (self.kind == Kind::Key).then(|| dkey.tensor());
        Ok([Some(dx), Some(dsmall.tensor()), dkey])
    }
}
