//! `margay recipe`: shipped recipes, and checks of the user's own.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use clap::Subcommand;
use margay::convert::load::Description;
use margay::convert::plan::{Plan, PlanDevice, Section, open};
use margay::error::{Error, Kind, Result};
use margay::families::REGISTRY;
use margay::progress::Progress;
use margay::recipe::{self, Recipe};
use serde_json::json;

use super::output::Output;
use super::quoted;

#[derive(Subcommand)]
pub enum Command {
    /// List the shipped recipes
    List {
        /// Only those that can convert this model: a hub id or a folder
        #[arg(long)]
        model: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a recipe in full, with defaults and what each key means
    Show {
        /// A shipped recipe by name, or a TOML file
        #[arg(value_name = "RECIPE")]
        name: String,
        /// Change a key, such as stage.transfer.tokens=20000; may be repeated
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Write a shipped recipe to a file of your own
    Copy {
        /// A shipped recipe by name
        name: String,
        /// The file to write, which must not exist yet
        file: PathBuf,
    },
    /// Check a recipe and show all its problems
    Check {
        /// A TOML file, or a shipped recipe by name
        file: String,
        /// Change a key, such as stage.transfer.tokens=20000; may be repeated
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Print the JSON Schema of recipes
    Schema,
}

impl Command {
    pub fn run(&self, out: &Output) -> Result<()> {
        match self {
            Command::List { model, json } => {
                let list = model.as_ref().map_or_else(|| Ok(recipe::list()), |model| fitting(model))?;
                if *json {
                    let entry = |r: recipe::Shipped| json!({ "name": r.name, "about": r.about });
                    return out.json(&list.into_iter().map(entry).collect());
                }
                let rows = list.into_iter().map(|r| vec![r.name, r.about]).collect();
                out.tables(&[Section { title: "", columns: Vec::new(), rows }])
            }
            Command::Show { name, set } => out.data(&Recipe::load(name, set)?.text),
            Command::Copy { name, file } => {
                let text = recipe::shipped(name)?.text;
                let written = OpenOptions::new().write(true).create_new(true).open(file);
                written.and_then(|mut f| f.write_all(text.as_bytes())).map_err(|e| match e.kind() {
                    ErrorKind::AlreadyExists => {
                        Error::new(Kind::Output, format!("`{}` exists and is left as it is", file.display()))
                            .hint("choose another name, or remove it first")
                    }
                    _ => Error::io("write", file, e),
                })?;
                out.say(&format!(
                    "wrote `{}`; after editing: margay recipe check {}",
                    file.display(),
                    quoted(&file.to_string_lossy())
                ));
                Ok(())
            }
            Command::Check { file, set } => {
                Recipe::load(file, set)?;
                out.say(&format!("recipe `{file}` is in order"));
                Ok(())
            }
            Command::Schema => out.json(&recipe::schema()),
        }
    }
}

/// The shipped recipes that can convert `model`: those of its family, then those of Llama that its own do not stand for
/// and those of no family; none that was written for another model.
pub fn fitting(model: &str) -> Result<Vec<recipe::Shipped>> {
    let headers = open(model)?;
    let family = Description::of(&headers)?.family.name.trim_end_matches("_text");
    let others: Vec<&str> = REGISTRY.iter().map(|f| f.name.trim_end_matches("_text")).collect();
    let folder = |r: &recipe::Shipped| r.name.split('/').next().unwrap_or_default().to_string();
    let fits = |r: &recipe::Shipped| {
        let Ok(loaded) = Recipe::load(&r.name, &[]) else { return false };
        let base = &loaded.recipe.base.repo;
        let same = base.is_none() || *base == headers.source.repo;
        same && Plan::of(&headers, &loaded, PlanDevice::Cpu, None).is_ok()
    };
    let (mut own, rest): (Vec<_>, Vec<_>) = recipe::list().into_iter().partition(|r| folder(r) == family);
    own.retain(fits);
    let stands = |r: &recipe::Shipped| own.iter().any(|o| o.name.split('/').nth(1) == r.name.split('/').nth(1));
    let usable = |r: &recipe::Shipped| match folder(r) {
        llama if llama == "llama" => !stands(r) && fits(r),
        other => !others.contains(&other.as_str()) && fits(r),
    };
    let more: Vec<_> = rest.into_iter().filter(usable).collect();
    Ok(own.into_iter().chain(more).collect())
}
