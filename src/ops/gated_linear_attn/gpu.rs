//! The CUDA form (`kernels/gated_linear_attn.cu`): bf16, tensor cores.

use std::ffi::{c_int, c_longlong, c_void};
use std::sync::{Arc, Mutex};

use candle_core::{D, DType, Result, Tensor, bail};

use super::super::cuda::{self, Output, device_of, launch, pointer};
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
}

/// Widest head the kernels hold.
const WIDEST: usize = 128;

pub fn ready(op: &GatedLinearAttn, q: &Tensor, v: &Tensor, gates: &Tensor) -> bool {
    let (Ok(key_dim), Ok(value_dim)) = (q.dim(D::Minus1), v.dim(D::Minus1)) else { return false };
    let (rows, columns) = op.sides(key_dim, value_dim, gates);
    let fits = key_dim <= WIDEST && value_dim <= WIDEST && q.dtype() == DType::BF16 && v.dtype() == DType::BF16;
    // SAFETY: reads attributes of the device.
    let shared = || unsafe { margay_gated_linear_attn_fits(rows as c_int, columns as c_int, op.gates_on(gates)) };
    fits && cuda::ready(q) && shared() != 0
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

/// Heads of other widths are filled up with zeros, which change nothing: keys of 0 write nothing and read nothing.
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

fn exact(
    op: &GatedLinearAttn,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gates: &Tensor,
    initial: Option<&Tensor>,
    bounds: Option<&[usize]>,
) -> Result<(Tensor, Tensor)> {
    let (b, t, ..) = q.dims4()?;
    let device = device_of(q)?;
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
    let run = Arc::new(Run {
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
    });
    let (y, last) = run.forward()?;

    // As on the CPU: a stand-in carries the gradients of queries, keys and values.
    let found = Arc::new(Mutex::new(None));
    let theirs = found.clone();
    let stand_in = Output::new(device, 1, DType::F32)?.node(
        [&run.q, &run.k, &run.v],
        "gated_linear_attn",
        Box::new(move |_, _, _| match theirs.lock().ok().and_then(|mut f| f.take()) {
            Some(grads) => Ok(grads),
            None => bail!("gated attention has no gradients to give"),
        }),
    )?;
    let kept = run.clone();
    let backward = move |grad: &Tensor| -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (inputs, gates, initial) = kept.backward(grad)?;
        if let Ok(mut found) = found.lock() {
            *found = Some(inputs);
        }
        Ok((Some(Tensor::zeros(1, DType::F32, grad.device())?), gates, initial))
    };
    let y = match &run.initial {
        None => y.node(
            [&stand_in, &run.gates],
            "gated_linear_attn",
            Box::new(move |_, _, grad| backward(grad).map(|(x, gates, _)| [x, gates])),
        )?,
        Some(initial) => y.node(
            [&stand_in, &run.gates, initial],
            "gated_linear_attn",
            Box::new(move |_, _, grad| backward(grad).map(|(x, gates, initial)| [x, gates, initial])),
        )?,
    };
    Ok((y, if swapped { last.t()? } else { last }))
}

type InputGrads = [Option<Tensor>; 3];

impl Run {
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
    fn backward(&self, grad: &Tensor) -> Result<(InputGrads, Option<Tensor>, Option<Tensor>)> {
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
        let inputs = [Some(dq.tensor()), Some(dk.tensor()), Some(dv.tensor())];
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
        let op = GatedLinearAttn { scale: (dims[3] as f64).powf(-0.5), gated: place.1 };
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
            for (k, v) in [(64, 64), (64, 128), (128, 64), (80, 96), (6, 5)] {
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

    #[test]
    fn packed_sequences_do_not_meet() {
        let Ok(device) = cuda::open(0) else { return eprintln!("no GPU, nothing checked") };
        let bounds = [0, 37, 37, 101, 300];
        for place in PLACES {
            let op = GatedLinearAttn { scale: 0.1, gated: place.1 };
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
