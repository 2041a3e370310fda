//! The model card of an export: what it is, how it was made, what it lost.

use std::fmt::Write;

use super::export::Manifest;
use super::load::Linearization;
use super::verify::Report;

/// Markdown with the front matter the hub reads.
pub fn card(manifest: &Manifest, report: &Report, linearization: Option<&Linearization>) -> String {
    let mut text = String::from("---\nlibrary_name: margay\npipeline_tag: text-generation\n");
    if manifest.source.contains('/') {
        let _ = writeln!(text, "base_model: {}\nbase_model_relation: finetune", manifest.source);
    }
    text.push_str("tags:\n- margay\n- linear-attention\n- custom_code\n---\n\n");
    let revision = manifest.revision.as_deref().map_or(String::new(), |r| format!(" at `{r}`"));
    let _ = writeln!(text, "# {}, linearized\n", manifest.source.rsplit('/').next().unwrap_or_default());
    match linearization {
        Some(l) => {
            let _ = writeln!(
                text,
                "`{}`{revision} with softmax attention replaced by `{}` in layers {}. Converted by margay {} with recipe `{}`.\n",
                manifest.source,
                l.mixer.design().name(),
                super::plan::ranges(&l.layers),
                manifest.margay,
                manifest.recipe_origin
            );
            text.push_str(
                "Run it: `margay generate <this folder> --prompt \"...\"`, or with transformers:\n\n```python\n\
                 model = AutoModelForCausalLM.from_pretrained(\"<this folder>\", trust_remote_code=True)\n```\n\n\
                 The state does not grow with the text.\n",
            );
        }
        None => {
            let _ = writeln!(
                text,
                "`{}`{revision}, every layer kept. Written by margay {}.",
                manifest.source, manifest.margay
            );
        }
    }

    text.push_str("\n## Quality on held-back text\n\n| form | perplexity | bits per byte | KL to teacher | top-1 agreement |\n|---|---:|---:|---:|---:|\n");
    for stage in &report.stages {
        let q = &stage.quality;
        let kl = q.kl.map_or("–".into(), |kl| format!("{kl:.4}"));
        let top = q.top1_agreement.map_or("–".into(), |t| format!("{:.1} %", 100.0 * t));
        let _ = writeln!(text, "| {} | {:.4} | {:.4} | {kl} | {top} |", stage.name, q.perplexity, q.bits_per_byte);
    }
    text.push_str("\n## Verification\n\n| check | found | wanted | |\n|---|---|---|---|\n");
    for c in &report.checks {
        let mark = c.passed.map_or("", |p| if p { "ok" } else { "FAILED" });
        let _ = writeln!(text, "| {} | {} | {} | {mark} |", c.name, c.value, c.limit);
    }
    text.push_str("\n## Decoding\n\n| context | tokens/s | state | teacher's cache |\n|---:|---:|---:|---:|\n");
    for s in &report.speeds {
        let (state, cache) =
            (super::plan::bytes(s.state_bytes as u64), super::plan::bytes(s.teacher_cache_bytes as u64));
        let _ = writeln!(text, "| {} | {:.0} | {state} | {cache} |", s.context, s.tokens_per_second);
    }
    if report.linear_shares.iter().any(|s| s.is_some()) {
        text.push_str("\nShare of the attention carried by the linear part, by layer: ");
        let shares = report.linear_shares.iter().map(|s| s.map_or("softmax".into(), |s| format!("{:.1} %", 100.0 * s)));
        text.push_str(&shares.collect::<Vec<_>>().join(", "));
        text.push_str(".\n");
    }
    let _ = writeln!(text, "\n## Training\n\nText: {}.\n", manifest.data);
    for (name, outcome) in &manifest.stages {
        let of = |key: &str| outcome.get(key).cloned().unwrap_or_default();
        let _ = writeln!(
            text,
            "- {name}: {} tokens, {} steps, {:.0} s",
            of("tokens"),
            of("steps"),
            of("seconds").as_f64().unwrap_or(0.0)
        );
    }
    let _ = writeln!(text, "\n## Recipe\n\n```toml\n{}```", manifest.recipe.to_toml());
    text
}
