//! Where text comes from: files, globs, folders and hub data sets become a stream of documents.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::formats;
use crate::checkpoint::{HubId, hub};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::recipe;

pub use super::formats::{Content, Document, EXTENSIONS, Origin};

/// Brings the files of a hub data set.
type Fetch<'a> = &'a dyn Fn(&HubId) -> Result<Vec<PathBuf>>;

/// The files behind `sources`, in order; those of a folder, glob or hub data set sorted by path.
///
/// Fails where a source does not exist, matches nothing or holds no byte.
pub fn resolve(sources: &[String], progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    resolve_with(sources, &|id| hub::fetch_dataset(id, progress))
}

/// [`resolve`] with `fetch` bringing the files of a hub data set.
fn resolve_with(sources: &[String], fetch: Fetch) -> Result<Vec<PathBuf>> {
    if sources.is_empty() {
        return Err(Error::new(Kind::Data, "no training text is named")
            .hint("give `--data FILE`, a folder, a glob or a hub data set id, or set `data.sources` in the recipe"));
    }
    let mut all = Vec::new();
    for source in sources {
        let files = files_of(source, fetch)?;
        let mut size = 0;
        for file in &files {
            size += fs::metadata(file).map_err(|e| Error::io("read", file, e))?.len();
        }
        if size == 0 {
            return Err(Error::new(Kind::Data, format!("`{source}` is empty")).hint("give a source that holds text"));
        }
        all.extend(files);
    }
    Ok(all)
}

/// All documents of `files`, read as they are asked for. Rows without text are skipped.
pub fn documents<'a>(files: &'a [PathBuf], settings: &'a recipe::Data) -> impl Iterator<Item = Result<Document>> + 'a {
    files.iter().flat_map(|file| formats::read(file, settings).unwrap_or_else(|e| Box::new(std::iter::once(Err(e)))))
}

fn files_of(source: &str, fetch: Fetch) -> Result<Vec<PathBuf>> {
    let path = Path::new(source);
    let unusable = |what: &str| {
        Error::new(Kind::Data, format!("{what} `{source}`")).hint(format!("known formats: {}", EXTENSIONS.join(", ")))
    };
    if path.is_file() {
        return Ok(vec![path.into()]);
    }
    if path.is_dir() {
        let mut files = Vec::new();
        walk(path, &mut files)?;
        files.sort();
        return if files.is_empty() { Err(unusable("no text file in folder")) } else { Ok(files) };
    }
    if source.contains(['*', '?', '[']) {
        let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
        let matches = glob::glob_with(source, options)
            .map_err(|e| Error::new(Kind::Data, format!("`{source}` is no glob pattern: {}", e.msg)))?;
        let files: Vec<PathBuf> = matches.flatten().filter(|p| p.is_file()).collect();
        return if files.is_empty() { Err(unusable("no file matches")) } else { Ok(files) };
    }
    if let Some(id) = hub_id(source) {
        let mut files: Vec<PathBuf> = fetch(&id)?.into_iter().filter(|p| is_text(p)).collect();
        files.sort();
        return if files.is_empty() { Err(unusable("no text file in hub data set")) } else { Ok(files) };
    }
    Err(Error::io("read", path, std::io::ErrorKind::NotFound.into()))
}

/// `org/name[@revision]` without a known file ending, which would rather be a file that is not there.
fn hub_id(source: &str) -> Option<HubId> {
    HubId::parse(source).filter(|_| !EXTENSIONS.iter().any(|e| source.ends_with(e)))
}

/// Every text file below `dir`, hidden ones left out.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if path.is_dir() && !hidden {
            walk(&path, files)?;
        } else if path.is_file() && !hidden && is_text(&path) {
            files.push(path);
        }
    }
    Ok(())
}

/// A file of a known format that is not a description of the folder it lies in.
fn is_text(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let described = name.starts_with("README") || name.starts_with("dataset_info");
    !described && EXTENSIONS.iter().any(|e| name.ends_with(e))
}

pub(super) fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io("read", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["yahma/alpaca-cleaned", "Salesforce/wikitext", "a/b.c"] {
            assert!(hub_id(id).is_some(), "{id}");
        }
        for path in ["data/train.jsonl", "./data", "/data/x", "a/b/c", "text", "../x", "a/", "a b/c"] {
            assert!(hub_id(path).is_none(), "{path}");
        }
    }

    #[test]
    fn hub_data_sets_come_through_the_fetcher() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.parquet", "README.md", "dataset_infos.json", "picture.png"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let fetch = |id: &HubId| {
            assert_eq!(id.to_string(), "some/set");
            Ok(fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect())
        };
        let files = resolve_with(&["some/set".into()], &fetch).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.parquet", "b.jsonl"]);
    }
}
