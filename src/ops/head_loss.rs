//! Output head and loss in one op: logits are formed for a block of rows at a time and never kept.
//!
//! ```text
//! z = h Wᵀ, or cap tanh(h Wᵀ / cap)                     h [M, N], W [V, N]
//! loss = Σ_i m_i (ce · -log softmax(z_i)[target_i] + kl · KL(softmax(z'_i) || softmax(z_i))) / Σ m
//! ```
//! with z' the teacher's logits from its own hidden state h', through the same head or one of its own. The gradient with
//! respect to h, and to W where that trains, is computed in the same pass, block by block. The KL may also be taken the
//! other way round, at another temperature, or over the teacher's likeliest tokens ([`Kl`]); these run in plain tensor
//! operations.

use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;

use super::softmax_attn::bend;
use super::{cpu, loss};
use crate::recipe::{Direction, Kl};

/// What makes logits of hidden states.
#[derive(Debug, Clone)]
pub struct Head {
    /// [V, N]
    pub weight: Tensor,
    /// Logits are bent to stay between -cap and cap.
    pub softcap: Option<f64>,
    /// What trains of the weight, [V, N] in f32 or wider: it gets the weight's gradient.
    pub trained: Option<Tensor>,
}

impl From<&Tensor> for Head {
    fn from(weight: &Tensor) -> Self {
        Head { weight: weight.clone(), softcap: None, trained: None }
    }
}

impl Head {
    /// Logits [M, V] of `h` [M, N].
    fn logits(&self, h: &Tensor) -> Result<Tensor> {
        let z = h.matmul(&self.weight.t()?)?;
        self.softcap.map_or(Ok(z.clone()), |cap| bend(&z, cap))
    }

    /// The gradient of what is bent from that of bent logits `z`: tanh' = 1 - tanh².
    fn unbend(&self, gradient: Tensor, z: &Tensor) -> Result<Tensor> {
        let Some(cap) = self.softcap else { return Ok(gradient) };
        let slope = (1.0 - (z / cap)?.sqr()?)?.to_dtype(gradient.dtype())?;
        gradient * slope
    }
}

/// What [`head_loss`] optimises and measures.
pub struct Target<'a> {
    /// `[M]` u32, the next token of each row.
    pub tokens: &'a Tensor,
    /// `[M]` f32, 0 where a row does not count.
    pub mask: Option<&'a Tensor>,
    /// [M, N], the teacher's final hidden state.
    pub teacher: Option<&'a Tensor>,
    /// The teacher's head where it is another one.
    pub teacher_head: Option<&'a Head>,
    pub ce_weight: f64,
    pub kl_weight: f64,
    /// What the KL is; the default is KL(teacher || student) of the distributions as they are.
    pub kl: Kl,
}

/// Sums over the rows that count.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    pub rows: f64,
    /// Negative log-likelihood of the targets, nats.
    pub nll: f64,
    /// The divergence from the teacher, nats; 0 without a teacher.
    pub kl: f64,
    /// Rows where student and teacher agree on the most likely token.
    pub agree: f64,
    /// Negative log-likelihood under the teacher, nats.
    pub teacher_nll: f64,
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, o: Sums) {
        self.rows += o.rows;
        self.nll += o.nll;
        self.kl += o.kl;
        self.agree += o.agree;
        self.teacher_nll += o.teacher_nll;
    }
}

/// Rows whose logits are in memory at once: near 64 MB of them on the CPU; on a GPU, which needs more at once to be
/// busy, near 256 MB.
pub fn block_rows(vocab: usize, gpu: bool) -> usize {
    let logits: usize = if gpu { 128 << 20 } else { 16 << 20 };
    (logits / vocab).clamp(16, if gpu { 4096 } else { 1024 })
}

/// The loss, a scalar with gradient to `h` and to what trains of the head. Nothing waits for the device.
pub fn head_loss(h: &Tensor, head: impl Into<Head>, target: &Target) -> Result<Tensor> {
    let head = head.into();
    let (parts, per_row, [gradient, of_weight]) = run(&h.detach(), &head, target, true)?;
    let weights = [0.0, target.ce_weight, target.kl_weight, 0.0, 0.0].map(|w| w * per_row);
    let weights = Tensor::new(&weights, h.device())?.to_dtype(parts.dtype())?;
    let value = (parts * weights)?.sum_all()?.to_dtype(super::wide(h.dtype()))?;
    let gradient = gradient.map_or_else(|| h.zeros_like(), Ok)?;
    let loss = loss::with_gradient(h, value, gradient)?;
    match (&head.trained, of_weight) {
        (Some(trained), Some(gradient)) => &loss + loss::with_gradient(trained, loss.zeros_like()?, gradient)?,
        _ => Ok(loss),
    }
}

/// The parts alone, no gradient.
pub fn measure(h: &Tensor, head: impl Into<Head>, target: &Target) -> Result<Sums> {
    let parts = run(h, &head.into(), target, false)?.0.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let [rows, nll, kl, agree, teacher_nll] = parts[..] else { candle_core::bail!("{} sums of a loss", parts.len()) };
    Ok(Sums { rows, nll, kl, agree, teacher_nll })
}

/// The fields of [`Sums`] in order as a tensor `[5]` on the device, the weight of a row, the gradients of `h` and of the
/// head's weight, the latter in f32 or wider.
fn run(h: &Tensor, head: &Head, target: &Target, with_gradient: bool) -> Result<(Tensor, f64, [Option<Tensor>; 2])> {
    let rows = h.dim(0)?;
    let count = match target.mask {
        Some(mask) => mask.sum_all()?.to_scalar::<f32>()? as f64,
        None => rows as f64,
    };
    let per_row = 1.0 / count.max(1.0);
    let (mut sums, mut gradients, mut of_weight) = (Vec::new(), Vec::new(), None::<Tensor>);
    let block = block_rows(head.weight.dim(0)?, !h.device().is_cpu());
    for start in (0..rows).step_by(block) {
        let n = block.min(rows - start);
        let (mask, teacher) = (target.mask, target.teacher);
        let mask = mask.map(|m| m.narrow(0, start, n)).transpose()?;
        let teacher = teacher.map(|t| t.narrow(0, start, n)).transpose()?;
        let tokens = target.tokens.narrow(0, start, n)?;
        let part = Target { tokens: &tokens, mask: mask.as_ref(), teacher: teacher.as_ref(), ..*target };
        let h = h.narrow(0, start, n)?;
        let logits = head.logits(&h)?;
        // A kernel may write the gradient over the logits.
        let kept = if head.softcap.is_some() && with_gradient { logits.copy()? } else { logits.clone() };
        let teacher = part.teacher.map(|t| part.teacher_head.unwrap_or(head).logits(t)).transpose()?;
        let (s, gradient) = block_loss(logits, teacher.as_ref(), &part, per_row, with_gradient)?;
        sums.push(s);
        if with_gradient {
            let gradient = head.unbend(gradient, &kept)?;
            if head.trained.is_some() {
                let dtype = super::wide(h.dtype());
                let part = gradient.to_dtype(dtype)?.t()?.matmul(&h.to_dtype(dtype)?)?; // [V, N]
                of_weight = Some(of_weight.map_or(Ok(part.clone()), |sum| sum + part)?);
            }
            gradients.push(gradient.to_dtype(h.dtype())?.matmul(&head.weight)?);
        }
    }
    let gradient = if gradients.is_empty() { None } else { Some(Tensor::cat(&gradients, 0)?) };
    Ok((Tensor::stack(&sums, 0)?.sum(0)?, per_row, [gradient, of_weight]))
}

/// Sums `[5]` and ∂loss/∂logits of one block, by the fastest form there is.
fn block_loss(
    logits: Tensor,
    teacher: Option<&Tensor>,
    target: &Target,
    per_row: f64,
    with_gradient: bool,
) -> Result<(Tensor, Tensor)> {
    if teacher.is_some() && target.kl != Kl::default() {
        return plain_block(&logits, teacher, target, per_row);
    }
    #[cfg(feature = "cuda")]
    if super::cuda::ready(&logits) {
        return gpu_block(logits, teacher, target, per_row, with_gradient);
    }
    let _ = with_gradient; // the forms below give it in the same pass
    if !super::fast(&logits) {
        return plain_block(&logits, teacher, target, per_row);
    }
    let (s, gradient) = fast_block(&logits, teacher, target, per_row)?;
    Ok((Tensor::new(&[s.rows, s.nll, s.kl, s.agree, s.teacher_nll], logits.device())?, gradient))
}

/// The kernel writes the gradient over the logits.
#[cfg(feature = "cuda")]
fn gpu_block(
    logits: Tensor,
    teacher: Option<&Tensor>,
    target: &Target,
    per_row: f64,
    with_gradient: bool,
) -> Result<(Tensor, Tensor)> {
    use super::cuda::{Output, code, device_of, launch, pointer};
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn margay_head_loss(
            z: *mut c_void,
            t: *const c_void,
            tokens: *const c_void,
            mask: *const c_void,
            stats: *mut c_void,
            rows: c_int,
            vocab: c_int,
            ce: f32,
            kl: f32,
            per_row: f32,
            gradient: c_int,
            dtype: c_int,
            stream: *mut c_void,
        ) -> c_int;
    }
    let ((rows, vocab), device) = (logits.dims2()?, device_of(&logits)?);
    let stats = Output::new(device, (rows, 5), DType::F32)?;
    let optional = |x: Option<&Tensor>| x.map(pointer).transpose().map(|p| p.unwrap_or(std::ptr::null()));
    // The logits were made by the caller's product and belong to this call alone.
    let z = pointer(&logits)?.cast_mut();
    let (t, mask) = (optional(teacher)?, optional(target.mask)?);
    let (tokens, out, dtype) = (pointer(target.tokens)?, stats.pointer()?, code(logits.dtype())?);
    let [ce, kl, weight] = [target.ce_weight, target.kl_weight, per_row].map(|x| x as f32);
    let (rows, vocab, gradient) = (rows as c_int, vocab as c_int, with_gradient as c_int);
    // SAFETY: contiguous [rows, vocab], `[rows]` and [rows, 5], of the precisions the kernel names, on this device.
    launch(device, "head_loss", |stream| unsafe {
        margay_head_loss(z, t, tokens, mask, out, rows, vocab, ce, kl, weight, gradient, dtype, stream)
    })?;
    Ok((stats.tensor().sum(0)?, logits))
}

/// log softmax(z) over the last axis, at least in f32.
fn log_softmax(z: &Tensor) -> Result<Tensor> {
    let z = z.to_dtype(super::wide(z.dtype()))?;
    let z = z.broadcast_sub(&z.max_keepdim(D::Minus1)?)?;
    z.broadcast_sub(&z.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// Sums `[5]` and ∂loss/∂logits of one block, in plain tensor operations.
fn plain_block(logits: &Tensor, teacher: Option<&Tensor>, target: &Target, per_row: f64) -> Result<(Tensor, Tensor)> {
    let (dtype, device) = (super::wide(logits.dtype()), logits.device());
    let tokens = target.tokens.unsqueeze(1)?;
    let mask = match target.mask {
        Some(mask) => mask.to_dtype(dtype)?,
        None => Tensor::ones(logits.dim(0)?, dtype, device)?,
    };
    let total = |x: &Tensor| (x * &mask)?.to_dtype(DType::F64)?.sum_all();
    let nll = |log_p: &Tensor| total(&log_p.gather(&tokens, 1)?.squeeze(1)?.neg()?);
    let log_p = log_softmax(logits)?;
    let p = log_p.exp()?;
    let hot = Tensor::zeros(p.shape(), dtype, device)?;
    let hot = hot.scatter_add(&tokens, &Tensor::ones(tokens.shape(), dtype, device)?, 1)?;
    let mut gradient = ((&p - hot)? * target.ce_weight)?;
    let zero = Tensor::zeros((), DType::F64, device)?;
    let mut of_teacher = [zero.clone(), zero.clone(), zero];
    if let Some(teacher) = teacher {
        let (divergence, slope) = divergence(logits, teacher, target.kl)?;
        gradient = (gradient + (slope * target.kl_weight)?)?;
        let log_t = log_softmax(teacher)?;
        let agree = log_t.argmax(1)?.eq(&log_p.argmax(1)?)?.to_dtype(dtype)?;
        of_teacher = [total(&divergence)?, total(&agree)?, nll(&log_t)?];
    }
    let [kl, agree, teacher_nll] = of_teacher;
    let sums = Tensor::stack(&[mask.to_dtype(DType::F64)?.sum_all()?, nll(&log_p)?, kl, agree, teacher_nll], 0)?;
    Ok((sums, (gradient.broadcast_mul(&mask.unsqueeze(1)?)? * per_row)?))
}

/// The divergence of every row `[rows]` and its gradient in the student's logits z [rows, V]. With q = softmax(z / τ) and
/// p = softmax(t / τ), where the tokens outside the teacher's first k count as one:
///
/// ```text
/// forward   τ² Σ p log(p / q)      ∂/∂z_j = τ (q_j - p_j),                 for j outside: τ q_j (1 - P / Q)
/// reverse   τ² Σ q log(q / p)      ∂/∂z_j = τ q_j (log(q_j / p_j) - KL),   for j outside: log(Q / P)
/// ```
/// with P and Q what lies outside in all.
fn divergence(logits: &Tensor, teacher: &Tensor, kl: Kl) -> Result<(Tensor, Tensor)> {
    let tau = kl.temperature;
    let scaled = |z: &Tensor| log_softmax(&(z.to_dtype(super::wide(z.dtype()))? / tau)?);
    let (log_q, mut log_p) = (scaled(logits)?, scaled(teacher)?);
    let q = log_q.exp()?;
    let mut p = log_p.exp()?;
    if kl.top_k > 0 && kl.top_k < logits.dim(1)? {
        // Outside, the teacher is taken to split its mass as the student does: the ratio is P / Q at every token.
        let inside = likeliest(&log_p, kl.top_k)?;
        let outside = inside.eq(0u8)?.to_dtype(q.dtype())?;
        let mass = |x: &Tensor| (x * &outside)?.sum_keepdim(1)?.maximum(1e-30)?.log();
        let log_ratio = (mass(&p)? - mass(&q)?)?;
        log_p = inside.where_cond(&log_p, &log_q.broadcast_add(&log_ratio)?)?;
        p = log_p.exp()?;
    }
    let difference = (log_q - log_p)?;
    let (rows, slope) = match kl.direction {
        Direction::Forward => ((&p * &difference)?.sum(1)?.neg()?, (q - p)?),
        Direction::Reverse => {
            let rows = (&q * &difference)?.sum(1)?;
            let slope = (q * difference.broadcast_sub(&rows.unsqueeze(1)?)?)?;
            (rows, slope)
        }
    };
    Ok(((rows * (tau * tau))?, (slope * tau)?))
}

/// 1 at the `k` largest entries of every row of `x` [rows, V], ties of the last included: u8. Halves the range of the
/// smallest of them, because a sort of a vocabulary does not fit a GPU's block.
fn likeliest(x: &Tensor, k: usize) -> Result<Tensor> {
    /// Halvings after which f32 has no number left between the ends.
    const HALVINGS: usize = 48;
    let (mut low, mut high) = (x.min_keepdim(1)?, (x.max_keepdim(1)? + 1.0)?);
    for _ in 0..HALVINGS {
        let middle = ((&low + &high)? * 0.5)?;
        let count = x.broadcast_ge(&middle)?.to_dtype(DType::F32)?.sum_keepdim(1)?;
        let enough = count.ge(k as f64)?;
        low = enough.where_cond(&middle, &low)?;
        high = enough.where_cond(&high, &middle)?;
    }
    x.broadcast_ge(&low)
}

/// The same on f32 slices, one pass over each row.
fn fast_block(logits: &Tensor, teacher: Option<&Tensor>, target: &Target, per_row: f64) -> Result<(Sums, Tensor)> {
    let (rows, vocab) = logits.dims2()?;
    let tokens = target.tokens.to_vec1::<u32>()?;
    if let Some(bad) = tokens.iter().find(|t| **t as usize >= vocab) {
        candle_core::bail!("target token {bad} is outside the vocabulary of {vocab}");
    }
    let mask = target.mask.map(|m| m.to_vec1::<f32>()).transpose()?;
    let mut out = vec![0f32; rows * vocab];
    let mut row_sums = vec![Sums::default(); rows];
    let mut run = |z: &[f32], t: Option<&[f32]>| {
        out.par_chunks_mut(vocab).zip(&mut row_sums).enumerate().for_each(|(i, (out, sums))| {
            let m = mask.as_ref().map_or(1.0, |m| m[i]);
            if m == 0.0 {
                return;
            }
            let z = &z[i * vocab..(i + 1) * vocab];
            let token = tokens[i] as usize;
            cpu::vectorised(
                #[inline(always)]
                || {
                    let top = cpu::max(z);
                    for (p, z) in out.iter_mut().zip(z) {
                        *p = cpu::exp(z - top);
                    }
                    let sum = cpu::sum(out);
                    let log_sum = sum.ln() + top;
                    let scale =
                        (target.ce_weight + if t.is_some() { target.kl_weight } else { 0.0 }) * per_row * m as f64;
                    let to_p = (scale / sum as f64) as f32;
                    *sums = Sums { rows: m as f64, nll: (m * (log_sum - z[token])) as f64, ..Sums::default() };
                    match t {
                        None => out.iter_mut().for_each(|p| *p *= to_p),
                        Some(t) => {
                            let t = &t[i * vocab..(i + 1) * vocab];
                            let top_t = cpu::max(t);
                            let mut sum_t = 0f32;
                            let mut cross = 0f32; // Σ e^t (t - z)
                            const LANES: usize = 16;
                            let (mut sums_t, mut crosses) = ([0f32; LANES], [0f32; LANES]);
                            let whole = vocab / LANES * LANES;
                            for j in (0..whole).step_by(LANES) {
                                for l in 0..LANES {
                                    let e = cpu::exp(t[j + l] - top_t);
                                    sums_t[l] += e;
                                    crosses[l] += e * (t[j + l] - z[j + l]);
                                }
                            }
                            for j in whole..vocab {
                                let e = cpu::exp(t[j] - top_t);
                                sum_t += e;
                                cross += e * (t[j] - z[j]);
                            }
                            sum_t += sums_t.iter().sum::<f32>();
                            cross += crosses.iter().sum::<f32>();
                            let log_sum_t = sum_t.ln() + top_t;
                            let from_t = (target.kl_weight * per_row * m as f64 / sum_t as f64) as f32;
                            for j in 0..vocab {
                                out[j] = out[j] * to_p - cpu::exp(t[j] - top_t) * from_t;
                            }
                            sums.kl = (m * (cross / sum_t - log_sum_t + log_sum)) as f64;
                            sums.teacher_nll = (m * (log_sum_t - t[token])) as f64;
                            let first = |x: &[f32], top: f32| x.iter().position(|v| *v == top);
                            sums.agree = if first(z, top) == first(t, top_t) { m as f64 } else { 0.0 };
                        }
                    }
                    out[token] -= (target.ce_weight * per_row * m as f64) as f32;
                },
            );
        });
        Ok(())
    };
    cpu::with(logits, |z| match teacher {
        Some(t) => cpu::with(t, |t| run(z, Some(t))),
        None => run(z, None),
    })?;
    let mut sums = Sums::default();
    row_sums.into_iter().for_each(|s| sums += s);
    Ok((sums, Tensor::from_vec(out, (rows, vocab), logits.device())?))
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, input};
    use super::*;
    use candle_core::Device;

    /// The definition by autograd over whole logits. The `k` likeliest tokens of the teacher are those that at most
    /// `k` - 1 others exceed.
    fn oracle(h: &Tensor, head: &Tensor, target: &Target) -> Result<Tensor> {
        capped_oracle(h, head, None, target)
    }

    /// The same where the model bends its logits.
    fn capped_oracle(h: &Tensor, head: &Tensor, softcap: Option<f64>, target: &Target) -> Result<Tensor> {
        let log_p = |z: &Tensor, tau: f64| -> Result<Tensor> {
            let z = (z.to_dtype(super::super::wide(z.dtype()))? / tau)?; // as precise as the product that made them
            let z = z.broadcast_sub(&z.max_keepdim(1)?.detach())?;
            z.broadcast_sub(&z.exp()?.sum_keepdim(1)?.log()?)
        };
        let logits = |h: &Tensor| {
            let z = h.matmul(&head.t()?)?;
            softcap.map_or(Ok(z.clone()), |cap| (z / cap)?.tanh()? * cap)
        };
        let z = logits(h)?;
        let tokens = target.tokens.unsqueeze(1)?;
        let mut rows = (log_p(&z, 1.0)?.gather(&tokens, 1)?.squeeze(1)? * -target.ce_weight)?;
        if let Some(teacher) = target.teacher {
            let Kl { direction, temperature: tau, top_k } = target.kl;
            let t = logits(teacher)?;
            let (mut q, mut p) = (log_p(&z, tau)?, log_p(&t, tau)?);
            if top_k > 0 && top_k < z.dim(1)? {
                let above = t.unsqueeze(1)?.broadcast_gt(&t.unsqueeze(2)?)?.to_dtype(q.dtype())?.sum(2)?;
                let inside = above.lt(top_k as f64)?;
                // The tokens outside as one more column, in place of theirs, which get no probability.
                let never = (q.ones_like()? * -1e9)?;
                let lump = |x: &Tensor| -> Result<Tensor> {
                    let rest = (x.exp()? * inside.eq(0u8)?.to_dtype(x.dtype())?)?.sum_keepdim(1)?.log()?;
                    Tensor::cat(&[inside.where_cond(x, &never)?, rest], 1)
                };
                (q, p) = (lump(&q)?, lump(&p)?);
            }
            let (of, other) = if direction == Direction::Forward { (&p, &q) } else { (&q, &p) };
            let kl = ((of.exp()? * (of - other)?)?.sum(1)? * (tau * tau))?;
            rows = (rows + (kl * target.kl_weight)?)?;
        }
        match target.mask {
            Some(mask) => (rows * mask)?.sum_all()?.div(&mask.sum_all()?),
            None => rows.mean_all(),
        }
    }

    /// Every way to take the divergence.
    fn divergences() -> Vec<Kl> {
        let ways = [(1.0, 0), (2.5, 0), (1.0, 7), (0.5, 1), (1.0, 49), (1.0, 1000)];
        let both = |(temperature, top_k)| {
            [Direction::Forward, Direction::Reverse].map(|direction| Kl { direction, temperature, top_k })
        };
        ways.into_iter().flat_map(both).collect()
    }

    #[test]
    fn fast_and_plain_equal_autograd() {
        let (rows, width, vocab) = (37, 6, 50);
        let tokens = Tensor::from_iter((0..rows as u32).map(|i| i * 7 % vocab), &Device::Cpu).unwrap();
        let mask = Tensor::from_iter((0..rows).map(|i| (i % 3 != 0) as u8 as f64), &Device::Cpu).unwrap();
        let (head, t) = (input("randn", &[vocab as usize, width], 2), input("randn", &[rows, width], 3));
        for (masked, taught) in [(false, false), (true, false), (false, true), (true, true)] {
            let ways = if taught { divergences() } else { vec![Kl::default()] };
            for (kl, plain) in ways.into_iter().flat_map(|kl| [(kl, false), (kl, true)]) {
                check(&format!("head_loss {kl:?}"), &[input("randn", &[rows, width], 1)], 5e-6, |x| {
                    let dtype = x[0].dtype();
                    let (mask, t, head) = (mask.to_dtype(dtype)?, t.to_dtype(dtype)?, head.to_dtype(dtype)?);
                    let target = Target {
                        tokens: &tokens,
                        mask: masked.then_some(&mask),
                        teacher: taught.then_some(&t),
                        teacher_head: None,
                        ce_weight: 0.7,
                        kl_weight: 1.3,
                        kl,
                    };
                    match (dtype, plain) {
                        (DType::F64, false) => oracle(&x[0], &head, &target),
                        (DType::F32, true) => oracle(&x[0], &head, &target),
                        _ => {
                            let mask = mask.to_dtype(DType::F32)?;
                            head_loss(&x[0], &head, &Target { mask: masked.then_some(&mask), ..target })
                        }
                    }
                });
            }
        }
    }

    #[test]
    fn bent_logits_have_the_gradient_of_what_they_are_bent_from() {
        let (rows, width, vocab) = (37, 6, 50);
        let tokens = Tensor::from_iter((0..rows as u32).map(|i| i * 7 % vocab), &Device::Cpu).unwrap();
        let (head, t) = (input("randn", &[vocab as usize, width], 2), input("randn", &[rows, width], 3));
        for (kl, plain) in divergences().into_iter().flat_map(|kl| [(kl, false), (kl, true)]) {
            check(&format!("bent head_loss {kl:?}"), &[input("randn", &[rows, width], 1)], 5e-6, |x| {
                let (t, head) = (t.to_dtype(x[0].dtype())?, head.to_dtype(x[0].dtype())?);
                let target = Target {
                    tokens: &tokens,
                    mask: None,
                    teacher: Some(&t),
                    teacher_head: None,
                    ce_weight: 0.7,
                    kl_weight: 1.3,
                    kl,
                };
                match (x[0].dtype(), plain) {
                    (DType::F64, false) | (DType::F32, true) => capped_oracle(&x[0], &head, Some(2.5), &target),
                    _ => head_loss(&x[0], Head { softcap: Some(2.5), ..Head::from(&head) }, &target),
                }
            });
        }
    }

    /// A head that trains beside a teacher's own, whose gradient is the sum over several blocks of rows.
    #[test]
    fn a_head_that_trains_has_its_gradient() {
        let (vocab, width) = (50, 6);
        let rows = block_rows(vocab, false) + 29;
        let tokens = Tensor::from_iter((0..rows as u32).map(|i| i * 7 % vocab as u32), &Device::Cpu).unwrap();
        let (t, own) = (input("randn", &[rows, width], 3), input("randn", &[vocab, width], 4));
        let inputs = [input("randn", &[rows, width], 1), input("randn", &[vocab, width], 2)];
        for softcap in [None, Some(2.5)] {
            check(&format!("head that trains, bent {softcap:?}"), &inputs, 5e-6, |x| {
                let (t, own) = (t.to_dtype(x[0].dtype())?, own.to_dtype(x[0].dtype())?);
                let own = Head { softcap, ..Head::from(&own) };
                let target = Target {
                    tokens: &tokens,
                    mask: None,
                    teacher: Some(&t),
                    teacher_head: Some(&own),
                    ce_weight: 0.7,
                    kl_weight: 1.3,
                    kl: Kl::default(),
                };
                let head = Head { weight: x[1].detach(), softcap, trained: Some(x[1].clone()) };
                match x[0].dtype() {
                    // The definition through the gradient of whole logits.
                    DType::F64 => {
                        let z = x[0].matmul(&x[1].t()?)?;
                        let z = softcap.map_or(Ok(z.clone()), |cap| (z / cap)?.tanh()? * cap)?;
                        let log_p = |z: &Tensor| z.broadcast_sub(&z.exp()?.sum_keepdim(1)?.log()?);
                        let (log_q, log_t) = (log_p(&z)?, log_p(&own.logits(&t)?)?);
                        let ce = log_q.gather(&tokens.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
                        let kl = (log_t.exp()? * (&log_t - &log_q)?)?.sum(1)?;
                        ((ce * 0.7)? + (kl * 1.3)?)?.mean_all()
                    }
                    _ => head_loss(&x[0], head, &target),
                }
            });
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn gpu_equals_autograd() {
        let (rows, width, vocab) = (300, 64, 1000);
        for (masked, taught) in [(false, false), (true, false), (false, true), (true, true)] {
            let with = |x: &Tensor, loss: &dyn Fn(&Tensor, &Target) -> Result<Tensor>| -> Result<Tensor> {
                let (device, dtype) = (x.device(), x.dtype());
                let there = |t: Tensor| t.to_dtype(DType::BF16)?.to_dtype(dtype)?.to_device(device);
                let tokens = Tensor::from_iter((0..rows as u32).map(|i| i * 7 % vocab), device)?;
                let mask = Tensor::from_iter((0..rows).map(|i| (i % 3 != 0) as u8 as f32), device)?;
                let mask = mask.to_dtype(super::super::wide(dtype))?;
                let (head, t) =
                    (there(input("randn", &[vocab as usize, width], 2))?, there(input("randn", &[rows, width], 3))?);
                let (mask, teacher) = (masked.then_some(&mask), taught.then_some(&t));
                loss(
                    &head,
                    &Target {
                        tokens: &tokens,
                        mask,
                        teacher,
                        teacher_head: None,
                        ce_weight: 0.7,
                        kl_weight: 1.3,
                        kl: Kl::default(),
                    },
                )
            };
            super::super::check::check_gpu(
                &format!("masked {masked}, taught {taught}"),
                &[input("randn", &[rows, width], 1)],
                false,
                |x| with(&x[0], &|head, target| head_loss(&x[0], head, target)),
                |x| with(&x[0], &|head, target| oracle(&x[0], head, target)),
            );
        }
    }
}
