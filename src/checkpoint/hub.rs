//! Models and data sets by hub id.
//!
//! Names, addresses and the cache layout are those of hf-hub (`models--org--name/{blobs,refs,snapshots}`), so the cache
//! is shared with other programs. The transfers are our own: they time out, continue where they were cut, and are
//! checked by size and hash.

mod download;
mod push;
mod request;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use ureq::Agent;

use super::headers::{Folder, LocalFolder, is_plain_name, is_side_file, parse_index, shard_names};
use super::{Headers, HubId, INDEX, Source, writer};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

/// [`Hub::headers`] with the options of the environment.
pub fn headers(id: &HubId) -> Result<Headers> {
    Hub::new(Options::from_env()?).headers(id)
}

/// [`Hub::fetch_model`] with the options of the environment.
pub fn fetch_model(id: &HubId, progress: &dyn Progress) -> Result<(PathBuf, String)> {
    Hub::new(Options::from_env()?).fetch_model(id, progress)
}

/// [`Hub::fetch_dataset`] with the options of the environment.
pub fn fetch_dataset(id: &HubId, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    Hub::new(Options::from_env()?).fetch_dataset(id, progress)
}

/// [`Hub::push`] with the options of the environment.
pub fn push(dir: &Path, id: &HubId, private: bool, progress: &dyn Progress) -> Result<String> {
    Hub::new(Options::from_env()?).push(dir, id, private, progress)
}

/// How to reach the hub and where to keep its files.
#[derive(Clone)]
pub struct Options {
    pub endpoint: String,
    pub token: Option<String>,
    /// The folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Only the cache, no network.
    pub offline: bool,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence while an answer is read.
    pub read_timeout: Duration,
    /// Further attempts after one that failed; counted anew whenever one brought something.
    pub retries: u32,
}

impl Options {
    /// `HF_ENDPOINT`, `HF_TOKEN` (or the stored login), `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`,
    /// `HF_HUB_DOWNLOAD_TIMEOUT` (seconds).
    pub fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let cache_home = || {
            let base = var("XDG_CACHE_HOME").map(PathBuf::from).or(Some(std::env::home_dir()?.join(".cache")));
            base.map(|b| b.join("huggingface"))
        };
        let home = var("HF_HOME").map(PathBuf::from).or_else(cache_home).ok_or_else(|| {
            Error::new(Kind::Hub, "there is no home folder for the hub cache").hint("set HF_HOME to a folder")
        })?;
        let timeout = var("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.parse().ok()).unwrap_or(30);
        Ok(Options {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            token: var("HF_TOKEN").or_else(|| Cache::new(home.join("hub")).token()),
            cache: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: var("HF_HUB_OFFLINE")
                .is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str())),
            connect_timeout: Duration::from_secs(15),
            read_timeout: Duration::from_secs(timeout),
            retries: 3,
        })
    }
}

/// A connection to one hub with its cache.
pub struct Hub {
    options: Options,
    agent: Agent,
}

/// A repository at one commit.
struct Remote<'a> {
    hub: &'a Hub,
    id: HubId,
    /// Its revision is the commit.
    repo: Repo,
    files: Vec<RemoteFile>,
}

struct RemoteFile {
    name: String,
    bytes: Option<u64>,
    /// Name of the blob: SHA-256 of large files, git's hash of others.
    etag: String,
}

impl Hub {
    pub fn new(options: Options) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The token goes to the hub, not to the storage it redirects to.
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            // Compressed answers would make nonsense of byte ranges.
            .accept_encoding("identity")
            .user_agent(concat!("margay/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(options.connect_timeout))
            .timeout_connect(Some(options.connect_timeout))
            .timeout_recv_response(Some(options.read_timeout))
            .timeout_per_read(Some(options.read_timeout))
            .timeout_per_write(Some(options.read_timeout))
            .build();
        let endpoint = options.endpoint.trim_end_matches('/').to_string();
        Hub { options: Options { endpoint, ..options }, agent: config.into() }
    }

    /// Config and shard headers of a model by ranged reads; no weights are downloaded.
    pub fn headers(&self, id: &HubId) -> Result<Headers> {
        if self.options.offline {
            let (dir, sha) = self.cached(id, RepoType::Model).ok_or_else(|| self.not_cached(id))?;
            return Headers::read(&LocalFolder(dir.clone()), source(id, sha, Some(dir)));
        }
        let remote = self.resolve(id, RepoType::Model)?;
        let sha = remote.repo.revision().to_string();
        Headers::read(&remote, source(id, sha, None))
    }

    /// Downloads config, safetensors and the files beside them; gives the snapshot folder and the commit.
    pub fn fetch_model(&self, id: &HubId, progress: &dyn Progress) -> Result<(PathBuf, String)> {
        // A commit never changes: a complete copy needs no question to the hub.
        if self.options.offline || is_commit(&id.revision) {
            let complete = |(dir, sha): &(PathBuf, String)| {
                Headers::read(&LocalFolder(dir.clone()), source(id, sha.clone(), None)).map(drop)
            };
            match self.cached(id, RepoType::Model).map(|found| complete(&found).map(|()| found)) {
                Some(Ok(found)) => return Ok(found),
                Some(Err(e)) if self.options.offline => {
                    return Err(e.hint("the cached copy is incomplete; run once with HF_HUB_OFFLINE unset"));
                }
                None if self.options.offline => return Err(self.not_cached(id)),
                _ => (),
            }
        }
        let remote = self.resolve(id, RepoType::Model)?;
        let names = remote.names()?;
        let index = match names.iter().any(|n| n == INDEX) {
            true => {
                remote.download_all(&[INDEX.into()], progress)?;
                let path = remote.pointer(INDEX);
                let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
                Some(parse_index(&bytes, &remote.shown(INDEX))?)
            }
            false => None,
        };
        // Weights last: a snapshot with all its shards has everything else too.
        let mut wanted: Vec<String> =
            names.iter().filter(|n| *n == "config.json" || is_side_file(n)).cloned().collect();
        wanted.extend(shard_names(&names, index.as_ref(), &id.to_string())?);
        remote.download_all(&wanted, progress)?;
        remote.write_ref()?;
        Ok((remote.snapshot(), remote.repo.revision().into()))
    }

    /// Downloads the text files of a data set: the first kind present of Parquet, JSONL, JSON and text, and of those the
    /// train split where files are named so.
    pub fn fetch_dataset(&self, id: &HubId, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
        let choose = |names: &[String]| match dataset_files(names) {
            chosen if chosen.is_empty() => {
                let message = format!("data set `{id}` has no Parquet, JSONL, JSON or text files");
                Err(Error::new(Kind::Data, message)
                    .hint("data sets made by scripts are not run; give files of your own"))
            }
            chosen => Ok(chosen),
        };
        if self.options.offline {
            let (dir, _) = self.cached(id, RepoType::Dataset).ok_or_else(|| self.not_cached(id))?;
            let mut names = Vec::new();
            walk(&dir, "", &mut names)?;
            return Ok(choose(&names)?.iter().map(|name| dir.join(name)).collect());
        }
        let remote = self.resolve(id, RepoType::Dataset)?;
        let names: Vec<String> = remote.files.iter().map(|f| f.name.clone()).collect();
        let chosen = choose(&names)?;
        remote.download_all(&chosen, progress)?;
        remote.write_ref()?;
        Ok(chosen.iter().map(|name| remote.pointer(name)).collect())
    }

    /// Asks the hub for the commit behind a revision and its files.
    fn resolve(&self, id: &HubId, kind: RepoType) -> Result<Remote<'_>> {
        #[derive(serde::Deserialize)]
        struct Reply {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            blob_id: Option<String>,
            lfs: Option<Lfs>,
        }
        #[derive(serde::Deserialize)]
        struct Lfs {
            sha256: Option<String>,
        }

        let repo = Repo::with_revision(id.repo.clone(), kind, id.revision.clone());
        let url = format!("{}/api/{}?blobs=true", self.options.endpoint, repo.api_url());
        let bytes = self.retry(|| self.read_body(&url, None, 64 << 20, id, None).map(|(bytes, _)| bytes))?;
        let odd = |what: String| {
            Error::new(Kind::Hub, format!("the hub's answer about `{id}` makes no sense: {what}"))
                .hint("check HF_ENDPOINT")
        };
        let Reply { sha, siblings } = serde_json::from_slice(&bytes).map_err(|e| odd(e.to_string()))?;
        if !is_word(&sha) {
            return Err(odd(format!("commit `{sha}`")));
        }
        let file = |s: Sibling| {
            // Without a hash the blob is named by commit and file, which is as unique.
            let named = s.lfs.and_then(|l| l.sha256).or(s.blob_id);
            let etag =
                named.unwrap_or_else(|| format!("{sha}-{}", s.rfilename.replace(|c: char| !c.is_alphanumeric(), "-")));
            // These become paths on this disk.
            match s.rfilename.split('/').all(is_plain_name) && is_word(&etag) {
                true => Ok(RemoteFile { name: s.rfilename, bytes: s.size, etag }),
                false => Err(odd(format!("file `{}`", s.rfilename))),
            }
        };
        let files = siblings.into_iter().map(file).collect::<Result<_>>()?;
        let repo = Repo::with_revision(id.repo.clone(), kind, sha);
        Ok(Remote { hub: self, id: id.clone(), repo, files })
    }

    /// The snapshot folder and commit of what the cache holds for `id`.
    fn cached(&self, id: &HubId, kind: RepoType) -> Option<(PathBuf, String)> {
        let root = self.options.cache.join(Repo::new(id.repo.clone(), kind).folder_name());
        let sha = std::fs::read_to_string(root.join("refs").join(&id.revision));
        let sha = sha.map(|s| s.trim().to_string()).unwrap_or_else(|_| id.revision.clone());
        let dir = root.join("snapshots").join(&sha);
        (is_word(&sha) && dir.is_dir()).then_some((dir, sha))
    }

    fn not_cached(&self, id: &HubId) -> Error {
        let message =
            format!("`{id}` is not in the hub cache `{}`, and HF_HUB_OFFLINE is set", self.options.cache.display());
        Error::new(Kind::Hub, message)
            .hint("run once with HF_HUB_OFFLINE unset, or set HF_HOME to the cache that has it")
    }
}

impl Folder for Remote<'_> {
    fn names(&self) -> Result<Vec<String>> {
        Ok(self.files.iter().map(|f| f.name.clone()).filter(|n| is_plain_name(n)).collect())
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.hub.retry(|| {
            self.hub.read_body(&self.url(name), None, 256 << 20, &self.id, Some(name)).map(|(bytes, _)| bytes)
        })
    }

    fn range(&self, name: &str, start: u64, count: u64) -> Result<(Vec<u8>, u64)> {
        let last = start + count.max(1) - 1;
        self.hub.retry(|| self.hub.read_body(&self.url(name), Some((start, Some(last))), count, &self.id, Some(name)))
    }

    fn shown(&self, name: &str) -> String {
        format!("{}/{name}", self.id)
    }
}

impl Remote<'_> {
    fn url(&self, name: &str) -> String {
        let path: String = name
            .bytes()
            .map(|b| match b {
                b'-' | b'.' | b'_' | b'~' | b'/' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => char::from(b).to_string(),
                _ => format!("%{b:02X}"),
            })
            .collect();
        format!("{}/{}/resolve/{}/{path}", self.hub.options.endpoint, self.repo.url(), self.repo.url_revision())
    }

    fn root(&self) -> PathBuf {
        self.hub.options.cache.join(self.repo.folder_name())
    }

    fn snapshot(&self) -> PathBuf {
        self.root().join("snapshots").join(self.repo.revision())
    }

    fn pointer(&self, name: &str) -> PathBuf {
        self.snapshot().join(name)
    }

    /// Remembers the commit of a branch or tag.
    fn write_ref(&self) -> Result<()> {
        match self.id.revision == self.repo.revision() {
            true => Ok(()),
            false => {
                let path = self.root().join("refs").join(&self.id.revision);
                make_parent(&path)?;
                writer::write_atomic(&path, self.repo.revision().as_bytes())
            }
        }
    }
}

fn source(id: &HubId, sha: String, dir: Option<PathBuf>) -> Source {
    Source { id: id.to_string(), dir, repo: Some(id.repo.clone()), revision: Some(sha) }
}

/// A plain name of letters, digits, `-` and `_`.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

fn make_parent(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).map_err(|e| writer::output("create the folder", folder, e))
}

/// Adds the files under `dir`, as paths relative to it.
fn walk(dir: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    let fail = |e| Error::io("read the folder", dir, e);
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = format!("{prefix}{}", path.file_name().unwrap_or_default().to_string_lossy());
        match path.is_dir() {
            true => walk(&path, &format!("{name}/"), names)?,
            false => names.push(name),
        }
    }
    Ok(())
}

/// The files of a data set to train on, sorted: the first kind present, of the train split where one is named.
fn dataset_files(names: &[String]) -> Vec<String> {
    const ABOUT: [&str; 5] =
        ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "requirements.txt"];
    let is_data = |name: &&String| {
        let file = name.rsplit('/').next().unwrap_or(name);
        !file.starts_with('.') && !ABOUT.contains(&file)
    };
    let is_train = |name: &&String| {
        let mut words = name.split(|c: char| !c.is_ascii_alphabetic());
        words.any(|w| w.eq_ignore_ascii_case("train") || w.eq_ignore_ascii_case("training"))
    };
    for kind in [".parquet", ".jsonl", ".json", ".txt"] {
        let mut all: Vec<&String> = names.iter().filter(is_data).filter(|n| n.ends_with(kind)).collect();
        if all.iter().any(is_train) {
            all.retain(is_train);
        }
        if !all.is_empty() {
            all.sort();
            return all.into_iter().cloned().collect();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_sets_give_their_train_split_of_the_best_kind() {
        let names = |list: &[&str]| list.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let wiki = names(&["README.md", "a/test-0.parquet", "a/train-1.parquet", "a/train-0.parquet", "train.txt"]);
        assert_eq!(dataset_files(&wiki), ["a/train-0.parquet", "a/train-1.parquet"]);
        assert_eq!(dataset_files(&names(&["alpaca.json", "dataset_infos.json", "notes.txt"])), ["alpaca.json"]);
        assert!(dataset_files(&names(&["load.py", "requirements.txt"])).is_empty());
    }
}
