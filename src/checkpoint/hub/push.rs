//! A folder sent to the hub as one commit: small text inside it, everything else through large-file storage, which asks
//! for a file's hash first and takes only what it does not hold.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::Trouble;
use super::{Hub, walk};
use crate::checkpoint::{HubId, writer};
use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, stop_requested};

/// First bytes of a file, by which the hub tells text from data.
const SAMPLE: u64 = 512;
/// Files that the hub is asked about at once.
const ASKED: usize = 250;

/// A file of the folder.
struct Local {
    /// Path in the repository.
    name: String,
    bytes: u64,
    sha256: String,
}

/// What large-file storage says of one object.
#[derive(Deserialize)]
struct Object {
    oid: String,
    /// Absent where the storage holds it already.
    actions: Option<Actions>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    /// Of an upload in parts: `chunk_size`, and an address for each part number.
    #[serde(default)]
    header: BTreeMap<String, Value>,
}

impl Hub {
    /// Sends every file of `dir` to the model repository `id`, at its branch; a repository that is not there is made,
    /// `private` or not. Gives the address of the commit.
    pub fn push(&self, dir: &Path, id: &HubId, private: bool, progress: &dyn Progress) -> Result<String> {
        if self.options.offline {
            return Err(Error::new(Kind::Hub, format!("`{id}` cannot be written, and HF_HUB_OFFLINE is set"))
                .hint("unset HF_HUB_OFFLINE"));
        }
        if self.options.token.is_none() {
            return Err(Error::new(Kind::Hub, format!("writing `{id}` needs a token"))
                .hint("set HF_TOKEN to an access token that may write, or log in with `hf auth login`"));
        }
        let mut names = Vec::new();
        walk(dir, "", &mut names)?;
        names.sort();
        let local = |name: String| {
            let path = dir.join(&name);
            let bytes = std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
            Ok(Local { bytes, sha256: writer::sha256_file(&path)?, name })
        };
        let files = names.into_iter().map(local).collect::<Result<Vec<_>>>()?;
        self.create(id, private)?;
        let (large, small): (Vec<Local>, Vec<Local>) = self.split(dir, id, files)?;
        progress.begin("push", large.iter().map(|f| f.bytes).sum(), 0, "bytes");
        self.store(dir, id, &large, progress)?;
        progress.end("");
        self.commit(dir, id, &large, &small)
    }

    /// Makes the repository; one that is there stays as it is.
    fn create(&self, id: &HubId, private: bool) -> Result<()> {
        let (organization, name) = id.repo.split_once('/').unwrap_or_default();
        let body = json!({ "name": name, "organization": organization, "type": "model", "private": private });
        let url = format!("{}/api/repos/create", self.options.endpoint);
        self.answer(&url, "application/json", body.to_string().as_bytes(), &[409], id).map(drop)
    }

    /// Files for large-file storage, and those that go into the commit.
    fn split(&self, dir: &Path, id: &HubId, files: Vec<Local>) -> Result<(Vec<Local>, Vec<Local>)> {
        #[derive(Deserialize)]
        struct Reply {
            files: Vec<Told>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Told {
            path: String,
            upload_mode: String,
        }
        let url = format!("{}/api/models/{}/preupload/{}", self.options.endpoint, id.repo, branch(id));
        let mut modes = BTreeMap::new();
        for some in files.chunks(ASKED) {
            let asked = some.iter().map(|f| {
                let sample = STANDARD.encode(part(&dir.join(&f.name), 0, SAMPLE)?);
                Ok(json!({ "path": f.name, "sample": sample, "size": f.bytes }))
            });
            let body = json!({ "files": asked.collect::<Result<Vec<_>>>()? });
            let reply: Reply = self.json(&url, "application/json", &body, id)?;
            modes.extend(reply.files.into_iter().map(|f| (f.path, f.upload_mode)));
        }
        Ok(files.into_iter().partition(|f| modes.get(&f.name).is_none_or(|mode| mode == "lfs")))
    }

    /// Gives large-file storage what it does not hold.
    fn store(&self, dir: &Path, id: &HubId, files: &[Local], progress: &dyn Progress) -> Result<()> {
        #[derive(Deserialize)]
        struct Reply {
            objects: Vec<Object>,
        }
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.options.endpoint, id.repo);
        for file in files {
            if stop_requested() {
                return Err(Error::new(Kind::Interrupted, "stopped while pushing; nothing was committed"));
            }
            let body = json!({
                "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
                "objects": [{ "oid": file.sha256, "size": file.bytes }], "ref": { "name": id.revision },
            });
            let reply: Reply = self.json(&url, "application/vnd.git-lfs+json", &body, id)?;
            let object = reply.objects.into_iter().find(|o| o.oid == file.sha256);
            let path = dir.join(&file.name);
            if let Some(Actions { upload: Some(upload), verify }) = object.and_then(|o| o.actions) {
                match upload.header.get("chunk_size").and_then(size) {
                    Some(chunk) => self.in_parts(&path, file, &upload, chunk, id)?,
                    None => {
                        let whole = || File::open(&path).map_err(|e| Trouble::from(Error::io("read", &path, e)));
                        self.retry(|| self.put(&upload.href, &whole()?, &file.name, id).map(drop))?;
                    }
                }
                if let Some(verify) = verify {
                    let body = json!({ "oid": file.sha256, "size": file.bytes }).to_string();
                    self.answer(&verify.href, "application/vnd.git-lfs+json", body.as_bytes(), &[], id)?;
                }
            }
            progress.advance(file.bytes, &file.name);
        }
        Ok(())
    }

    /// One file in parts of `chunk` bytes.
    fn in_parts(&self, path: &Path, file: &Local, upload: &Action, chunk: u64, id: &HubId) -> Result<()> {
        let addresses = upload.header.iter().filter_map(|(key, url)| Some((key.parse::<u64>().ok()?, url.as_str()?)));
        let mut parts = Vec::new();
        for (number, url) in addresses.collect::<BTreeMap<_, _>>() {
            let bytes = part(path, (number - 1) * chunk, chunk)?;
            let tag = self.retry(|| self.put(url, bytes.as_slice(), &file.name, id))?;
            parts.push(json!({ "partNumber": number, "etag": tag }));
        }
        let body = json!({ "oid": file.sha256, "parts": parts }).to_string();
        self.answer(&upload.href, "application/vnd.git-lfs+json", body.as_bytes(), &[], id).map(drop)
    }

    /// The commit of all files.
    fn commit(&self, dir: &Path, id: &HubId, large: &[Local], small: &[Local]) -> Result<String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Reply {
            commit_url: String,
        }
        let mut lines = vec![json!({ "key": "header", "value": { "summary": "Model converted by Margay" } })];
        for file in small {
            let content = STANDARD.encode(part(&dir.join(&file.name), 0, file.bytes)?);
            let value = json!({ "path": file.name, "content": content, "encoding": "base64" });
            lines.push(json!({ "key": "file", "value": value }));
        }
        for file in large {
            let value = json!({ "path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.bytes });
            lines.push(json!({ "key": "lfsFile", "value": value }));
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let url = format!("{}/api/models/{}/commit/{}", self.options.endpoint, id.repo, branch(id));
        let reply: Reply = self.parse(&self.answer(&url, "application/x-ndjson", body.as_bytes(), &[], id)?, id)?;
        Ok(reply.commit_url)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, url: &str, kind: &str, body: &Value, id: &HubId) -> Result<T> {
        self.parse(&self.answer(url, kind, body.to_string().as_bytes(), &[], id)?, id)
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, answer: &[u8], id: &HubId) -> Result<T> {
        serde_json::from_slice(answer).map_err(|e| {
            Error::new(Kind::Hub, format!("the hub's answer about `{id}` makes no sense: {e}"))
                .hint("check HF_ENDPOINT")
        })
    }

    /// The answer to a body of type `kind`; statuses in `fine` are as good as success.
    fn answer(&self, url: &str, kind: &str, body: &[u8], fine: &[u16], id: &HubId) -> Result<Vec<u8>> {
        self.retry(|| {
            let mut request = self.agent.post(url).header("Content-Type", kind);
            if kind.contains("git-lfs") {
                request = request.header("Accept", kind);
            }
            if let Some(token) = &self.options.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let mut response = request.send(body).map_err(|e| self.cut(&e, false))?;
            let status = response.status().as_u16();
            if !(200..300).contains(&status) && !fine.contains(&status) {
                return Err(self.denied(status, "the commit", id));
            }
            response.body_mut().with_config().limit(64 << 20).read_to_vec().map_err(|e| self.cut(&e, false))
        })
    }

    /// Puts bytes to an address that the hub gave, which carries its own right; gives the entity tag of the answer.
    fn put(&self, url: &str, body: impl ureq::AsSendBody, name: &str, id: &HubId) -> Result<String, Trouble> {
        let response = self.agent.put(url).send(body).map_err(|e| self.cut(&e, false))?;
        match response.status().as_u16() {
            200..300 => Ok(response.headers().get("etag").and_then(|v| v.to_str().ok()).unwrap_or_default().into()),
            status => Err(self.denied(status, &format!("`{name}`"), id)),
        }
    }

    /// A refusal to take something.
    fn denied(&self, status: u16, what: &str, id: &HubId) -> Trouble {
        let error = Error::new(Kind::Hub, format!("the hub did not take {what} of `{id}` (HTTP {status})"));
        match status {
            401 | 403 => Trouble::Final(error.hint("check that HF_TOKEN may write to this repository")),
            429 | 500..=599 => Trouble::Passing { error: error.hint("try again in some minutes"), advanced: false },
            _ => Trouble::Final(error.hint("check the name of the repository and its branch")),
        }
    }
}

/// A branch in an address.
fn branch(id: &HubId) -> String {
    id.revision.replace('/', "%2F")
}

/// A number that may be written as text.
fn size(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// At most `count` bytes of a file, from `start` on.
fn part(path: &Path, start: u64, count: u64) -> Result<Vec<u8>> {
    let fail = |e| Error::io("read", path, e);
    let mut file = File::open(path).map_err(fail)?;
    file.seek(SeekFrom::Start(start)).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(count).read_to_end(&mut bytes).map_err(fail)?;
    Ok(bytes)
}
