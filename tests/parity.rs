//! Every family against Hugging Face transformers.

#[path = "common/parity.rs"]
mod parity;
#[path = "common/random.rs"]
mod random;
#[allow(dead_code)] // its Llama is for other tests
#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use margay::convert::load::Model;
use margay::families::{self, Projection};
use margay::model::{Decoder, Net};
use margay::params::{Adapters, LowRank};
use margay::progress::Silent;
use random::{close, flat, randn};

const CPU: Device = Device::Cpu;

fn tokens(length: usize, vocab: usize) -> Tensor {
    let ids: Vec<u32> = (0..length).map(|i| ((7919 * i + 13) % vocab) as u32).collect();
    Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap()
}

/// Logits [T, V] of a whole prompt.
fn logits(decoder: &Decoder, net: &Net, ids: &Tensor) -> Tensor {
    decoder.logits(&decoder.hidden(ids, net).unwrap(), net).unwrap().squeeze(0).unwrap()
}

/// In f32; the sums of both programs have other orders, which moves the logits of these models by near 1e-6.
#[test]
fn logits_equal_those_of_transformers() {
    let mut families = std::collections::BTreeSet::new();
    for (name, path) in parity::cases() {
        let fixture = parity::case(&path);
        let config = &fixture["config"];
        let folder = tiny_model::folder(config, &parity::weights(config));
        let (model, decoder) = tiny_model::open(folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        families.insert(model.description.family.name);
        let net = Net::teacher(model.architecture());
        let mut worst = 0f64;
        for row in fixture["rows"].as_array().unwrap() {
            let number = |key: &str| row[key].as_u64().unwrap() as usize;
            let ids = tokens(number("length"), model.architecture().vocab);
            let all = logits(&decoder, &net, &ids);
            let found = flat(&all.get(number("position")).unwrap());
            let wanted: Vec<f64> = row["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            assert_eq!(found.len(), wanted.len(), "{name}");
            let largest = wanted.iter().fold(0f64, |most, x| most.max(x.abs()));
            let difference = found.iter().zip(&wanted).fold(0f64, |most, (a, b)| most.max((a - b).abs()));
            worst = worst.max(difference / largest);
        }
        println!("{name}: {worst:.1e}");
        assert!(worst < 1e-4, "{name}: logits differ by {worst:e} of the largest");

        // The same in pieces, by the cache. Frequencies that depend on the length stay those of their time there.
        if !model.architecture().ropes.iter().any(|rope| rope.grows()) {
            let ids = tokens(150, model.architecture().vocab);
            let mut states = net.states();
            let (mut parts, mut at) = (Vec::new(), 0);
            for piece in [70, 1, 1, 50, 28] {
                let hidden = decoder.extend(&ids.narrow(1, at, piece).unwrap(), &net, &mut states).unwrap();
                parts.push(decoder.logits(&hidden, &net).unwrap().squeeze(0).unwrap());
                at += piece;
            }
            let whole = logits(&decoder, &net, &ids);
            close(&format!("{name}, in pieces"), &Tensor::cat(&parts, 0).unwrap(), &whole, 2e-5);
        }
    }
    let known: std::collections::BTreeSet<_> = families::REGISTRY.iter().map(|f| f.name).collect();
    assert_eq!(families, known, "every family has a fixture");
}

/// Checkpoints of GPT-2 leave out what the class puts before its names.
#[test]
fn gpt2_in_its_first_spelling() {
    let config =
        parity::case(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/gpt2.json"))["config"].clone();
    let weights = parity::weights(&config);
    let mut bare: HashMap<String, Tensor> =
        weights.iter().map(|(name, x)| (name.trim_start_matches("transformer.").to_string(), x.clone())).collect();
    bare.insert("h.0.attn.bias".into(), Tensor::ones((1, 1, 8, 8), DType::U8, &CPU).unwrap());
    let run = |weights: &HashMap<String, Tensor>| {
        let folder = tiny_model::folder(&config, weights);
        let (model, decoder) = tiny_model::open(folder.path()).unwrap();
        flat(&logits(&decoder, &Net::teacher(model.architecture()), &tokens(20, 48)))
    };
    assert_eq!(run(&bare), run(&weights));
}

/// Learned positions end; a longer text is an error that says so.
#[test]
fn positions_of_gpt2_end() {
    let config =
        parity::case(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/gpt2.json"))["config"].clone();
    let folder = tiny_model::folder(&config, &parity::weights(&config));
    let (model, decoder) = tiny_model::open(folder.path()).unwrap();
    let net = Net::teacher(model.architecture());
    assert!(decoder.hidden(&tokens(512, 48), &net).is_ok());
    let error = decoder.hidden(&tokens(513, 48), &net).unwrap_err().to_string();
    assert!(error.contains("512 learned positions"), "{error}");
}

/// `pull_back` against the slope of the block's output between two points, in f64, for every block of every family, as it
/// is and with adapters on attention and on all projections. The
/// bound is that of candle's derivative of the tanh GELU, whose constants have six digits.
#[test]
fn blocks_have_the_gradient_of_their_output() {
    for (name, path) in parity::cases() {
        let config = parity::case(&path)["config"].clone();
        let folder = tiny_model::folder(&config, &parity::weights(&config));
        let model = Model::open(folder.path().to_str().unwrap(), &Silent).unwrap();
        let a = model.architecture();
        let decoder = Decoder::load(&model.checkpoint, a, DType::F64, &CPU, &Silent).unwrap();
        let net = Net::teacher(a);
        let time = 50;
        let tables = decoder.tables(0, time).unwrap();
        let random = |seed| randn(&[1, time, a.hidden], seed);
        let (x, way, weights) = (random(1), random(2), random(3));
        let low_rank = |layer, p: Projection| {
            let [out, inner] = a.shape(p);
            LowRank { layer, projection: p, a: randn(&[2, inner], 4), b: randn(&[out, 2], 5), alpha: 0.1 }
        };
        for layer in 0..a.layers {
            let (block, mixer) = (decoder.block(layer), net.mixers[layer].as_ref());
            let dense = a.experts(layer).is_none();
            let attention = [Projection::Q, Projection::V, Projection::O];
            let all: Vec<Projection> =
                Projection::ALL.into_iter().filter(|p| *p != Projection::Gate || a.gated()).collect();
            for places in [&[][..], &attention, &all].into_iter().take(if dense { 3 } else { 2 }) {
                let lora = Adapters::of(places.iter().map(|p| low_rank(layer, *p)).collect()).unwrap();
                let (lora, what) = (Some(&lora), format!("{name}, block {layer}, {} changed", places.len()));
                let value = |step: f64| {
                    let x = (&x + (&way * step).unwrap()).unwrap();
                    block.forward(&x, mixer, &tables, lora, None).unwrap()
                };
                let opened = block.open(&x, mixer, &tables, lora, None).unwrap();
                let apart = (block.close(&opened, lora).unwrap() - value(0.0)).unwrap().abs().unwrap();
                assert!(apart.max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-9, "{what}: another value");
                let step = 1e-6;
                let slope = ((value(step) - value(-step)).unwrap() * &weights).unwrap();
                let slope = slope.sum_all().unwrap().to_scalar::<f64>().unwrap() / (2.0 * step);
                let var = Var::from_tensor(&x).unwrap();
                let opened = block.open(var.as_tensor(), mixer, &tables, lora, None).unwrap();
                let scalar = block.pull_back(opened, &weights, lora).unwrap();
                let gradient = scalar.backward().unwrap().remove(&var).unwrap();
                let along = (gradient * &way).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
                assert!((along - slope).abs() < 1e-4 * slope.abs().max(1.0), "{what}: {along}, not {slope}");
            }
        }
    }
}
