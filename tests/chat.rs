//! Chat templates against what transformers makes of them, and conversations as training data.

#[path = "common/byte_tokenizer.rs"]
mod byte_tokenizer;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use byte_tokenizer::{BOS, EOS, byte_tokenizer};
use margay::data::sources::{Content, documents, resolve};
use margay::data::{Chat, ChatTemplate, Split, Tokenizer, eval_rows};
use margay::error::Error;
use margay::progress::Silent;
use margay::recipe::{self, Format, Join};
use serde_json::{Value, json};
use tempfile::TempDir;

const FIXTURES: &str = "fixtures/chat";

/// A model folder with a byte tokenizer and these files.
fn model(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#).unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::open(model(&[("chat_template.jinja", source)]).path()).unwrap().unwrap()
}

fn fixture(name: &str) -> String {
    fs::read_to_string(Path::new(FIXTURES).join(name).with_extension("jinja")).unwrap()
}

fn chat(messages: &[(&str, &str)]) -> Chat {
    let mut chat = Chat::default();
    messages.iter().for_each(|(role, content)| chat.push(role, content));
    chat
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, parts: &[&str]) {
    let Err(error) = result else { panic!("was not refused") };
    let text = format!("{error}\n{}", error.hint.clone().unwrap_or_default());
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// Every template of a folder over every conversation of its `golden.json` (`fixtures/chat.py`); how many agreed.
fn check(folder: &Path) -> usize {
    let golden: Value = serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let (mut agreed, mut wrong) = (0, Vec::new());
    for (name, renders) in golden["renders"].as_object().unwrap() {
        let source = fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let tokens = golden["tokens"].to_string();
        let dir = model(&[("chat_template.jinja", &source), ("tokenizer_config.json", &tokens)]);
        let template = ChatTemplate::open(dir.path()).unwrap().unwrap();
        for (of, texts) in renders.as_object().unwrap() {
            let Value::Object(row) = &golden["chats"][of] else { panic!("no chat `{of}`") };
            let chat = Chat { messages: row["messages"].as_array().unwrap().clone(), tools: row["tools"].clone() };
            for (prompt, wanted) in [false, true].into_iter().zip(texts.as_array().unwrap()) {
                let given = template.render(&chat, prompt);
                match (given, wanted.as_str()) {
                    (Ok(given), Some(wanted)) if given == wanted => agreed += 1,
                    (Err(_), None) => agreed += 1,
                    (given, wanted) => wrong.push(format!("{name}, {of}: {given:?}\n  wanted {wanted:?}")),
                }
            }
            if let Some(spans) = golden["answers"][name][of].as_array() {
                let answers = template.conversation(&chat).unwrap().answers;
                assert_eq!(json!(answers.iter().map(|a| [a.start, a.end]).collect::<Vec<_>>()), json!(spans), "{of}");
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ, {agreed} agree\n{}", wrong.len(), wrong.join("\n"));
    agreed
}

#[test]
fn templates_render_as_transformers_renders_them() {
    assert_eq!(check(Path::new(FIXTURES)), 6 * 9 * 2);
}

/// Templates of published models, which are not ours to ship.
#[test]
fn published_templates_render_as_transformers_renders_them() {
    let folder = Path::new("../shared/data/chat-templates");
    match folder.exists() {
        true => assert!(check(folder) > 100),
        false => println!("skipped: ../shared/data/chat-templates is absent"),
    }
}

#[test]
fn a_template_is_found_where_transformers_finds_it() {
    let open = |files: &[(&str, &str)]| ChatTemplate::open(model(files).path()).unwrap();
    let said = |files: &[(&str, &str)]| open(files).unwrap().render(&chat(&[("user", "x")]), false).unwrap();
    let (jinja, json) = (("chat_template.jinja", "a\n"), ("chat_template.json", r#"{"chat_template": "c"}"#));
    let config = ("tokenizer_config.json", r#"{"chat_template": "b{{ eos_token }}", "eos_token": {"content": "!"}}"#);
    assert_eq!(said(&[jinja, config, json]), "a");
    assert_eq!(said(&[config, json]), "b!");
    assert_eq!(said(&[json]), "c");
    assert!(open(&[]).is_none());

    let named = json!({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]});
    assert_eq!(said(&[("tokenizer_config.json", &named.to_string())]), "d");
    let named = json!({"chat_template": [{"name": "rag", "template": "r"}]}).to_string();
    let rag = open(&[("tokenizer_config.json", &named)]).unwrap();
    refused(
        rag.render(&Chat::default(), false),
        &["tokenizer_config.json`", "none of its templates is named `default`"],
    );
}

#[test]
fn a_template_says_what_it_refuses() {
    // One that is broken does not keep its model from anything else.
    let broken = model(&[("chat_template.jinja", "{% for %}")]);
    assert!(Tokenizer::open(broken.path()).is_ok());
    refused(
        ChatTemplate::open(broken.path()).unwrap().unwrap().render(&Chat::default(), true),
        &["chat_template.jinja`"],
    );
    refused(template(&fixture("model")).render(&chat(&[("system", "x")]), true), &["No system role"]);
    refused(template("{{ strftime_now('%Q') }}").render(&Chat::default(), true), &["`%Q` is no date format"]);
}

/// What the assistant wrote, by turns.
fn answers(name: &str, messages: &[(&str, &str)]) -> Result<Vec<String>, Error> {
    let rendered = template(&fixture(name)).conversation(&chat(messages))?;
    Ok(rendered.answers.iter().map(|range| rendered.text[range.clone()].to_string()).collect())
}

#[test]
fn the_turns_of_the_assistant_are_found() {
    let turns = [("user", "Hello."), ("assistant", " Hello. "), ("user", "Hello."), ("assistant", "Hello.\nBye")];
    let found = |name| answers(name, &turns).unwrap();
    assert_eq!(found("headers"), ["Hello.<|end|>", "Hello.\nBye<|end|>"]);
    assert_eq!(found("brackets"), [" Hello. </s>", "Hello.\nBye</s>"]);
    assert_eq!(found("model"), ["Hello.<end>\n", "Hello.\nBye<end>\n"]);
    assert_eq!(found("generation"), ["Hello.</s>", "Hello.\nBye</s>"]);
    // EOS ends the text, not the turn.
    assert_eq!(found("ends"), [" Hello. <|end|>\n", "Hello.\nBye<|end|>\n</s>"]);
    // The last turn alone has a thought, so that no earlier one is how its own conversation ends.
    assert_eq!(found("thoughts"), [" Hello. <|out|>\n", "<think>\n\n</think>\n\nHello.\nBye<|out|>\n"]);
    assert_eq!(answers("headers", &turns[..1]).unwrap(), [""; 0]);

    // The system message goes to the question that ends the text, where there is one.
    let wandering = [&[("system", "Be brief.")], &turns[..]].concat();
    refused(
        answers("brackets", &wandering),
        &["message 3 cannot be told", "{% generation %}", "data.mask_prompt=false"],
    );
}

// Training data.

/// The rows of one file under the template `brackets`.
fn rows(name: &str, content: &[u8], settings: &recipe::Data, len: usize) -> Result<Split, Error> {
    let dir = model(&[("chat_template.jinja", &fixture("brackets"))]);
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    eval_rows(&[path.to_str().unwrap().into()], settings, &tokenizer, len, &dir.path().join("cache"), &Silent)
}

/// Ids of a text in which `<s>` and `</s>` are tokens of their own.
fn ids(text: &str) -> Vec<u32> {
    let text = text.replace("</s>", "\u{2}").replace("<s>", "\u{1}");
    text.bytes().map(|b| [u32::from(b), BOS, EOS][if b < 3 { b as usize } else { 0 }]).collect()
}

const OPENAI: &str = r#"{"messages": [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Yé."},
    {"role": "user", "content": "So"}, {"role": "assistant", "content": "No", "weight": null}]}"#;
const TEXT: &str = "<s>[INST]Hé?[/INST]Yé.</s>[INST]So[/INST]No</s>";

#[test]
fn the_loss_counts_what_the_assistant_wrote() {
    let settings = recipe::Data::default();
    let wanted = ids(TEXT);
    let len = wanted.len() - 1;
    let openai = OPENAI.replace('\n', " ");
    let sequence = rows("a.jsonl", openai.as_bytes(), &settings, len).unwrap().sequence(0);
    assert_eq!(sequence.ids, wanted);
    let learned: Vec<u32> = sequence.mask.unwrap().iter().zip(&wanted[1..]).filter(|m| *m.0).map(|m| *m.1).collect();
    assert_eq!(learned, ids("Yé.</s>No</s>"));
    assert_eq!(rows("a.jsonl", openai.as_bytes(), &settings, len).unwrap().text_bytes(0), "Yé.</s>No</s>".len());

    let all = recipe::Data { mask_prompt: false, ..settings.clone() };
    let sequence = rows("a.jsonl", openai.as_bytes(), &all, len).unwrap().sequence(0);
    assert_eq!((sequence.ids, sequence.mask), (wanted.clone(), None));

    let joined = recipe::Data { eos: Join::Always, ..settings };
    let sequence = rows("a.jsonl", openai.as_bytes(), &joined, len + 1).unwrap().sequence(0);
    assert_eq!(sequence.ids, [wanted, vec![EOS]].concat());
}

#[test]
fn conversations_are_read_however_they_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str, content: &str, settings: &recipe::Data| {
        let path = dir.path().join(name);
        if !content.is_empty() {
            fs::write(&path, content).unwrap();
        }
        let files = resolve(&[path.to_str().unwrap().into()], &Silent)?;
        documents(&files, settings).map(|d| d.map(|d| d.content)).collect::<Result<Vec<_>, _>>()
    };
    let auto = recipe::Data::default();
    let named = recipe::Data { format: Format::Chat, field: "talk".into(), ..auto.clone() };
    let both = vec![Content::Chat(chat(&[("user", "a"), ("assistant", "b")]))];
    let openai =
        r#"{"text": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let sharegpt = r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#;
    assert_eq!(read("a.jsonl", openai, &auto).unwrap(), both);
    assert_eq!(read("b.json", &format!("[{sharegpt}]"), &auto).unwrap(), both);
    assert_eq!(read("c.jsonl", &openai.replace("messages", "talk"), &named).unwrap(), both);
    assert_eq!(read("d.jsonl", &openai.replace("[{", "[], \"old\": [{"), &auto).unwrap(), []);
    let text = recipe::Data { format: Format::Text, ..auto.clone() };
    assert_eq!(read("e.jsonl", openai, &text).unwrap(), [Content::Text("x".into())]);
    let with_tools = openai.replace("\"text\": \"x\"", "\"tools\": [{\"type\": \"function\"}]");
    let Content::Chat(offered) = &read("f.jsonl", &with_tools, &auto).unwrap()[0] else { panic!("no chat") };
    assert_eq!(offered.tools, json!([{"type": "function"}]));
    nested_parquet(&dir.path().join("g.parquet"));
    assert_eq!(read("g.parquet", "", &auto).unwrap(), both);

    let wrong = |name: &str, content: &str, parts: &[&str]| refused(read(name, content, &named), parts);
    wrong("h.txt", "a", &["plain text, but `data.format` is `chat`"]);
    wrong("i.jsonl", r#"{"text": "a"}"#, &["line 1 has no field `messages`", "`text`"]);
    wrong("j.jsonl", r#"{"messages": "a"}"#, &["line 1: `messages` is a string, not a list of messages"]);
    wrong(
        "k.jsonl",
        r#"{"messages": [{"content": "a"}]}"#,
        &["line 1: `messages` has no `role` (or `from`) in message 1"],
    );
    wrong("l.jsonl", r#"{"messages": ["a"]}"#, &["line 1: `messages` has a string as message 1"]);
}

/// One row with `messages` of a user's `a` and an assistant's `b`.
fn nested_parquet(path: &Path) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let schema = "message rows { optional group messages (LIST) { repeated group list { optional group element {
        optional binary content (UTF8); optional binary role (UTF8); } } } }";
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap();
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for values in [["a", "b"], ["user", "assistant"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let bytes = values.map(ByteArray::from);
        // Every value is there (level 4), the second goes on with the list of the first (level 1).
        column.typed::<ByteArrayType>().write_batch(&bytes, Some(&[4, 4]), Some(&[0, 1])).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn what_cannot_be_rendered_names_its_row() {
    let settings = recipe::Data::default();
    let twice = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}"#;
    let lines = format!("{}\n{twice}", OPENAI.replace('\n', " "));
    refused(rows("a.jsonl", lines.as_bytes(), &settings, 8), &["a.jsonl` line 2:", "Turns must alternate"]);

    let dir = model(&[("a.jsonl", &lines)]);
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    let source = dir.path().join("a.jsonl").to_str().unwrap().to_string();
    let result = eval_rows(&[source], &settings, &tokenizer, 8, &dir.path().join("cache"), &Silent);
    refused(result, &["a.jsonl` line 1:", "no chat template", "chat_template.jinja", "data.format=text"]);
}
