//! The training log as figures: losses of each stage, and of its layers where it has parts.

use serde_json::Value;

use crate::plot::{Figure, Heat, Lines, Scale, Series, number};

/// Points of a curve, at most; more are averaged.
const POINTS: usize = 400;
/// Columns of a heat map, at most.
const COLUMNS: usize = 60;

/// What a stage wrote into the log.
pub struct Stage {
    pub name: String,
    /// Names of the parts of the loss.
    parts: Vec<String>,
    /// Step and mean loss on training data.
    train: Vec<(f64, f64)>,
    /// Step and loss of every part on validation data.
    valid: Vec<(f64, Vec<f64>)>,
}

/// The stages of a log in the order they ran; lines that are not of a stage are passed over.
pub fn stages(log: &str) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    for line in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let (Some(name), Some(step)) = (line["stage"].as_str(), line["step"].as_f64()) else { continue };
        let at = stages.iter().position(|s| s.name == name).unwrap_or_else(|| {
            stages.push(Stage { name: name.into(), parts: Vec::new(), train: Vec::new(), valid: Vec::new() });
            stages.len() - 1
        });
        let stage = &mut stages[at];
        stage.train.extend(line["loss"].as_f64().map(|loss| (step, loss)));
        if let Some(valid) = line["valid"].as_array() {
            stage.valid.push((step, valid.iter().filter_map(Value::as_f64).collect()));
        }
        if let Some(parts) = line["parts"].as_array() {
            stage.parts = parts.iter().filter_map(Value::as_str).map(String::from).collect();
        }
    }
    stages
}

impl Stage {
    pub fn figures(&self) -> Vec<Figure> {
        let curve = |what: &str, points: Vec<(f64, f64)>| {
            let scale = if points.iter().all(|p| p.1 > 0.0) { Scale::Log } else { Scale::Linear };
            let title = format!("{}: {what} loss", self.name);
            let mut series = Series::new(what, points);
            series.marked = series.points.len() <= COLUMNS;
            Lines { title: &title, x: ("step", Scale::Linear), y: scale, series: vec![series] }.figure()
        };
        let mut figures = Vec::new();
        if self.train.len() > 1 {
            figures.push(curve("training", averaged(&self.train)));
        }
        let mean = |losses: &Vec<f64>| losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        if self.valid.len() > 1 {
            figures.push(curve("validation", self.valid.iter().map(|(step, losses)| (*step, mean(losses))).collect()));
        }
        figures.extend(self.by_part());
        figures
    }

    /// Validation losses of the parts over the steps.
    fn by_part(&self) -> Option<Figure> {
        let parts = self.valid.iter().map(|(_, losses)| losses.len()).max().filter(|n| *n > 1)?;
        let every = self.valid.len().div_ceil(COLUMNS);
        let last = self.valid.len() - 1;
        let shown: Vec<_> = (0..=last).filter(|i| (last - i).is_multiple_of(every)).map(|i| &self.valid[i]).collect();
        let name = |part: usize| self.parts.get(part).cloned().unwrap_or_else(|| format!("part {part}"));
        let title = format!("{}: validation loss of each layer", self.name);
        let figure = Heat {
            title: &title,
            row_label: "",
            column_label: "step",
            rows: (0..parts).map(name).collect(),
            columns: shown.iter().map(|(step, _)| step.to_string()).collect(),
            cells: (0..parts).map(|p| shown.iter().map(|(_, losses)| losses.get(p).copied()).collect()).collect(),
            scale: Scale::Log,
            range: None,
            text: &number,
        };
        Some(figure.figure())
    }
}

/// At most [`POINTS`] points, each the mean of its neighbours.
fn averaged(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(points.len().div_ceil(POINTS).max(1)).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_any_name_in_their_order() {
        let log = r#"{"stage":"warm","step":0,"valid":[4.0,2.0],"parts":["layer 1","layer 5"]}
{"stage":"warm","step":1,"loss":3.0,"lr":0.1}
{"stage":"warm","step":2,"loss":2.0,"lr":0.1}
{"stage":"warm","step":2,"valid":[2.0,1.0]}
{"stage":"align","step":0,"valid":[1.5]}
{"stage":"align","ste"#;
        let stages = stages(log);
        assert_eq!(stages.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["warm", "align"]);
        let [training, validation, layers] = &stages[0].figures()[..] else { panic!("three figures") };
        assert!(training.svg.contains("warm: training loss") && validation.svg.contains("warm: validation loss"));
        assert!(layers.svg.contains("layer 5, step 2: 1<"), "{}", layers.svg);
        assert!(stages[1].figures().is_empty());
    }

    #[test]
    fn long_curves_are_averaged() {
        let points: Vec<(f64, f64)> = (0..4000).map(|i| (i as f64, 1.0)).collect();
        let short = averaged(&points);
        assert_eq!((short.len(), short[0]), (400, (4.5, 1.0)));
        assert_eq!(averaged(&points[..3]), points[..3]);
    }
}
