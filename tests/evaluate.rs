//! Measures against hand-made computations on the fixture.

use std::path::Path;

use candle_core::{Device, IndexOp, Tensor};
use margay::convert::load::Model;
use margay::data::{ChoiceItem, Tokenizer, eval_rows};
use margay::evaluate::choice::choices;
use margay::evaluate::position::by_position;
use margay::evaluate::recall::{Settings, suite};
use margay::evaluate::score::{Asked, score};
use margay::evaluate::{Subject, quality};
use margay::generate::{Sampler, generate};
use margay::model::{Decoder, Net};
use margay::progress::Silent;
use margay::recipe::Data;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/llama-tiny");

fn fixture() -> (Decoder, Net, Tokenizer) {
    let model = Model::open(FIXTURE, &Silent).unwrap();
    let decoder = model.decoder(&Device::Cpu, &Silent).unwrap();
    (decoder, model.net(&Device::Cpu).unwrap(), Tokenizer::open(Path::new(FIXTURE)).unwrap())
}

/// Log-probability of every token but the first.
fn log_p(decoder: &Decoder, net: &Net, ids: &[u32]) -> Vec<f64> {
    let input = Tensor::new(&ids[..ids.len() - 1], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = decoder.logits(&decoder.hidden(&input, net).unwrap(), net).unwrap().i(0).unwrap();
    let rows = logits.to_vec2::<f32>().unwrap();
    let one = |(row, id): (&Vec<f32>, &u32)| {
        let sum: f64 = row.iter().map(|z| (*z as f64).exp()).sum();
        row[*id as usize] as f64 - sum.ln()
    };
    rows.iter().zip(&ids[1..]).map(one).collect()
}

#[test]
fn scores_are_sums_of_log_softmax_whatever_else_is_in_the_batch() {
    let (decoder, net, tokenizer) = fixture();
    let texts = ["The cat sat on the mat.", "One", "A longer text, which comes last; it has two parts."];
    let asked: Vec<Asked> = texts
        .iter()
        .map(|text| {
            let ids = tokenizer.encode(text).unwrap();
            let middle = 1.max(ids.len() / 2).min(ids.len() - 1);
            Asked { spans: vec![1..middle, middle..ids.len()], ids }
        })
        .collect();
    let found = score(Subject { decoder: &decoder, net: &net }, &asked, &Silent).unwrap();
    for (asked, found) in asked.iter().zip(found) {
        let wanted = log_p(&decoder, &net, &asked.ids);
        for (span, score) in asked.spans.iter().zip(found) {
            let wanted: f64 = span.clone().map(|p| wanted[p - 1]).sum();
            assert!((score.log_likelihood - wanted).abs() < 1e-4, "{} for {wanted}", score.log_likelihood);
        }
    }
}

#[test]
fn greedy_is_what_generation_writes() {
    let (decoder, net, tokenizer) = fixture();
    let subject = Subject { decoder: &decoder, net: &net };
    let prompt = tokenizer.encode_prompt("The boy went to the").unwrap();
    let mut answer = Vec::new();
    generate(subject, &prompt, &mut Sampler::greedy(), 8, &[], |id| {
        answer.push(id);
        Ok(true)
    })
    .unwrap();
    let asked = |answer: &[u32]| Asked::end([prompt.as_slice(), answer].concat(), prompt.len());
    let mut wrong = answer.clone();
    wrong[7] = (wrong[7] + 1) % 1024;
    let found = score(subject, &[asked(&answer), asked(&wrong)], &Silent).unwrap();
    assert_eq!((found[0][0].greedy, found[1][0].greedy), (true, false));
}

#[test]
fn choices_as_computed_by_hand() {
    let (decoder, net, tokenizer) = fixture();
    let item = |context: &str, choices: [&str; 2], gold| ChoiceItem {
        context: context.into(),
        choices: choices.map(String::from).to_vec(),
        gold,
    };
    let items = [item("Once upon a time", ["there was a girl", "q"], 0), item("She said ", ["hello", "zqxj kv"], 1)];
    let shots = [item("The sky is", ["blue", "a door"], 0)];
    // The shot, a space before the choice, no second one where the context ends in one.
    let texts = [
        ("The sky is blue\n\nOnce upon a time", [" there was a girl", " q"]),
        ("The sky is blue\n\nShe said", [" hello", " zqxj kv"]),
    ];
    let mut wanted = [[0.0; 2]; 2];
    for (row, (context, choices)) in texts.iter().enumerate() {
        for (column, choice) in choices.iter().enumerate() {
            let start = tokenizer.encode_prompt(context).unwrap().len();
            let ids = tokenizer.encode_prompt(&format!("{context}{choice}")).unwrap();
            wanted[row][column] = log_p(&decoder, &net, &ids)[start - 1..].iter().sum();
        }
    }
    let taken = |length: &dyn Fn(usize, usize) -> f64| -> Vec<usize> {
        (0..2).map(|r| if wanted[r][1] / length(r, 1) > wanted[r][0] / length(r, 0) { 1 } else { 0 }).collect()
    };
    let right = |taken: Vec<usize>| taken.iter().zip(&items).filter(|(t, item)| **t == item.gold).count() as f64 / 2.0;
    let plain = taken(&|_, _| 1.0);
    let subject = Subject { decoder: &decoder, net: &net };
    let found = choices(subject, Some(subject), &tokenizer, &items, &shots, 1024, &Silent).unwrap();
    let counts = |place: usize| plain.iter().filter(|p| **p == place).count();
    assert_eq!(found.model.chosen, [counts(0), counts(1)]);
    assert_eq!(found.model.accuracy, right(plain.clone()));
    assert_eq!(found.model.accuracy_norm, right(taken(&|r, c| items[r].choices[c].len() as f64)));
    assert_eq!((found.gold.as_slice(), found.shots, found.teacher.as_ref()), (&[1, 1][..], 1, Some(&found.model)));
}

#[test]
fn positions_add_up_to_the_whole() {
    let (decoder, net, tokenizer) = fixture();
    let subject = Subject { decoder: &decoder, net: &net };
    let cache = tempfile::tempdir().unwrap();
    let text = [format!("{FIXTURE}/valid.jsonl")];
    let rows = eval_rows(&text, &Data::default(), &tokenizer, 200, cache.path(), &Silent).unwrap().limit(800);
    let whole = quality(subject, Some(subject), &rows, &Silent).unwrap();
    let (all, buckets) = by_position(subject, Some(subject), &rows, &Silent).unwrap();
    assert!((all.perplexity / whole.perplexity - 1.0).abs() < 1e-6 && all.tokens == whole.tokens);
    assert!((all.bits_per_byte / whole.bits_per_byte - 1.0).abs() < 1e-6);
    assert_eq!(buckets.iter().map(|b| (b.from, b.to)).collect::<Vec<_>>(), [(0, 63), (64, 127), (128, 199)]);
    let nll: f64 = buckets.iter().map(|b| b.perplexity.ln() * b.tokens as f64).sum();
    assert!((nll / whole.tokens as f64 - whole.perplexity.ln()).abs() < 1e-6);
    assert!(buckets.iter().all(|b| b.teacher_perplexity == Some(b.perplexity) && b.top1_agreement == Some(1.0)));
}

#[test]
fn a_model_is_as_good_as_itself_in_the_suite() {
    let (decoder, net, tokenizer) = fixture();
    let subject = Subject { decoder: &decoder, net: &net };
    let settings = Settings { seed: 0, samples: 2, longest: 128 };
    let run = || suite(subject, Some(subject), &tokenizer, settings, &Silent).unwrap();
    let found = run();
    assert_eq!(found, run());
    let cells = || found.grids.iter().flat_map(|g| g.cells.iter().flatten().flatten());
    assert!(found.grids.len() == 4 && cells().all(|c| c.teacher_right == Some(c.right) && c.asked > 0));
    // The fixture was trained on such tables.
    assert!(found.grids[0].cells[0][0].unwrap().right > 0, "{:?}", found.grids[0]);
    let error = suite(subject, None, &tokenizer, Settings { longest: 8, ..settings }, &Silent).unwrap_err();
    assert!(error.message.contains("no prompt of the recall suite fits 8 tokens"), "{}", error.message);
}

/// The model of the shared folder recalls tables of its kind; what a conversion loses must show against that.
#[test]
fn a_model_that_recalls_does_so_in_the_suite() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/models/scribe-11m");
    if !dir.exists() {
        return eprintln!("skipped: no {}", dir.display());
    }
    let model = Model::open(&dir.to_string_lossy(), &Silent).unwrap();
    let (decoder, net) = (model.decoder(&Device::Cpu, &Silent).unwrap(), model.net(&Device::Cpu).unwrap());
    let settings = Settings { seed: 0, samples: 2, longest: 160 };
    let tokenizer = Tokenizer::open(&dir).unwrap();
    let found = suite(Subject { decoder: &decoder, net: &net }, None, &tokenizer, settings, &Silent).unwrap();
    for grid in &found.grids[..2] {
        let cells = grid.cells.iter().flatten().flatten();
        let (right, asked) = cells.fold((0, 0), |(r, a), cell| (r + cell.right, a + cell.asked));
        assert!(10 * right >= 9 * asked, "{:?}: {right} of {asked}", grid.task);
    }
}
