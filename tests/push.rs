//! A folder pushed to a hub on this machine: what is asked, stored and committed, and what is refused.
#![cfg(feature = "hub")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use margay::checkpoint::HubId;
use margay::checkpoint::hub::{Hub, Options};
use margay::checkpoint::writer::sha256;
use margay::error::Kind;
use margay::progress::Silent;
use serde_json::{Value, json};

/// What the server was sent: `METHOD path` and body, in order.
type Seen = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

const PART: usize = 1000;

/// A hub that stores `.safetensors` files apart, those of more than [`PART`] bytes in parts, and holds `known` already.
fn serve(known: String, token: &'static str) -> (String, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Seen::default();
    let (shared, own) = (seen.clone(), url.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            answer(stream, &own, &known, token, &shared);
        }
    });
    (url, seen)
}

fn answer(mut stream: TcpStream, url: &str, known: &str, token: &str, seen: &Seen) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_string());
    }
    let Some(first) = lines.first() else { return };
    let header = |name: &str| {
        let found = lines.iter().find_map(|l| l.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        found.map(|(_, value)| value.to_string())
    };
    let mut body = vec![0; header("content-length").map_or(0, |n| n.parse().unwrap())];
    reader.read_exact(&mut body).unwrap();
    let place = first.rsplit_once(' ').unwrap().0.to_string();
    let storage = place.starts_with("PUT ");
    let allowed = storage || header("authorization") == Some(format!("Bearer {token}"));
    let (status, reply) = match place.as_str() {
        _ if !allowed => (403, json!({})),
        "POST /api/repos/create" => (409, json!({ "error": "exists" })),
        "POST /api/models/org/new/preupload/main" => {
            let asked: Value = serde_json::from_slice(&body).unwrap();
            let told = asked["files"].as_array().unwrap().iter().map(|f| {
                let path = f["path"].as_str().unwrap();
                json!({ "path": path, "uploadMode": if path.ends_with("safetensors") { "lfs" } else { "regular" } })
            });
            (200, json!({ "files": told.collect::<Vec<_>>() }))
        }
        "POST /org/new.git/info/lfs/objects/batch" => {
            let asked: Value = serde_json::from_slice(&body).unwrap();
            let (oid, size) =
                (asked["objects"][0]["oid"].as_str().unwrap(), asked["objects"][0]["size"].as_u64().unwrap());
            let verify = json!({ "href": format!("{url}/verify") });
            let upload = match size as usize > PART {
                true => {
                    let mut header = json!({ "chunk_size": PART.to_string() });
                    for n in 1..=(size as usize).div_ceil(PART) {
                        header[format!("{n:05}")] = json!(format!("{url}/part/{n}"));
                    }
                    json!({ "href": format!("{url}/complete"), "header": header })
                }
                false => json!({ "href": format!("{url}/whole") }),
            };
            let actions = json!({ "upload": upload, "verify": verify });
            match oid == known {
                true => (200, json!({ "objects": [{ "oid": oid, "size": size }] })),
                false => (200, json!({ "objects": [{ "oid": oid, "size": size, "actions": actions }] })),
            }
        }
        "POST /api/models/org/new/commit/main" => (200, json!({ "commitUrl": format!("{url}/commit/1") })),
        _ => (200, json!({})),
    };
    let tag = place.rsplit('/').next().unwrap().to_string();
    seen.lock().unwrap().push((place, body));
    let text = reply.to_string();
    let length = text.len();
    write!(
        stream,
        "HTTP/1.1 {status} x\r\nETag: \"{tag}\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
    )
    .unwrap();
}

fn hub(url: &str, token: Option<&str>, offline: bool) -> Hub {
    Hub::new(Options {
        endpoint: url.into(),
        token: token.map(String::from),
        cache: "/nowhere".into(),
        offline,
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_secs(5),
        retries: 0,
    })
}

fn folder() -> (tempfile::TempDir, BTreeMap<&'static str, Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let files = BTreeMap::from([
        ("README.md", b"# card".to_vec()),
        ("adapter/adapter_model.safetensors", vec![1; 300]),
        ("known.safetensors", vec![2; 400]),
        ("model.safetensors", (0..2500).map(|i| i as u8).collect()),
    ]);
    for (name, bytes) in &files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    (dir, files)
}

fn push(hub: &Hub, dir: &Path) -> margay::Result<String> {
    hub.push(dir, &HubId::parse("org/new").unwrap(), true, &Silent)
}

#[test]
fn a_folder_becomes_one_commit() {
    let (dir, files) = folder();
    let (url, seen) = serve(sha256(&files["known.safetensors"]), "secret");
    assert_eq!(push(&hub(&url, Some("secret"), false), dir.path()).unwrap(), format!("{url}/commit/1"));
    let seen = seen.lock().unwrap();
    let bodies = |wanted: &str| -> Vec<Vec<u8>> {
        seen.iter().filter(|(place, _)| place == wanted).map(|(_, body)| body.clone()).collect()
    };
    let created: Value = serde_json::from_slice(&bodies("POST /api/repos/create")[0]).unwrap();
    assert_eq!(created, json!({ "name": "new", "organization": "org", "type": "model", "private": true }));
    // What storage holds is not sent; a small file goes whole, a large one in parts.
    assert_eq!(bodies("PUT /whole"), [files["adapter/adapter_model.safetensors"].clone()]);
    let parts: Vec<u8> = (1..=3).flat_map(|n| bodies(&format!("PUT /part/{n}")).concat()).collect();
    assert_eq!(parts, files["model.safetensors"]);
    let complete: Value = serde_json::from_slice(&bodies("POST /complete")[0]).unwrap();
    assert_eq!(complete["parts"][2], json!({ "partNumber": 3, "etag": "\"3\"" }));
    assert_eq!(bodies("POST /verify").len(), 2);
    let commit = bodies("POST /api/models/org/new/commit/main").concat();
    let lines: Vec<Value> =
        commit.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let keys: Vec<&str> = lines.iter().map(|line| line["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["header", "file", "lfsFile", "lfsFile", "lfsFile"]);
    assert_eq!(lines[1]["value"], json!({ "path": "README.md", "content": "IyBjYXJk", "encoding": "base64" }));
    let model = &files["model.safetensors"];
    assert_eq!(
        lines[4]["value"],
        json!({ "path": "model.safetensors", "algo": "sha256", "oid": sha256(model), "size": 2500 })
    );
}

#[test]
fn what_may_not_be_written_is_refused() {
    let (dir, _) = folder();
    let (url, seen) = serve(String::new(), "secret");
    for (token, offline, word) in
        [(None, false, "HF_TOKEN"), (Some("secret"), true, "HF_HUB_OFFLINE"), (Some("other"), false, "may write")]
    {
        let error = push(&hub(&url, token, offline), dir.path()).unwrap_err();
        assert_eq!(error.kind, Kind::Hub);
        assert!(error.hint.as_ref().unwrap().contains(word), "{error:?}");
    }
    assert!(seen.lock().unwrap().iter().all(|(place, _)| place == "POST /api/repos/create"));
}
