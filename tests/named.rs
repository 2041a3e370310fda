//! Norms, embeddings and head that train by name, in every family.

#[path = "common/parity.rs"]
mod parity;
#[path = "common/random.rs"]
mod random;
#[allow(dead_code)] // its Llama is for other tests
#[path = "common/tiny_model.rs"]
mod tiny_model;

use candle_core::{DType, Device, Tensor};
use margay::convert::merge::fold;
use margay::convert::recover::Recover;
use margay::convert::swap::swap;
use margay::convert::trained;
use margay::data::Batch;
use margay::families::{self, Role};
use margay::mixers::lolcats::Config;
use margay::model::Net;
use margay::recipe::{Loss, Stage};
use margay::train::clock::{Clock, Spent};
use margay::train::{Grads, Task};
use random::{close, flat, randn};

const CPU: Device = Device::Cpu;
type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The loss and the gradients of all that trains.
fn gradients(task: &mut Recover, batch: &Batch) -> Result<(f64, Vec<Option<Tensor>>)> {
    let mut grads = Grads(vec![None; task.params().len()]);
    let loss = task.gradients(batch, 0, 1.0, &mut grads, &mut Clock::new(Spent::default(), &CPU, false))?;
    Ok((flat(&loss)[0], grads.0))
}

/// Every tensor of every word of a family has a gradient that is the slope of the loss, and merged the model is the same.
#[test]
fn every_word_of_every_family_trains() -> Result {
    for (name, path) in parity::cases() {
        let config = parity::case(&path)["config"].clone();
        let folder = tiny_model::folder(&config, &parity::weights(&config));
        let (model, mut decoder) = tiny_model::open(folder.path())?;
        let a = decoder.architecture.clone();
        let converted: Vec<usize> = (0..a.layers).step_by(2).collect();
        let mut student = swap(&a, &Config { window: 4, ..Config::default() }, &converted, 1, &CPU)?;
        let words: Vec<&str> = a.names.words().filter(|word| !a.named(word).is_empty()).collect();
        assert!(words.iter().all(|word| families::words().contains(word)), "{name}");
        let stage = Stage {
            train: words.iter().map(|word| word.to_string()).collect(),
            loss: Loss { next_token: 1.0, logit_kl: 0.5, ..Loss::default() },
            ..Stage::default()
        };
        assert_eq!(stage.problems(), [], "{name}");
        trained::prepare(&mut student, &stage, &a, 1, &CPU)?;

        let roles: Vec<Role> = student.adapters.as_ref().unwrap().roles().collect();
        let here = |role: &Role| role.layer().is_none_or(|layer| converted.contains(&layer));
        let mut wanted: Vec<Role> = a.tensors().into_values().map(|(role, _)| role).collect();
        wanted.retain(|role| a.names.word(*role).is_some() && here(role));
        wanted.sort();
        assert_eq!(roles, wanted, "{name}");

        let ids = |seed| {
            let ids = flat(&randn(&[2, 12], seed)).into_iter().map(|x| (x.abs() * 1e4) as u32 % a.vocab as u32);
            Tensor::from_iter(ids, &CPU)?.reshape((2, 12))
        };
        let batch = Batch { inputs: ids(1)?, targets: ids(2)?, mask: None };
        let teacher = Net::teacher(&a);
        let params = Recover::new(&decoder, &teacher, &student, &stage, (2, 1), 1).params();
        for (n, param) in params.iter().enumerate() {
            let noise = (randn(param.var.dims(), n as u64) * 0.02)?.to_dtype(DType::F32)?;
            param.var.set(&noise)?;
        }
        let mut task = Recover::new(&decoder, &teacher, &student, &stage, (2, 1), 1);
        let (_, grads) = gradients(&mut task, &batch)?;
        for (param, gradient) in params.iter().zip(grads) {
            let what = format!("{name}: `{}`", param.name);
            let gradient = gradient.ok_or_else(|| format!("{what} has no gradient"))?;
            let size = flat(&gradient).iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!(size.is_finite() && size > 0.0, "{what}: gradient of size {size}");
            // Up and down the gradient: the slope is its size.
            // Where a token changes its experts the loss jumps: steps that no token does so in.
            let step = if a.experts.is_some() { 2e-4 } else { 1e-2 / a.embedding_scale.max(1.0) };
            let start = param.var.copy()?;
            let mut at = |step: f64| -> Result<f64> {
                param.var.set(&(&start + (&gradient * (step / size))?)?)?;
                Ok(gradients(&mut task, &batch)?.0)
            };
            let slope = (at(step)? - at(-step)?) / (2.0 * step);
            param.var.set(&start)?;
            // Rounding of a loss near 4 in f32, over both steps, and the third derivative.
            assert!((slope - size).abs() < 1e-6 / step + 2e-2 * size, "{what}: slope {slope}, gradient {size}");
        }

        let logits = |decoder: &margay::model::Decoder, net: &Net| -> Result<Tensor> {
            Ok(decoder.logits(&decoder.hidden(&batch.inputs, net)?, net)?)
        };
        let (adapted, plain) = (logits(&decoder, &student)?, logits(&decoder, &teacher)?);
        let adapters = student.adapters.take().unwrap();
        let names = fold(&mut decoder, &adapters, &model)?;
        assert_eq!(names.len(), roles.len(), "{name}");
        close(&format!("{name}: merged"), &logits(&decoder, &student)?, &adapted, 1e-5);
        assert!(flat(&(logits(&decoder, &teacher)? - plain)?).iter().any(|d| d.abs() > 1e-3), "{name}");
        let shared = decoder.stored(Role::Head)?;
        assert_eq!(a.tied, flat(&shared) == flat(&decoder.stored(Role::Embedding)?), "{name}");
    }
    Ok(())
}
