//! What long work tells about itself; the command line draws it, tests and libraries can ignore it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Receives progress of long work. All methods may be ignored.
pub trait Progress: Send + Sync {
    /// A stage begins: `total` units of work (`unit` is `tokens`, `bytes`, …), `done` of them already.
    fn begin(&self, _stage: &str, _total: u64, _done: u64, _unit: &'static str) {}
    /// `delta` further units are done; `note` is a short figure such as `loss 0.123`.
    fn advance(&self, _delta: u64, _note: &str) {}
    /// The stage that began last is over.
    fn end(&self, _summary: &str) {}
    /// A line for the user: what happened, in plain words.
    fn say(&self, _line: &str) {}
    /// Something the user should look at.
    fn warn(&self, _line: &str) {}
}

/// Says nothing.
pub struct Silent;
impl Progress for Silent {}

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks running work to save and stop at the next step (Ctrl-C).
pub fn request_stop() {
    STOP.store(true, Ordering::SeqCst);
}

/// Whether a stop was asked for.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// `1h 02m`, `3m 05s`, `4.2s`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{:.1}s", d.as_secs_f64()),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
    }
}
