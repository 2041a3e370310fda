//! Line charts and heat maps as SVG that takes its colours from the page: light, dark, and any width.
//!
//! A [`Figure`] carries no colour of its own, only classes; [`STYLE`] gives them theirs, inline in a page or in the
//! file that [`sheet`] makes. Values stand in the tooltip of every point and cell.

use std::fmt::Write;

/// Colours of figures by class. Series colours keep apart for the colour-blind in their fixed order.
pub const STYLE: &str = include_str!("plot.css");

/// A drawn chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// A whole `<svg>` element.
    pub svg: String,
    /// Natural size in pixels.
    pub width: f64,
    pub height: f64,
}

/// How values become lengths or shades. A logarithm shows only values above 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    Log,
}

/// Curves over one pair of axes.
pub struct Lines<'a> {
    pub title: &'a str,
    pub x: (&'a str, Scale),
    /// The name of what is drawn is the title.
    pub y: Scale,
    pub series: Vec<Series>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    pub name: String,
    /// Ascending in x.
    pub points: Vec<(f64, f64)>,
    /// Whether each point has a dot with its value.
    pub marked: bool,
}

impl Series {
    pub fn new(name: &str, points: Vec<(f64, f64)>) -> Series {
        Series { name: name.into(), points, marked: true }
    }
}

/// A grid of values as shades.
pub struct Heat<'a> {
    pub title: &'a str,
    pub row_label: &'a str,
    pub column_label: &'a str,
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    /// Rows of columns; `None` stays empty.
    pub cells: Vec<Vec<Option<f64>>>,
    pub scale: Scale,
    /// Values of the lightest and darkest shade; those of the data where not given.
    pub range: Option<(f64, f64)>,
    pub text: &'a dyn Fn(f64) -> String,
}

/// Largest series count that has a colour of its own; later ones begin anew.
const COLOURS: usize = 6;
/// Ordinary width of a letter, for laying out text without a font.
const LETTER: f64 = 6.6;

impl Lines<'_> {
    pub fn figure(&self) -> Figure {
        let (width, height) = (480.0, 280.0);
        let keep = |(x, y): &(f64, f64)| self.x.1.shows(*x) && self.y.shows(*y);
        let points = || self.series.iter().flat_map(|s| s.points.iter().filter(|p| keep(p)));
        let (left, right, bottom) = (54.0, width - 14.0, height - 40.0);
        let mut body = String::new();
        let legend = if self.series.len() > 1 { self.legend(&mut body, left, right) } else { 0.0 };
        let top = 30.0 + legend;
        let x = Axis::over(points().map(|p| p.0), self.x.1, left, right);
        let y = Axis::over(points().map(|p| p.1), self.y, bottom, top);
        for tick in y.ticks() {
            let at = y.place(tick);
            _ = write!(body, r#"<path class="grid" d="M{left} {at:.1}H{right}"/>"#);
            label(&mut body, "end muted", left - 6.0, at + 4.0, &number(tick));
        }
        for tick in x.ticks() {
            label(&mut body, "middle muted", x.place(tick), bottom + 16.0, &number(tick));
        }
        label(&mut body, "middle muted", (left + right) / 2.0, height - 6.0, self.x.0);
        _ = write!(body, r#"<path class="axis" d="M{left} {bottom}H{right}"/>"#);
        for (i, series) in self.series.iter().enumerate() {
            let colour = i % COLOURS;
            let places: Vec<_> =
                series.points.iter().filter(|p| keep(p)).map(|p| (p, x.place(p.0), y.place(p.1))).collect();
            let path: Vec<String> = places.iter().map(|(_, x, y)| format!("{x:.1} {y:.1}")).collect();
            if path.len() > 1 {
                _ = write!(body, r#"<path class="line s{colour}" d="M{}"/>"#, path.join("L"));
            }
            if !series.marked {
                continue;
            }
            for ((px, py), x, y) in &places {
                let told = escape(&format!("{}: {} at {} {}", series.name, number(*py), self.x.0, number(*px)));
                _ = write!(
                    body,
                    r#"<circle class="dot s{colour}" cx="{x:.1}" cy="{y:.1}" r="3"><title>{told}</title></circle>"#
                );
            }
        }
        figure(self.title, width, height, &body)
    }

    /// Names and colours in rows under the title; gives their height.
    fn legend(&self, body: &mut String, left: f64, right: f64) -> f64 {
        let (mut x, mut row) = (left, 0.0);
        for (i, series) in self.series.iter().enumerate() {
            let wide = 34.0 + LETTER * series.name.chars().count() as f64;
            if x + wide > right && x > left {
                (x, row) = (left, row + 1.0);
            }
            let y = 38.0 + 16.0 * row;
            _ = write!(body, r#"<path class="line s{}" d="M{x:.1} {:.1}h16"/>"#, i % COLOURS, y - 4.0);
            label(body, "", x + 21.0, y, &series.name);
            x += wide;
        }
        16.0 * (row + 1.0)
    }
}

impl Heat<'_> {
    pub fn figure(&self) -> Figure {
        let values = || self.cells.iter().flatten().flatten().copied().filter(|v| self.scale.shows(*v));
        let (low, high) = self.range.unwrap_or_else(|| extent(values()));
        let longest = |names: &[String]| names.iter().map(|n| n.chars().count()).max().unwrap_or(0) as f64 * LETTER;
        let left = 26.0 + longest(&self.rows);
        let (rows, columns) = (self.rows.len().max(1) as f64, self.columns.len().max(1) as f64);
        let texts = values().map(|v| (self.text)(v).chars().count()).max().unwrap_or(0) as f64 * LETTER;
        let (wide, tall) = ((430.0 / columns).clamp(3.0, 56.0), (360.0 / rows).clamp(5.0, 28.0));
        let written = wide >= texts + 4.0 && tall >= 14.0;
        let (top, right, bottom) = (34.0, left + columns * wide, 34.0 + rows * tall);
        let width = (right + 14.0).max(40.0 + LETTER * 1.15 * self.title.chars().count() as f64).max(240.0);
        let height = bottom + if written { 40.0 } else { 66.0 };

        let mut body = String::new();
        for (r, row) in self.cells.iter().enumerate() {
            for (c, value) in row.iter().enumerate() {
                let (x, y) = (left + c as f64 * wide, top + r as f64 * tall);
                let place = format!(r#"x="{x:.1}" y="{y:.1}" width="{:.1}" height="{:.1}""#, wide - 1.0, tall - 1.0);
                let Some(value) = value.filter(|v| self.scale.shows(*v)) else {
                    _ = write!(body, r#"<rect class="none" {place}/>"#);
                    continue;
                };
                let shade = self.scale.share(value, low, high).clamp(0.0, 1.0);
                let text = (self.text)(value);
                let (row, column) = (&self.rows[r], &self.columns[c]);
                let told = escape(&format!("{} {row}, {} {column}: {text}", self.row_label, self.column_label));
                _ = write!(
                    body,
                    r#"<rect class="cell" {place} fill-opacity="{:.3}"><title>{told}</title></rect>"#,
                    0.06 + 0.94 * shade
                );
                if written {
                    let class = if shade > 0.55 { "middle deep" } else { "middle" };
                    label(&mut body, class, x + wide / 2.0, y + tall / 2.0 + 4.0, &text);
                }
            }
        }
        let sparse =
            |names: &[String], pitch: f64, need: f64| ((need / pitch).ceil() as usize).clamp(1, names.len().max(1));
        let every = sparse(&self.rows, tall, 12.0);
        for (i, name) in self.rows.iter().enumerate().step_by(every) {
            label(&mut body, "end muted", left - 6.0, top + (i as f64 + 0.5) * tall + 4.0, name);
        }
        let every = sparse(&self.columns, wide, longest(&self.columns) + 8.0);
        for (i, name) in self.columns.iter().enumerate().step_by(every) {
            label(&mut body, "middle muted", left + (i as f64 + 0.5) * wide, bottom + 15.0, name);
        }
        label(&mut body, "middle muted", (left + right) / 2.0, bottom + 32.0, self.column_label);
        let middle = (top + bottom) / 2.0;
        let turned = format!(r#"transform="rotate(-90 12 {middle:.1})" "#);
        _ = write!(
            body,
            r#"<text class="middle muted" {turned}x="12" y="{middle:.1}">{}</text>"#,
            escape(self.row_label)
        );
        if !written {
            self.key(&mut body, left, height - 12.0, low, high);
        }
        figure(self.title, width, height, &body)
    }

    /// The shades from the lowest to the highest value.
    fn key(&self, body: &mut String, left: f64, y: f64, low: f64, high: f64) {
        let (low, high) = ((self.text)(low), (self.text)(high));
        label(body, "muted", left, y, &low);
        let start = left + 6.0 + LETTER * low.chars().count() as f64;
        for step in 0..10 {
            let (x, shade) = (start + 9.0 * step as f64, 0.06 + 0.94 * step as f64 / 9.0);
            _ = write!(
                body,
                r#"<rect class="cell" x="{x:.1}" y="{:.1}" width="9" height="9" fill-opacity="{shade:.3}"/>"#,
                y - 8.5
            );
        }
        label(body, "muted", start + 96.0, y, &high);
    }
}

impl Scale {
    fn shows(self, value: f64) -> bool {
        value.is_finite() && (self == Scale::Linear || value > 0.0)
    }

    /// Where `value` lies between `low` (0) and `high` (1).
    fn share(self, value: f64, low: f64, high: f64) -> f64 {
        let share = |v: f64, low: f64, high: f64| if high > low { (v - low) / (high - low) } else { 0.5 };
        match self {
            Scale::Linear => share(value, low, high),
            Scale::Log => share(value.ln(), low.ln(), high.ln()),
        }
    }
}

/// An axis from the pixel `from` to `to`.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// An axis a little longer than its values; a linear one of values that are not negative starts at 0.
    fn over(values: impl Iterator<Item = f64>, scale: Scale, from: f64, to: f64) -> Axis {
        let (mut low, mut high) = extent(values);
        if scale == Scale::Log && low <= 0.0 {
            (low, high) = (1.0, 10.0); // no value at all
        }
        let flat = high - low <= 1e-9 * high.abs();
        match scale {
            Scale::Linear if low >= 0.0 => (low, high) = (0.0, if high > 0.0 { 1.03 * high } else { 1.0 }),
            Scale::Linear if flat => (low, high) = (low - 0.5 * low.abs().max(1.0), high + 0.5 * high.abs().max(1.0)),
            Scale::Linear => (low, high) = (low - 0.03 * (high - low), high + 0.03 * (high - low)),
            Scale::Log if flat => (low, high) = (low / 2.0, high * 2.0),
            Scale::Log => {
                let margin = (high / low).powf(0.03);
                (low, high) = (low / margin, high * margin);
            }
        }
        Axis { scale, low, high, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * self.scale.share(value, self.low, self.high)
    }

    /// Round numbers, at most about seven.
    fn ticks(&self) -> Vec<f64> {
        let linear = || {
            let raw = (self.high - self.low) / 5.0;
            let power = 10f64.powf(raw.log10().floor());
            let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw).unwrap_or(raw);
            let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
            (first..=last).map(|i| i as f64 * step).collect::<Vec<_>>()
        };
        if self.scale == Scale::Linear {
            return linear();
        }
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let of = |steps: &'static [f64]| -> Vec<f64> {
            let all = decades.clone().flat_map(|d| steps.iter().map(move |m| m * 10f64.powi(d)));
            all.filter(|t| (self.low..=self.high).contains(t)).collect()
        };
        let mut choices = [&[1.0, 2.0, 5.0][..], &[1.0, 3.0], &[1.0]].map(of).into_iter();
        match choices.find(|ticks| ticks.len() <= 7) {
            Some(ticks) if ticks.len() > 1 => ticks,
            Some(_) => linear(), // less than a factor of two
            None => {
                let ticks = of(&[1.0]);
                let every = ticks.len().div_ceil(7);
                ticks.into_iter().step_by(every).collect()
            }
        }
    }
}

/// Smallest and largest; 0 and 1 where there is none.
fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

fn figure(title: &str, width: f64, height: f64, body: &str) -> Figure {
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}" role="img" aria-label="{}">"#,
        escape(title)
    );
    label(&mut svg, "title", 4.0, 18.0, title);
    svg.push_str(body);
    svg.push_str("</svg>\n");
    Figure { svg, width, height }
}

fn label(body: &mut String, class: &str, x: f64, y: f64, text: &str) {
    _ = write!(body, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escape(text));
}

/// Figures below each other in one SVG file, which brings its own colours.
pub fn sheet(figures: &[Figure]) -> String {
    let width = figures.iter().map(|f| f.width).fold(0.0, f64::max) + 32.0;
    let height: f64 = figures.iter().map(|f| f.height + 16.0).sum::<f64>() + 16.0;
    let mut file = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\">\n<style>{STYLE}</style>\n<rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n"
    );
    let mut y = 16.0;
    for figure in figures {
        file += &figure.svg.replacen("<svg ", &format!("<svg x=\"16\" y=\"{y:.0}\" "), 1);
        y += figure.height + 16.0;
    }
    file + "</svg>\n"
}

/// Three figures, without needless zeros.
pub fn number(x: f64) -> String {
    let size = x.abs();
    if x == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e6).contains(&size) {
        return format!("{x:.1e}").replace(".0e", "e");
    }
    let decimals = (2 - size.log10().floor() as i32).max(0) as usize;
    let text = format!("{x:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

/// Text between tags or in a quoted attribute.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (1.0, "1"), (12.345, "12.3"), (1234.0, "1234"), (0.05, "0.05"), (2e-7, "2e-7")];
        cases.into_iter().for_each(|(x, text)| assert_eq!(number(x), text));
        assert_eq!((number(-0.125).as_str(), number(2.5e6).as_str()), ("-0.125", "2.5e6"));
    }

    #[test]
    fn ticks_are_round_and_few() {
        let ticks = |low, high, scale| Axis { scale, low, high, from: 0.0, to: 1.0 }.ticks();
        assert_eq!(ticks(0.0, 10.0, Scale::Linear), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(1.0, 100.0, Scale::Log), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert!(ticks(1e-9, 1e9, Scale::Log).len() <= 7);
        assert!(ticks(1.1, 1.3, Scale::Log).len() > 1);
    }

    #[test]
    fn a_linear_axis_shows_zero() {
        let low = |values: &[f64], scale| Axis::over(values.iter().copied(), scale, 0.0, 1.0).low;
        assert_eq!((low(&[5.0, 7.0], Scale::Linear), low(&[], Scale::Linear)), (0.0, 0.0));
        assert!(low(&[-5.0, 7.0], Scale::Linear) < -5.0 && low(&[5.0, 7.0], Scale::Log) > 4.0);
    }

    #[test]
    fn a_heat_map_says_its_values() {
        let heat = Heat {
            title: "a < b",
            row_label: "pairs",
            column_label: "distance",
            rows: vec!["4".into(), "8".into()],
            columns: vec!["0".into(), "64".into()],
            cells: vec![vec![Some(1.0), Some(0.5)], vec![Some(0.0), None]],
            scale: Scale::Linear,
            range: Some((0.0, 1.0)),
            text: &|v| format!("{:.0} %", 100.0 * v),
        };
        let svg = heat.figure().svg;
        assert!(svg.contains("a &lt; b") && svg.contains("<title>pairs 4, distance 64: 50 %</title>"), "{svg}");
        assert_eq!((svg.matches("class=\"cell\"").count(), svg.matches("class=\"none\"").count()), (3, 1));
        let file = sheet(&[heat.figure(), heat.figure()]);
        assert_eq!(file.matches("<svg ").count(), 3);
    }

    #[test]
    fn curves_leave_out_what_cannot_be_drawn() {
        let series = vec![
            Series::new("loss", vec![(1.0, 10.0), (2.0, 0.0), (3.0, f64::NAN), (4.0, 0.1)]),
            Series::new("one", vec![(2.0, 1.0)]),
        ];
        let svg = Lines { title: "t", x: ("step", Scale::Linear), y: Scale::Log, series }.figure().svg;
        assert_eq!((svg.matches("<circle").count(), svg.matches("class=\"line").count()), (3, 3));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let empty = Lines { title: "t", x: ("x", Scale::Log), y: Scale::Log, series: Vec::new() }.figure();
        assert!(!empty.svg.contains("NaN"), "{}", empty.svg);
    }
}
