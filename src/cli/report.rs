//! `margay report`: a conversion as one page of HTML.

use std::path::PathBuf;

use clap::Args;
use margay::checkpoint::writer::write_atomic;
use margay::convert::load::Model;
use margay::data::Tokenizer;
use margay::error::{Error, Result};
use margay::evaluate::Subject;
use margay::evaluate::position::by_position;
use margay::evaluate::recall::suite;
use margay::progress::Progress;
use margay::recipe::Data;
use margay::report::{Folder, Measured};

use super::output::Output;
use super::{DeviceArg, SuiteArgs, TextArgs, verify};

#[derive(Args)]
pub struct Report {
    /// An exported folder, or the folder of an unfinished conversion
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The file to write [default: report.html in the folder]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Run the recall suite on the export and, with --data, measure perplexity by position
    #[arg(long)]
    suites: bool,
    /// Compare with this model in both
    #[arg(long, value_name = "MODEL", requires = "suites")]
    teacher: Option<String>,
    #[command(flatten)]
    made: SuiteArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    device: DeviceArg,
}

impl Report {
    pub fn run(&self, out: &Output) -> Result<()> {
        let folder = Folder::open(&self.dir)?;
        let measured = if self.suites { self.measure(out)? } else { Measured::default() };
        let report = folder.verification()?;
        let html = folder.html(&report, &verify::sections(&report), &measured);
        let path = self.out.clone().unwrap_or_else(|| folder.dir.join("report.html"));
        write_atomic(&path, html.as_bytes())?;
        out.say(&format!("wrote `{}`", path.display()));
        Ok(())
    }

    fn measure(&self, out: &Output) -> Result<Measured> {
        let device = self.device.open()?;
        let model = Model::open(&self.dir.to_string_lossy(), out)?;
        let positions = model.architecture().max_positions;
        let tokenizer = Tokenizer::open(model.checkpoint.dir())?;
        let rows = self.text.rows(&Data::default(), &tokenizer, positions, 65_536, out)?;
        let teacher = self.teacher.as_ref().map(|id| Model::open(id, out)).transpose()?;
        let weights = |m: &Model| Ok::<_, Error>((m.decoder(&device, out)?, m.net(&device)?));
        let (decoder, net) = weights(&model)?;
        let teacher = teacher.as_ref().map(weights).transpose()?;
        let subject = Subject { decoder: &decoder, net: &net };
        let teacher = teacher.as_ref().map(|(decoder, net)| Subject { decoder, net });
        let positions_found = rows.map(|rows| by_position(subject, teacher, &rows, out)).transpose()?;
        let settings = self.made.settings(self.text.row_len(positions).min(positions));
        let suite = suite(subject, teacher, &tokenizer, settings, out)?;
        Ok(Measured { positions: positions_found.map(|(_, b)| b).unwrap_or_default(), suite: Some(suite) })
    }
}
