//! Every family against Hugging Face transformers.

#[path = "common/parity.rs"]
mod parity;
#[path = "common/random.rs"]
mod random;
#[allow(dead_code)] // its Llama is for other tests
#[path = "common/tiny_model.rs"]
mod tiny_model;

use candle_core::{Device, Tensor};
use margay::families;
use margay::model::{Decoder, Net};
use random::{close, flat};

const CPU: Device = Device::Cpu;

fn tokens(length: usize, vocab: usize) -> Tensor {
    let ids: Vec<u32> = (0..length).map(|i| ((7919 * i + 13) % vocab) as u32).collect();
    Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap()
}

/// Logits [T, V] of a whole prompt.
fn logits(decoder: &Decoder, net: &Net, ids: &Tensor) -> Tensor {
    decoder.logits(&decoder.hidden(ids, net).unwrap()).unwrap().squeeze(0).unwrap()
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
                parts.push(decoder.logits(&hidden).unwrap().squeeze(0).unwrap());
                at += piece;
            }
            let whole = logits(&decoder, &net, &ids);
            close(&format!("{name}, in pieces"), &Tensor::cat(&parts, 0).unwrap(), &whole, 2e-5);
        }
    }
    let known: std::collections::BTreeSet<_> = families::REGISTRY.iter().map(|f| f.name).collect();
    assert_eq!(families, known, "every family has a fixture");
}
