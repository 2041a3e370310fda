//! Text to packed rows, with a tokenizer small enough to count by hand: one token a byte.

#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use byte_tokenizer::{BOS, EOS, byte_tokenizer};
use candle_core::Device;
use margay::data::sources::{Content, Document, documents, resolve};
use margay::data::{Corpus, Split, Tokenizer, alpaca_prompt, eval_rows, read_recall};
use margay::error::{Error, Kind};
use margay::progress::Silent;
use margay::recipe::{self, Format, Join};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a byte tokenizer.
fn model(tokenizer_config: Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    if !tokenizer_config.is_null() {
        fs::write(dir.path().join("tokenizer_config.json"), tokenizer_config.to_string()).unwrap();
    }
    dir
}

fn tokenizer() -> Tokenizer {
    Tokenizer::open(model(json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}})).path()).unwrap()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    /// Writes a file and returns its path as a source.
    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().into()
    }

    fn cache(&self) -> PathBuf {
        self.0.path().join("cache")
    }

    fn caches(&self) -> Vec<PathBuf> {
        fs::read_dir(self.cache()).unwrap().map(|e| e.unwrap().path()).collect()
    }

    fn prepare(&self, source: &str, settings: &recipe::Data, row_len: usize) -> Result<Corpus, Error> {
        Corpus::prepare(&[source.into()], settings, 7, &tokenizer(), row_len, &self.cache(), &Silent)
    }

    fn eval(&self, source: &str, settings: &recipe::Data, seq_len: usize) -> Result<Split, Error> {
        eval_rows(&[source.into()], settings, &tokenizer(), seq_len, &self.cache(), &Silent)
    }
}

type Text = (Option<String>, String);

fn texts(source: &str, settings: &recipe::Data) -> Result<Vec<Text>, Error> {
    let files = resolve(&[source.into()], &Silent)?;
    let text = |document: Document| match document.content {
        Content::Text(text) => (None, text),
        Content::Answer { prompt, answer } => (Some(prompt), answer),
        Content::Chat(chat) => (Some("chat".into()), json!(chat.messages).to_string()),
    };
    documents(&files, settings).map(|d| d.map(text)).collect()
}

fn plain(texts: &[&str]) -> Vec<Text> {
    texts.iter().map(|t| (None, t.to_string())).collect()
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn all_ids(split: &Split) -> Vec<Vec<u32>> {
    (0..split.len()).map(|i| split.sequence(i).ids).collect()
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, parts: &[&str]) {
    let Err(error) = result else { panic!("was not refused") };
    let text = format!("{error}\n{}", error.hint.clone().unwrap_or_default());
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

fn parquet_file(path: &Path, columns: &[(&str, &[Option<&str>])]) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    let fields: String = columns.iter().map(|(name, _)| format!("optional binary {name} (UTF8); ")).collect();
    let schema = parquet::schema::parser::parse_message_type(&format!("message rows {{ {fields} }}")).unwrap();
    let file = fs::File::create(path).unwrap();
    let mut writer =
        parquet::file::writer::SerializedFileWriter::new(file, Arc::new(schema), Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (_, values) in columns {
        let mut column = group.next_column().unwrap().unwrap();
        let bytes: Vec<ByteArray> = values.iter().flatten().map(|v| ByteArray::from(*v)).collect();
        let levels: Vec<i16> = values.iter().map(|v| i16::from(v.is_some())).collect();
        column.typed::<ByteArrayType>().write_batch(&bytes, Some(&levels), None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

// Formats.

/// A text of its own to measure on: none of it trains, and all of the other does.
#[test]
fn held_out_text_replaces_the_split() {
    let folder = Folder::new();
    let (train, valid) = (folder.file("train.txt", "a".repeat(100)), folder.file("valid.txt", "b".repeat(30)));
    let settings = recipe::Data { held_out: vec![valid.clone()], eos: Join::Never, ..recipe::Data::default() };
    let corpus = folder.prepare(&train, &settings, 9).unwrap();
    let ids = |split: Split| -> Vec<u32> {
        let rows: Vec<usize> = (0..split.len()).collect();
        split.batch(&rows, &Device::Cpu).unwrap().targets.flatten_all().unwrap().to_vec1().unwrap()
    };
    assert_eq!((corpus.train(9).unwrap().len(), corpus.valid(9).unwrap().len()), (10, 3));
    assert!(ids(corpus.train(9).unwrap()).iter().all(|id| *id == u32::from(b'a')));
    assert!(ids(corpus.valid(9).unwrap()).iter().all(|id| *id == u32::from(b'b')));
    let other = folder.file("other.txt", "c".repeat(30));
    let moved = recipe::Data { held_out: vec![other], ..settings.clone() };
    assert_ne!(folder.prepare(&train, &moved, 9).unwrap().digest(), corpus.digest());
    let short = recipe::Data { held_out: vec![folder.file("short.txt", "bbb")], ..settings };
    let error = folder.prepare(&train, &short, 9).err().unwrap().to_string();
    assert!(error.contains("short.txt"), "{error}");
}

#[test]
fn every_format_gives_its_documents() {
    let dir = Folder::new();
    let settings = recipe::Data::default();
    let read = |name: &str, content: &str| texts(&dir.file(name, content), &settings).unwrap();
    let alpaca = vec![(Some(alpaca_prompt("Say", "x")), "y".to_string()), (Some(alpaca_prompt("Go", "")), "z".into())];

    assert_eq!(read("a.txt", "\u{feff}one\ntwo"), plain(&["one\ntwo"]));
    let lines = "{\"text\": \"é\"}\n\n\"bare\"\r\n{\"text\": \"\"}\n{\"id\": 1, \"text\": \"b\"}";
    assert_eq!(read("b.jsonl", lines), plain(&["é", "bare", "b"]));
    let rows = r#"[{"instruction": "Say", "input": "x", "output": "y", "text": "all"},
                   {"instruction": "Go", "output": "z"}]"#;
    assert_eq!(read("c.json", rows), alpaca);
    assert_eq!(read("d.json", "{\"text\": \"a\"}\n{\"text\": \"b\"}"), plain(&["a", "b"]));

    let as_text = recipe::Data { format: Format::Text, ..settings.clone() };
    let row = dir.file("e.json", r#"[{"instruction": "", "output": "", "text": "t"}]"#);
    assert_eq!(texts(&row, &as_text).unwrap(), plain(&["t"]));
    assert_eq!(texts(&dir.file("notes.log", "log"), &as_text).unwrap(), plain(&["log"]));

    let path = dir.0.path().join("f.parquet");
    let source = path.to_str().unwrap();
    parquet_file(&path, &[("id", &[Some("1"), Some("2"), None]), ("text", &[Some("p"), Some(""), Some("q")])]);
    assert_eq!(texts(source, &settings).unwrap(), plain(&["p", "q"]));
    let instructions: [Option<&str>; 2] = [Some("Say"), Some("Go")];
    parquet_file(
        &path,
        &[("output", &[Some("y"), Some("z")]), ("instruction", &instructions), ("input", &[Some("x"), None])],
    );
    assert_eq!(texts(source, &settings).unwrap(), alpaca);
}

#[test]
fn the_field_comes_from_the_recipe() {
    let dir = Folder::new();
    let settings = recipe::Data { field: "body".into(), ..Default::default() };
    let source = dir.file("a.jsonl", r#"{"text": "no", "body": "yes"}"#);
    assert_eq!(texts(&source, &settings).unwrap(), plain(&["yes"]));
}

#[test]
fn folders_and_globs_are_read_in_order() {
    let dir = Folder::new();
    for (name, text) in [("b.txt", "b"), ("a.txt", "a"), ("sub/c.md", "c")] {
        dir.file(&format!("t/{name}"), text);
    }
    for name in ["README.md", ".hidden.txt", "picture.png"] {
        dir.file(&format!("t/{name}"), "no");
    }
    let settings = recipe::Data::default();
    let folder = dir.0.path().join("t");
    assert_eq!(texts(folder.to_str().unwrap(), &settings).unwrap(), plain(&["a", "b", "c"]));
    assert_eq!(texts(&format!("{}/*.txt", folder.display()), &settings).unwrap(), plain(&["a", "b"]));
}

// Errors.

#[test]
fn broken_files_are_refused_with_their_place() {
    let dir = Folder::new();
    let settings = recipe::Data::default();
    let check = |name: &str, content: &[u8], parts: &[&str]| refused(texts(&dir.file(name, content), &settings), parts);

    check("a.txt", b"ok\nok\xff", &["a.txt` is not UTF-8", "offset 5", "line 2"]);
    check("b.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}", &["b.jsonl` is not UTF-8", "offset 24", "line 2"]);
    check("c.jsonl", b"{\"text\": \"a\"}\n{\"text\": }", &["c.jsonl` line 2 column 10 is not JSON", "expected value"]);
    check("d.jsonl", b"{\"id\": 1, \"texts\": \"\"}", &["line 1 has no field `text`", "`id`, `texts`", "mean `texts`"]);
    check("e.jsonl", b"{\"text\": null}", &["line 1: `text` is null"]);
    check("f.jsonl", b"[1]", &["line 1 holds an array"]);
    check("g.json", b"[{\"text\": \"a\"},", &["g.json` is not a JSON array", "line 1"]);
    check("h.parquet", b"no parquet", &["h.parquet` is not a readable parquet file"]);
    check("i.csv", b"a,b", &["i.csv` has no known format", ".parquet", "data.format=text"]);
    check("j.txt", b"", &["j.txt` is empty"]);
    let alpaca = recipe::Data { format: Format::Alpaca, ..settings.clone() };
    refused(texts(&dir.file("k.txt", "text"), &alpaca), &["plain text, but `data.format` is `alpaca`"]);
    refused(texts(&dir.file("l.jsonl", r#"{"instruction": "a"}"#), &alpaca), &["no field `output`"]);
    let path = dir.0.path().join("m.parquet");
    parquet_file(&path, &[("content", &[Some("p")])]);
    refused(texts(path.to_str().unwrap(), &settings), &["m.parquet` has no field `text`", "`content`"]);
    refused(dir.prepare(&dir.file("n.jsonl", "\n\n"), &settings, 8), &["there is no text in", "n.jsonl"]);
}

#[test]
fn sources_that_give_nothing_are_refused() {
    let dir = Folder::new();
    let check = |source: &str, parts: &[&str]| refused(texts(source, &recipe::Data::default()), parts);
    let path = |name: &str| format!("{}/{name}", dir.0.path().display());
    check(&path("x.txt"), &["cannot read", "x.txt"]);
    check(&path("*.zzz"), &["no file matches", "*.zzz"]);
    fs::create_dir(path("none")).unwrap();
    check(&path("none"), &["no text file in folder"]);
    refused(resolve(&[], &Silent), &["no training text is named", "--data"]);
}

#[test]
fn too_little_text_says_how_much_there_is() {
    let dir = Folder::new();
    let settings = recipe::Data::default();
    let source = dir.file("a.txt", "0123456789");
    let Err(error) = dir.prepare(&source, &settings, 8) else { panic!() };
    assert_eq!(error.kind, Kind::Data);
    refused::<()>(Err(error), &["1 documents, 11 tokens", "needs 18", "seq_len"]);
    refused(dir.eval(&source, &settings, 20), &["11 tokens", "needs 21"]);
    let corpus = dir.prepare(&source, &settings, 4).unwrap();
    assert!(corpus.train(4).unwrap().require(1).is_ok());
    refused(corpus.train(4).unwrap().require(3), &["needs 3 sequences of 4 tokens", "has 1", "11 tokens in all"]);
    refused(corpus.train(5), &["`seq_len` is 5", "1 to 4"]);
    refused(corpus.train(0), &["`seq_len` is 0"]);
}

// Packing.

#[test]
fn rows_are_the_joined_documents_cut_without_overlap() {
    let dir = Folder::new();
    let source = dir.file("a.jsonl", "{\"text\": \"abcd\"}\n{\"text\": \"efg\"}\n{\"text\": \"hij\"}");
    let rows = |bos, eos| {
        let settings = recipe::Data { bos, eos, ..Default::default() };
        all_ids(&dir.eval(&source, &settings, 4).unwrap())
    };
    // 10 characters; with 3 EOS two rows of 5 and a remainder that is dropped.
    assert_eq!(rows(Join::Auto, Join::Auto), [vec![97, 98, 99, 100, EOS], vec![101, 102, 103, EOS, 104]]);
    assert_eq!(rows(Join::Never, Join::Never), [ids("abcde"), ids("fghij")]);
    assert_eq!(
        rows(Join::Always, Join::Always),
        [vec![BOS, 97, 98, 99, 100], vec![EOS, BOS, 101, 102, 103], vec![EOS, BOS, 104, 105, 106]]
    );
}

#[test]
fn auto_joins_follow_the_tokenizer() {
    let joins = |config: Value| {
        let joins = Tokenizer::open(model(config).path()).unwrap().joins(&recipe::Data::default()).unwrap();
        (joins.bos, joins.eos)
    };
    assert_eq!(joins(json!({"bos_token": "<s>", "eos_token": "</s>"})), (None, Some(EOS)));
    assert_eq!(joins(json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true})), (Some(BOS), None));
    let both = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true});
    assert_eq!(joins(both), (Some(BOS), Some(EOS)));
    // Without any configuration the tokenizer's own BOS is all there is.
    assert_eq!(joins(Value::Null), (Some(BOS), None));
    let settings = recipe::Data { eos: Join::Always, ..Default::default() };
    let unnamed = Tokenizer::open(model(Value::Null).path()).unwrap();
    refused(unnamed.joins(&settings), &["`data.eos` is `always`", "EOS"]);
}

#[test]
fn long_texts_are_packed_whole() {
    let dir = Folder::new();
    let text: String = (0..90_000).map(|i| format!("{i}é\n")).collect();
    let split = dir.eval(&dir.file("a.txt", &text), &recipe::Data::default(), 999).unwrap();
    let expected = ids(&text);
    assert_eq!(all_ids(&split).concat(), expected[..expected.len() / 1000 * 1000]);
    let bytes: usize = (0..split.len()).map(|i| split.text_bytes(i)).sum();
    // The first token of each row is no target; both bytes of `é` count at the first one.
    assert!(bytes.abs_diff(split.len() * 999) < split.len(), "{bytes}");
}

#[test]
fn bytes_of_text_are_counted_exactly() {
    let dir = Folder::new();
    let source = dir.file("a.jsonl", "{\"text\": \"aé b\"}\n{\"text\": \"  c\"}");
    let corpus = dir.prepare(&source, &recipe::Data::default(), 2).unwrap();
    // 5 + 3 bytes of text, one token each, and two EOS.
    assert_eq!((corpus.documents(), corpus.tokens()), (2, 10));
    assert_eq!(corpus.bytes_per_token(), 0.8);
}

#[test]
fn the_prompt_of_an_alpaca_row_is_masked() {
    let dir = Folder::new();
    let source = dir.file("a.jsonl", r#"{"instruction": "Say", "input": "", "output": "yes"}"#);
    let prompt = alpaca_prompt("Say", "");
    let count = 1 + prompt.len() + 3 + 1;
    let settings = recipe::Data::default();
    let split = dir.eval(&source, &settings, count - 1).unwrap();
    let sequence = split.sequence(0);
    assert_eq!(sequence.ids, [vec![BOS], ids(&prompt), ids("yes"), vec![EOS]].concat());
    let expected: Vec<bool> = (1..count).map(|i| i > prompt.len()).collect();
    assert_eq!(sequence.mask, Some(expected));
    assert_eq!(split.text_bytes(0), 3);

    let unmasked = recipe::Data { mask_prompt: false, ..settings.clone() };
    let sequence = dir.eval(&source, &unmasked, count - 1).unwrap().sequence(0);
    assert_eq!((sequence.ids.len(), sequence.mask), (count, None));

    // Rows of 20: those within a prompt have nothing to learn and are dropped.
    let line = fs::read_to_string(&source).unwrap();
    let split = dir.eval(&dir.file("b.jsonl", format!("{line}\n").repeat(5)), &settings, 19).unwrap();
    assert!((4..=10).contains(&split.len()), "{} of {}", split.len(), 5 * count / 20);
    assert!((0..split.len()).all(|i| split.sequence(i).mask.unwrap().contains(&true)));
}

#[test]
fn the_alpaca_prompt_is_the_original() {
    assert_eq!(
        alpaca_prompt("Name it.", ""),
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\nName it.\n\n### Response:\n"
    );
    assert_eq!(
        alpaca_prompt("Name it.", "A cat."),
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\nA cat.\n\n\
         ### Response:\n"
    );
}

// Splits.

/// 90 rows of 9 tokens, each beginning with another character.
fn rows_of_nine(dir: &Folder) -> String {
    let text: String = (b' '..b'z').map(|first| format!("{}--------", first as char)).collect();
    dir.file("rows.txt", &text)
}

#[test]
fn the_split_is_seeded_whole_and_disjoint() {
    let dir = Folder::new();
    let source = rows_of_nine(&dir);
    let settings = recipe::Data { validation: 0.2, ..Default::default() };
    let corpus = dir.prepare(&source, &settings, 8).unwrap();
    let (train, valid) = (corpus.train(8).unwrap(), corpus.valid(8).unwrap());
    assert_eq!((train.len(), valid.len()), (72, 18));
    let mut rows = [all_ids(&train), all_ids(&valid)].concat();
    rows.sort();
    assert_eq!(rows, all_ids(&dir.eval(&source, &settings, 8).unwrap()), "the rows themselves are in ascending order");

    let again = dir.prepare(&source, &settings, 8).unwrap();
    assert_eq!(again.digest(), corpus.digest());
    assert_eq!(all_ids(&again.valid(8).unwrap()), all_ids(&valid));
    let other = dir.prepare(&source, &recipe::Data { seed: Some(8), ..settings.clone() }, 8).unwrap();
    assert_ne!(other.digest(), corpus.digest());
    assert_ne!(all_ids(&other.valid(8).unwrap()), all_ids(&valid));

    // At least one validation row, never all.
    for (share, held_back) in [(0.0, 1), (1.0, 89)] {
        let settings = recipe::Data { validation: share, ..Default::default() };
        assert_eq!(dir.prepare(&source, &settings, 8).unwrap().valid(8).unwrap().len(), held_back);
    }
    assert_eq!(valid.clone().limit(50).len(), 6);
    assert_eq!(valid.limit(1).len(), 1);
}

#[test]
fn shorter_sequences_divide_rows_and_share_one_token() {
    let dir = Folder::new();
    let corpus = dir.prepare(&rows_of_nine(&dir), &recipe::Data::default(), 8).unwrap();
    let (rows, pieces) = (corpus.train(8).unwrap(), corpus.train(3).unwrap());
    assert_eq!(pieces.len(), 2 * rows.len());
    for i in 0..rows.len() {
        let row = rows.sequence(i).ids;
        assert_eq!(pieces.sequence(2 * i).ids, row[0..4]);
        assert_eq!(pieces.sequence(2 * i + 1).ids, row[3..7]);
    }
}

#[test]
fn batches_shift_targets_by_one() {
    let dir = Folder::new();
    let split = dir.eval(&dir.file("a.txt", "abcdefghij"), &recipe::Data::default(), 4).unwrap();
    let batch = split.batch(&[1, 0], &Device::Cpu).unwrap();
    assert_eq!(batch.inputs.to_vec2::<u32>().unwrap(), [ids("fghi"), ids("abcd")]);
    assert_eq!(batch.targets.to_vec2::<u32>().unwrap(), [ids("ghij"), ids("bcde")]);
    assert!(batch.mask.is_none());

    let source = dir.file("b.jsonl", r#"{"instruction": "Say", "output": "yes"}"#);
    let last = alpaca_prompt("Say", "").len() + 4;
    let split = dir.eval(&source, &recipe::Data::default(), last).unwrap();
    let mask = split.batch(&[0], &Device::Cpu).unwrap().mask.unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(mask[0].iter().sum::<f32>(), 4.0);
    assert_eq!(mask[0][last - 4..], [1.0; 4]);
}

#[test]
fn the_order_depends_on_seed_and_epoch_alone() {
    let dir = Folder::new();
    let corpus = dir.prepare(&rows_of_nine(&dir), &recipe::Data::default(), 8).unwrap();
    let split = corpus.train(8).unwrap();
    let order = split.order(1, 0);
    let mut sorted = order.clone();
    sorted.sort();
    assert_eq!(sorted, (0..split.len() as u32).collect::<Vec<_>>());
    assert_eq!(order, split.order(1, 0));
    assert_ne!(order, split.order(1, 1));
    assert_ne!(order, split.order(2, 0));

    // Drawing in steps is drawing at once, across epochs too.
    let whole = split.draw(1, 0, 300);
    assert_eq!(whole[..split.len()], order.iter().map(|i| *i as usize).collect::<Vec<_>>());
    let steps: Vec<usize> = (0..43).flat_map(|step| split.draw(1, step * 7, 7)).collect();
    assert_eq!(whole, steps[..300]);
}

// The cache.

#[test]
fn the_cache_is_reused_and_made_again_when_damaged() {
    let dir = Folder::new();
    let source = dir.file("a.txt", "abcdefghijklmnopqrstuvwxyz");
    let rows = |settings: &recipe::Data| all_ids(&dir.eval(&source, settings, 4).unwrap());
    let settings = recipe::Data::default();
    let expected = rows(&settings);
    let [cache] = dir.caches().try_into().unwrap();
    let written = fs::metadata(&cache).unwrap().modified().unwrap();
    assert_eq!(rows(&settings), expected);
    assert_eq!(fs::metadata(&cache).unwrap().modified().unwrap(), written, "made again without need");

    let good = fs::read(&cache).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut wrong_count = good.clone();
    wrong_count[80] ^= 1;
    for bad in [&good[..good.len() - 3], &good[..50], &[], &flipped, &wrong_count] {
        fs::write(&cache, bad).unwrap();
        assert_eq!(rows(&settings), expected);
        assert_eq!(fs::read(&cache).unwrap(), good);
    }

    // Other settings and other content are other caches; a row length is not.
    assert_ne!(rows(&recipe::Data { bos: Join::Always, ..settings.clone() }), expected);
    assert_eq!(dir.caches().len(), 2);
    dir.eval(&source, &settings, 6).unwrap();
    assert_eq!(dir.caches().len(), 2);
    dir.file("a.txt", "Abcdefghijklmnopqrstuvwxyz");
    assert_ne!(rows(&settings), expected);
    assert_eq!(dir.caches().len(), 3);
}

#[test]
fn a_failure_leaves_no_cache() {
    let dir = Folder::new();
    refused(dir.prepare(&dir.file("a.jsonl", "{\"text\": \"abc\"}\n{"), &recipe::Data::default(), 1), &["line 2"]);
    assert!(dir.caches().is_empty());
}

// The tokenizer.

#[test]
fn special_tokens_come_from_the_configuration() {
    let dir = model(Value::Null);
    let write = |name: &str, content: Value| fs::write(dir.path().join(name), content.to_string()).unwrap();
    write("config.json", json!({"bos_token_id": 256, "eos_token_id": [257, 10]}));
    write("generation_config.json", json!({"eos_token_id": 11}));
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(BOS), Some(EOS)));
    assert_eq!(tokenizer.stops(), [10, 11, EOS]);
    assert_eq!(tokenizer.vocab_size(), 258);
    assert_eq!(tokenizer.encode("hello").unwrap(), ids("hello"), "`truncation` of the file must not cut texts");
    assert_eq!(tokenizer.encode_prompt("hello").unwrap(), [vec![BOS], ids("hello")].concat());
    assert_eq!(tokenizer.decode(&[BOS, 104, 105, EOS]).unwrap(), "hi");

    write("special_tokens_map.json", json!({"eos_token": {"content": "<s>"}}));
    assert_eq!(Tokenizer::open(dir.path()).unwrap().eos(), Some(BOS));
    let without = model(json!({"bos_token": "<s>", "add_bos_token": false}));
    assert_eq!(Tokenizer::open(without.path()).unwrap().encode_prompt("a").unwrap(), ids("a"));
}

#[test]
fn a_tokenizer_that_cannot_be_used_says_why() {
    let dir = tempfile::tempdir().unwrap();
    refused(Tokenizer::open(dir.path()), &["has no `tokenizer.json`", "copy"]);
    fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    refused(Tokenizer::open(dir.path()), &["only `tokenizer.model`", "transformers"]);
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    refused(Tokenizer::open(dir.path()), &["tokenizer.json` is no tokenizer"]);
    let bad_config = model(json!({}));
    fs::write(bad_config.path().join("config.json"), "{").unwrap();
    refused(Tokenizer::open(bad_config.path()), &["config.json` is not JSON"]);
    let tokenizer = tokenizer();
    assert!(tokenizer.check_vocab(258).is_ok());
    refused(tokenizer.check_vocab(257), &["vocabulary mismatch", "257 (`</s>`)", "is 257"]);
}

#[test]
fn streams_emit_whole_characters_only() {
    let tokenizer = tokenizer();
    let mut stream = tokenizer.stream(&ids("so ")).unwrap();
    let pieces: Vec<String> = ids("aé€😀!").into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀", "!"]);
    assert_eq!(stream.push(EOS).unwrap(), "");
    // Bytes that are no character come out as replacement characters, and the stream goes on.
    let invalid: String = [0xe2, 0x28, 0xff, 0x61].map(|id| stream.push(id).unwrap()).concat();
    assert_eq!(invalid, "\u{fffd}(\u{fffd}a");
    assert_eq!(stream.push(0xe2).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    let mut stream = tokenizer.stream(&[]).unwrap();
    let endless: String = (0..40).map(|_| stream.push(0xff).unwrap()).collect();
    assert_eq!(endless.chars().count(), 32, "held back for a while, not for ever");
}

#[test]
fn recall_files_are_read() {
    let dir = Folder::new();
    let good = r#"{"pairs": 4, "prompt": "a -> b\na ->", "answer": " b", "stop": "\n"}"#;
    let items = read_recall(Path::new(&dir.file("r.jsonl", format!("{good}\n\n{good}\n")))).unwrap();
    assert_eq!((items.len(), items[1].pairs, items[1].answer.as_str(), items[1].stop.as_str()), (2, 4, " b", "\n"));
    let bad = dir.file("s.jsonl", format!("{good}\n{{\"pairs\": 4}}"));
    refused(read_recall(Path::new(&bad)), &["s.jsonl` line 2", "missing field `prompt`"]);
    refused(read_recall(Path::new(&dir.file("t.jsonl", ""))), &["t.jsonl` holds no recall prompt"]);
}

// Real tokenizers, where they are there.

fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new("../shared/data").join(path);
    path.exists().then_some(path).or_else(|| {
        println!("skipped: ../shared/data is absent");
        None
    })
}

#[test]
fn real_tokenizers_go_there_and_back() {
    let cases = [
        ("models/stories260k", Some(1), Some(2), 512),
        ("models/scribe-11m", Some(0), Some(1), 4096),
        ("tokenizers/sp-bpe-32k", Some(1), Some(32000), 32002),
    ];
    for (name, bos, eos, size) in cases {
        let Some(dir) = shared(name) else { return };
        let tokenizer = Tokenizer::open(&dir).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (bos, eos, size), "{name}");
        assert!(tokenizer.check_vocab(size).is_ok());
        let text = "Once upon a time, 12 cafés\n\tsold “tea” 😀.";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text, "{name}");
        // A stream that continues a prompt keeps the space that begins its first token.
        let (prompt, all) = (tokenizer.encode("Once upon").unwrap(), tokenizer.encode(text).unwrap());
        let mut stream = tokenizer.stream(&prompt).unwrap();
        let mut rest: String = all[prompt.len()..].iter().map(|id| stream.push(*id).unwrap()).collect();
        rest += &stream.finish().unwrap();
        assert_eq!(format!("Once upon{rest}"), text, "{name}");
    }
}

#[test]
fn prompts_of_the_story_model_match_its_reference() {
    let Some(dir) = shared("models/stories260k") else { return };
    let tokenizer = Tokenizer::open(&dir).unwrap();
    let reference: Value = serde_json::from_slice(&fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let expected: Vec<u32> = serde_json::from_value(reference["input_ids"].clone()).unwrap();
    assert_eq!(tokenizer.encode_prompt("Once upon a time").unwrap(), expected);
    let expected: Vec<u32> = serde_json::from_value(reference["eval_ids"].clone()).unwrap();
    assert_eq!(tokenizer.encode_prompt(reference["eval_text"].as_str().unwrap()).unwrap(), expected);
    let joins = tokenizer.joins(&recipe::Data::default()).unwrap();
    assert_eq!((joins.bos, joins.eos), (Some(1), None));
}

#[test]
fn sentencepiece_streams_survive_invalid_bytes() {
    let Some(dir) = shared("tokenizers/sp-bpe-32k") else { return };
    let tokenizer = Tokenizer::open(&dir).unwrap();
    // Byte tokens start at id 3: é, then the first byte of a character that never ends, then a word.
    let mut stream = tokenizer.stream(&[]).unwrap();
    let mut text: String = [0xc3, 0xa9, 0xe2].map(|byte| stream.push(3 + byte).unwrap()).concat();
    text.extend(tokenizer.encode("word").unwrap().iter().map(|id| stream.push(*id).unwrap()));
    assert_eq!(text, "é\u{fffd} word");
}

#[test]
fn the_validation_file_of_the_recall_model_packs_by_its_protocol() {
    let (Some(dir), Some(source)) = (shared("models/scribe-11m"), shared("text/scribe-11m/valid.jsonl")) else {
        return;
    };
    let (tokenizer, cache) = (Tokenizer::open(&dir).unwrap(), tempfile::tempdir().unwrap());
    let sources = [source.to_str().unwrap().to_string()];
    let rows = |settings: &recipe::Data| {
        all_ids(&eval_rows(&sources, settings, &tokenizer, 1024, cache.path(), &Silent).unwrap())
    };
    let protocol = recipe::Data { bos: Join::Never, eos: Join::Always, ..Default::default() };
    let packed = rows(&protocol);
    assert!(packed.len() >= 100, "{}", packed.len());
    assert_eq!(packed, rows(&recipe::Data::default()), "`auto` finds the same");
    let mut expected = Vec::new();
    for (_, text) in texts(&sources[0], &protocol).unwrap().iter().take(20) {
        expected.extend(tokenizer.encode(text).unwrap());
        expected.push(1);
    }
    assert_eq!(packed.concat()[..expected.len()], expected);
}
