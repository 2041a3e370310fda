//! The plan as tables for people: repeated tensors in one row, so that any model fits a page.

use super::{Fate, Memory, Plan, Stage, Tensor, Total};

/// One table: a title, column heads (none for a list of names and values) and rows of as many cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub title: &'static str,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Section {
    /// Names and their values.
    pub fn list<const N: usize>(title: &'static str, rows: [(&str, String); N]) -> Section {
        let rows = rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
        Section { title, columns: Vec::new(), rows }
    }
}

/// Column heads.
pub fn heads<const N: usize>(names: [&str; N]) -> Vec<String> {
    names.map(String::from).to_vec()
}

impl Plan {
    /// The plan in tables, in reading order; warnings are not among them.
    pub fn sections(&self) -> Vec<Section> {
        let model = &self.model;
        let revision = model.revision.as_ref().map(|r| format!(" at {r}")).unwrap_or_default();
        let dtypes: Vec<String> = model.dtypes.iter().map(|d| d.to_string()).collect();
        let weights = if model.weights { "" } else { ", as config.json says" };
        let mixer = self.recipe.mixer.design().name();
        let mut sections = vec![Section::list(
            "Plan",
            [
                ("model", format!("{}{revision}", model.id)),
                ("family", format!("{}, {} layers", model.family, model.layers)),
                ("parameters", format!("{}{weights}", count(model.parameters))),
                ("weights", format!("{}, {}", bytes(model.bytes), dtypes.join(" and "))),
                ("recipe", self.recipe.name.clone()),
                ("", self.recipe.about.clone()),
                ("layers", layers(mixer, &self.layers.converted, &self.layers.kept)),
            ],
        )];
        sections[0].rows.extend(self.hybrid().map(|hybrid| vec![String::new(), hybrid]));
        let (new, source): (Vec<_>, Vec<_>) = self.tensors.iter().partition(|t| t.fate == Fate::New);
        sections.push(tensors("Tensors of the source", &source));
        if !new.is_empty() {
            sections.push(tensors("New tensors", &new));
        }
        let fates = self.fates.iter().map(|(fate, Total { tensors, bytes: size })| {
            vec![fate.word().to_string(), tensors.to_string(), bytes(*size)]
        });
        sections.push(Section { title: "Fates", columns: heads(["fate", "tensors", "size"]), rows: fates.collect() });
        sections.push(stages(&self.stages, &self.verify));
        let mut disk = vec![("export", self.disk.export), ("run folder", self.disk.run)];
        if self.disk.download > 0 {
            disk.push(("download", self.disk.download));
        }
        let rows = disk.into_iter().map(|(name, size)| vec![name.to_string(), bytes(size)]).collect();
        sections.push(Section { title: "Disk", columns: Vec::new(), rows });
        sections
    }
}

impl Fate {
    /// The word that JSON has for it too.
    pub fn word(self) -> &'static str {
        match self {
            Fate::Kept => "kept",
            Fate::Merged => "merged",
            Fate::Tied => "tied",
            Fate::Dropped => "dropped",
            Fate::New => "new",
        }
    }
}

/// `lolcats in 0..15; softmax in 3, 7`.
fn layers(mixer: &str, converted: &[usize], kept: &[usize]) -> String {
    let part = |name: &str, list: &[usize]| (!list.is_empty()).then(|| format!("{name} in {}", ranges(list)));
    [part(mixer, converted), part("softmax", kept)].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// One row for all tensors that differ in their layer and their expert only, in order of first appearance.
fn tensors(title: &'static str, list: &[&Tensor]) -> Section {
    struct Group<'a> {
        first: &'a Tensor,
        /// Name before and after the layer.
        name: (&'a str, String),
        layers: Vec<usize>,
        count: usize,
        bytes: u64,
    }
    let mut groups: Vec<Group> = Vec::new();
    for tensor in list {
        let (before, layer, after) = split(&tensor.name);
        let same = |g: &&mut Group| {
            let f = g.first;
            (g.name.0, g.name.1.as_str()) == (before, after.as_str())
                && !g.layers.is_empty()
                && (f.dtype, &f.shape, f.fate, &f.note) == (tensor.dtype, &tensor.shape, tensor.fate, &tensor.note)
        };
        match groups.iter_mut().find(same).filter(|_| layer.is_some()) {
            Some(group) => {
                group.layers.extend(layer);
                group.count += 1;
                group.bytes += tensor.bytes;
            }
            None => {
                let layers = layer.into_iter().collect();
                groups.push(Group { first: tensor, name: (before, after), layers, count: 1, bytes: tensor.bytes });
            }
        }
    }
    let row = |mut g: Group| {
        g.layers.sort_unstable();
        g.layers.dedup();
        let layers = match g.layers.len() {
            0 | 1 => ranges(&g.layers),
            _ => format!("{{{}}}", ranges(&g.layers)),
        };
        vec![
            format!("{}{layers}{}", g.name.0, g.name.1),
            g.first.dtype.to_string(),
            format!("{:?}", g.first.shape),
            g.count.to_string(),
            bytes(g.bytes),
            g.first.fate.word().to_string(),
            g.first.note.clone().unwrap_or_default(),
        ]
    };
    let columns = heads(["tensor", "type", "shape", "count", "size", "fate", "why"]);
    Section { title, columns, rows: groups.into_iter().map(row).collect() }
}

/// `model.layers.`, 3, `.mlp.experts.*.up_proj.weight`: what is before and behind the first number, later ones as `*`;
/// without a number the whole name.
fn split(name: &str) -> (&str, Option<usize>, String) {
    let mut start = 0;
    for part in name.split('.') {
        if let Ok(layer) = part.parse() {
            let rest = name[start + part.len()..].split('.');
            let rest = rest.map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
            return (&name[..start], Some(layer), rest.collect::<Vec<_>>().join("."));
        }
        start += part.len() + 1;
    }
    (name, None, String::new())
}

/// A column for each training stage, and one for the memory of verification.
fn stages(list: &[Stage], verify: &Memory) -> Section {
    let trains = |s: &Stage| {
        [
            count(s.trainable),
            count(s.tokens),
            s.steps.to_string(),
            s.batch.to_string(),
            s.micro_batch.to_string(),
            if s.layer_wise { String::new() } else { s.kept.to_string() },
            s.seq_len.to_string(),
            scaled(s.flops, "FLOP"),
        ]
    };
    let holds = |m: &Memory| [m.total, m.weights, m.optimizer, m.inputs, m.working].map(bytes);
    let mut columns = vec![("", STAGE_ROWS.map(String::from).to_vec())];
    columns.extend(list.iter().map(|s| (s.name.as_str(), [&trains(s)[..], &holds(&s.memory)].concat())));
    columns.push(("verify", [vec![String::new(); 8], holds(verify).to_vec()].concat()));
    let row = |i: usize| columns.iter().map(|(_, cells)| cells[i].clone()).collect();
    let rows = (0..STAGE_ROWS.len()).map(row).collect();
    Section { title: "Stages", columns: columns.iter().map(|(head, _)| head.to_string()).collect(), rows }
}

const STAGE_ROWS: [&str; 13] = [
    "trains",
    "tokens",
    "steps",
    "sequences per step",
    "at once",
    "graphs kept",
    "tokens per sequence",
    "operations",
    "memory",
    "of which weights",
    "training state",
    "block inputs",
    "working space",
];

/// Ascending numbers as `0..3, 7, 9..11`, both ends included.
pub fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for n in numbers {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == *n => *end = *n,
            _ => runs.push((*n, *n)),
        }
    }
    let text = |(from, to): (usize, usize)| if from == to { from.to_string() } else { format!("{from}..{to}") };
    runs.into_iter().map(text).collect::<Vec<_>>().join(", ")
}

/// `16.1 GB`, in powers of ten.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, "B")
}

/// `8.03 G`, in powers of ten; whole below a thousand.
pub fn count(n: u64) -> String {
    scaled(n as f64, "").trim_end().to_string()
}

/// Three figures, a prefix and a unit.
fn scaled(mut x: f64, unit: &str) -> String {
    let mut prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"].into_iter().peekable();
    while x >= 999.5 && prefixes.len() > 1 {
        x /= 1000.0;
        prefixes.next();
    }
    let prefix = prefixes.next().unwrap_or_default();
    let decimals = match x {
        _ if prefix.is_empty() => 0,
        x if x < 9.995 => 2,
        x if x < 99.95 => 1,
        _ => 0,
    };
    format!("{x:.decimals$} {prefix}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(16_060_522_496), "16.1 GB");
        assert_eq!(bytes(999_999), "1.00 MB");
        assert_eq!(count(8_030_261_248), "8.03 G");
        assert_eq!(count(64), "64");
    }

    #[test]
    fn layer_ranges() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[0, 1, 2, 7, 9, 10]), "0..2, 7, 9..10");
        let of = |name| {
            let (before, layer, after) = split(name);
            (before, layer, after.leak() as &str)
        };
        assert_eq!(of("model.layers.12.mlp.up_proj.weight"), ("model.layers.", Some(12), ".mlp.up_proj.weight"));
        assert_eq!(of("h.3.mlp.experts.7.w1.weight"), ("h.", Some(3), ".mlp.experts.*.w1.weight"));
        assert_eq!(of("model.norm.weight"), ("model.norm.weight", None, ""));
    }
}
