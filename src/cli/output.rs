//! The only place that prints: data to stdout, everything else to stderr.
//!
//! Progress is a bar on a terminal, a line every ten seconds elsewhere, or one JSON object per line with `--json-logs`.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use margay::convert::plan::{Section, bytes, count};
use margay::error::{Error, Kind, Result};
use margay::progress::{Progress, duration};
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::Voice;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warning,
    Info,
    Debug,
}

/// Decides quiet, normal and verbose, where bars draw and what is coloured.
pub struct Output {
    /// The least important level that is shown.
    level: Level,
    json: bool,
    bars: bool,
    colour: bool,
    /// Nobody reads stdout any more.
    closed: AtomicBool,
    stage: Mutex<Option<Stage>>,
}

/// The stage that runs.
struct Stage {
    name: String,
    unit: &'static str,
    total: u64,
    done: u64,
    /// Where this run of it began.
    from: u64,
    started: Instant,
    told: Instant,
    bar: Option<ProgressBar>,
}

impl Output {
    pub fn new(voice: Voice) -> Self {
        let plain = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        let terminal = io::stderr().is_terminal();
        Output {
            level: match (voice.quiet, voice.verbose) {
                (true, _) => Level::Error,
                (_, true) => Level::Debug,
                _ => Level::Info,
            },
            json: voice.json_logs,
            bars: terminal && !voice.no_progress && !voice.json_logs && !voice.quiet,
            colour: !plain("NO_COLOR"),
            closed: AtomicBool::new(false),
            stage: Mutex::new(None),
        }
    }

    /// Shows what the library traces: all with `-v`, else warnings.
    pub fn trace(&'static self) {
        _ = tracing_subscriber::registry().with(Traces(self)).try_init();
    }

    /// Data for stdout, written at once. Where nobody reads any more, nothing is written: see [`Output::closed`].
    pub fn data(&self, text: &str) -> Result<()> {
        let write = || {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        };
        match self.aside(&self.stage(), write) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(e) => Err(Error::new(Kind::Io, format!("cannot write the output: {e}"))),
            Ok(()) => Ok(()),
        }
    }

    /// Invites someone at a terminal to type.
    pub fn ask(&self, prompt: &str) {
        let mut stderr = io::stderr().lock();
        _ = write!(stderr, "{prompt}").and_then(|()| stderr.flush());
    }

    /// Whether the reader of stdout has gone.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    pub fn json(&self, value: &Value) -> Result<()> {
        self.data(&format!("{value:#}\n"))
    }

    /// Tables for stdout.
    pub fn tables(&self, sections: &[Section]) -> Result<()> {
        self.data(&tables(sections, self.colour && io::stdout().is_terminal()))
    }

    /// Tables for stderr, with `-v` only.
    pub fn details(&self, sections: &[Section]) {
        if self.level == Level::Debug {
            self.say(&tables(sections, self.colour && io::stderr().is_terminal()));
        }
    }

    /// The end of a command that failed.
    pub fn error(&self, error: &Error) {
        clear(&self.stage().take());
        self.log(Level::Error, &error.message, error.hint.as_deref());
    }

    pub fn log(&self, level: Level, message: &str, hint: Option<&str>) {
        if level > self.level {
            return;
        }
        let stage = self.stage();
        let text = match self.json {
            true => event(level, stage.as_ref(), message, [("hint", json!(hint))]),
            false => {
                let colour = self.colour && io::stderr().is_terminal();
                let paint = |code: &str, word: &str| match colour {
                    true => format!("\x1b[{code}m{word}\x1b[0m "),
                    false => format!("{word} "),
                };
                let word = match level {
                    Level::Error => paint("1;31", "error:"),
                    Level::Warning => paint("1;33", "warning:"),
                    Level::Info => String::new(),
                    Level::Debug => paint("2", "debug:"),
                };
                let hint = hint.map(|hint| format!("\n{}{hint}", paint("1;36", "hint:")));
                format!("{word}{message}{}", hint.unwrap_or_default())
            }
        };
        self.line(&stage, &text);
    }

    fn stage(&self) -> MutexGuard<'_, Option<Stage>> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line on stderr; where that is closed there is nobody to tell.
    fn line(&self, stage: &Option<Stage>, text: &str) {
        self.aside(stage, || _ = writeln!(io::stderr().lock(), "{text}"));
    }

    /// Does `write` while no bar draws.
    fn aside<T>(&self, stage: &Option<Stage>, write: impl FnOnce() -> T) -> T {
        match stage.as_ref().and_then(|s| s.bar.as_ref()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn style(&self, unit: &'static str) -> ProgressStyle {
        let bar = if self.colour { "{bar:20.cyan/dim}" } else { "{bar:20}" };
        let template = format!("{{prefix:9}} {bar} {{percent:>3}} %  {{amount}}  {{rate}}  {{left}}  {{wide_msg}}");
        let amount_of = move |s: &ProgressState, w: &mut dyn std::fmt::Write| {
            _ = w.write_str(&of(s.pos(), s.len().unwrap_or(0), unit));
        };
        let rate = move |s: &ProgressState, w: &mut dyn std::fmt::Write| {
            _ = write!(w, "{}/s", amount(s.per_sec() as u64, unit));
        };
        let left = |s: &ProgressState, w: &mut dyn std::fmt::Write| _ = write!(w, "{} left", short(s.eta()));
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let style = style.with_key("amount", amount_of).with_key("rate", rate).with_key("left", left);
        style.progress_chars("━╸─")
    }
}

impl Progress for Output {
    fn begin(&self, name: &str, total: u64, done: u64, unit: &'static str) {
        let mut stage = self.stage();
        clear(&stage);
        let bar = self.bars.then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(self.style(unit));
            bar.set_prefix(name.to_string());
            bar.set_position(done);
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        let now = Instant::now();
        *stage = Some(Stage { name: name.into(), unit, total, done, from: done, started: now, told: now, bar });
        if self.json && self.level >= Level::Info {
            self.line(&stage, &event(Level::Info, stage.as_ref(), "begin", [("unit", json!(unit))]));
        }
    }

    fn advance(&self, delta: u64, note: &str) {
        let mut stage = self.stage();
        let Some(running) = stage.as_mut() else { return };
        running.done += delta;
        if let Some(bar) = &running.bar {
            bar.set_message(note.to_string());
            bar.inc(delta);
            return;
        }
        let pause = Duration::from_secs(if self.json { 1 } else { 10 });
        if self.level < Level::Info || running.told.elapsed() < pause {
            return;
        }
        running.told = Instant::now();
        let text = match self.json {
            true => event(Level::Info, Some(running), "progress", [("note", json!(note))]),
            false => running.line(note),
        };
        self.line(&stage, &text);
    }

    fn end(&self, summary: &str) {
        let mut guard = self.stage();
        clear(&guard);
        let Some(stage) = guard.take() else { return };
        let took = stage.started.elapsed();
        if self.json && self.level >= Level::Info {
            let seconds = json!(took.as_secs_f64());
            let summary = Some(summary).filter(|s| !s.is_empty());
            self.line(
                &None,
                &event(Level::Info, Some(&stage), "end", [("note", json!(summary)), ("seconds", seconds)]),
            );
        } else if self.level >= Level::Info {
            let (name, done) = (&stage.name, amount(stage.done, stage.unit));
            match summary {
                "" if took < Duration::from_secs(2) => {}
                "" => self.line(&None, &format!("{name}: {done} in {}", duration(took))),
                summary => self.line(&None, &format!("{name}: {summary}")),
            }
        }
    }

    fn say(&self, line: &str) {
        self.log(Level::Info, line, None);
    }

    fn warn(&self, line: &str) {
        self.log(Level::Warning, line, None);
    }
}

impl Stage {
    /// `transfer: 120 k of 300 k tokens (40 %), 3.10 k tokens/s, 58s left, loss 0.0123`
    fn line(&self, note: &str) -> String {
        let share = 100.0 * self.done as f64 / self.total.max(1) as f64;
        let rate = (self.done - self.from) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let left = Duration::from_secs_f64((self.total.saturating_sub(self.done) as f64 / rate.max(1e-3)).min(1e8));
        let (of, rate) = (of(self.done, self.total, self.unit), amount(rate as u64, self.unit));
        let note = if note.is_empty() { String::new() } else { format!(", {note}") };
        format!("{}: {of} ({share:.0} %), {rate}/s, {} left{note}", self.name, short(left))
    }
}

/// One line of `--json-logs`; fields that are null are left out.
fn event<const N: usize>(level: Level, stage: Option<&Stage>, message: &str, more: [(&str, Value); N]) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
    };
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let fields = [
        ("time", json!(time.as_millis() as f64 / 1000.0)),
        ("level", json!(level)),
        ("stage", json!(stage.map(|s| &s.name))),
        ("message", json!(message)),
        ("done", json!(stage.map(|s| s.done))),
        ("total", json!(stage.map(|s| s.total))),
    ];
    let all = fields.into_iter().chain(more).filter(|(_, value)| !value.is_null());
    Value::Object(all.map(|(key, value)| (key.to_string(), value)).collect::<Map<_, _>>()).to_string()
}

fn clear(stage: &Option<Stage>) {
    if let Some(bar) = stage.as_ref().and_then(|s| s.bar.as_ref()) {
        bar.finish_and_clear();
    }
}

/// `12 files`, `3.10 k tokens`, `16.1 GB`.
fn amount(n: u64, unit: &str) -> String {
    if unit == "bytes" { bytes(n) } else { format!("{} {unit}", count(n)) }
}

/// `120 k of 300 k tokens`.
fn of(done: u64, total: u64, unit: &str) -> String {
    let done = if unit == "bytes" { bytes(done) } else { count(done) };
    format!("{done} of {}", amount(total, unit))
}

/// A time to come, in whole seconds.
fn short(time: Duration) -> String {
    if time.as_secs() < 60 { format!("{}s", time.as_secs()) } else { duration(time) }
}

/// Tables, a blank line between them.
fn tables(sections: &[Section], colour: bool) -> String {
    sections.iter().map(|section| table(section, colour)).collect::<Vec<_>>().join("\n")
}

/// A title and a table that fits the terminal; where there is none, rows stay whole.
fn table(section: &Section, colour: bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    let heading = |text: &str| match colour {
        true => Cell::new(text).add_attribute(Attribute::Dim),
        false => Cell::new(text),
    };
    if !section.columns.is_empty() {
        table.set_header(section.columns.iter().map(|name| heading(name)));
    }
    let cell = |text: &String| match text.as_str() {
        "ok" if colour => Cell::new(text).fg(Color::Green),
        "FAILED" if colour => Cell::new(text).fg(Color::Red).add_attribute(Attribute::Bold),
        _ => Cell::new(text),
    };
    table.add_rows(section.rows.iter().map(|row| row.iter().map(cell).collect::<Vec<_>>()));
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((2, 0));
        let cells = section.rows.iter().filter_map(|row| row.get(index));
        if index > 0 && !section.columns.is_empty() && numeric(cells) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let title = match section.title {
        "" => String::new(),
        title if colour => format!("\x1b[1m{title}\x1b[0m\n"),
        title => format!("{title}\n"),
    };
    let lines: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    title + &lines
}

/// Whether all cells that say something begin with a number.
fn numeric<'a>(cells: impl Iterator<Item = &'a String>) -> bool {
    let mut said = cells.filter(|cell| !cell.is_empty() && *cell != "–").peekable();
    let number = |cell: &String| cell.trim_start_matches(['-', '+', '±']).starts_with(|c: char| c.is_ascii_digit());
    said.peek().is_some() && said.all(number)
}

/// Hands the library's traces to the output.
struct Traces(&'static Output);

impl<S: tracing::Subscriber> Layer<S> for Traces {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if !metadata.target().starts_with("margay") {
            return;
        }
        let level = match *metadata.level() {
            tracing::Level::ERROR | tracing::Level::WARN => Level::Warning,
            _ => Level::Debug,
        };
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.log(level, text.0.trim_end(), None);
    }
}

/// The fields of a trace in one line.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}
