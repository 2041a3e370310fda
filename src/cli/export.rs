//! `margay export`: a model for another program.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use margay::checkpoint::writer::parse_size;
use margay::checkpoint::{HubId, hub};
use margay::convert::export::formats::{self, Format};
use margay::convert::export::{Shape, lolcats};
use margay::convert::load::Model;
use margay::convert::plan::bytes;
use margay::error::{Error, Kind, Result};
use margay::progress::Progress;
use margay::recipe::Recipe;
use margay::run_dir::{fill, refuse_taken};
use safetensors::Dtype;

use super::output::Output;
use super::quoted;

#[derive(Args)]
pub struct Export {
    /// A folder that `margay convert` or the official Liger code wrote, for gguf any model; with --base the official LoLCATs
    /// checkpoints `_distill.pt` and `_ft.pt`
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<PathBuf>,
    /// What to write
    #[arg(long, value_name = "FORMAT", default_value = "transformers", value_parser = names(Format::ALL.map(|f| f.0)))]
    to: String,
    /// The folder to write, which must not exist yet; with gguf also a file whose name ends so
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Round the base model's tensors to this type; those of mixers stay in f32
    #[arg(long, value_name = "TYPE", value_parser = names(DTYPES.map(|d| d.0)))]
    dtype: Option<String>,
    /// Largest shard, such as 5GB or 500MiB
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: String,
    /// The model that official checkpoints belong to: a folder or a hub id
    #[arg(long, value_name = "MODEL", requires = "recipe")]
    base: Option<String>,
    /// The recipe whose mixer official checkpoints have
    #[arg(long, value_name = "RECIPE", requires = "base")]
    recipe: Option<String>,
    /// Change a key of that recipe, such as mixer.window_kind=terraced; may be repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "recipe")]
    set: Vec<String>,
    /// Send the written folder to this repository of the hub, which is made where it is not there
    #[arg(long, value_name = "ORG/NAME[@BRANCH]")]
    push: Option<String>,
    /// Make the repository private
    #[arg(long, requires = "push")]
    private: bool,
}

const DTYPES: [(&str, Dtype); 3] = [("f32", Dtype::F32), ("bf16", Dtype::BF16), ("f16", Dtype::F16)];

fn names<const N: usize>(list: [&'static str; N]) -> PossibleValuesParser {
    PossibleValuesParser::new(list)
}

/// What a name of `list` stands for; the parser lets no other through.
fn named<T: Copy>(list: &[(&str, T)], name: &str) -> Option<T> {
    list.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

impl Export {
    pub fn run(&self, out: &Output) -> Result<()> {
        refuse_taken(&self.out)?;
        let repository = self.push.as_deref().map(repository).transpose()?;
        let dtype = self.dtype.as_deref().and_then(|name| named(&DTYPES, name));
        let shape = Shape { dtype, max_shard_bytes: parse_size(&self.max_shard_size)? };
        let format = named(&Format::ALL, &self.to).unwrap_or(Format::Transformers);
        if repository.is_some() && formats::is_gguf(&self.out) {
            let message = format!("`{}` is a file, and --push sends a folder", self.out.display());
            return Err(Error::new(Kind::Usage, message).hint("name a folder with --out: the file is made in it"));
        }
        let files = match (&self.base, &self.recipe, self.sources.as_slice()) {
            (Some(base), Some(recipe), sources) => {
                if format != Format::Transformers {
                    let message = format!("official checkpoints become `transformers` first, not `{}`", self.to);
                    return Err(Error::new(Kind::Usage, message).hint("export the folder that is written once more"));
                }
                let recipe = Recipe::load(recipe, &self.set)?;
                fill(&self.out, |dir| lolcats::import(base, &recipe, sources, &shape, dir, out))?
            }
            (_, _, [source]) => {
                if source.join("run.json").is_file() {
                    let message = format!("`{}` is an unfinished run", source.display());
                    return Err(Error::new(Kind::Usage, message)
                        .hint("finish it first: `margay convert` with the same arguments and `--until export`"));
                }
                let model = Model::open(&source.to_string_lossy(), out)?;
                fill(&self.out, |dir| formats::write(&model, format, &shape, dir, out))?
            }
            _ => {
                return Err(Error::new(Kind::Usage, "several sources are official checkpoints, which need `--base`")
                    .hint("give one exported folder, or name base model and recipe"));
            }
        };
        let total: u64 = files.iter().map(|f| f.bytes).sum();
        let path = quoted(&self.out.to_string_lossy());
        let files = if files.len() == 1 { "1 file".into() } else { format!("{} files", files.len()) };
        out.say(&format!("wrote {files}, {}: {path}", bytes(total)));
        if let Some(id) = repository {
            out.say(&format!("pushed: {}", hub::push(&self.out, &id, self.private, out)?));
        }
        Ok(())
    }
}

/// The repository of `--push`.
fn repository(text: &str) -> Result<HubId> {
    HubId::parse(text).ok_or_else(|| {
        Error::new(Kind::Usage, format!("`{text}` names no repository of the hub")).hint("write `org/name`")
    })
}
