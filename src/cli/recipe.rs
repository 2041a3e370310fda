//! `margay recipe`: shipped recipes, and checks of the user's own.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use clap::Subcommand;
use margay::convert::plan::{Plan, PlanDevice, Section, open};
use margay::error::{Error, Kind, Result};
use margay::progress::Progress;
use margay::recipe::{self, Recipe};
use serde_json::json;

use super::output::Output;
use super::quoted;

#[derive(Subcommand)]
pub enum Command {
    /// List the shipped recipes
    List {
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
            Command::List { json: false } => {
                let rows = recipe::list().into_iter().map(|r| vec![r.name, r.about]).collect();
                out.tables(&[Section { title: "", columns: Vec::new(), rows }])
            }
            Command::List { json: true } => {
                let entry = |r: recipe::Shipped| json!({ "name": r.name, "about": r.about });
                out.json(&recipe::list().into_iter().map(entry).collect())
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

/// Names of the shipped recipes that can convert `model`: not those written for another one.
pub fn fitting(model: &str) -> Result<Vec<String>> {
    let headers = open(model)?;
    let fits = |name: &str| {
        let Ok(loaded) = Recipe::load(name, &[]) else { return false };
        let base = &loaded.recipe.base.repo;
        let same = base.is_none() || *base == headers.source.repo;
        same && Plan::of(&headers, &loaded, PlanDevice::Cpu, None).is_ok()
    };
    Ok(recipe::list().into_iter().map(|r| r.name).filter(|name| fits(name)).collect())
}
