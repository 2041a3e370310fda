//! The program `margay`: parse, run one command, print the error and its hint, choose the exit code.

mod cli;

use std::process::ExitCode;
use std::thread;

use clap::Parser;
use margay::error::{Error, Kind};

use cli::Cli;
use cli::output::Output;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Gradients are found by recursion over the graph, which is deep where sequences are long.
const STACK: usize = 256 << 20;

fn main() -> ExitCode {
    // candle's own elementwise threads spin while they wait, which costs more than they bring beside our own.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: nothing else runs yet.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    let Cli { voice, command } = Cli::parse();
    let out: &'static Output = Box::leak(Box::new(Output::new(voice)));
    out.trace();
    let worker = thread::Builder::new().name("work".into()).stack_size(STACK).spawn(move || cli::run(&command, out));
    let done = match worker.map(|w| w.join()) {
        Ok(Ok(done)) => done,
        Ok(Err(_)) => Err(Error::new(Kind::Unexpected, "the program failed; this is a bug in it")
            .hint("please report the lines above with the command that led to them")),
        Err(e) => Err(Error::new(Kind::Unexpected, format!("cannot start a thread: {e}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            out.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
