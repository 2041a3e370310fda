//! Where recipes come from: the folder `recipes/`, carried in the program, and files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use include_dir::{Dir, DirEntry, include_dir};

use crate::error::{Error, Kind, Result, closest};

static FOLDER: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/recipes");

/// A recipe the program carries.
#[derive(Debug, Clone)]
pub struct Shipped {
    /// What `--recipe` takes, such as `llama/lolcats`.
    pub name: String,
    /// Its `about` line.
    pub about: String,
    /// The file as written.
    pub text: &'static str,
}

/// Every shipped recipe, by name.
pub fn list() -> Vec<Shipped> {
    fn walk(folder: &'static Dir<'static>, found: &mut Vec<Shipped>) {
        for entry in folder.entries() {
            match entry {
                DirEntry::Dir(inner) => walk(inner, found),
                DirEntry::File(file) if file.path().extension().is_some_and(|e| e == "toml") => {
                    let text = file.contents_utf8().unwrap_or_default();
                    let about = text.parse::<toml::Table>().ok().and_then(|t| t.get("about")?.as_str().map(Into::into));
                    let name = file.path().with_extension("").to_string_lossy().replace('\\', "/");
                    found.push(Shipped { name, about: about.unwrap_or_default(), text });
                }
                DirEntry::File(_) => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(&FOLDER, &mut found);
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The shipped recipe of this name. Errors: an unknown name, with the closest or all known ones.
pub fn shipped(name: &str) -> Result<Shipped> {
    let all = list();
    if let Some(found) = all.iter().find(|s| s.name == name) {
        return Ok(found.clone());
    }
    let known: Vec<&str> = all.iter().map(|s| s.name.as_str()).collect();
    let advice = match closest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("shipped recipes: {}; a file ends in `.toml`", known.join(", ")),
    };
    Err(Error::new(Kind::Recipe, format!("there is no recipe `{name}`")).hint(advice))
}

/// One recipe's text and where it stands.
pub struct Source {
    /// What messages call it: a path, or `recipes/<name>.toml` for a shipped one.
    pub label: Arc<str>,
    pub text: String,
    /// The file, canonical; `None` for a shipped recipe.
    pub file: Option<PathBuf>,
}

impl Source {
    /// Finds what `--recipe` or `extends` names: `*.toml` is a file (relative to `folder`), else a shipped name, else
    /// a file again.
    pub fn find(wanted: &str, folder: &Path) -> Result<Source> {
        let path = folder.join(wanted);
        if wanted.ends_with(".toml") {
            return Self::read(&path);
        }
        match shipped(wanted) {
            Ok(found) => {
                let label = format!("recipes/{}.toml", found.name).into();
                Ok(Source { label, text: found.text.into(), file: None })
            }
            Err(_) if path.is_file() => Self::read(&path),
            Err(unknown) => Err(unknown),
        }
    }

    fn read(path: &Path) -> Result<Source> {
        let read = |e| Error::io("read the recipe", path, e);
        let text = std::fs::read_to_string(path).map_err(read)?;
        let file = path.canonicalize().map_err(read)?;
        Ok(Source { label: path.display().to_string().into(), text, file: Some(file) })
    }

    /// The folder that relative `extends` paths of this recipe start from.
    pub fn folder(&self) -> &Path {
        self.file.as_deref().and_then(Path::parent).unwrap_or(Path::new(""))
    }
}
