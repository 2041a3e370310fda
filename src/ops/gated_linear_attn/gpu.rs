//! The CUDA form (`kernels/gated_linear_attn.cu`): bf16, tensor cores.

use std::ffi::{c_int, c_longlong, c_void};
use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor, bail};

use super::super::cuda::{self, Output, device_of, joint, launch, pointer};
use super::{Channels, GatedLinearAttn};

unsafe extern "C" {
    fn margay_gated_linear_attn_fits(key_dim: c_int, value_dim: c_int, gates_on: c_int) -> c_int;
    fn margay_gated_linear_attn_scratch(
        sequences: c_int,
        time: c_longlong,
        packed: c_int,
        heads: c_int,
        key_dim: c_int,
        value_dim: c_int,
        backward: c_int,
    ) -> usize;
    fn margay_gated_linear_attn_fwd(
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        gates: *const c_void,
        initial: *const c_void,
        y: *mut c_void,
        last: *mut c_void,
        scratch: *mut c_void,
        starts: *const c_void,
        sequences: c_int,
        time: c_longlong,
        heads: c_int,
        key_dim: c_int,
        value_dim: c_int,
        gates_on: c_int,
        f32_gates: c_int,
        gate_stride: c_longlong,
        scale: f32,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_gated_linear_attn_bwd(
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        gates: *const c_void,
        initial: *const c_void,
        dy: *const c_void,
        dlast: *const c_void,
        dq: *mut c_void,
        dk: *mut c_void,
        dv: *mut c_void,
        dgates: *mut c_void,
        dinitial: *mut c_void,
        scratch: *mut c_void,
        starts: *const c_void,
        sequences: c_int,
        time: c_longlong,
        heads: c_int,
        key_dim: c_int,
        value_dim: c_int,
        gates_on: c_int,
        f32_gates: c_int,
        gate_stride: c_longlong,
        scale: f32,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_gated_count_starts(batch: c_int, time: c_int, heads: c_int, dim: c_int) -> usize;
    fn margay_gated_count(
        q: *const c_void,
        k: *const c_void,
        gates: *const c_void,
        count: *mut c_void,
        starts: *mut c_void,
        batch: c_int,
        time: c_int,
        heads: c_int,
        dim: c_int,
        per_channel: c_int,
        scale: f32,
        stream: *mut c_void,
    ) -> c_int;
    fn margay_gated_count_bwd(
        q: *const c_void,
        k: *const c_void,
        gates: *const c_void,
        dcount: *const c_void,
        starts: *const c_void,
        behind: *mut c_void,
        dq: *mut c_void,
        dk: *mut c_void,
        dgates: *mut c_void,
        batch: c_int,
        time: c_int,
        heads: c_int,
        dim: c_int,
        per_channel: c_int,
        scale: f32,
        stream: *mut c_void,
    ) -> c_int;
}

/// Widest head the kernels hold; wider ones run in pieces.
const WIDEST: usize = 128;

pub fn ready(op: &GatedLinearAttn, q: &Tensor, v: &Tensor, gates: &Tensor) -> bool {
    let (Ok(key_dim), Ok(value_dim)) = (q.dim(D::Minus1), v.dim(D::Minus1)) else { return false };
    let (rows, columns) = op.sides(key_dim.min(WIDEST), value_dim.min(WIDEST), gates);
    let narrow = q.dtype() == DType::BF16 && v.dtype() == DType::BF16;
    // SAFETY: reads attributes of the device.
    let shared = || unsafe { margay_gated_linear_attn_fits(rows as c_int, columns as c_int, op.gates_on(gates)) };
    narrow && cuda::ready(q) && shared() != 0
}

impl GatedLinearAttn {
    /// How the kernels call the place of the gates.
    fn gates_on(&self, gates: &Tensor) -> c_int {
        match self.gated {
            _ if gates.rank() != 4 => 0,
            Channels::Keys => 1,
            Channels::Values => 2,
        }
    }

    /// The sides of a state, the gated one first.
    fn sides(&self, key_dim: usize, value_dim: usize, gates: &Tensor) -> (usize, usize) {
        if self.gates_on(gates) == 2 { (value_dim, key_dim) } else { (key_dim, value_dim) }
    }
}

/// Of heads wider than the kernels hold, results of pieces of the keys add up and those of pieces of the values stand side by
/// side. Heads of other widths are filled up with zeros, which change nothing: keys of 0 write nothing and read nothing.
pub fn forward(
    op: &GatedLinearAttn,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gates: &Tensor,
    initial: Option<&Tensor>,
    bounds: Option<&[usize]>,
) -> Result<(Tensor, Tensor)> {
    let (key_dim, value_dim) = (q.dim(3)?, v.dim(3)?);
    if key_dim > WIDEST || value_dim > WIDEST {
        let side = if value_dim > WIDEST { Channels::Values } else { Channels::Keys };
        let width = if side == Channels::Values { value_dim } else { key_dim };
        let (mut results, mut states) = (Vec::new(), Vec::new());
        for from in (0..width).step_by(WIDEST) {
            let cut = |x: &Tensor, dim: usize, cuts: bool| match cuts {
                true => x.narrow(dim, from, WIDEST.min(width - from)),
                false => Ok(x.clone()),
            };
            let keys = |x: &Tensor| cut(x, 3, side == Channels::Keys);
            let gates = cut(gates, 3, gates.rank() == 4 && op.gated == side)?;
            let initial = initial.map(|s| cut(s, if side == Channels::Keys { 2 } else { 3 }, true)).transpose()?;
            let v = cut(v, 3, side == Channels::Values)?;
            let (y, last) = forward(op, &keys(q)?, &keys(k)?, &v, &gates, initial.as_ref(), bounds)?;
            results.push(y);
            states.push(last);
        }
        return match side {
            Channels::Values => Ok((Tensor::cat(&results, 3)?, Tensor::cat(&states, 3)?)),
            Channels::Keys => {
                let y = results[1..].iter().try_fold(results[0].clone(), |sum, part| sum + part)?;
                Ok((y, Tensor::cat(&states, 2)?))
            }
        };
    }
    let full = |n: usize| if n <= 64 { 64 } else { WIDEST };
    let (keys, values) = (full(key_dim), full(value_dim));
    if (keys, values) == (key_dim, value_dim) {
        return exact(op, q, k, v, gates, initial, bounds);
    }
    let wider = |x: &Tensor, dim: usize, to: usize| x.pad_with_zeros(dim, 0, to - x.dim(dim)?);
    let gates = match op.gates_on(gates) {
        0 => gates.clone(),
        1 => wider(gates, 3, keys)?,
        _ => wider(gates, 3, values)?,
    };
    let initial = initial.map(|s| wider(&wider(s, 2, keys)?, 3, values)).transpose()?;
    let (q, k, v) = (wider(q, 3, keys)?, wider(k, 3, keys)?, wider(v, 3, values)?);
    let (y, last) = exact(op, &q, &k, &v, &gates, initial.as_ref(), bounds)?;
    Ok((y.narrow(3, 0, value_dim)?, last.narrow(2, 0, key_dim)?.narrow(3, 0, value_dim)?))
}

/// One call's operands, kept for the backward pass.
struct Run {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    initial: Option<Tensor>,
    starts: Option<Tensor>,
    sequences: usize,
    time: usize,
    scale: f32,
    gates_on: c_int,
    gate_grad: bool,
}

/// Whether `counted` has kernels for these heads.
pub fn counts(op: &GatedLinearAttn, q: &Tensor, v: &Tensor, gates: &Tensor) -> bool {
    let whole = |x: &Tensor| x.dim(D::Minus1).is_ok_and(|n| n == 64 || n == WIDEST);
    op.gated == Channels::Keys && whole(q) && whole(v) && ready(op, q, v, gates)
}

/// The result, and in f32 the sums [B, T, H] of the weights it was made with (`kernels/gated_count.cu`).
pub fn counted(op: &GatedLinearAttn, q: &Tensor, k: &Tensor, v: &Tensor, gates: &Tensor) -> Result<(Tensor, Tensor)> {
    let run = Run::new(op, q, k, v, &gates.to_dtype(DType::F32)?, None, None)?;
    let (y, _) = run.forward()?;
    let (count, starts) = run.count()?;
    let kept = run.clone();
    let inputs = [&run.q, &run.k, &run.v, &run.gates];
    let mut results = joint(&inputs, vec![y, count], "gated_linear_attn", move |given| {
        let [y, count] = given else { bail!("{} gradients of two results", given.len()) };
        let none = || Tensor::zeros(kept.v.shape(), DType::BF16, kept.v.device());
        let dy = y.as_ref().map_or_else(none, |(_, grad)| Ok(grad.clone()))?;
        let (inputs, gates, _) = kept.backward(&dy)?;
        if let Some((_, grad)) = count {
            kept.count_backward(grad, &starts, &inputs, gates.as_ref())?;
        }
        Ok(inputs.into_iter().map(Some).chain([gates]).collect())
    })?;
    let count = results.swap_remove(1);
    Ok((results.swap_remove(0), count))
}

fn exact(
    op: &GatedLinearAttn,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gates: &Tensor,
    initial: Option<&Tensor>,
    bounds: Option<&[usize]>,
) -> Result<(Tensor, Tensor)> {
    let run = Run::new(op, q, k, v, gates, initial, bounds)?;
    let (y, last) = run.forward()?;
    let kept = run.clone();
    let mut inputs = vec![&run.q, &run.k, &run.v, &run.gates];
    inputs.extend(&run.initial);
    let mut results = joint(&inputs, vec![y], "gated_linear_attn", move |given| {
        let Some((_, grad)) = given.first().and_then(Option::as_ref) else {
            bail!("gated attention without a gradient")
        };
        let (inputs, gates, initial) = kept.backward(grad)?;
        Ok(inputs.into_iter().map(Some).chain([gates, initial]).collect())
    })?;
    Ok((results.swap_remove(0), if run.gates_on == 2 { last.t()? } else { last }))
}

impl Run {
    fn new(
        op: &GatedLinearAttn,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gates: &Tensor,
        initial: Option<&Tensor>,
        bounds: Option<&[usize]>,
    ) -> Result<Arc<Run>> {
        let (b, t, ..) = q.dims4()?;
        // Gates per head are few: always f32.
        let narrow = gates.dtype() == DType::BF16 && gates.rank() == 4;
        let gates = if narrow { gates.clone() } else { gates.to_dtype(DType::F32)? };
        let starts = match bounds {
            Some(bounds) => {
                let bounds: Vec<u32> = bounds.iter().map(|b| *b as u32).collect();
                Some(Tensor::new(bounds, q.device())?)
            }
            None => None,
        };
        let swapped = op.gates_on(&gates) == 2;
        Ok(Arc::new(Run {
            q: q.contiguous()?,
            k: k.to_dtype(DType::BF16)?.contiguous()?,
            v: v.contiguous()?,
            gate_grad: gates.track_op(),
            gates: gates.contiguous()?,
            initial: match initial {
                Some(s) if swapped => Some(s.to_dtype(DType::F32)?.t()?.contiguous()?),
                Some(s) => Some(s.to_dtype(DType::F32)?.contiguous()?),
                None => None,
            },
            gates_on: op.gates_on(&gates),
            sequences: bounds.map_or(b, |b| b.len() - 1),
            starts,
            time: t,
            scale: op.scale as f32,
        }))
    }

    /// B, T, H, K of the counts' kernels, and whether gates are per channel.
    fn count_sizes(&self) -> Result<[c_int; 5]> {
        let (b, t, h, k) = self.q.dims4()?;
        Ok([b, t, h, k, self.gates_on as usize].map(|n| n as c_int))
    }

    /// Sums of the weights [B, T, H], and the chunks' starts that their backward pass needs.
    fn count(&self) -> Result<(Output, Tensor)> {
        let [b, t, h, k, per_channel] = self.count_sizes()?;
        let device = device_of(&self.q)?;
        let count = Output::new(device, (b as usize, t as usize, h as usize), DType::F32)?;
        // SAFETY: arithmetic on sizes.
        let starts = Output::new(device, unsafe { margay_gated_count_starts(b, t, h, k) }, DType::F32)?;
        let (q_at, k_at, g_at) = (pointer(&self.q)?, pointer(&self.k)?, pointer(&self.gates)?);
        let (count_at, starts_at) = (count.pointer()?, starts.pointer()?);
        // SAFETY: contiguous bf16 queries and keys, f32 gates and counts of the sizes given, on this device.
        launch(device, "gated_count", |stream| unsafe {
            margay_gated_count(q_at, k_at, g_at, count_at, starts_at, b, t, h, k, per_channel, self.scale, stream)
        })?;
        Ok((count, starts.tensor()))
    }

    /// Adds what a gradient of the counts gives queries, keys and gates to theirs, which nothing else reads yet.
    fn count_backward(
        &self,
        grad: &Tensor,
        starts: &Tensor,
        inputs: &[Tensor; 3],
        gates: Option<&Tensor>,
    ) -> Result<()> {
        let [b, t, h, k, per_channel] = self.count_sizes()?;
        let device = device_of(&self.q)?;
        let behind = Output::new(device, starts.shape(), DType::F32)?;
        let (q_at, k_at, g_at) = (pointer(&self.q)?, pointer(&self.k)?, pointer(&self.gates)?);
        let (grad, starts, behind_at) = (pointer(grad)?, pointer(starts)?, behind.pointer()?);
        let (dq, dk) = (pointer(&inputs[0])?.cast_mut(), pointer(&inputs[1])?.cast_mut());
        let dg = gates.map(pointer).transpose()?.unwrap_or(std::ptr::null()).cast_mut();
        // SAFETY: as in `count`; the gradients were made for this backward pass and are like what they belong to.
        launch(device, "gated_count backward", |stream| unsafe {
            margay_gated_count_bwd(
                q_at,
                k_at,
                g_at,
                grad,
                starts,
                behind_at,
                dq,
                dk,
                dg,
                b,
                t,
                h,
                k,
                per_channel,
                self.scale,
                stream,
            )
        })
    }

    /// Heads, and the sides of a state, the gated one first.
    fn dims(&self) -> Result<(usize, usize, usize)> {
        let (h, k, v) = (self.q.dim(2)?, self.q.dim(3)?, self.v.dim(3)?);
        Ok(if self.gates_on == 2 { (h, v, k) } else { (h, k, v) })
    }

    fn scratch(&self, backward: bool) -> Result<Output> {
        let (h, k, v) = self.dims()?;
        let (sequences, packed) = (self.sequences as c_int, self.starts.is_some() as c_int);
        // SAFETY: plain arithmetic.
        let bytes = unsafe {
            margay_gated_linear_attn_scratch(
                sequences,
                self.time as c_longlong,
                packed,
                h as c_int,
                k as c_int,
                v as c_int,
                backward as c_int,
            )
        };
        Output::scratch(device_of(&self.q)?, bytes)
    }

    fn gate_stride(&self) -> c_longlong {
        self.gates.dims()[2..].iter().product::<usize>() as c_longlong
    }

    fn optional(x: &Option<Tensor>) -> Result<*const c_void> {
        Ok(x.as_ref().map(pointer).transpose()?.unwrap_or(std::ptr::null()))
    }

    fn forward(&self) -> Result<(Output, Tensor)> {
        let ((h, k, v), device) = (self.dims()?, device_of(&self.q)?);
        let y = Output::new(device, self.v.shape(), DType::BF16)?;
        let last = Output::new(device, (self.sequences, h, k, v), DType::F32)?;
        let scratch = self.scratch(false)?;
        let (q_at, k_at, v_at, g_at) = (pointer(&self.q)?, pointer(&self.k)?, pointer(&self.v)?, pointer(&self.gates)?);
        let (initial, starts) = (Run::optional(&self.initial)?, Run::optional(&self.starts)?);
        let (out, last_at, scratch_at) = (y.pointer()?, last.pointer()?, scratch.pointer()?);
        // SAFETY: contiguous operands of the shapes checked in `run`; the scratch has the size asked for.
        launch(device, "gated_linear_attn", |stream| unsafe {
            margay_gated_linear_attn_fwd(
                q_at,
                k_at,
                v_at,
                g_at,
                initial,
                out,
                last_at,
                scratch_at,
                starts,
                self.sequences as c_int,
                self.time as c_longlong,
                h as c_int,
                k as c_int,
                v as c_int,
                self.gates_on,
                (self.gates.dtype() == DType::F32) as c_int,
                self.gate_stride(),
                self.scale,
                stream,
            )
        })?;
        Ok((y, last.tensor()))
    }

    /// Gradients of queries, keys and values, of the gates, of the initial states.
    fn backward(&self, grad: &Tensor) -> Result<([Tensor; 3], Option<Tensor>, Option<Tensor>)> {
        let ((h, k, v), device) = (self.dims()?, device_of(&self.q)?);
        let grad = grad.to_dtype(DType::BF16)?.contiguous()?;
        let like = |x: &Tensor| Output::new(device, x.shape(), x.dtype());
        let (dq, dk, dv) = (like(&self.q)?, like(&self.k)?, like(&self.v)?);
        let dgates = if self.gate_grad { Some(like(&self.gates)?) } else { None };
        let dinitial = self.initial.as_ref().map(like).transpose()?;
        let scratch = self.scratch(true)?;
        let (q_at, k_at, v_at, g_at) = (pointer(&self.q)?, pointer(&self.k)?, pointer(&self.v)?, pointer(&self.gates)?);
        let (initial, starts) = (Run::optional(&self.initial)?, Run::optional(&self.starts)?);
        let address = |x: &Option<Output>| {
            Ok::<_, candle_core::Error>(match x {
                Some(x) => x.pointer()?,
                None => std::ptr::null_mut(),
            })
        };
        let (dy_at, dgates_at, dinitial_at) = (pointer(&grad)?, address(&dgates)?, address(&dinitial)?);
        let (dq_at, dk_at, dv_at, scratch_at) = (dq.pointer()?, dk.pointer()?, dv.pointer()?, scratch.pointer()?);
        // SAFETY: as in the forward pass; gradients have the shapes of their tensors.
        launch(device, "gated_linear_attn", |stream| unsafe {
            margay_gated_linear_attn_bwd(
                q_at,
                k_at,
                v_at,
                g_at,
                initial,
                dy_at,
                std::ptr::null(),
                dq_at,
                dk_at,
                dv_at,
                dgates_at,
                dinitial_at,
                scratch_at,
                starts,
                self.sequences as c_int,
                self.time as c_longlong,
                h as c_int,
                k as c_int,
                v as c_int,
                self.gates_on,
                (self.gates.dtype() == DType::F32) as c_int,
                self.gate_stride(),
                self.scale,
                stream,
            )
        })?;
        let inputs = [dq.tensor(), dk.tensor(), dv.tensor()];
        Ok((inputs, dgates.map(Output::tensor), dinitial.map(Output::tensor)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::super::check::{INPUTS, input};
    use super::super::tests::{KINDS, PLACES, sized};
    use super::*;

    /// ‖a - b‖ / ‖b‖, NaN where anything is.
    fn error(a: &Tensor, b: &Tensor) -> f64 {
        let flat = |x: &Tensor| -> Vec<f64> {
            x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(a.dims(), b.dims());
        let (a, b) = (flat(a), flat(b));
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-20)
    }

    /// Result, state and gradients against the plain form in f64 on the same bf16 inputs.
    fn check(what: &str, device: &Device, dims: [usize; 5], kind: &str, gate_kind: &str, place: (bool, Channels)) {
        let op = GatedLinearAttn { scale: (dims[3] as f64).powf(-0.5), gated: place.1, ..GatedLinearAttn::UNSCALED };
        let inputs = sized(kind, gate_kind, dims, place).map(|x| x.to_dtype(DType::BF16).unwrap());
        let weights = input("randn", &[dims[0], dims[1], dims[2], dims[4]], 9).to_dtype(DType::BF16).unwrap();
        let run = |device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
            let x: Vec<Var> = inputs
                .iter()
                .enumerate()
                .map(|(i, x)| {
                    Var::from_tensor(
                        &x.to_dtype(if i == 4 { super::super::super::wide(dtype) } else { dtype })?
                            .to_device(device)?,
                    )
                })
                .collect::<Result<_>>()?;
            let (y, last) = op.forward(&x[0], &x[1], &x[2], &x[3], Some(&x[4]))?;
            let weights = weights.to_dtype(y.dtype())?.to_device(device)?;
            let grads = (&y * weights)?.to_dtype(last.dtype())?.sum_all()?.backward()?;
            let mut out = vec![y, last];
            out.extend(x.iter().map(|v| grads.get(v).expect("every input has a gradient").clone()));
            Ok(out)
        };
        let (wanted, got) = (run(&Device::Cpu, DType::F64).expect(what), run(device, DType::BF16).expect(what));
        let again = run(device, DType::BF16).expect(what);
        for (i, name) in ["result", "state", "dq", "dk", "dv", "dgates", "dstate"].iter().enumerate() {
            assert_eq!(error(&again[i], &got[i]), 0.0, "{what}: {name} differs from run to run");
            // Gates that close leave gradients too small to compare.
            if *name == "dgates" && gate_kind == "strong" {
                continue;
            }
            // Rows, weights and states are rounded to bf16 once each before the tensor cores read them, results once
            // more: about twice what rounding the result alone costs, which is 1.7e-3.
            let error = error(&got[i], &wanted[i]);
            assert!(error < 6e-3, "{what}: {name} is off by {error:e}");
        }
    }

    #[test]
    fn kernels_equal_plain() {
        let Ok(device) = cuda::open(0) else { return eprintln!("no GPU, nothing checked") };
        for place in PLACES {
            for time in [1, 63, 64, 65, 1000] {
                check(&format!("{place:?}, {time}"), &device, [1, time, 2, 128, 128], "randn", "usual", place);
            }
            for (k, v) in [(64, 64), (64, 128), (128, 64), (80, 96), (6, 5), (153, 64), (64, 256), (273, 256)] {
                check(&format!("{place:?}, {k} x {v}"), &device, [2, 130, 3, k, v], "randn", "soft", place);
            }
            for kind in INPUTS {
                for gate_kind in KINDS {
                    let what = format!("{place:?}, {kind}, gates {gate_kind}");
                    check(&what, &device, [1, 130, 2, 64, 64], kind, gate_kind, place);
                }
            }
        }
        check("long", &device, [1, 4096, 1, 64, 64], "randn", "soft", PLACES[1]);
        check("long", &device, [1, 4096, 1, 64, 64], "randn", "soft", PLACES[0]);
    }

    /// Results and counts against a column of ones among the values.
    #[test]
    fn counts_equal_plain() {
        for (gates, dim) in [(true, 64), (true, 128), (false, 64), (false, 128)] {
            for (time, gate_kind) in
                [(1, "usual"), (31, "soft"), (64, "soft"), (130, "strong"), (1000, "soft"), (200, "cut")]
            {
                let op = GatedLinearAttn::UNSCALED;
                let [q, k, v, g, _] = sized("randn", gate_kind, [2, time, 3, dim, 64], (gates, Channels::Keys));
                // As features are: of one sign, so that sums do not cancel.
                let x = [q.abs().unwrap(), k.abs().unwrap(), v, g];
                let joined = |parts: Result<(Tensor, Tensor)>| {
                    let (y, count) = parts?;
                    let dtype = super::super::super::wide(y.dtype());
                    Tensor::cat(&[y.to_dtype(dtype)?, count.to_dtype(dtype)?], 3)
                };
                let plain = |x: &[Tensor]| {
                    let one = x[2].narrow(3, 0, 1)?.ones_like()?;
                    let all = op.chunked(&x[0], &x[1], &Tensor::cat(&[&x[2], &one], 3)?, &x[3], None)?.0;
                    joined(Ok((all.narrow(3, 0, 64)?, all.narrow(3, 64, 1)?)))
                };
                let what = format!("per channel: {gates}, {dim}, {time}, gates {gate_kind}");
                let ours = |x: &[Tensor]| joined(op.counted(&x[0], &x[1], &x[2], &x[3]));
                // The plain form keeps the gates' gradient in f32 up to its end; here two passes round it apart.
                super::super::super::check::check_gpu_within(5e-3, &what, &x, false, ours, plain);
            }
        }
    }

    #[test]
    fn packed_sequences_do_not_meet() {
        let Ok(device) = cuda::open(0) else { return eprintln!("no GPU, nothing checked") };
        let bounds = [0, 37, 37, 101, 300];
        for place in PLACES {
            let op = GatedLinearAttn { scale: 0.1, gated: place.1, ..GatedLinearAttn::UNSCALED };
            let [q, k, v, g, _] = sized("randn", "soft", [1, 300, 2, 64, 64], place)
                .map(|x| x.to_dtype(DType::BF16).unwrap().to_device(&device).unwrap());
            let (y, last) = op.forward_packed(&q, &k, &v, &g, None, &bounds).unwrap();
            for (n, bound) in bounds.windows(2).enumerate().filter(|(_, b)| b[0] < b[1]) {
                let part = |x: &Tensor| x.narrow(1, bound[0], bound[1] - bound[0]).unwrap();
                let (one, end) = op.forward(&part(&q), &part(&k), &part(&v), &part(&g), None).unwrap();
                assert_eq!(error(&part(&y), &one), 0.0, "{place:?}, {bound:?}");
                assert_eq!(error(&last.narrow(0, n, 1).unwrap(), &end), 0.0, "{place:?}, {bound:?}");
            }
        }
    }
}
