//! The hub against a server on this machine: downloads, pinned commits, ranged reads, refusals, cuts, silence, offline.
#![cfg(feature = "hub")]

#[path = "common/hub_server.rs"]
mod hub_server;
#[path = "common/safetensors_file.rs"]
mod safetensors_file;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use hub_server::{HubServer, SHA};
use margay::checkpoint::hub::{Hub, Options};
use margay::checkpoint::{Checkpoint, HubId};
use margay::error::Kind;
use margay::progress::Silent;
use safetensors_file::one_tensor;

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

fn files() -> BTreeMap<String, Vec<u8>> {
    let values: Vec<f32> = (0..5000).map(|i| i as f32).collect();
    let index = format!(r#"{{"weight_map":{{"a":"{}","b":"{}"}}}}"#, SHARDS[0], SHARDS[1]);
    let text = |name: &str, text: &str| (name.to_string(), text.as_bytes().to_vec());
    BTreeMap::from([
        text("config.json", r#"{"model_type": "llama"}"#),
        text("model.safetensors.index.json", &index),
        text("tokenizer.json", "{}"),
        text("README.md", "not wanted"),
        text("pytorch_model.bin", "not wanted"),
        text("data/train-0.jsonl", "{\"text\": \"train\"}\n"),
        text("data/test-0.jsonl", "{\"text\": \"test\"}\n"),
        (SHARDS[0].to_string(), one_tensor("a", &values)),
        (SHARDS[1].to_string(), one_tensor("b", &values)),
    ])
}

fn options(server: &HubServer, cache: &Path) -> Options {
    Options {
        endpoint: format!("{}/", server.url),
        token: None,
        cache: cache.into(),
        offline: false,
        connect_timeout: Duration::from_millis(500),
        read_timeout: Duration::from_millis(500),
        retries: 0,
    }
}

fn tiny() -> HubId {
    HubId::parse("org/tiny").unwrap()
}

fn setup() -> (HubServer, tempfile::TempDir, Options) {
    let (server, cache) = (HubServer::start(files()), tempfile::tempdir().unwrap());
    let options = options(&server, cache.path());
    (server, cache, options)
}

#[test]
fn a_model_is_downloaded_pinned_and_kept() {
    let (server, cache, options) = setup();
    for redirect in [false, true] {
        server.set(|b| b.redirect = redirect);
        let (dir, sha) = Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap();
        let root = cache.path().join("models--org--tiny");
        assert_eq!((sha.as_str(), &dir), (SHA, &root.join("snapshots").join(SHA)));
        assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), SHA);
        let mut names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        let wanted = ["config.json", SHARDS[0], SHARDS[1], "model.safetensors.index.json", "tokenizer.json"];
        assert_eq!(names, wanted);
        assert!(std::fs::read_link(dir.join("config.json")).unwrap().starts_with("../../blobs"));

        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert_eq!(checkpoint.tensor("b", DType::F32, &Device::Cpu).unwrap().elem_count(), 5000);
        assert!(server.take_seen().len() >= 6);
        // A second time only the commit is asked for; a pinned commit asks for nothing.
        Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap();
        assert_eq!(server.take_seen().len(), 1);
        let pinned = HubId { revision: SHA.into(), ..tiny() };
        assert_eq!(Hub::new(options.clone()).fetch_model(&pinned, &Silent).unwrap().1, SHA);
        assert_eq!(server.take_seen().len(), 0);
        std::fs::remove_dir_all(root).unwrap();
    }
}

#[test]
fn headers_come_without_weights() {
    let (server, cache, options) = setup();
    for redirect in [false, true] {
        server.set(|b| (b.redirect, b.sent) = (redirect, 0));
        let headers = Hub::new(options.clone()).headers(&tiny()).unwrap();
        assert_eq!(headers.parameters(), 10_000);
        assert_eq!(headers.tensors["b"].shape, [5000]);
        assert_eq!(headers.source.revision.as_deref(), Some(SHA));
        assert!(headers.tokenizer());
        let files = files();
        let header_bytes: usize = SHARDS.iter().map(|s| files[*s].len() - 20_000).sum();
        let sent = server.behaviour.lock().unwrap().sent;
        assert_eq!(sent, header_bytes + files["config.json"].len() + files["model.safetensors.index.json"].len());
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    }
    server.set(|b| b.no_ranges = true);
    assert!(Hub::new(options).headers(&tiny()).unwrap_err().message.contains("parts of files"));
}

#[test]
fn refusals_say_what_to_do() {
    let (server, _cache, options) = setup();
    server.set(|b| b.token = Some("secret".into()));
    let error = Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap_err();
    assert!(error.kind == Kind::Hub && error.message.contains("401") && error.message.contains("org/tiny"), "{error}");
    assert!(error.hint.unwrap().contains("HF_TOKEN"));
    let with_token = Options { token: Some("secret".into()), ..options.clone() };
    Hub::new(with_token).fetch_model(&tiny(), &Silent).unwrap();

    server.set(|b| b.token = None);
    let hub = Hub::new(options);
    for id in ["org/tinny", "org/tiny@v9"] {
        let error = hub.headers(&HubId::parse(id).unwrap()).unwrap_err();
        assert!(error.kind == Kind::Hub && error.message.contains(&format!("`{id}`")), "{error}");
        let hint = error.hint.unwrap();
        assert!(error.message.contains("404") && hint.contains("spelling") && hint.contains("revision"));
    }
    for (status, word) in [(403, "licence"), (503, "again"), (418, "HF_ENDPOINT")] {
        server.set(|b| b.status = Some(status));
        let error = hub.headers(&tiny()).unwrap_err();
        assert!(error.message.contains(&status.to_string()) && error.hint.unwrap().contains(word));
    }
}

#[test]
fn silence_ends_in_an_error() {
    let (server, _cache, options) = setup();
    server.set(|b| b.silent = true);
    let start = Instant::now();
    let error = Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap_err();
    assert!(error.kind == Kind::Hub && error.hint.unwrap().contains("network"));
    assert!(start.elapsed() < Duration::from_secs(4));

    let nobody = Options { endpoint: "http://127.0.0.1:9".into(), ..options };
    assert_eq!(Hub::new(nobody).headers(&tiny()).unwrap_err().kind, Kind::Hub);
}

#[test]
fn a_cut_download_continues() {
    let (server, cache, options) = setup();
    server.set(|b| b.cut = (1, 7000));
    let error = Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap_err();
    assert!(error.kind == Kind::Hub && error.hint.unwrap().contains("continue"));
    let snapshot = cache.path().join("models--org--tiny/snapshots").join(SHA);
    assert!(!snapshot.join(SHARDS[0]).exists());

    server.take_seen();
    let (dir, _) = Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap();
    assert!(server.take_seen().iter().any(|r| r.ends_with(&format!("{} bytes=7000-", SHARDS[0]))));
    assert_eq!(std::fs::read(dir.join(SHARDS[0])).unwrap(), files()[SHARDS[0]]);

    // Within one call, as often as it takes while each attempt brings something; also where ranges are ignored.
    for no_ranges in [false, true] {
        std::fs::remove_dir_all(cache.path().join("models--org--tiny")).unwrap();
        server.set(|b| (b.cut, b.no_ranges) = ((2, 7000), no_ranges));
        let patient = Options { retries: 2, ..options.clone() };
        let (dir, _) = Hub::new(patient).fetch_model(&tiny(), &Silent).unwrap();
        assert_eq!(std::fs::read(dir.join(SHARDS[0])).unwrap(), files()[SHARDS[0]]);
    }
}

#[test]
fn a_damaged_part_is_thrown_away() {
    let (_server, cache, options) = setup();
    let blobs = cache.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let hash = margay::checkpoint::writer::sha256(&files()[SHARDS[0]]);
    std::fs::write(blobs.join(format!("{hash}.incomplete")), b"garbage").unwrap();
    let hub = Hub::new(options);
    let error = hub.fetch_model(&tiny(), &Silent).unwrap_err();
    assert!(error.message.contains(SHARDS[0]) && error.message.contains("SHA-256"), "{error}");
    let (dir, _) = hub.fetch_model(&tiny(), &Silent).unwrap();
    assert_eq!(std::fs::read(dir.join(SHARDS[0])).unwrap(), files()[SHARDS[0]]);
}

#[test]
fn offline_uses_the_cache_only() {
    let (server, cache, options) = setup();
    let offline = Options { offline: true, ..options.clone() };
    for error in [
        Hub::new(offline.clone()).fetch_model(&tiny(), &Silent).unwrap_err(),
        Hub::new(offline.clone()).headers(&tiny()).unwrap_err(),
        Hub::new(offline.clone()).fetch_dataset(&tiny(), &Silent).unwrap_err(),
    ] {
        assert!(error.kind == Kind::Hub && error.message.contains("HF_HUB_OFFLINE"), "{error}");
        assert!(error.message.contains("org/tiny") && error.message.contains(cache.path().to_str().unwrap()));
    }
    let (dir, _) = Hub::new(options.clone()).fetch_model(&tiny(), &Silent).unwrap();
    let data = Hub::new(options).fetch_dataset(&tiny(), &Silent).unwrap();
    server.take_seen();
    let hub = Hub::new(offline);
    assert_eq!(hub.fetch_model(&tiny(), &Silent).unwrap(), (dir.clone(), SHA.to_string()));
    assert_eq!(hub.headers(&tiny()).unwrap().parameters(), 10_000);
    assert_eq!(hub.fetch_dataset(&tiny(), &Silent).unwrap(), data);
    std::fs::remove_file(dir.join(SHARDS[1])).unwrap();
    let error = hub.fetch_model(&tiny(), &Silent).unwrap_err();
    assert!(error.message.contains(SHARDS[1]) && error.hint.as_ref().unwrap().contains("HF_HUB_OFFLINE"), "{error}");
    assert!(server.take_seen().is_empty());
}

#[test]
fn data_sets() {
    let (_server, _cache, options) = setup();
    let files = Hub::new(options).fetch_dataset(&tiny(), &Silent).unwrap();
    assert_eq!(files.len(), 1);
    assert!(files[0].ends_with(format!("datasets--org--tiny/snapshots/{SHA}/data/train-0.jsonl")));
    assert!(std::fs::read_to_string(&files[0]).unwrap().contains("train"));

    let empty = HubServer::start(BTreeMap::from([("README.md".to_string(), Vec::new())]));
    let cache = tempfile::tempdir().unwrap();
    let error = Hub::new(self::options(&empty, cache.path())).fetch_dataset(&tiny(), &Silent).unwrap_err();
    assert!(error.kind == Kind::Data && error.message.contains("no Parquet"), "{error}");
}

#[test]
fn a_server_cannot_write_outside_the_cache() {
    let outside = BTreeMap::from([("../../../../escape.safetensors".to_string(), vec![1])]);
    let (server, cache) = (HubServer::start(outside), tempfile::tempdir().unwrap());
    let error = Hub::new(options(&server, cache.path())).fetch_model(&tiny(), &Silent).unwrap_err();
    assert!(error.message.contains("escape"), "{error}");
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
}

/// Runs itself as a child, since the environment belongs to the whole process.
#[test]
fn options_come_from_the_environment() {
    if std::env::var_os("MARGAY_TEST_CHILD").is_some() {
        let options = Options::from_env().unwrap();
        assert_eq!(options.endpoint, "http://mirror");
        assert_eq!(options.token.as_deref(), Some("t"));
        assert_eq!(options.cache, Path::new("/some/home/hub"));
        assert!(options.offline);
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "options_come_from_the_environment"])
        .env_remove("HF_HUB_CACHE")
        .envs([("MARGAY_TEST_CHILD", "1"), ("HF_ENDPOINT", "http://mirror"), ("HF_TOKEN", "t")])
        .envs([("HF_HOME", "/some/home"), ("HF_HUB_OFFLINE", "1")])
        .status()
        .unwrap();
    assert!(status.success());
}
