//! Every shipped recipe, and what happens to a recipe that is wrong.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use margay::error::Kind;
use margay::families::{Architecture, Layer};
use margay::recipe::{self, By, Format, Layers, Loaded, Mixer, Recipe, Schedule, Stage};
use serde_json::Value;

fn load(name: &str, sets: &[&str]) -> Loaded {
    try_load(name, sets).unwrap_or_else(|e| panic!("{e}"))
}

fn try_load(name: &str, sets: &[&str]) -> margay::Result<Loaded> {
    Recipe::load(name, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>())
}

/// The message and hint of a refused recipe, with the folder of `file` cut off.
fn refused(file: &Path, sets: &[&str]) -> String {
    let error = try_load(file.to_str().unwrap(), sets).unwrap_err();
    assert_eq!(error.kind, Kind::Recipe, "{error}");
    let folder = format!("{}/", file.parent().unwrap().display());
    format!("{error}\nhint: {}", error.hint.as_deref().unwrap_or("-")).replace(&folder, "")
}

/// Files of one folder that is gone after the test.
fn files(list: &[(&str, &str)]) -> (tempfile::TempDir, impl Fn(&str) -> PathBuf + use<>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in list {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let root = folder.path().to_path_buf();
    (folder, move |name| root.join(name))
}

/// A model of so many layers.
fn of(layers: usize) -> Architecture {
    Architecture { layers, ..Architecture::default() }
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|e| e == "toml") {
            found.push(path);
        }
    }
}

/// Every recipe in the folder, by name and path; all of them are in the program.
fn shipped() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut paths = Vec::new();
    walk(&root, &mut paths);
    let name = |p: &Path| p.strip_prefix(&root).unwrap().with_extension("").to_str().unwrap().replace('\\', "/");
    let mut found: Vec<_> = paths.into_iter().map(|p| (name(&p), p)).collect();
    found.sort();
    let embedded: Vec<String> = recipe::list().into_iter().map(|s| s.name).collect();
    assert!(found.iter().map(|(name, _)| name).eq(&embedded), "rebuild: the program carries {embedded:?}");
    found
}

#[test]
fn the_promised_recipes_are_shipped() {
    let names: BTreeSet<String> = shipped().into_iter().map(|(name, _)| name).collect();
    for name in [
        "llama/lolcats",
        "llama/radlads",
        "llama/3.2-1b-lolcats",
        "llama/3.1-8b-lolcats",
        "llama/hedgehog",
        "llama/t2r",
        "mistral/7b-lolcats",
        "tiny/lolcats",
    ] {
        assert!(names.contains(name), "{name}");
    }
}

#[test]
fn every_shipped_recipe_loads_and_comes_back_from_its_own_toml() {
    for (name, path) in shipped() {
        let loaded = load(&name, &[]);
        assert!(!loaded.recipe.about.is_empty(), "{name}");
        assert_eq!(recipe::shipped(&name).unwrap().text, std::fs::read_to_string(&path).unwrap(), "rebuild");
        assert_eq!(load(path.to_str().unwrap(), &[]).recipe, loaded.recipe, "{name}");

        let (_folder, at) = files(&[("shown.toml", &loaded.text)]);
        let again = load(at("shown.toml").to_str().unwrap(), &[]);
        assert_eq!(again.recipe, loaded.recipe, "{name}\n{}", loaded.text);
        assert_eq!(again.text, loaded.text, "{name}");
    }
}

#[test]
fn every_shipped_recipe_begins_with_what_it_makes_and_its_command() {
    for (name, path) in shipped() {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines();
        assert!(lines.next().is_some_and(|l| l.starts_with("# ")), "{name}");
        let command = lines.next().unwrap();
        assert!(command.starts_with("# margay convert ") && command.contains(&format!("--recipe {name} ")), "{name}");
        if let Some(repo) = load(&name, &[]).recipe.base.repo {
            assert!(command.contains(&repo), "{name}");
        }
    }
}

/// Whether `json` is what `schema` says: the part of JSON Schema that ours uses, written apart from the program's.
fn fits(root: &Value, schema: &Value, json: &Value) -> bool {
    if let Some(target) = schema["$ref"].as_str() {
        return fits(root, root.pointer(target.trim_start_matches('#')).unwrap(), json);
    }
    let is = |kind: &Value| match kind.as_str() {
        Some("object") => json.is_object(),
        Some("array") => json.is_array(),
        Some("string") => json.is_string(),
        Some("integer") => json.is_u64() || json.is_i64(),
        Some("number") => json.is_number(),
        Some("boolean") => json.is_boolean(),
        Some("null") => json.is_null(),
        _ => panic!("{kind}"),
    };
    let one = |key: &str, holds: &dyn Fn(&Value) -> bool| schema.get(key).is_none_or(holds);
    let count = |list: &Value| list.as_array().unwrap().iter().filter(|option| fits(root, option, json)).count();
    let below = |a: &Value, b: &Value, strict: bool| match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a < b || !strict && a == b,
        _ => true,
    };
    one("oneOf", &|list| count(list) == 1)
        && one("anyOf", &|list| count(list) > 0)
        && one("type", &|kind| kind.as_array().map_or_else(|| is(kind), |kinds| kinds.iter().any(is)))
        && one("const", &|word| word == json)
        && one("enum", &|words| words.as_array().unwrap().contains(json))
        && one("minimum", &|limit| below(limit, json, false))
        && one("maximum", &|limit| below(json, limit, false))
        && one("exclusiveMinimum", &|limit| below(limit, json, true))
        && one("exclusiveMaximum", &|limit| below(json, limit, true))
        && one("items", &|item| json.as_array().is_none_or(|list| list.iter().all(|v| fits(root, item, v))))
        && one("required", &|keys| keys.as_array().unwrap().iter().all(|key| json.get(key.as_str().unwrap()).is_some()))
        && json.as_object().is_none_or(|map| {
            map.iter().all(|(key, value)| match schema["properties"].get(key) {
                Some(property) => fits(root, property, value),
                None => match schema.get("additionalProperties") {
                    Some(Value::Bool(any)) => *any,
                    Some(each) => fits(root, each, value),
                    None => true,
                },
            })
        })
}

#[test]
fn the_schema_fits_every_shipped_recipe_as_written_and_as_shown() {
    let schema = recipe::schema();
    for (name, path) in shipped() {
        for text in [std::fs::read_to_string(path).unwrap(), load(&name, &[]).text] {
            let mut json = serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
            assert!(fits(&schema, &schema, &json), "{name}\n{text}");
            json["stage"]["align"] = serde_json::json!({ "batch": 8 });
            assert!(fits(&schema, &schema, &json), "{name}: a stage of any name");
            json["stage"]["align"]["batch"] = 0.into();
            assert!(!fits(&schema, &schema, &json), "{name}");
        }
    }
}

#[test]
fn the_schema_describes_every_key() {
    fn walk(root: &Value, schema: &Value, path: &str) {
        let options = ["oneOf", "anyOf"].iter().filter_map(|k| schema[*k].as_array()).flatten();
        options.for_each(|option| walk(root, option, path));
        if let Some(each) = schema.get("additionalProperties").filter(|each| each.is_object()) {
            walk(root, each["$ref"].as_str().map_or(each, |r| root.pointer(&r[1..]).unwrap()), path);
        }
        for (key, property) in schema["properties"].as_object().into_iter().flatten() {
            let target = property["$ref"].as_str().map_or(property, |r| root.pointer(&r[1..]).unwrap());
            let described = key == "kind" || [property, target].iter().any(|s| s["description"].is_string());
            assert!(described, "{path}.{key} has no description");
            walk(root, target, &format!("{path}.{key}"));
        }
    }
    let schema = recipe::schema();
    walk(&schema, &schema, "");
}

#[test]
fn all_problems_are_reported_at_once_with_file_line_and_column() {
    let (_folder, at) = files(&[(
        "mine.toml",
        r#"extends = "llama/lolcats"
about = 3
lr = 0.1
layers = { kept = [0] }
stages = ["transfer", "recover", "align", "tune", "plan", "Tune", "tune"]

[recover]
lr = 1

[stage.transfer]
tokens = "many"
bacth = 8
seq_len = 0
lr = -1
epochs = 1979-05-27
micro_batch = 9
schedule = { kind = "cosin", floor = 2 }

[stage.recover]
tokens = 1.5
schedule = { kind = "cosine", floor = 2 }
lora = { dropout = 1.0, targets = ["q_proj", "query", 3] }
loss = { output_mse = 1, nexttoken = 1 }
train = ["mixers"]
kl = { direction = "both", temperature = 0 }

[stage.plan]
loss = { next_token = 1 }

[stage.Tune]
loss = { next_token = 1 }

[stage.tune]
train = []
schedule = { kind = "wsd", decay = 0.95 }
data = { sources = 3 }

[stage.unused]
train = []

[mixer]
kind = "lolcat"

[data]
validation = 1
format = "alpca"
sources = "a.txt"
field = ""

[export]
max_shard_size = "5 gigs"

[verify]
contexts = [0, 8]

[verfy]
"#,
    )]);
    insta::assert_snapshot!(refused(&at("mine.toml"), &["stage.recover.bach=4", "transfer.tokens=3", "seed=x", "nothing", "verify.tokens=nan"]), @r##"
    recipe `mine.toml` has 42 problems:
      mine.toml:2:9: `about` must be a string, found `3`
      mine.toml:3:1: unknown key `lr`; did you mean `stage.<name>.lr`?
      mine.toml:4:12: unknown key `layers.kept`; did you mean `layers.keep`?
      mine.toml:5:10: stage `Tune` of `stages` is no name; use small letters, digits, `_` and `-`
      mine.toml:5:10: stage `align` of `stages` has no table `[stage.align]`; tables there are: Tune, plan, recover, transfer, tune, unused
      mine.toml:5:10: stage `plan` of `stages` means something else; choose another name
      mine.toml:5:10: stage `tune` of `stages` comes twice; let it be two tables of two names
      mine.toml:7:2: unknown key `recover`; did you mean `stage.recover`?
      mine.toml:11:10: `stage.transfer.tokens` must be an integer, found the string `"many"`
      mine.toml:12:1: unknown key `stage.transfer.bacth`; did you mean `stage.transfer.batch`?
      mine.toml:13:11: `stage.transfer.seq_len` must be at least 2, found `0`
      mine.toml:14:6: `stage.transfer.lr` must be at least 0, found `-1`
      mine.toml:15:10: `stage.transfer.epochs` must be a number, found a date
      mine.toml:16:15: `stage.transfer.micro_batch` must be at most `batch`
      mine.toml:17:21: `stage.transfer.schedule.kind` cannot be `cosin`; did you mean `cosine`? known: constant, linear, cosine, wsd, plateau
      mine.toml:20:10: `stage.recover.tokens` must be an integer, found `1.5`
      mine.toml:21:39: `stage.recover.schedule.floor` must be at most 1, found `2`
      mine.toml:22:20: `stage.recover.lora.dropout` must be below 1, found `1.0`
      mine.toml:22:46: `stage.recover.lora.targets[1]` cannot be `query`; known: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
      mine.toml:22:55: `stage.recover.lora.targets[2]` must be one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, found `3`
      mine.toml:23:8: `stage.recover.loss` mixes losses of single layers (`output_mse`, `attention_ce`, `hidden_mse`, `hidden_l2`) with losses of the whole model (`logit_kl`, `next_token`); make two stages of them
      mine.toml:23:26: unknown key `stage.recover.loss.nexttoken`; did you mean `stage.recover.loss.next_token`?
      mine.toml:24:10: `stage.recover.train[0]` cannot be `mixers`; did you mean `mixer`? known: mixer, lora, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens, norm, lm_head, input_layernorm, post_attention_layernorm, q_norm, k_norm, post_feedforward_layernorm, pre_feedforward_layernorm, embed_in, final_layer_norm, embed_out, wte, wpe, ln_f, ln_1, ln_2
      mine.toml:25:20: `stage.recover.kl.direction` cannot be `both`; known: forward, reverse
      mine.toml:25:42: `stage.recover.kl.temperature` must be above 0, found `0`
      mine.toml:33:1: `stage.tune.loss` has no weight above 0, so there is nothing to learn; `tokens = 0` skips the stage
      mine.toml:34:9: `stage.tune.train` names nothing; `tokens = 0` skips the stage
      mine.toml:35:12: `stage.tune.schedule` warms up and decays over 1.05 of the steps, more than all
      mine.toml:36:20: `stage.tune.data.sources` must be a list, each item a string, found `3`
      mine.toml:42:8: `mixer.kind` cannot be `lolcat`; did you mean `lolcats`? known: lolcats, lizard, lizard-paper, lawcat, gla, hgrn2, gsa, delta, mamba2, mala, rala
      mine.toml:45:14: `data.validation` must be below 1, found `1`
      mine.toml:46:10: `data.format` cannot be `alpca`; did you mean `alpaca`? known: text, alpaca, auto, chat
      mine.toml:47:11: `data.sources` must be a list, each item a string, found the string `"a.txt"`
      mine.toml:48:9: `data.field` must be a name, found an empty string
      mine.toml:51:18: `export.max_shard_size` must be a size such as `5GB` or `500MB`, found `5 gigs`
      mine.toml:54:13: `verify.contexts[0]` must be at least 1, found `0`
      mine.toml:56:2: unknown key `verfy`; did you mean `verify`?
      --set nothing: `nothing` is not `key=value`, such as `stage.transfer.tokens=20000`
      --set seed: `seed` must be an integer, found the string `"x"`
      --set stage.recover.bach: unknown key `stage.recover.bach`; did you mean `stage.recover.batch`?
      --set transfer.tokens: unknown key `transfer`; did you mean `stage.transfer`?
      --set verify.tokens: `verify.tokens` must be an integer, found a number that is not finite
    hint: `margay recipe schema` describes every key; `margay recipe show llama/lolcats` shows them in use
    "##);
}

#[test]
fn a_syntax_error_has_its_line_and_column() {
    let (_folder, at) = files(&[("mine.toml", "about = \"x\"\n[stage.transfer]\nlr = = 3\nseed = 1\nseed = 2\n")]);
    insta::assert_snapshot!(refused(&at("mine.toml"), &[]), @r##"
    recipe `mine.toml` has 3 problems:
      mine.toml:3:6: not TOML: extra `=`, expected nothing
      mine.toml:3:8: not TOML: unexpected key or value, expected newline, `#`
      mine.toml:5:1: not TOML: duplicate key
    hint: `margay recipe schema` describes every key; `margay recipe show llama/lolcats` shows them in use
    "##);
}

#[test]
fn an_unknown_recipe_names_the_closest_or_all() {
    let hint = |name: &str| try_load(name, &[]).unwrap_err().hint.unwrap();
    assert_eq!(hint("llama/lolcat"), "did you mean `llama/lolcats`?");
    assert!(hint("zebra").contains("llama/3.2-1b-lolcats, "));
    assert_eq!(try_load("missing/mine.toml", &[]).unwrap_err().kind, Kind::Io);
}

#[test]
fn extends_merges_tables_key_by_key_through_files_and_shipped_recipes() {
    let (_folder, at) = files(&[
        ("base.toml", "extends = \"llama/lolcats\"\n[stage.transfer]\nlr = 0.5\n[mixer]\nwindow = 16\n"),
        ("sub/mine.toml", "extends = \"../base.toml\"\nabout = \"mine\"\n[stage.transfer]\nbatch = 4\n"),
    ]);
    let (mine, parent) = (load(at("sub/mine.toml").to_str().unwrap(), &[]).recipe, load("llama/lolcats", &[]).recipe);
    let transfer = &mine.stage["transfer"];
    assert_eq!((mine.about.as_str(), transfer.lr, transfer.batch), ("mine", 0.5, 4));
    assert_eq!(transfer.epochs, parent.stage["transfer"].epochs);
    assert_eq!(mine.stage["recover"], parent.stage["recover"]);
    let Mixer::Lolcats(config) = &mine.mixer else { panic!("{:?}", mine.mixer) };
    assert_eq!(config.window, 16);
}

#[test]
fn a_table_of_another_kind_replaces_its_parent_whole() {
    let (_folder, at) = files(&[
        ("base.toml", "[stage.transfer.schedule]\nkind = \"plateau\"\npatience = 3\nwarmup = 0.1\n"),
        ("same.toml", "extends = \"base.toml\"\n[stage.transfer.schedule]\npatience = 4\n"),
        ("other.toml", "extends = \"base.toml\"\n[stage.transfer.schedule]\nkind = \"cosine\"\nfloor = 0.2\n"),
    ]);
    let schedule = |name: &str| load(at(name).to_str().unwrap(), &[]).recipe.stage["transfer"].schedule.clone();
    assert_eq!(schedule("same.toml"), Schedule::Plateau { factor: 0.1, patience: 4, min_lr: 1e-5, warmup: 0.1 });
    assert_eq!(schedule("other.toml"), Schedule::Cosine { warmup: 0.0, floor: 0.2 });
}

#[test]
fn circles_and_broken_parents_are_refused() {
    let (_folder, at) = files(&[
        ("a.toml", "extends = \"b.toml\"\n"),
        ("b.toml", "\nextends = \"./a.toml\"\n"),
        ("self.toml", "extends = \"self.toml\"\n"),
        ("typo.toml", "extends = \"llama/lolcat\"\n"),
        ("gone.toml", "extends = \"gone/base.toml\"\n"),
        ("list.toml", "extends = [\"llama/lolcats\"]\n"),
    ]);
    let first = |name: &str| refused(&at(name), &[]).lines().next().unwrap().to_string();
    let circle = "b.toml:2:11: recipes extend each other in a circle: `a.toml` extends `b.toml` extends `./a.toml`";
    assert_eq!(first("a.toml"), circle);
    assert!(first("self.toml").contains("`self.toml` extends `self.toml`"));
    assert_eq!(first("typo.toml"), "typo.toml:1:11: there is no recipe `llama/lolcat`");
    assert!(refused(&at("typo.toml"), &[]).contains("did you mean `llama/lolcats`?"));
    assert!(first("gone.toml").starts_with("gone.toml:1:11: cannot read the recipe `gone/base.toml`"));
    assert!(refused(&at("list.toml"), &[]).contains("list.toml:1:11: `extends` must be a string"));
}

#[test]
fn set_changes_any_key_last() {
    let sets = [
        "stage.transfer.tokens=2e4",
        "stage.recover.tokens = 30_000",
        "layers={keep=[0, 3]}",
        "mixer.window=16",
        "mixer.window_kind=terraced",
        "stage.recover.schedule.floor=0.1",
        "stage.recover.schedule.kind=cosine",
        "base.revision=4e20",
        "about=\"with = and spaces\"",
        "data.sources=a.txt",
        "stage.recover.lora.targets=[\"v_proj\"]",
        "stage.transfer.lr=1",
        "seed=1",
        "seed=7",
    ];
    let recipe = load("llama/3.2-1b-lolcats", &sets).recipe;
    let (transfer, recover) = (&recipe.stage["transfer"], &recipe.stage["recover"]);
    assert_eq!((transfer.tokens, recover.tokens, recipe.seed), (20_000, 30_000, 7));
    assert_eq!(recipe.converted(&of(5)).unwrap(), [1, 2, 4]);
    assert_eq!(recover.schedule, Schedule::Cosine { warmup: 0.0, floor: 0.1 });
    assert_eq!(recipe.base.revision.as_deref(), Some("4e20"));
    assert_eq!((recipe.about.as_str(), &recipe.data.sources), ("with = and spaces", &vec!["a.txt".to_string()]));
    assert_eq!((&recover.lora.targets, transfer.lr), (&vec!["v_proj".to_string()], 1.0));
    let Mixer::Lolcats(config) = recipe.mixer else { panic!("another mixer") };
    assert_eq!(config.window, 16);

    assert_eq!(load("llama/lolcats", &["layers=[1]"]).recipe.layers, Layers::Only(vec![1]));
    assert_eq!(load("llama/lolcats", &["layers=all"]).recipe.converted(&of(2)).unwrap(), [0, 1]);
    assert!(load("llama/lolcats", &["layers=[9]"]).recipe.converted(&of(2)).is_err());
}

#[test]
fn layers_that_stay_are_given_by_one_rule() {
    let layers = |sets: &[&str]| load("llama/lolcats", sets).recipe.layers;
    assert_eq!(layers(&["layers={every=4}"]).converted(&of(9)).unwrap(), [0, 1, 2, 4, 5, 6, 8]);
    assert_eq!(layers(&["layers={every=1}"]).converted(&of(2)).unwrap(), [] as [usize; 0]);
    assert_eq!(
        layers(&["layers={keep=[0]}", "layers={every=2}"]).converted(&of(3)).unwrap(),
        [0, 2],
        "replaced, not merged"
    );

    let window = |window| Layer { window, ..Layer::default() };
    let alternating = Architecture { layer: vec![window(Some(8)), window(None), window(Some(8))], ..of(3) };
    assert_eq!(layers(&["layers=global"]).converted(&alternating).unwrap(), [1]);
    assert_eq!(layers(&["layers=global"]).converted(&of(2)).unwrap(), [0, 1]);

    let chosen = layers(&["layers={keep_best={count=2}}", "layers.keep_best.by=gates", "layers.keep_best.tokens=1e5"]);
    let best = chosen.best().unwrap();
    assert_eq!((best.count, best.by, best.tokens()), (Some(2), By::Gates, 100_000));
    assert_eq!(chosen.converted(&of(3)).unwrap(), [0, 1, 2], "all of them until they are chosen");
    assert!(chosen.converted(&of(2)).unwrap_err().contains("keeps 2 layers"));
    let text = load("llama/lolcats", &["layers={keep_best={fraction=0.25}}"]).text;
    assert!(text.contains("layers = { keep_best = { by = \"restore-one-kl\", fraction = 0.25 } }"), "{text}");

    let refused = |set: &str| refused(Path::new("llama/lolcats"), &[set]);
    assert!(refused("layers={every=0}").contains("`layers.every` must be at least 1"));
    assert!(refused("layers={evry=4}").contains("unknown key `layers.evry`; did you mean `layers.every`?"));
    assert!(refused("layers={keep=[0], every=4}").contains("unknown key `layers.every`"));
    assert!(refused("layers={keep_best={}}").contains("`layers.keep_best` needs `count` or `fraction`"));
    assert!(refused("layers={keep_best={count=1,fraction=0.5}}").contains("give one of them"));
    assert!(refused("layers={keep_best={count=1,by='luck'}}").contains("`layers.keep_best.by` cannot be `luck`"));
    assert!(refused("layers={keep_best={fraction=1}}").contains("`layers.keep_best.fraction` must be below 1"));
}

#[test]
fn stages_are_a_list_of_named_tables() {
    let (_folder, at) = files(&[(
        "mine.toml",
        r#"
extends = "llama/lolcats"
stages = ["tune", "transfer"]
data = { sources = ["a.txt"], field = "body", mask_prompt = false }
stage.tune = { loss = { next_token = 2 }, optimizer = { clip = 0 }, data = { sources = ["b.json"], format = "alpaca" } }
"#,
    )]);
    let loaded = load(at("mine.toml").to_str().unwrap(), &[]);
    let recipe = &loaded.recipe;
    assert_eq!(recipe.in_order().map(|(name, _)| name).collect::<Vec<_>>(), ["tune", "transfer"]);
    assert!(!recipe.stage.contains_key("recover"), "what is not used is gone");
    assert!(loaded.text.find("[stage.tune]").unwrap() < loaded.text.find("[stage.transfer]").unwrap());
    let tune = &recipe.stage["tune"];
    assert_eq!((tune.optimizer.clip, tune.optimizer.beta2, tune.lr), (0.0, 0.999, Stage::default().lr));
    // Text of its own: what it does not say is said by `[data]`.
    let data = tune.data.as_ref().unwrap();
    assert_eq!((data.sources[0].as_str(), data.format, data.field.as_str()), ("b.json", Format::Alpaca, "body"));
    assert!(!data.mask_prompt && recipe.stage["transfer"].data.is_none());
    assert_eq!(load(at("mine.toml").to_str().unwrap(), &["stages=transfer"]).recipe.stage.len(), 1);
}

#[test]
fn tokens_are_bounded_by_epochs() {
    let transfer = load("llama/lolcats", &["stage.transfer.epochs=1.5"]).recipe.stage["transfer"].clone();
    assert_eq!((transfer.budget(1_000), transfer.budget(1 << 40)), (1_500, 20_000_000));
    let recover = Stage { tokens: 500, epochs: None, ..Stage::recover() };
    assert_eq!(recover.budget(1), 500, "no bound, no matter how short the text");
}

#[test]
fn the_defaults_are_shown_with_comments() {
    let text = load("tiny/lolcats", &["layers={keep=[0]}", "stage.transfer.schedule={kind=\"constant\"}"]).text;
    let part = |from: &str, lines: usize| {
        let at = text.find(from).unwrap_or_else(|| panic!("{text}"));
        text[at..].lines().take(lines).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(part("# Which layers", 10), @r##"
    # Which layers are converted: `"all"`, a list of indices, or those that stay softmax: `{ keep = [...] }`, the last of
    # each group with `{ every = 4 }`, or those that need it most with `{ keep_best = { count = 2 } }`.
    layers = { keep = [0] }
    # The training stages that run, in this order: names of the tables `[stage.<name>]`.
    stages = ["transfer", "recover"]

    # The checkpoint the recipe was written for.
    [base]
    # Hub id, `org/name`.
    # repo =
    "##);
    insta::assert_snapshot!(part("[stage.transfer.schedule]", 3), @r##"
    [stage.transfer.schedule]
    kind = "constant"
    # Share of the steps spent warming up linearly.
    "##);
    insta::assert_snapshot!(part("# Added to", 2), @r##"
    # Added to the root of the second moment.
    eps = 1e-8
    "##);
}

#[test]
fn a_part_given_in_part_keeps_the_rest_of_its_mixers_own() {
    for name in ["llama/lizard", "llama/lawcat", "llama/gsa", "llama/gla"] {
        let (before, after) = (load(name, &[]).recipe, load(name, &["mixer.gate.normaliser=3"]).recipe);
        let json = |recipe: &Recipe| serde_json::to_value(&recipe.mixer).unwrap();
        let (mut wanted, found) = (json(&before), json(&after));
        wanted["gate"]["normaliser"] = 3.0.into();
        assert_eq!(found, wanted, "{name}");
    }
    let other = load("llama/gsa", &["mixer.gate.kind=pooled"]).recipe;
    assert_eq!(serde_json::to_value(&other.mixer).unwrap()["gate"]["kind"], "pooled");
}

#[test]
fn a_key_of_another_kind_names_the_kinds_that_have_it() {
    let error = try_load("llama/lolcats", &["mixer.exponents=recentred"]).unwrap_err().to_string();
    assert!(error.contains("it is a key of `kind` `lizard`, `lizard-paper`, this one is `lolcats`"), "{error}");
}
