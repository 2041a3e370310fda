//! A hub on 127.0.0.1 with one model and one data set, which can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does wrong, and what it saw.
#[derive(Default)]
pub struct Behaviour {
    /// Answer everything with this status.
    pub status: Option<u16>,
    /// Refuse requests without this token.
    pub token: Option<String>,
    /// Accept connections and stay silent.
    pub silent: bool,
    /// For this many answers: close after so many bytes of a `.safetensors` body.
    pub cut: (usize, usize),
    /// Serve whole files whatever range is asked for.
    pub no_ranges: bool,
    /// Send files with a redirect, as the real hub does with large ones.
    pub redirect: bool,
    /// `path range` of every request.
    pub seen: Vec<String>,
    /// Body bytes sent of files, not counting listings.
    pub sent: usize,
}

pub struct HubServer {
    pub url: String,
    pub behaviour: Arc<Mutex<Behaviour>>,
}

impl HubServer {
    /// Serves `files` as `org/tiny` at branch `main` and at [`SHA`], model and data set alike. Hashes are told for
    /// `.safetensors` files, as for files in large-file storage.
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let behaviour = Arc::new(Mutex::new(Behaviour::default()));
        let (files, shared) = (Arc::new(files), behaviour.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, shared) = (files.clone(), shared.clone());
                // A client that hangs up is part of the tests.
                std::thread::spawn(move || answer(stream, &files, &shared).ok());
            }
        });
        HubServer { url, behaviour }
    }

    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }

    /// The requests since the last call.
    pub fn take_seen(&self) -> Vec<String> {
        std::mem::take(&mut self.behaviour.lock().unwrap().seen)
    }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, shared: &Mutex<Behaviour>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let headers: Vec<String> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
    let header = |name: &str| {
        let found = headers.iter().find_map(|h| h.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        found.map(|(_, value)| value.to_string())
    };
    let mut behaviour = shared.lock().unwrap();
    behaviour.seen.push(format!("{path} {}", header("range").unwrap_or_default()).trim().to_string());
    if behaviour.silent {
        drop(behaviour);
        std::thread::sleep(Duration::from_secs(5));
        return Ok(());
    }
    if let Some(status) = behaviour.status {
        return reply(&mut stream, status, &[], b"", 0);
    }
    if let Some(token) = &behaviour.token
        && header("authorization") != Some(format!("Bearer {token}"))
    {
        return reply(&mut stream, 401, &[], b"", 0);
    }
    if let Some(rest) = path.strip_prefix("/api/models/org/tiny/").or(path.strip_prefix("/api/datasets/org/tiny/")) {
        return match rest == "revision/main?blobs=true" || rest == format!("revision/{SHA}?blobs=true") {
            true => reply(&mut stream, 200, &[], listing(files).as_bytes(), usize::MAX),
            false => reply(&mut stream, 404, &[], b"", 0),
        };
    }
    let place = path.strip_prefix("/datasets").unwrap_or(&path);
    let stored = place.strip_prefix("/storage/").and_then(|name| files.get_key_value(name));
    let resolved = place.strip_prefix(&format!("/org/tiny/resolve/{SHA}/")).and_then(|name| files.get_key_value(name));
    let Some((name, bytes)) = stored.or(resolved) else {
        return reply(&mut stream, 404, &[], b"", 0);
    };
    if behaviour.redirect && stored.is_none() {
        return reply(&mut stream, 302, &[format!("Location: /storage/{name}")], b"", 0);
    }
    let bounds = header("range").filter(|_| !behaviour.no_ranges).and_then(|range| {
        let (start, end) =
            range.strip_prefix("bytes=")?.split_once('-').map(|(s, e)| (s.to_string(), e.to_string()))?;
        Some((start.parse::<usize>().ok()?, end.parse::<usize>().map_or(bytes.len(), |e| bytes.len().min(e + 1))))
    });
    let (start, end) = bounds.unwrap_or((0, bytes.len()));
    let body = &bytes[start..end];
    let mut limit = usize::MAX;
    if name.ends_with(".safetensors") && behaviour.cut.0 > 0 {
        behaviour.cut.0 -= 1;
        limit = behaviour.cut.1;
    }
    behaviour.sent += body.len().min(limit);
    drop(behaviour);
    match bounds {
        None => reply(&mut stream, 200, &[], body, limit),
        Some(_) => {
            let range = format!("Content-Range: bytes {start}-{}/{}", end.saturating_sub(1), bytes.len());
            reply(&mut stream, 206, &[range], body, limit)
        }
    }
}

/// Sends at most `limit` bytes of the body it announces.
fn reply(stream: &mut TcpStream, status: u16, headers: &[String], body: &[u8], limit: usize) -> std::io::Result<()> {
    let headers: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
    let length = body.len();
    write!(stream, "HTTP/1.1 {status} x\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n")?;
    stream.write_all(&body[..length.min(limit)])
}

fn listing(files: &BTreeMap<String, Vec<u8>>) -> String {
    let siblings: Vec<_> = files
        .iter()
        .map(|(name, bytes)| {
            let hash = margay::checkpoint::writer::sha256(bytes);
            let mut entry = serde_json::json!({ "rfilename": name, "size": bytes.len(), "blobId": hash[..40] });
            if name.ends_with(".safetensors") {
                entry["lfs"] = serde_json::json!({ "sha256": hash, "size": bytes.len() });
            }
            entry
        })
        .collect();
    serde_json::json!({ "sha": SHA, "siblings": siblings }).to_string()
}
