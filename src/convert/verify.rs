//! Reopens an export from disk and checks it: tensors, logits, decoding, quality, speed.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::export::{self, Manifest};
use super::load::Model;
use crate::checkpoint::{Checkpoint, writer};
use crate::data::Split;
use crate::error::{Error, Kind, Result};
use crate::evaluate::diagnose::{self, Branch, Diagnostics, LINEAR_SHARE, diagnose};
use crate::evaluate::{Quality, Subject, quality};
use crate::families::Claim;
use crate::mixers::softmax::cache_bytes;
use crate::model::Steps;
use crate::progress::{Progress, Silent};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub value: String,
    /// What the value must satisfy, where it must.
    pub limit: String,
    /// `None` for a figure that only informs.
    pub passed: Option<bool>,
}

/// Quality of one form of the model on the validation split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    pub name: String,
    pub quality: Quality,
}

/// Decoding at one context length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    pub context: usize,
    pub tokens_per_second: f64,
    pub state_bytes: usize,
    /// Key/value cache of the softmax teacher at this context, same element size.
    pub teacher_cache_bytes: usize,
}

/// Everything `verify` found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub checks: Vec<Check>,
    pub stages: Vec<Stage>,
    /// Share of the attention carried by the linear part, per layer; `None` where softmax was kept.
    pub linear_shares: Vec<Option<f64>>,
    /// What every head of the converted layers does.
    #[serde(default)]
    pub diagnostics: Diagnostics,
    pub speeds: Vec<Speed>,
}

impl Report {
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|c| c.passed != Some(false))
    }

    fn check(&mut self, name: &str, value: String, limit: &str, passed: bool) {
        self.checks.push(Check { name: name.into(), value, limit: limit.into(), passed: Some(passed) });
    }

    fn inform(&mut self, name: &str, value: String) {
        self.checks.push(Check { name: name.into(), value, limit: String::new(), passed: None });
    }
}

/// What to verify an export against; each part that is absent is left out of the table.
pub struct Against<'a> {
    /// The student as it is in memory.
    pub student: Option<Subject<'a>>,
    pub teacher: Option<Subject<'a>>,
    /// The checkpoint it was made from.
    pub source: Option<&'a Checkpoint>,
    /// Names of tensors that may differ from the source: merged adapters.
    pub merged: &'a [String],
    pub valid: Option<&'a Split>,
    /// Measures taken before, in order.
    pub stages: Vec<Stage>,
    /// Contexts to measure speed at.
    pub contexts: &'a [usize],
}

/// Largest [`difference`] allowed between two computations of the same logits: sums in another order in f32, and in bf16
/// one rounding of 2^-9 per tensor, added up over the layers.
fn tolerance(device: &Device) -> f64 {
    if device.is_cpu() { 1e-4 } else { 5e-2 }
}

/// Norm of the difference over the norm, of logits [B, T, V] as a whole: a single position that is wrong shows, while one
/// whose sums nearly cancel, and so hold little but rounding, does not decide.
fn difference(found: &Tensor, wanted: &Tensor) -> Result<f64> {
    let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
    Ok((norm(&(found - wanted)?)? / norm(wanted)?.max(1e-18)).sqrt())
}

/// Verifies the export in `dir`.
pub fn verify(
    dir: &Path,
    manifest: &Manifest,
    against: Against,
    device: &Device,
    progress: &dyn Progress,
) -> Result<Report> {
    let mut report = Report { stages: against.stages, ..Report::default() };
    let shown = dir.to_string_lossy();
    let model = Model::open(&shown, &Silent)?;
    files(&mut report, dir, manifest)?;
    tensors(&mut report, &model, manifest);
    if let Some(source) = against.source {
        kept(&mut report, &model, source, against.merged)?;
    }
    let decoder = model.decoder(device, progress)?;
    let net = model.net(device)?;
    let subject = Subject { decoder: &decoder, net: &net };

    let ids = sample(against.valid, manifest, model.architecture().vocab);
    if let Some(student) = against.student {
        let ids = Tensor::new(&ids[..ids.len().min(256)], device)?.unsqueeze(0)?;
        let logits = |s: Subject| -> Result<Tensor> { Ok(s.decoder.logits(&s.decoder.hidden(&ids, s.net)?, s.net)?) };
        let (wanted, found) = (logits(student)?, logits(subject)?);
        let difference = difference(&found, &wanted)?;
        let limit = tolerance(device);
        report.check(
            "logits equal the model in memory",
            format!("{difference:.1e}"),
            &format!("≤ {limit:.0e}"),
            difference <= limit,
        );
    } else if let Some(reference) = &manifest.reference {
        let found = export::reference(&decoder, &net, &reference.ids)?;
        let of = |token: u32| found.top.iter().find(|(t, _)| *t == token).map(|(_, z)| *z);
        let scale = reference.top.iter().fold(1e-9f32, |m, (_, z)| m.max(z.abs()));
        let gap = |(t, z): &(u32, f32)| of(*t).map_or(f32::INFINITY, |found| (found - z).abs() / scale);
        let worst = reference.top.iter().take(8).map(gap).fold(0f32, f32::max) as f64;
        let limit = tolerance(device);
        report.check(
            "logits equal those at conversion",
            format!("{worst:.1e}"),
            &format!("≤ {limit:.0e}"),
            worst <= limit,
        );
    }
    recurrence(&mut report, subject, &ids, device)?;

    if let Some(valid) = against.valid {
        let found = quality(subject, against.teacher, valid, progress)?;
        if let Some(last) = report.stages.last() {
            let ratio = found.perplexity / last.quality.perplexity;
            // Rounding merged weights to the file's precision moves it a little.
            let equal = (ratio - 1.0).abs() <= 0.01;
            report.check("perplexity equals that before merging", format!("{ratio:.6} ×"), "1 ± 0.01", equal);
        }
        report.stages.push(Stage { name: "exported".into(), quality: found });
    }
    branches(&mut report, subject, &ids[..ids.len().min(512)], device)?;
    let a = model.architecture();
    let longest = if a.has_positions() { a.max_positions.saturating_sub(STEPS + 2) } else { usize::MAX };
    let mut contexts: Vec<usize> = against.contexts.iter().map(|context| (*context).min(longest)).collect();
    contexts.dedup(); // of those that are longer than the model's positions
    for context in contexts {
        report.speeds.push(speed(&model, subject, context, &ids, device)?);
    }
    Ok(report)
}

/// Which branch of the converted layers does the work.
fn branches(report: &mut Report, model: Subject, ids: &[u32], device: &Device) -> Result<()> {
    let ids = Tensor::new(ids, device)?.unsqueeze(0)?;
    let found = diagnose(model, &ids)?;
    let mut shares = vec![None; model.net.mixers.len()];
    if let Some(metric) = found.metrics.get(LINEAR_SHARE) {
        for (layer, heads) in metric.layers.iter().zip(&metric.values) {
            shares[*layer] = Some(heads.iter().sum::<f64>() / heads.len().max(1) as f64);
        }
    }
    let split = |layer: &usize| model.net.mixers[*layer].window() > 0;
    let idle = |test: fn(f64) -> bool| -> Vec<String> {
        let layers = (0..shares.len()).filter(|l| split(l) && shares[*l].is_some_and(test));
        layers.map(|l| l.to_string()).collect()
    };
    for (name, layers) in [
        ("layers whose linear part does nothing (share < 1 %)", idle(|s| s < 0.01)),
        ("layers whose window does nothing (share < 1 %)", idle(|s| s > 0.99)),
    ] {
        if !layers.is_empty() {
            report.inform(name, layers.join(", "));
        }
    }
    let whole = diagnose::loss(model, &ids)?;
    for (name, left) in [("the linear part", Branch::Window), ("the window", Branch::Linear)] {
        if let Some(loss) = diagnose::without(model, &ids, left)? {
            // A branch that can go unnoticed does nothing, whatever its share.
            let needless = match loss - whole {
                change if change < -0.03 => ": better without it",
                change if change < 0.01 => ": it does nothing",
                _ => "",
            };
            let times = (loss - whole).min(50.0).exp();
            report.inform(&format!("perplexity without {name}"), format!("{times:.3} ×{needless}"));
        }
    }
    report.linear_shares = shares;
    report.diagnostics = found;
    Ok(())
}

/// Token ids to try the model on: validation text where there is some, else the reference prompt, repeated.
fn sample(valid: Option<&Split>, manifest: &Manifest, vocab: usize) -> Vec<u32> {
    let known = match (valid, &manifest.reference) {
        (Some(valid), _) if !valid.is_empty() => valid.sequence(0).ids,
        (_, Some(reference)) => reference.ids.clone(),
        _ => (0..vocab.min(512) as u32).collect(),
    };
    known.iter().copied().cycle().take(known.len().max(1024)).collect()
}

fn files(report: &mut Report, dir: &Path, manifest: &Manifest) -> Result<()> {
    let mut bad = Vec::new();
    for row in &manifest.files {
        let path = dir.join(&row.file);
        match writer::sha256_file(&path) {
            Ok(found) if found == row.sha256 => {}
            Ok(_) => bad.push(format!("{} changed", row.file)),
            Err(_) => bad.push(format!("{} missing", row.file)),
        }
    }
    let value = if bad.is_empty() { format!("{} files", manifest.files.len()) } else { bad.join(", ") };
    report.check("files as written (sha256)", value, "all", bad.is_empty());
    Ok(())
}

fn tensors(report: &mut Report, model: &Model, manifest: &Manifest) {
    let found = &model.checkpoint.headers().tensors;
    let differs = |(name, (dtype, shape)): &(&String, &(String, Vec<usize>))| match found.get(*name) {
        None => Some(format!("{name} missing")),
        Some(info) if info.shape != *shape || format!("{:?}", info.dtype) != *dtype => Some(format!("{name} differs")),
        Some(_) => None,
    };
    let mut bad: Vec<String> = manifest.tensors.iter().filter_map(|t| differs(&t)).collect();
    bad.extend(found.keys().filter(|n| !manifest.tensors.contains_key(*n)).map(|n| format!("{n} not planned")));
    let value = if bad.is_empty() { format!("{} tensors", found.len()) } else { bad.join(", ") };
    report.check("every planned tensor and no other", value, "all", bad.is_empty());
}

/// Tensors that were to stay have the bytes they had.
fn kept(report: &mut Report, model: &Model, source: &Checkpoint, merged: &[String]) -> Result<()> {
    let (mut same, mut bad) = (0, Vec::new());
    for (name, claim) in &model.description.claims {
        if matches!(claim, Claim::Mixer) || merged.contains(name) {
            continue;
        }
        match model.checkpoint.bytes(name)? == source.bytes(name)? {
            true => same += 1,
            false => bad.push(name.clone()),
        }
    }
    let value = if bad.is_empty() { format!("{same} tensors") } else { bad.join(", ") };
    report.check("kept tensors equal the source byte for byte", value, "all", bad.is_empty());
    Ok(())
}

/// One token at a time equals the whole sequence at once, two windows past the window.
fn recurrence(report: &mut Report, model: Subject, ids: &[u32], device: &Device) -> Result<()> {
    let window = match model.net.mixers.iter().all(|m| m.is_softmax()) {
        true => 32,
        false => model.net.mixers.iter().map(|m| m.window()).max().unwrap_or(0).max(32),
    };
    let ids: Vec<u32> = ids.iter().copied().cycle().take(3 * window + 1).collect();
    let all = Tensor::new(ids.as_slice(), device)?.unsqueeze(0)?;
    let whole = model.decoder.logits(&model.decoder.hidden(&all, model.net)?, model.net)?;
    let mut states = model.net.states();
    let half = window / 2; // a prefill in one piece, then single tokens
    let mut steps = vec![model.decoder.extend(&all.narrow(1, 0, half)?.contiguous()?, model.net, &mut states)?];
    for t in half..ids.len() {
        steps.push(model.decoder.extend(&all.narrow(1, t, 1)?.contiguous()?, model.net, &mut states)?);
    }
    let steps = model.decoder.logits(&Tensor::cat(&steps, 1)?, model.net)?;
    let difference = difference(&steps, &whole)?;
    let limit = tolerance(device);
    let name = format!("one token at a time = parallel, {} tokens", ids.len());
    report.check(&name, format!("{difference:.1e}"), &format!("≤ {limit:.0e}"), difference <= limit);
    Ok(())
}

/// Tokens that are timed.
const STEPS: usize = 16;

/// Decodes after a prefill of `context` tokens.
fn speed(model: &Model, subject: Subject, context: usize, ids: &[u32], device: &Device) -> Result<Speed> {
    let ids: Vec<u32> = ids.iter().copied().cycle().take(context).collect();
    let mut states = subject.net.states();
    for part in ids.chunks(1024) {
        let part = Tensor::new(part, device)?.unsqueeze(0)?;
        subject.decoder.extend(&part, subject.net, &mut states)?;
    }
    let n = STEPS;
    let mut steps = Steps::new(subject.decoder, subject.net, states, 1, n + 2);
    let state_bytes = steps.state_bytes();
    let mut run = |n: usize| -> Result<f64> {
        let started = Instant::now();
        for _ in 0..n {
            steps.step(&ids[..1])?;
        }
        device.synchronize()?;
        Ok(started.elapsed().as_secs_f64())
    };
    run(2)?;
    let seconds = run(n)?;
    let a = model.architecture();
    let element = subject.decoder.dtype.size_in_bytes();
    Ok(Speed {
        context,
        tokens_per_second: n as f64 / seconds.max(1e-9),
        state_bytes,
        teacher_cache_bytes: cache_bytes(a, 0..a.layers, context, element),
    })
}

/// The error of a report in which something failed.
pub fn failure(report: &Report, dir: &Path) -> Error {
    let failed: Vec<String> =
        report.checks.iter().filter(|c| c.passed == Some(false)).map(|c| format!("{}: {}", c.name, c.value)).collect();
    Error::new(Kind::Verify, format!("verification of `{}` failed: {}", dir.display(), failed.join("; ")))
        .hint("do not use this export; convert again, and report it if it fails again")
}
