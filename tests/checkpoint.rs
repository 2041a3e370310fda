//! Checkpoints on disk: read back what was written, and refuse every way a file can be broken.

#[path = "common/safetensors_file.rs"]
mod safetensors_file;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use margay::checkpoint::writer::{Data, Entry, sha256_file, tensor_bytes, write_atomic, write_sharded};
use margay::checkpoint::{Checkpoint, Config, Headers, HubId, Place};
use margay::error::{Error, Kind};
use margay::progress::Silent;
use safetensors::{Dtype, SafeTensors};
use safetensors_file::{one_tensor, safetensors};

const CPU: Device = Device::Cpu;

/// A folder with a `config.json` and these files.
fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "config.json", br#"{"model_type": "llama", "hidden_size": 4}"#);
    for (name, bytes) in files {
        write(dir.path(), name, bytes);
    }
    dir
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(dir.join(name), bytes).unwrap();
}

fn open_error(dir: &Path) -> Error {
    let error = Checkpoint::open(dir).err().expect("the folder is broken");
    // What can be opened without weights must be refused for the same reason.
    assert_eq!(Headers::open(dir.to_str().unwrap()).unwrap_err().message, error.message);
    error
}

/// Opens a folder whose `model.safetensors` has these bytes; the error must name the file and hold `words`.
fn refused(file: Vec<u8>, words: &[&str]) {
    let dir = folder(&[("model.safetensors", file)]);
    let error = open_error(dir.path());
    assert_eq!(error.kind, Kind::Checkpoint);
    for word in words.iter().chain(&["model.safetensors"]) {
        assert!(error.message.contains(word), "`{word}` in: {error}");
    }
}

fn two_tensors(first: &str, second: &str, bytes: usize) -> Vec<u8> {
    let entry = |offsets| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{offsets}]}}"#);
    safetensors(&format!(r#"{{"a":{},"b":{}}}"#, entry(first), entry(second)), &vec![0; bytes])
}

#[test]
fn truncated_files() {
    let whole = one_tensor("w", &[1.0, 2.0, 3.0]);
    refused(whole[..whole.len() - 1].to_vec(), &["truncated", "12 bytes", "11"]);
    refused(whole[..40].to_vec(), &["truncated"]);
    refused(whole[..5].to_vec(), &["5 bytes"]);
    refused(Vec::new(), &["0 bytes"]);
}

#[test]
fn overlapping_tensors() {
    refused(two_tensors("0,8", "4,12", 12), &["`a`", "`b`", "overlap"]);
}

#[test]
fn gaps_between_and_after_tensors() {
    refused(two_tensors("0,8", "12,20", 20), &["4 unused bytes", "`b`"]);
    refused(two_tensors("0,8", "8,16", 19), &["3 unused bytes"]);
}

#[test]
fn huge_header() {
    let mut file = one_tensor("w", &[1.0]);
    file[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    refused(file, &["header", "1099511627776"]);
}

#[test]
fn header_that_is_not_json() {
    refused(safetensors("{\"w\": ", &[]), &["JSON"]);
    refused(safetensors("[1, 2]", &[]), &["JSON"]);
    refused(safetensors("\u{7f}\u{1}", &[]), &["JSON"]);
}

#[test]
fn unknown_dtype_and_wrong_sizes() {
    let entry = |text: &str| safetensors(&format!(r#"{{"w":{text}}}"#), &[0; 8]);
    refused(entry(r#"{"dtype":"F33","shape":[2],"data_offsets":[0,8]}"#), &["`w`", "F33"]);
    refused(entry(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), &["`w`", "12 bytes", "0 to 8"]);
    refused(entry(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), &["`w`"]);
    refused(entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), &["`w`"]);
    let huge = r#"{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}"#;
    refused(entry(huge), &["`w`"]);
}

/// Two shards of one tensor each, with this weight map.
fn sharded(weight_map: &str) -> tempfile::TempDir {
    folder(&[
        ("model-00001-of-00002.safetensors", one_tensor("a", &[1.0])),
        ("model-00002-of-00002.safetensors", one_tensor("b", &[2.0])),
        ("model.safetensors.index.json", format!(r#"{{"weight_map":{weight_map}}}"#).into_bytes()),
    ])
}

#[test]
fn shards_and_index_must_agree() {
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let good = sharded(&format!(r#"{{"a":"{one}","b":"{two}"}}"#));
    assert_eq!(Checkpoint::open(good.path()).unwrap().names().collect::<Vec<_>>(), ["a", "b"]);

    let cases = [
        (format!(r#"{{"a":"{one}","b":"{two}","c":"{two}"}}"#), vec!["`c`", two, "not there"]),
        (format!(r#"{{"a":"{one}","b":"{one}"}}"#), vec!["`b`", "not there"]),
        (format!(r#"{{"a":"{two}","b":"{two}"}}"#), vec!["`a`"]),
        (format!(r#"{{"b":"{two}","a":"{two}","z":"{one}"}}"#), vec!["`a`", one, two]),
        (format!(r#"{{"a":"{one}","b":"model-00003-of-00003.safetensors"}}"#), vec!["model-00003", "missing"]),
        (r#"["a"]"#.to_string(), vec!["index"]),
    ];
    for (map, words) in cases {
        let dir = sharded(&map);
        let error = open_error(dir.path());
        assert_eq!(error.kind, Kind::Checkpoint);
        assert!(words.iter().all(|w| error.message.contains(w)), "{words:?} in: {error}");
    }
}

#[test]
fn index_naming_a_path_outside_the_folder() {
    for path in ["../secret.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "..", ""] {
        let error = open_error(sharded(&format!(r#"{{"a":"{path}"}}"#)).path());
        assert_eq!(error.kind, Kind::Checkpoint);
        assert!(error.message.contains(&format!("`{path}`")) && error.message.contains("index.json"), "{error}");
    }
}

#[test]
fn shards_without_index() {
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let dir = folder(&[(one, one_tensor("a", &[1.0])), (two, one_tensor("b", &[2.0]))]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), 2);

    write(dir.path(), two, &one_tensor("a", &[2.0]));
    let error = open_error(dir.path());
    assert!(error.message.contains("`a`") && error.message.contains("both"), "{error}");

    std::fs::remove_file(dir.path().join(two)).unwrap();
    let error = open_error(dir.path());
    assert!(error.message.contains(two) && error.message.contains("missing"), "{error}");
}

#[test]
fn pickle_only_and_empty_folders() {
    let error = open_error(folder(&[("pytorch_model.bin", vec![1])]).path());
    assert!(error.message.contains("pytorch_model.bin") && error.hint.unwrap().contains("convert them to safetensors"));
    let error = open_error(folder(&[]).path());
    assert!(error.message.contains("no safetensors"), "{error}");
}

#[test]
fn missing_and_malformed_config() {
    let dir = folder(&[("model.safetensors", one_tensor("w", &[1.0]))]);
    for (text, word) in [("{\"hidden_size\": 4", "JSON"), ("[]", "object"), ("", "JSON")] {
        write(dir.path(), "config.json", text.as_bytes());
        let error = open_error(dir.path());
        assert!(error.kind == Kind::Config && error.message.contains(word), "{error}");
        assert!(error.message.contains("config.json"), "{error}");
    }
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    let error = open_error(dir.path());
    assert!(error.kind == Kind::Config && error.message.contains("`config.json` is missing"), "{error}");
}

#[test]
fn config_reads_name_the_key() {
    let text = br#"{"z": 1, "hidden_size": 64, "rope_theta": 10000, "tie": null, "bad": "x", "eos_token_id": [1, 2],
        "architectures": ["LlamaForCausalLM"], "rope_scaling": {"factor": "8"}, "a": 2}"#;
    let config = Config::parse(text, "m/config.json").unwrap();
    assert_eq!(config.object().keys().next_back().unwrap(), "a");
    assert_eq!(config.usize("hidden_size").unwrap(), 64);
    assert_eq!(config.f64("rope_theta").unwrap(), 10000.0);
    assert!(config.bool_or("tie", true).unwrap());
    assert_eq!(config.opt_str("tie").unwrap(), None);
    assert_eq!(config.token_ids("eos_token_id").unwrap(), [1, 2]);
    assert_eq!(config.architectures().unwrap(), ["LlamaForCausalLM"]);

    let message = |e: Error| {
        assert_eq!(e.kind, Kind::Config);
        e.message
    };
    let wrong = message(config.usize("bad").unwrap_err());
    assert!(["`bad`", "m/config.json", "\"x\"", "whole number"].iter().all(|w| wrong.contains(w)), "{wrong}");
    let missing = config.usize("hiden_size").unwrap_err();
    assert!(missing.hint.as_ref().unwrap().contains("hidden_size"));
    assert!(message(missing).contains("`hiden_size` is missing"));
    let rope = config.opt_object("rope_scaling").unwrap().unwrap();
    assert!(message(rope.f64("factor").unwrap_err()).contains("`rope_scaling.factor`"));
    assert!(message(config.model_type().unwrap_err()).contains("model_type"));
}

#[test]
fn values_that_are_not_finite() {
    for (bad, at) in [(f32::NAN, 0), (f32::INFINITY, 4999), (f32::NEG_INFINITY, 8192)] {
        let mut values = vec![1.0; 9000];
        values[at] = bad;
        let dir = folder(&[("model.safetensors", one_tensor("w", &values))]);
        let error = Checkpoint::open(dir.path()).unwrap().tensor("w", DType::F32, &CPU).unwrap_err();
        assert_eq!(error.kind, Kind::Checkpoint);
        assert!(error.message.contains("`w`") && error.message.contains(&format!("index {at}")), "{error}");
    }
}

#[test]
fn wrong_shape_dtype_and_name() {
    let header = r#"{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[24,32]}}"#;
    let dir = folder(&[("model.safetensors", safetensors(header, &[0; 32]))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.shaped("w", &[2, 3], DType::F32, &CPU).unwrap().dims(), [2, 3]);
    let message = |e: margay::Result<Tensor>| e.unwrap_err().message;
    let shape = message(checkpoint.shaped("w", &[3, 2], DType::F32, &CPU));
    assert!(["`w`", "[2, 3]", "[3, 2]"].iter().all(|w| shape.contains(w)), "{shape}");
    let dtype = message(checkpoint.tensor("ids", DType::F32, &CPU));
    assert!(dtype.contains("`ids`") && dtype.contains("I64"), "{dtype}");
    let error = checkpoint.tensor("v", DType::F32, &CPU).unwrap_err();
    assert!(error.message.contains("`v`") && error.hint.unwrap().contains("`w`"));
}

/// Numbers that F16 and BF16 hold exactly, in both of their ranges.
fn exact(count: usize) -> Tensor {
    let values: Vec<f32> = (0..count).map(|i| (i as f32 - 7.0) * 0.25).collect();
    Tensor::from_vec(values, count, &CPU).unwrap()
}

fn entries(count: usize) -> Vec<Entry<'static>> {
    (0..count)
        .map(|i| {
            let (name, dtype) = (format!("t{i}"), [Dtype::BF16, Dtype::F32, Dtype::F16][i % 3]);
            let data = Data::Lazy(Box::new(move || tensor_bytes(&exact(9 + i), dtype)));
            Entry { name, dtype, shape: vec![9 + i], data }
        })
        .collect()
}

#[test]
fn written_files_read_back() {
    let about = BTreeMap::from([("by".to_string(), "margay".to_string())]);
    for (max, files) in [(1 << 20, 1), (100, 4)] {
        let dir = folder(&[]);
        let written = write_sharded(dir.path(), entries(6), max, &about, &Silent).unwrap();
        assert_eq!(written.len(), files, "{written:?}");
        for file in &written {
            let path = dir.path().join(&file.file);
            assert_eq!(sha256_file(&path).unwrap(), file.sha256);
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(bytes.len() as u64, file.bytes);
            if file.file.ends_with(".safetensors") {
                let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
                assert_eq!(header % 8, 0);
                assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
                assert!(max > 100 || metadata.data_len() <= 100);
            }
        }
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().count(), 6);
        for i in 0..6 {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let read = checkpoint.shaped(&format!("t{i}"), &[9 + i], dtype, &CPU).unwrap();
                let (read, wanted) = (read.to_dtype(DType::F32).unwrap(), exact(9 + i));
                assert_eq!(read.to_vec1::<f32>().unwrap(), wanted.to_vec1::<f32>().unwrap());
            }
        }
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), files + 1, "{left:?}");
    }
}

#[test]
fn writing_what_was_read_gives_the_same_bytes() {
    let from = folder(&[]);
    write_sharded(from.path(), entries(7), 200, &BTreeMap::new(), &Silent).unwrap();
    let checkpoint = Checkpoint::open(from.path()).unwrap();
    let entry = |name: &str| {
        let info = checkpoint.info(name).unwrap();
        let data = Data::Bytes(checkpoint.bytes(name).unwrap());
        Entry { name: name.into(), dtype: info.dtype, shape: info.shape.clone(), data }
    };
    let to = folder(&[]);
    write_sharded(to.path(), checkpoint.names().map(entry).collect(), 1 << 20, &BTreeMap::new(), &Silent).unwrap();
    let copy = Checkpoint::open(to.path()).unwrap();
    for name in checkpoint.names() {
        assert_eq!(copy.bytes(name).unwrap(), checkpoint.bytes(name).unwrap());
    }
    assert_ne!(copy.digest(), checkpoint.digest());
    assert_eq!(copy.digest(), Headers::open(to.path().to_str().unwrap()).unwrap().digest());
}

#[test]
fn failed_writes_leave_nothing_and_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let short = Entry { name: "w".into(), dtype: Dtype::F32, shape: vec![2], data: Data::Bytes(&[0; 4]) };
    let error = write_sharded(dir.path(), vec![short], 100, &BTreeMap::new(), &Silent).unwrap_err();
    assert!(error.message.contains("`w`"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    let path = dir.path().join("state.json");
    write_atomic(&path, b"old").unwrap();
    write_atomic(&path, b"new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let error = write_atomic(&dir.path().join("none/state.json"), b"x").unwrap_err();
    assert!(error.kind == Kind::Output && error.message.contains("state.json"), "{error}");
}

#[test]
fn side_files_are_carried_and_nothing_else() {
    let names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt", "LICENSE"];
    let others = ["README.md", "margay.json", "pytorch_model.bin", "notes.txt"];
    let dir = folder(&[("model.safetensors", one_tensor("w", &[1.0]))]);
    names.iter().chain(&others).for_each(|n| write(dir.path(), n, b"x"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.tokenizer());
    let mut side: Vec<_> = checkpoint.side_files();
    side.sort();
    let mut wanted: Vec<_> = names.iter().map(|n| dir.path().join(n)).collect();
    wanted.sort();
    assert_eq!(side, wanted);
}

#[test]
fn places() {
    let dir = folder(&[("model.safetensors", one_tensor("w", &[1.0]))]);
    let hub = |repo: &str, revision: &str| Place::Hub(HubId { repo: repo.into(), revision: revision.into() });
    assert_eq!(Place::of(dir.path().to_str().unwrap()).unwrap(), Place::Local(dir.path().into()));
    assert_eq!(Place::of("org/name").unwrap(), hub("org/name", "main"));
    assert_eq!(Place::of("org/na.me@refs/pr/1").unwrap(), hub("org/na.me", "refs/pr/1"));
    for text in
        ["./org/name", "/org/name", "~/org-that-is-not-there/name", "name", "a/b/c", "org/name@../..", "org/..", ""]
    {
        assert!(Place::of(text).unwrap_err().message.contains(&format!("`{text}`")), "{text}");
    }
    let file = dir.path().join("model.safetensors");
    assert_eq!(Place::of(file.to_str().unwrap()).unwrap_err().kind, Kind::Usage);
}

#[test]
fn real_checkpoints() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/models");
    if !models.is_dir() {
        println!("skipped: ../shared/data/models is not there");
        return;
    }
    for (name, parameters, file_count) in [("stories260k", 260_032, 1), ("scribe-11m", 11_015_040, 2)] {
        let checkpoint = Checkpoint::open(&models.join(name)).unwrap();
        assert_eq!((checkpoint.parameters(), checkpoint.files.len()), (parameters, file_count));
        for tensor in checkpoint.names() {
            checkpoint.tensor(tensor, DType::F32, &CPU).unwrap();
        }
    }
}
