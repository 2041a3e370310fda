//! Training: the optimiser against loops, stage gradients against one graph of the whole loss.

#[path = "common/random.rs"]
mod random;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor, Var};
use margay::convert::recover::Recover;
use margay::convert::swap::swap;
use margay::convert::transfer::Transfer;
use margay::data::Batch;
use margay::families::Projection;
use margay::mixers::lolcats::Config;
use margay::model::{Decoder, Net};
use margay::params::{Adapters, Param};
use margay::recipe;
use margay::train::adamw::AdamW;
use margay::train::{Grads, Task};
use random::{close, close_slices, flat, randn};
use serde_json::json;

const CPU: Device = Device::Cpu;
type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A random model of three layers whose outer two are converted, and four sequences.
struct Setup {
    decoder: Decoder,
    teacher: Net,
    student: Net,
    batch: Batch,
}

fn nudge(params: &[Param], size: f64) -> Result {
    for (n, param) in params.iter().enumerate() {
        let noise = (randn(param.var.dims(), 500 + n as u64) * size)?.to_dtype(DType::F32)?;
        param.var.set(&(param.var.as_tensor() + noise)?)?;
    }
    Ok(())
}

fn setup() -> Result<Setup> {
    let config = tiny_model::config(json!({}));
    let folder = tiny_model::folder(&config, &tiny_model::weights(&config));
    let (model, decoder) = tiny_model::open(folder.path())?;
    let student = swap(model.architecture(), &Config { window: 4, ..Config::default() }, &[0, 2], 1, &CPU)?;
    student.mixers.iter().try_for_each(|m| nudge(m.params(), 0.3))?;
    let (rows, time, vocab) = (4, 24, decoder.architecture.vocab);
    let tokens = |seed| {
        let ids = flat(&randn(&[rows, time], seed)).into_iter().map(|x| (x.abs() * 1e4) as u32 % vocab as u32);
        Tensor::from_iter(ids, &CPU)?.reshape((rows, time))
    };
    let mask = randn(&[rows, time], 3).ge(-0.5)?.to_dtype(DType::F32)?;
    let batch = Batch { inputs: tokens(1)?, targets: tokens(2)?, mask: Some(mask) };
    Ok(Setup { teacher: Net::teacher(model.architecture()), decoder, student, batch })
}

impl Setup {
    /// Adapters on every projection, B not zero, so that A has a gradient.
    fn adapt(&mut self, dropout: f64) -> Result {
        let lora = recipe::Lora { rank: 4, alpha: 8.0, dropout, targets: Vec::new() };
        let adapters = Adapters::new(&self.decoder.architecture, &Projection::ALL, &lora, 9, &CPU)?;
        nudge(&adapters.params(), 0.1)?;
        self.student.adapters = Some(adapters);
        Ok(())
    }

    /// Rows `from..from + count` of the batch.
    fn rows(&self, from: usize, count: usize) -> Result<Batch> {
        let cut = |x: &Tensor| x.narrow(0, from, count);
        let Batch { inputs, targets, mask } = &self.batch;
        Ok(Batch { inputs: cut(inputs)?, targets: cut(targets)?, mask: mask.as_ref().map(cut).transpose()? })
    }
}

/// Gradients of a task over batches with these shares.
fn gradients(task: &mut dyn Task, parts: &[(Batch, f64)], position: u64) -> Result<(Vec<f64>, Vec<Tensor>)> {
    let params = task.params();
    let mut grads = Grads(vec![None; params.len()]);
    let mut losses = Vec::new();
    for (batch, share) in parts {
        losses = task.gradients(batch, position, *share, &mut grads)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    }
    let named = params.iter().zip(grads.0);
    let all = named.map(|(p, g)| g.ok_or_else(|| format!("`{}` has no gradient", p.name).into()));
    Ok((losses, all.collect::<Result<_>>()?))
}

fn same(what: &str, params: &[Param], got: &[Tensor], wanted: &[Tensor], tolerance: f64) {
    for ((param, got), wanted) in params.iter().zip(got).zip(wanted) {
        assert!(flat(wanted).iter().any(|g| *g != 0.0), "{what}: `{}` is not trained", param.name);
        close(&format!("{what}: `{}`", param.name), got, wanted, tolerance);
    }
}

/// The CPU, and the first GPU where this build and machine have one.
fn devices() -> Vec<Device> {
    let gpu = margay::ops::gpu(0);
    if gpu.is_err() {
        eprintln!("skipped on a GPU: there is none");
    }
    std::iter::once(CPU).chain(gpu).collect()
}

#[test]
fn adamw_equals_loops() -> Result {
    devices().iter().try_for_each(adamw_equals_loops_on)
}

fn adamw_equals_loops_on(device: &Device) -> Result {
    let settings = recipe::Optimizer { beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1, clip: 1.5 };
    let shapes: [&[usize]; 3] = [&[3, 4000], &[5], &[2]];
    let params: Vec<Param> = shapes
        .iter()
        .enumerate()
        .map(|(n, shape)| -> Result<Param> {
            let start = randn(shape, n as u64).to_dtype(DType::F32)?.to_device(device)?;
            Ok(Param { name: format!("p{n}"), var: Var::from_tensor(&start)?, scalar: false })
        })
        .collect::<Result<_>>()?;
    // The last one never gets a gradient and stays as it is, undecayed.
    let peaks = [1.0, 0.3, 1.0];
    let mut x: Vec<Vec<f64>> = params.iter().map(|p| flat(&p.var)).collect();
    let mut m: Vec<Vec<f64>> = x.iter().map(|x| vec![0.0; x.len()]).collect();
    let mut v = m.clone();
    let mut optimizer = AdamW::new(&params, &settings)?;
    let mut clipped = 0;
    for step in 1..=10i32 {
        // Early gradients are clipped, later ones are not.
        let grads: Vec<Option<Tensor>> = (0..3)
            .map(|n| -> Result<Option<Tensor>> {
                let scale = if n == 0 { 0.03 } else { 1.0 } / step as f64; // the large one must not rule the norm
                let g = (randn(shapes[n], 100 * step as u64 + n as u64) * scale)?.to_dtype(DType::F32)?;
                let g = g.to_device(device)?;
                Ok((n < 2).then_some(g))
            })
            .collect::<Result<_>>()?;
        let lr = 0.01 * step as f64;
        let update = optimizer.update(&params, &grads, lr, &peaks)?;
        update.check(&params, "transfer", step as u64)?;
        let norm = update.gradient_norm();
        let all: Vec<Vec<f64>> = grads.iter().flatten().map(flat).collect();
        let true_norm = all.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        assert!((norm - true_norm).abs() < 1e-5 * true_norm);
        let shrink = (settings.clip / true_norm).min(1.0);
        clipped += (shrink < 1.0) as usize;
        for (n, grads) in all.iter().enumerate() {
            for (i, g) in grads.iter().enumerate() {
                let (g, lr) = (g * shrink, lr * peaks[n]);
                m[n][i] = 0.9 * m[n][i] + 0.1 * g;
                v[n][i] = 0.99 * v[n][i] + 0.01 * g * g;
                let (m, v) = (m[n][i] / (1.0 - 0.9f64.powi(step)), v[n][i] / (1.0 - 0.99f64.powi(step)));
                x[n][i] -= lr * 0.1 * x[n][i] + lr * m / (v.sqrt() + 1e-6);
            }
        }
        for (param, x) in params.iter().zip(&x) {
            close_slices(&format!("step {step}: `{}`", param.name), &flat(&param.var), x, 2e-6);
        }
    }
    assert!((2..9).contains(&clipped), "{clipped} of 10 steps were clipped");
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result {
    devices().iter().try_for_each(a_gradient_that_is_not_finite_changes_nothing_on)
}

fn a_gradient_that_is_not_finite_changes_nothing_on(device: &Device) -> Result {
    let params = ["good", "bad"].map(|name| Param {
        name: name.into(),
        var: Var::from_tensor(&Tensor::ones(2, DType::F32, device).unwrap()).unwrap(),
        scalar: false,
    });
    let mut optimizer = AdamW::new(&params, &recipe::Recover::default().optimizer)?;
    let grads = [Some(Tensor::new(&[1f32, 1.0], device)?), Some(Tensor::new(&[1f32, f32::NAN], device)?)];
    let error = optimizer.update(&params, &grads, 0.1, &[1.0, 1.0])?.check(&params, "recover", 7).unwrap_err();
    assert!(error.message.contains("`bad`") && error.message.contains("step 7 of stage `recover`"), "{error}");
    assert_eq!((flat(&params[0].var), optimizer.steps), (vec![1.0, 1.0], 0));
    Ok(())
}

/// A layer at a time gives the gradients of the mean loss over all layers in one graph.
#[test]
fn transfer_gradients_equal_the_joint_loss() -> Result {
    let Setup { decoder, teacher, student, batch } = &setup()?;
    for attention_ce_weight in [0.0, 1.0] {
        let settings = recipe::Transfer { attention_ce_weight, ..recipe::Transfer::default() };
        let mut task = Transfer::new(decoder, teacher, student, &settings, 4);
        let whole = Batch { inputs: batch.inputs.clone(), targets: batch.targets.clone(), mask: None };
        let (losses, got) = gradients(&mut task, &[(whole, 1.0)], 0)?;

        let tables = decoder.tables(0, batch.inputs.dim(1)?)?;
        let mut x = decoder.embed(&batch.inputs)?;
        let mut parts = Vec::new();
        for layer in 0..3 {
            let heads = decoder.block(layer).heads(&x, &tables, None, None)?;
            let (target, wanted) = teacher.mixers[layer].parallel(&heads)?;
            if layer != 1 {
                let (y, weights) = student.mixers[layer].parallel(&heads)?;
                let mse = ((y - &target)?.sqr()?.mean_all()? * 1000.0)?;
                let log = weights.all.maximum(1e-12)?.log()?;
                // Minus the mean over rows of Σ_j A_ij log Â_ij.
                let ce = (wanted.all * log)?.sum(D::Minus1)?.mean_all()?.neg()?;
                parts.push((mse + (ce * attention_ce_weight)?)?);
            }
            x = decoder.block(layer).finish(&x, &target, None, None)?;
        }
        let wanted: Vec<f64> = parts.iter().flat_map(flat).collect();
        close_slices("losses by layer", &losses, &wanted, 1e-5);
        let store = Tensor::stack(&parts, 0)?.mean_all()?.backward()?;
        let params = task.params();
        assert_eq!(params.len(), 6);
        let wanted: Vec<Tensor> = params.iter().map(|p| store.get(&p.var).cloned().unwrap()).collect();
        same(&format!("attention cross-entropy {attention_ce_weight}"), &params, &got, &wanted, 1e-4);
        assert_eq!((0..6).map(|i| task.part(i)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1]);
        assert_eq!(task.part_name(1), "layer 2");
    }
    Ok(())
}

/// The loss of recovery over whole logits in one graph.
fn whole_graph(s: &Setup, settings: &recipe::Recover, noise: Option<u64>) -> Result<Tensor> {
    let Setup { decoder, teacher, student, batch } = s;
    let tables = decoder.tables(0, batch.inputs.dim(1)?)?;
    let run = |net: &Net, noise| -> Result<Tensor> {
        let mut x = decoder.embed(&batch.inputs)?;
        for (layer, mixer) in net.mixers.iter().enumerate() {
            x = decoder.block(layer).forward(&x, mixer.as_ref(), &tables, net.adapters.as_ref(), noise)?;
        }
        let z = decoder.final_norm(&x)?.flatten(0, 1)?.matmul(&decoder.head.t()?)?;
        Ok(z.broadcast_sub(&z.exp()?.sum_keepdim(1)?.log()?)?) // log probabilities [B T, V]
    };
    let (p, t) = (run(student, noise)?, run(teacher, None)?);
    let ce = p.gather(&batch.targets.flatten_all()?.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    let kl = (t.exp()? * (t - p)?)?.sum(1)?;
    let rows = ((ce * settings.ce_weight)? + (kl * settings.kl_weight)?)?;
    let mask = batch.mask.as_ref().unwrap().flatten_all()?;
    Ok((rows * &mask)?.sum_all()?.div(&mask.sum_all()?)?)
}

/// One block at a time, recomputed, gives the gradients of one graph; with dropout the recomputation sees the same
/// masks.
#[test]
fn recovery_gradients_equal_one_graph() -> Result {
    let mut s = setup()?;
    for (dropout, kl_weight, lr_mixer) in [(0.0, 0.0, 0.0), (0.0, 0.7, 1e-3), (0.4, 0.7, 1e-3)] {
        s.adapt(dropout)?;
        let settings = recipe::Recover { ce_weight: 0.8, kl_weight, lr_mixer, ..recipe::Recover::default() };
        let what = format!("dropout {dropout}, KL {kl_weight}");
        let mut task = Recover::new(&s.decoder, &s.teacher, &s.student, &settings, 4, 17);
        let params = task.params();
        assert_eq!(params.len(), 3 * 7 * 2 + if lr_mixer > 0.0 { 6 } else { 0 });
        let (losses, got) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
        let loss = whole_graph(&s, &settings, Some(17))?; // the noise of position 0 is the seed's
        close_slices(&what, &losses, &flat(&loss), 1e-5);
        let store = loss.backward()?;
        let wanted: Vec<Tensor> = params.iter().map(|p| store.get(&p.var).cloned().unwrap()).collect();
        same(&what, &params, &got, &wanted, 1e-4);

        // Other positions draw other masks, the same position the same.
        let (_, again) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
        let (_, later) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 4)?;
        let bits = |grads: &[Tensor]| grads.iter().flat_map(flat).collect::<Vec<_>>();
        assert!(bits(&got) == bits(&again), "{what}: not repeatable");
        assert_eq!(bits(&got) == bits(&later), dropout == 0.0, "{what}");
    }
    Ok(())
}

/// As LoRA starts: A uniform, B zero, so that the student is unchanged; named as PEFT names them.
#[test]
fn adapters_start_without_effect() -> Result {
    let mut s = setup()?;
    let before = flat(&s.decoder.hidden(&s.batch.inputs, &s.student)?);
    let lora = recipe::Lora::default();
    let adapters = Adapters::new(&s.decoder.architecture, &[Projection::Q, Projection::Down], &lora, 9, &CPU)?;
    let params = adapters.params();
    let named: Vec<String> = params[..4].iter().map(|p| format!("{} {:?}", p.name, p.var.dims())).collect();
    let wanted = [
        "model.layers.0.self_attn.q_proj.lora_A.weight [8, 32]",
        "model.layers.0.self_attn.q_proj.lora_B.weight [32, 8]",
        "model.layers.0.mlp.down_proj.lora_A.weight [8, 48]",
        "model.layers.0.mlp.down_proj.lora_B.weight [32, 8]",
    ];
    assert_eq!(named, wanted);
    let bound = 48f64.powf(-0.5);
    let a = flat(&params[2].var);
    assert!(a.iter().all(|a| a.abs() <= bound) && a.iter().any(|a| a.abs() > 0.95 * bound));
    assert!(flat(&params[3].var).iter().all(|b| *b == 0.0));
    assert_ne!(a, flat(&params[6].var), "layers start apart");
    s.student.adapters = Some(adapters);
    assert_eq!(flat(&s.decoder.hidden(&s.batch.inputs, &s.student)?), before);
    Ok(())
}

#[test]
fn accumulation_equals_the_whole_batch() -> Result {
    let mut s = setup()?;
    s.batch.mask = None; // with a mask, micro-batches weigh equally, not their tokens
    s.adapt(0.0)?;
    let transfer = recipe::Transfer::default();
    let recover = recipe::Recover { kl_weight: 0.5, ..recipe::Recover::default() };
    let tasks: [(&str, Box<dyn Task + '_>); 2] = [
        ("transfer", Box::new(Transfer::new(&s.decoder, &s.teacher, &s.student, &transfer, 4))),
        ("recover", Box::new(Recover::new(&s.decoder, &s.teacher, &s.student, &recover, 4, 1))),
    ];
    for (what, mut task) in tasks {
        let params = task.params();
        let (_, whole) = gradients(task.as_mut(), &[(s.rows(0, 4)?, 1.0)], 0)?;
        for micro in [1, 2] {
            let part = |from| -> Result<(Batch, f64)> { Ok((s.rows(from, micro)?, micro as f64 / 4.0)) };
            let parts = (0..4).step_by(micro).map(part).collect::<Result<Vec<_>>>()?;
            let (_, sum) = gradients(task.as_mut(), &parts, 0)?;
            same(&format!("{what} in micro-batches of {micro}"), &params, &sum, &whole, 5e-6);
        }
    }
    Ok(())
}

#[test]
fn merged_adapters_equal_the_adapted_forward() -> Result {
    let mut s = setup()?;
    s.adapt(0.3)?; // dropout is off outside of training
    let adapted = s.decoder.logits(&s.decoder.hidden(&s.batch.inputs, &s.student)?)?;
    let adapters = s.student.adapters.take().unwrap();
    let base = s.decoder.logits(&s.decoder.hidden(&s.batch.inputs, &s.student)?)?;
    assert!(flat(&(&adapted - base)?).iter().any(|d| d.abs() > 0.01));
    let pairs: HashMap<String, Vec<f64>> = adapters.params().iter().map(|p| (p.name.clone(), flat(&p.var))).collect();
    for (layer, p) in adapters.targets().collect::<Vec<_>>() {
        let weight = s.decoder.block(layer).weight(p)?;
        let merged = adapters.merged(layer, p, &weight)?.unwrap();
        // W + (alpha / r) B A in loops
        let side = |side: &str| &pairs[&format!("model.layers.{layer}.{}.lora_{side}.weight", p.path())];
        let (a, b, inner) = (side("A"), side("B"), weight.dim(1)?);
        let mut wanted = flat(&weight);
        for (i, w) in wanted.iter_mut().enumerate() {
            *w += 2.0 * (0..4).map(|r| b[i / inner * 4 + r] * a[r * inner + i % inner]).sum::<f64>();
        }
        close_slices(&format!("layer {layer}, {}", p.name()), &flat(&merged), &wanted, 1e-6);
        s.decoder.block_mut(layer).set_weight(p, &merged)?;
    }
    let merged = s.decoder.logits(&s.decoder.hidden(&s.batch.inputs, &s.student)?)?;
    close("logits", &merged, &adapted, 1e-5);
    Ok(())
}
