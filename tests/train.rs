//! Training: the optimiser against loops, stage gradients against one graph of the whole loss.

#[path = "common/random.rs"]
mod random;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor, Var};
use margay::convert::recover::Recover;
use margay::convert::swap::swap;
use margay::convert::trained;
use margay::convert::transfer::{Student, Transfer};
use margay::data::Batch;
use margay::families::Projection;
use margay::mixers::lolcats::Config;
use margay::model::{Decoder, Net};
use margay::params::Param;
use margay::recipe;
use margay::train::adamw::AdamW;
use margay::train::clock::{Clock, Spent};
use margay::train::{Grads, Task};
use random::{close, close_slices, flat, randn};
use serde_json::{Value, json};

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
    setup_of(json!({}))
}

/// The same with changes of its configuration.
fn setup_of(changes: Value) -> Result<Setup> {
    let config = tiny_model::config(changes);
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

/// LoRA on every projection.
fn lora(dropout: f64) -> recipe::Lora {
    recipe::Lora { rank: 4, alpha: 8.0, dropout, targets: Projection::ALL.map(|p| p.name().into()).into() }
}

/// A stage that trains `what` on `loss`.
fn stage(what: &[&str], loss: recipe::Loss) -> recipe::Stage {
    let train = what.iter().map(|w| w.to_string()).collect();
    recipe::Stage { train, loss, lora: lora(0.0), ..recipe::Stage::default() }
}

impl Setup {
    /// Adapters on every projection, B not zero, so that A has a gradient.
    fn adapt(&mut self, dropout: f64) -> Result {
        self.student.adapters = None;
        let stage = recipe::Stage { lora: lora(dropout), ..recipe::Stage::recover() };
        self.prepare(&stage, 9)
    }

    /// What a stage trains beside the mixers, away from its start.
    fn prepare(&mut self, stage: &recipe::Stage, seed: u64) -> Result {
        trained::prepare(&mut self.student, stage, &self.decoder.architecture, seed, &CPU)?;
        let params: Vec<Param> = self.student.adapters.iter().flat_map(|a| a.trained()).map(|t| t.param).collect();
        nudge(&params, 0.1)
    }

    /// `prepare`, and the values of what trains by name.
    fn adapt_more(&mut self, stage: &recipe::Stage, seed: u64, named: &mut HashMap<String, Vec<Vec<f64>>>) -> Result {
        self.prepare(stage, seed)?;
        for t in self.student.adapters.iter().flat_map(|a| a.trained()) {
            named.entry(t.param.name).or_default().push(flat(&t.param.var));
        }
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
    let mut clock = Clock::new(Spent::default(), &CPU, false);
    for (batch, share) in parts {
        losses =
            task.gradients(batch, position, *share, &mut grads, &mut clock)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
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
    let mut optimizer = AdamW::new(&params, &recipe::Optimizer::default())?;
    let grads = [Some(Tensor::new(&[1f32, 1.0], device)?), Some(Tensor::new(&[1f32, f32::NAN], device)?)];
    let error = optimizer.update(&params, &grads, 0.1, &[1.0, 1.0])?.check(&params, "recover", 7).unwrap_err();
    assert!(error.message.contains("`bad`") && error.message.contains("step 7 of stage `recover`"), "{error}");
    assert_eq!((flat(&params[0].var), optimizer.steps), (vec![1.0, 1.0], 0));
    Ok(())
}

/// A layer at a time gives the gradients of the mean loss over all layers in one graph: of mixers, of projections in
/// full and of LoRA, whichever loss is taken and whatever earlier stages left.
#[test]
fn transfer_gradients_equal_the_joint_loss() -> Result {
    use recipe::Loss;
    let none = Loss::default;
    let losses = [
        (&["mixer"][..], Loss { output_mse: 1000.0, ..none() }, false),
        (&["mixer"], Loss { output_mse: 1000.0, attention_ce: 1.0, ..none() }, false),
        (&["mixer"], Loss { output_mse: 1000.0, ..none() }, true),
        (&["mixer", "q_proj", "k_proj", "v_proj"], Loss { output_mse: 10.0, ..none() }, true),
        (&["mixer", "q_proj", "k_proj", "v_proj", "o_proj"], Loss { hidden_l2: 3.0, ..none() }, false),
        (&["mixer", "lora", "o_proj"], Loss { hidden_mse: 2.0, hidden_l2: 1.0, output_mse: 5.0, ..none() }, true),
        (&["q_proj", "lora"], Loss { attention_ce: 0.5, hidden_mse: 2.0, ..none() }, false),
    ];
    for (what, weights, changed) in losses {
        let mut s = setup()?;
        if changed {
            s.adapt(0.0)?;
        }
        let mut stage = stage(what, weights.clone());
        stage.lora.targets.truncate(4);
        assert_eq!(stage.problems(), []);
        s.prepare(&stage, 21)?;
        let Setup { decoder, teacher, student, batch } = &s;
        let mut task = Transfer::new(decoder, teacher, &[Student { name: "", net: student, stage: &stage }], 4, 1);
        let whole = Batch { inputs: batch.inputs.clone(), targets: batch.targets.clone(), mask: None };
        let (losses, got) = gradients(&mut task, &[(whole, 1.0)], 0)?;

        let tables = decoder.tables(0, batch.inputs.dim(1)?)?;
        let mut x = decoder.embed(&batch.inputs, None)?;
        let mut parts = Vec::new();
        for layer in 0..3 {
            let block = decoder.block(layer);
            let heads = block.heads(&x, &tables, None, None)?;
            let (target, wanted) = teacher.mixers[layer].parallel(&heads)?;
            if layer != 1 {
                let own = block.heads(&x, &tables, student.adapters.as_ref(), None)?;
                let (y, found) = student.mixers[layer].parallel(&own)?;
                let mse = |x: &Tensor, y: &Tensor| (x - y)?.sqr()?.mean_all();
                let hidden = block.output(&y, student.adapters.as_ref(), None)?;
                let after = (hidden - block.output(&target, None, None)?)?;
                let log = found.all.maximum(1e-12)?.log()?;
                // Minus the mean over rows of Σ_j A_ij log Â_ij.
                let ce = (wanted.all * log)?.sum(D::Minus1)?.mean_all()?.neg()?;
                let norm = after.sqr()?.sum(D::Minus1)?.sqrt()?.mean_all()?;
                let terms = [
                    (mse(&y, &target)?, weights.output_mse),
                    (ce, weights.attention_ce),
                    (after.sqr()?.mean_all()?, weights.hidden_mse),
                    (norm, weights.hidden_l2 / (after.dim(2)? as f64).sqrt()),
                ];
                let mut sum = Tensor::zeros((), DType::F32, &CPU)?;
                for (term, weight) in terms.iter().filter(|(_, weight)| *weight > 0.0) {
                    sum = (sum + (term * *weight)?)?;
                }
                parts.push(sum);
            }
            x = block.finish(&x, &target, None, None)?;
        }
        let wanted: Vec<f64> = parts.iter().flat_map(flat).collect();
        close_slices("losses by layer", &losses, &wanted, 1e-5);
        let store = Tensor::stack(&parts, 0)?.mean_all()?.backward()?;
        let params = task.params();
        let each = |w: &&str| match *w {
            "mixer" => 3,
            "lora" => 8,
            _ => 1,
        };
        let here = what.iter().map(each).sum::<usize>();
        assert_eq!(params.len(), 2 * here);
        let wanted: Vec<Tensor> = params.iter().map(|p| store.get(&p.var).cloned().unwrap()).collect();
        same(&format!("{what:?} on {weights:?}, changed {changed}"), &params, &got, &wanted, 2e-4);
        let part: Vec<usize> = (0..2 * here).map(|i| task.part(i)).collect();
        assert_eq!(part, [vec![0; here], vec![1; here]].concat());
        assert_eq!(task.part_name(1), "layer 2");
    }
    Ok(())
}

/// Students that share a walk of the teacher learn what each would alone.
#[test]
fn students_share_a_walk() -> Result {
    let s = setup()?;
    let config = Config { window: 2, ..Config::default() };
    let other = swap(&s.decoder.architecture, &config, &[1, 2], 1, &CPU)?;
    other.mixers.iter().try_for_each(|m| nudge(m.params(), 0.2))?;
    let stage = recipe::Stage::transfer();
    let [first, second] =
        [("first", &s.student), ("second", &other)].map(|(name, net)| Student { name, net, stage: &stage });
    let run = |students: &[Student]| -> Result<_> {
        let mut task = Transfer::new(&s.decoder, &s.teacher, students, 4, 1);
        let (losses, grads) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
        let names: Vec<String> = task.params().into_iter().map(|p| p.name).collect();
        let parts: Vec<String> = (0..losses.len()).map(|part| task.part_name(part)).collect();
        Ok((losses, names.into_iter().zip(grads.iter().map(flat)).collect::<HashMap<_, _>>(), parts))
    };
    let (together, grads, parts) = run(&[first, second])?;
    assert_eq!(parts, ["layer 0 of `first`", "layer 1 of `second`", "layer 2 of `first`", "layer 2 of `second`"]);
    for (n, student) in [first, second].into_iter().enumerate() {
        let (alone, lone, _) = run(&[student])?;
        assert_eq!(alone, [together[n], together[2 + n]]);
        for (name, gradient) in lone {
            assert_eq!(grads[&format!("{}: {name}", student.name)], gradient, "{name}");
        }
    }
    Ok(())
}

/// What a stage trains, and each kind at its own rate.
#[test]
fn every_kind_has_its_rate() -> Result {
    let mut s = setup()?;
    let mut both = stage(&["mixer", "lora", "v_proj"], recipe::Loss { next_token: 1.0, ..recipe::Loss::default() });
    s.prepare(&both, 3)?;
    let rates = |stage: &recipe::Stage, s: &Setup| -> Vec<f64> {
        let all = trained::trained(&s.student, stage);
        let of = |end: &str| all.iter().find(|t| t.param.name.ends_with(end)).unwrap().peak;
        ["mlp.layer", "window_factors", "lora_A.weight", "delta"].map(of).to_vec()
    };
    both.lr = 1.0;
    assert_eq!(rates(&both, &s), [1.0; 4]);
    both.lr_mixer = Some(2.0);
    assert_eq!(rates(&both, &s), [2.0, 2.0, 1.0, 1.0]);
    (both.lr_scalars, both.lr_lora, both.lr_projections) = (Some(3.0), Some(4.0), Some(5.0));
    assert_eq!(rates(&both, &s), [2.0, 3.0, 4.0, 5.0]);
    // The next stage trains v on and leaves the rest.
    let next = stage(&["v_proj"], both.loss.clone());
    trained::prepare(&mut s.student, &next, &s.decoder.architecture, 4, &CPU)?;
    let names: Vec<String> = trained::trained(&s.student, &next).into_iter().map(|t| t.param.name).collect();
    assert_eq!(names, [0, 2].map(|l| format!("model.layers.{l}.self_attn.v_proj.delta")));
    Ok(())
}

/// The loss of recovery over whole logits in one graph.
fn whole_graph(s: &Setup, loss: &recipe::Loss, noise: Option<u64>) -> Result<Tensor> {
    let Setup { decoder, teacher, student, batch } = s;
    let tables = decoder.tables(0, batch.inputs.dim(1)?)?;
    let run = |net: &Net, noise| -> Result<Tensor> {
        let lora = net.adapters.as_ref();
        let mut x = decoder.embed(&batch.inputs, lora)?;
        for (layer, mixer) in net.mixers.iter().enumerate() {
            x = decoder.block(layer).forward(&x, mixer.as_ref(), &tables, lora, noise)?;
        }
        let head = decoder.head(lora)?;
        let weight = head.trained.map_or(Ok(head.weight), |delta| decoder.head(None)?.weight + delta)?;
        let z = decoder.final_norm(&x, lora)?.flatten(0, 1)?.matmul(&weight.t()?)?;
        Ok(z.broadcast_sub(&z.exp()?.sum_keepdim(1)?.log()?)?) // log probabilities [B T, V]
    };
    let (p, t) = (run(student, noise)?, run(teacher, None)?);
    let ce = p.gather(&batch.targets.flatten_all()?.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    let kl = (t.exp()? * (t - p)?)?.sum(1)?;
    let rows = ((ce * loss.next_token)? + (kl * loss.logit_kl)?)?;
    let mask = batch.mask.as_ref().unwrap().flatten_all()?;
    Ok((rows * &mask)?.sum_all()?.div(&mask.sum_all()?)?)
}

/// One block at a time, its graph kept or computed again, gives the gradients of one graph; with dropout the
/// recomputation sees the same masks.
#[test]
fn recovery_gradients_equal_one_graph() -> Result {
    let mut s = setup()?;
    let all = ["mixer", "lora", "q_proj", "o_proj", "up_proj", "down_proj"];
    let full = 2 * 4;
    let named = ["input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"];
    for (dropout, logit_kl, train, count) in [
        (0.0, 0.0, &["lora"][..], 3 * 7 * 2),
        (0.0, 0.7, &["lora", "mixer"], 3 * 7 * 2 + 6),
        (0.4, 0.7, &["lora", "mixer"], 3 * 7 * 2 + 6),
        (0.4, 0.7, &all, 3 * 7 * 2 + 6 + full), // beside what the lines before left
        (0.0, 0.7, &all[2..], full),
        (0.0, 0.7, &named, 2 * 2 + 3),
        (0.4, 0.7, &["lora", "post_attention_layernorm"], 3 * 7 * 2 + 2), // the others rest
    ] {
        let loss = recipe::Loss { next_token: 0.8, logit_kl, ..recipe::Loss::default() };
        let mut stage = stage(train, loss);
        stage.lora.dropout = dropout;
        s.prepare(&stage, 9)?;
        let what = format!("dropout {dropout}, KL {logit_kl}, {train:?}");
        let dropout = if train.contains(&"lora") { dropout } else { 0.0 };
        let mut task = Recover::new(&s.decoder, &s.teacher, &s.student, &stage, (4, 2), 17);
        let params = task.params();
        assert_eq!(params.len(), count, "{what}");
        let (losses, got) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
        let loss = whole_graph(&s, &stage.loss, Some(17))?; // the noise of position 0 is the seed's
        close_slices(&what, &losses, &flat(&loss), 1e-5);
        let store = loss.backward()?;
        let wanted: Vec<Tensor> = params.iter().map(|p| store.get(&p.var).cloned().unwrap()).collect();
        same(&what, &params, &got, &wanted, 1e-4);
        for kept in [3, 0] {
            let mut task = Recover::new(&s.decoder, &s.teacher, &s.student, &stage, (4, kept), 17);
            let (_, got) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
            same(&format!("{what}, {kept} graphs kept"), &params, &got, &wanted, 1e-4);
            assert_eq!((task.slim(), task.slim()), (kept > 0, false));
            let (_, slim) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
            same(&format!("{what}, slim"), &params, &slim, &wanted, 1e-4);
        }

        // Other positions draw other masks, the same position the same.
        let (_, again) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
        let (_, later) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 4)?;
        let bits = |grads: &[Tensor]| grads.iter().flat_map(flat).collect::<Vec<_>>();
        assert!(bits(&got) == bits(&again), "{what}: not repeatable");
        assert_eq!(bits(&got) == bits(&later), dropout == 0.0, "{what}");
    }
    Ok(())
}

/// An embedding that doubles as the head gets the gradient of both.
#[test]
fn a_tied_embedding_gets_the_gradient_of_both_ends() -> Result {
    let mut s = setup_of(json!({ "tie_word_embeddings": true }))?;
    let loss = recipe::Loss { next_token: 0.8, logit_kl: 0.7, ..recipe::Loss::default() };
    let stage = stage(&["embed_tokens", "lm_head"], loss);
    s.prepare(&stage, 9)?;
    let mut task = Recover::new(&s.decoder, &s.teacher, &s.student, &stage, (4, 1), 17);
    let params = task.params();
    let names: Vec<&str> = params.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["model.embed_tokens.weight.delta"]);
    let (_, got) = gradients(&mut task, &[(s.rows(0, 4)?, 1.0)], 0)?;
    let wanted = whole_graph(&s, &stage.loss, None)?.backward()?.get(&params[0].var).cloned().unwrap();
    same("tied", &params, &got, &[wanted], 1e-4);
    Ok(())
}

/// As LoRA starts: A uniform, B zero, so that the student is unchanged; named as PEFT names them.
#[test]
fn adapters_start_without_effect() -> Result {
    let mut s = setup()?;
    let before = flat(&s.decoder.hidden(&s.batch.inputs, &s.student)?);
    let train = ["lora", "k_proj"].map(String::from).into();
    let lora = recipe::Lora { targets: ["q_proj", "down_proj"].map(String::from).into(), ..recipe::Lora::default() };
    let stage = recipe::Stage { train, lora, ..recipe::Stage::recover() };
    trained::prepare(&mut s.student, &stage, &s.decoder.architecture, 9, &CPU)?;
    let trained = trained::trained(&s.student, &stage);
    let (deltas, params): (Vec<Param>, Vec<Param>) =
        trained.into_iter().map(|t| t.param).partition(|p| p.name.ends_with("delta"));
    let deltas: Vec<String> = deltas.iter().map(|p| format!("{} {:?}", p.name, p.var.dims())).collect();
    assert_eq!(deltas, [0, 2].map(|l| format!("model.layers.{l}.self_attn.k_proj.delta [16, 32]")));
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
    assert_eq!(flat(&s.decoder.hidden(&s.batch.inputs, &s.student)?), before);
    Ok(())
}

#[test]
fn accumulation_equals_the_whole_batch() -> Result {
    let mut s = setup()?;
    s.batch.mask = None; // with a mask, micro-batches weigh equally, not their tokens
    s.adapt(0.0)?;
    let transfer = recipe::Stage::transfer();
    let loss = recipe::Loss { next_token: 1.0, logit_kl: 0.5, ..recipe::Loss::default() };
    let recover = recipe::Stage { loss, ..recipe::Stage::recover() };
    for (what, stage) in [("transfer", transfer), ("recover", recover)] {
        s.prepare(&stage, 5)?;
        let mut task: Box<dyn Task> = match stage.loss.layer_wise() {
            true => Box::new(Transfer::new(
                &s.decoder,
                &s.teacher,
                &[Student { name: "", net: &s.student, stage: &stage }],
                4,
                1,
            )),
            false => Box::new(Recover::new(&s.decoder, &s.teacher, &s.student, &stage, (4, 1), 1)),
        };
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

/// LoRA twice and a projection in full: what they add up to, and what they leave of the weights in f32.
#[test]
fn merged_adapters_equal_the_adapted_forward() -> Result {
    let mut s = setup()?;
    let loss = recipe::Loss { next_token: 1.0, ..recipe::Loss::default() };
    let mut named: HashMap<String, Vec<Vec<f64>>> = HashMap::new();
    for (n, what) in [&["lora", "o_proj"][..], &["lora"]].into_iter().enumerate() {
        s.adapt_more(&stage(what, loss.clone()), 9 + n as u64, &mut named)?;
    }
    let adapted = s.decoder.logits(&s.decoder.hidden(&s.batch.inputs, &s.student)?, &s.student)?;
    let adapters = s.student.adapters.take().unwrap();
    let base = s.decoder.logits(&s.decoder.hidden(&s.batch.inputs, &s.student)?, &s.student)?;
    assert!(flat(&(&adapted - base)?).iter().any(|d| d.abs() > 0.01));
    for (layer, p) in adapters.targets().collect::<Vec<_>>() {
        let weight = s.decoder.block(layer).weight(p)?;
        let merged = adapters.merged(layer, p, &weight)?.unwrap();
        // W + (alpha / r) (B A + B' A') + Δ in loops
        let of = |end: &str| named.get(&format!("model.layers.{layer}.{}.{end}", p.path()));
        let (a, b) = (of("lora_A.weight").unwrap(), of("lora_B.weight").unwrap());
        assert_eq!((a.len(), of("delta").is_some()), (2, p == Projection::O && layer != 1));
        let (inner, mut wanted) = (weight.dim(1)?, flat(&weight));
        for (i, w) in wanted.iter_mut().enumerate() {
            for (a, b) in a.iter().zip(b) {
                *w += 2.0 * (0..4).map(|r| b[i / inner * 4 + r] * a[r * inner + i % inner]).sum::<f64>();
            }
            *w += of("delta").map_or(0.0, |delta| delta[0][i]);
        }
        close_slices(&format!("layer {layer}, {}", p.name()), &flat(&merged), &wanted, 1e-6);
        s.decoder.block_mut(layer).set_weight(p, &merged)?;
    }
    let merged = s.decoder.logits(&s.decoder.hidden(&s.batch.inputs, &s.student)?, &s.student)?;
    close("logits", &merged, &adapted, 1e-5);
    Ok(())
}
