//! Plans and inspections: from synthetic checkpoints and from a `config.json` alone.

use std::collections::BTreeMap;
use std::path::Path;

use margay::checkpoint::writer::{Data, Entry, write_sharded};
use margay::checkpoint::{Config, Headers, Source};
use margay::convert::inspect::Inspection;
use margay::convert::plan::{self, Fate, Plan, PlanDevice, micro_batch, steps};
use margay::error::Kind;
use margay::families;
use margay::progress::Silent;
use margay::recipe::{Best, By, KeepBest, Layers, Loaded, Loss, Recipe, Stage};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A small Llama: 3 layers, 4 heads of 8 over 2 key heads.
fn tiny() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 96,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    })
}

fn llama(layers: usize, hidden: usize, heads: usize, intermediate: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "intermediate_size": intermediate, "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0, "torch_dtype": "bfloat16",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192},
    })
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn parsed(config: &Value) -> Config {
    Config::parse(config.to_string().as_bytes(), "config.json").unwrap()
}

fn described(config: &Value) -> Headers {
    plan::described(parsed(config), Source { id: "model".into(), ..Source::default() }).unwrap()
}

/// A checkpoint of zeros with the tensors of its architecture, less `without`, plus `extra`.
fn checkpoint(config: &Value, without: &[&str], extra: &[(&str, &[usize], Dtype)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let (_, architecture) = families::of(&parsed(config)).unwrap();
    let own = architecture.tensors().into_iter().map(|(name, (_, shape))| (name, shape, Dtype::BF16));
    let own = own.filter(|(name, ..)| !without.contains(&name.as_str()));
    let extra = extra.iter().map(|(name, shape, dtype)| (name.to_string(), shape.to_vec(), *dtype));
    let entries = own.chain(extra).map(|(name, shape, dtype)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        Entry { name, dtype, shape, data: Data::Lazy(Box::new(move || Ok(vec![0; bytes]))) }
    });
    write_sharded(dir.path(), entries.collect(), 1 << 30, &BTreeMap::new(), &Silent).unwrap();
    dir
}

fn open(dir: &Path) -> Headers {
    plan::open(dir.to_str().unwrap()).unwrap()
}

fn loaded(recipe: Recipe) -> Loaded {
    Loaded { text: recipe.to_toml(), recipe, origin: "test".into() }
}

fn planned(headers: &Headers, recipe: Recipe) -> margay::Result<Plan> {
    Plan::of(headers, &loaded(recipe), PlanDevice::Cpu, None)
}

fn stage<'a>(recipe: &'a mut Recipe, name: &str) -> &'a mut Stage {
    recipe.stage.get_mut(name).unwrap()
}

fn names(plan: &Plan, fate: Fate) -> Vec<&str> {
    plan.tensors.iter().filter(|t| t.fate == fate).map(|t| t.name.as_str()).collect()
}

#[test]
fn every_tensor_has_a_fate() {
    let ignored = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let dir = checkpoint(&tiny(), &[], &[(ignored, &[4], Dtype::F32)]);
    let headers = open(dir.path());
    let plan = planned(&headers, Recipe::default()).unwrap();

    assert_eq!(names(&plan, Fate::Dropped), [ignored]);
    assert_eq!(names(&plan, Fate::Merged).len(), 3 * 4, "q, k, v, o of every layer");
    assert_eq!(names(&plan, Fate::New).len(), 3 * 3, "two maps and the window factors of every layer");
    assert!(names(&plan, Fate::Tied).is_empty());
    let source: Vec<&str> = plan.tensors.iter().filter(|t| t.fate != Fate::New).map(|t| t.name.as_str()).collect();
    assert_eq!(source, headers.tensors.keys().collect::<Vec<_>>());

    let exported = plan.exported();
    for (name, info) in &headers.tensors {
        let wanted = (name != ignored).then(|| (info.shape.clone(), info.dtype));
        assert_eq!(exported.get(name), wanted.as_ref(), "{name}");
    }
    let map = &exported["model.layers.2.self_attn.feature_map_k.mlp.layer"];
    assert_eq!(*map, (vec![4, 8, 8], Dtype::F32));
    assert_eq!(exported.len(), headers.tensors.len() - 1 + 9);

    let total = |tensors: usize, bytes: u64| plan::Total { tensors, bytes };
    let qkvo = 3 * 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32);
    let new = 3 * 4 * (2 * 4 * 8 * 8 + 4);
    assert_eq!(plan.fates[&Fate::Merged], total(12, qkvo));
    assert_eq!(plan.fates[&Fate::New], total(9, new));
    assert_eq!(plan.fates[&Fate::Dropped], total(1, 16));
    assert_eq!(plan.disk.export, headers.bytes() - 16 + new);
    assert_eq!(plan.fates.values().map(|t| t.tensors).sum::<usize>(), plan.tensors.len());
}

#[test]
fn tied_spellings_stay_as_they_are() {
    let tied = with(tiny(), "tie_word_embeddings", json!(true));
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");

    let both = checkpoint(&tied, &[], &[(head, &[96, 32], Dtype::BF16)]);
    let plan = planned(&open(both.path()), Recipe::default()).unwrap();
    assert_eq!(names(&plan, Fate::Tied), [head]);
    assert!(plan.exported().contains_key(head) && plan.exported().contains_key(embedding));

    let one = checkpoint(&tied, &[embedding], &[(head, &[96, 32], Dtype::BF16)]);
    let plan = planned(&open(one.path()), Recipe::default()).unwrap();
    assert!(plan.exported().contains_key(head) && !plan.exported().contains_key(embedding));
}

#[test]
fn unknown_tensors_and_types_are_refused() {
    let dir = checkpoint(&tiny(), &[], &[("model.layers.1.self_attn.q_norm.weight", &[8], Dtype::BF16)]);
    let error = planned(&open(dir.path()), Recipe::default()).unwrap_err();
    assert_eq!(error.kind, Kind::Checkpoint);
    assert!(error.message.contains("q_norm") && error.message.contains("llama"), "{error}");

    let norm = "model.norm.weight";
    let dir = checkpoint(&tiny(), &[norm], &[(norm, &[32], Dtype::I8)]);
    let error = planned(&open(dir.path()), Recipe::default()).unwrap_err();
    assert!(error.message.contains(norm) && error.message.contains("I8"), "{error}");
}

#[test]
fn layers_by_list_and_by_keep() {
    let headers = described(&tiny());
    let layers = |layers: Layers| planned(&headers, Recipe { layers, ..Recipe::default() });
    let plan = layers(Layers::Only(vec![2, 0])).unwrap();
    assert_eq!((plan.layers.converted, plan.layers.kept), (vec![0, 2], vec![1]));
    let plan = layers(Layers::keep(vec![1])).unwrap();
    assert_eq!(plan.layers.converted, [0, 2]);
    assert!(plan.tensors.iter().all(|t| t.fate != Fate::New || !t.name.starts_with("model.layers.1.")));

    let plan = layers(Layers::keep(vec![0, 1, 2])).unwrap();
    assert!(plan.stage("transfer").is_none() && plan.stage("recover").is_some());
    assert!(plan.warnings.iter().any(|w| w.contains("no layer")), "{:?}", plan.warnings);

    let best = |by| Layers::KeepBest(KeepBest { keep_best: Best { count: Some(1), by, ..Best::default() } });
    let plan = layers(best(By::TransferMse)).unwrap();
    assert_eq!((plan.layers.converted.len(), plan.layers.chosen), (3, Some(1)), "planned with all converted");
    let hybrid = plan.hybrid().unwrap();
    assert_eq!(hybrid, "softmax stays in 1 of 3 layers, 128 B of cache per token, chosen after `transfer`");
    assert!(plan.sections()[0].rows.iter().any(|row| row[1] == hybrid));
    let recipe = Recipe { layers: best(By::TransferMse), ..Recipe::default() };
    let mut idle = recipe;
    idle.stage.insert("transfer".into(), Stage { tokens: 0, ..idle.stage["transfer"].clone() });
    let error = planned(&headers, idle).unwrap_err();
    assert!(error.kind == Kind::Recipe && error.message.contains("`transfer-mse`"), "{error}");

    let error = layers(Layers::Only(vec![3])).unwrap_err();
    assert_eq!(error.kind, Kind::Recipe);
    assert!(error.message.contains("layer 3") && error.message.contains("0 to 2"), "{error}");
}

#[test]
fn recipes_that_do_not_fit_are_refused() {
    let headers = described(&tiny());
    let mut recipe = Recipe::default();
    let config = margay::mixers::lolcats::Config { skip_connection: true, feature_dim: 4, ..Default::default() };
    recipe.mixer = margay::recipe::Mixer::Lolcats(config);
    let error = planned(&headers, recipe).unwrap_err();
    assert_eq!(error.kind, Kind::Recipe);
    assert!(error.message.contains("skip_connection"), "{error}");

    let mut recipe = Recipe::default();
    stage(&mut recipe, "recover").lora.targets = vec!["q_proj".into(), "qproj".into()];
    let error = planned(&headers, recipe).unwrap_err();
    assert!(error.kind == Kind::Recipe && error.message.contains("`qproj`"), "{error}");

    // Weights that do not sum to 1 cannot be compared with the teacher's.
    let mut recipe = Recipe { mixer: margay::recipe::Mixer::Delta(Default::default()), ..Recipe::default() };
    stage(&mut recipe, "transfer").loss.attention_ce = 1.0;
    let error = planned(&headers, recipe).unwrap_err();
    assert!(error.kind == Kind::Recipe && error.message.contains("`stage.transfer.loss.attention_ce`"), "{error}");
}

#[test]
fn nothing_trains_with_no_tokens() {
    let mut recipe = Recipe::default();
    recipe.stage.values_mut().for_each(|stage| stage.tokens = 0);
    let plan = planned(&described(&tiny()), recipe).unwrap();
    assert!(plan.stages.is_empty() && names(&plan, Fate::Merged).is_empty());
    assert_eq!((plan.disk.run, names(&plan, Fate::New).len()), (0, 9));
}

#[test]
fn warnings_name_what_differs() {
    let mut headers = described(&tiny());
    headers.source.repo = Some("org/other".into());
    headers.source.revision = Some("0123456789".into());
    let mut recipe = Recipe::default();
    recipe.base.repo = Some("org/model".into());
    stage(&mut recipe, "transfer").seq_len = 2048;
    stage(&mut recipe, "recover").tokens = 100;
    let text = planned(&headers, recipe.clone()).unwrap().warnings.join("\n");
    for part in
        ["no weights", "`org/model`", "`org/other`", "stage.transfer.seq_len", "1024", "`recover` has 100 tokens"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    (recipe.base.repo, recipe.base.revision) = (Some("org/other".into()), Some("ffff".into()));
    assert!(planned(&headers, recipe).unwrap().warnings.iter().any(|w| w.contains("ffff")));
}

#[test]
fn epochs_bound_the_tokens() {
    let mut recipe = Recipe::default();
    stage(&mut recipe, "transfer").epochs = Some(2.0);
    let text = ["transfer", "recover"].map(|name| (name.to_string(), 30_000)).into();
    let plan = Plan::of(&described(&tiny()), &loaded(recipe), PlanDevice::Cpu, Some(&text)).unwrap();
    let transfer = plan.stage("transfer").unwrap();
    assert_eq!((transfer.tokens, transfer.steps, transfer.tokens_per_step), (60_000, 8, 8192));
    assert_eq!(plan.stage("recover").unwrap().tokens, 20_000_000);
}

#[test]
fn steps_and_micro_batches() {
    assert_eq!([0, 1, 8192, 8193].map(|tokens| steps(tokens, 8, 1024)), [0, 1, 1, 2]);
    let auto = |seq_len, device| micro_batch(8, 0, seq_len, device);
    assert_eq!([512, 1024, 2048, 4096].map(|n| auto(n, PlanDevice::Cpu)), [4, 2, 1, 1]);
    assert_eq!([512, 1024, 4096].map(|n| auto(n, PlanDevice::Cuda)), [8, 8, 2]);
    assert_eq!(micro_batch(8, 3, 1024, PlanDevice::Cpu), 3);
    assert_eq!(micro_batch(2, 3, 1024, PlanDevice::Cpu), 2);
}

#[test]
fn figures_of_llama_3_8b() {
    let plan = planned(&described(&llama(32, 4096, 32, 14_336)), Recipe::default()).unwrap();
    assert_eq!(plan.model.parameters, 8_030_261_248);
    let [transfer, recover] = &plan.stages[..] else { panic!("two stages") };
    // Feature maps 32 · 2 · 32 · 128 · 64 and one factor per head; LoRA of rank 8 on q, k, v, o.
    assert_eq!(transfer.trainable, 16_777_216 + 32 * 32);
    assert_eq!(recover.trainable, 6_815_744);
    assert_eq!((transfer.steps, transfer.batch, transfer.micro_batch), (2442, 8, 2));
    assert_eq!((transfer.kept, recover.kept), (0, 1), "the graph of a block takes 0.6 GiB of 1");
    // Near 2 and 6 operations per parameter and token.
    let per_weight = |s: &plan::Stage| s.flops / (s.steps * s.tokens_per_step) as f64 / 8.03e9;
    assert!((1.7..2.2).contains(&per_weight(transfer)), "{}", per_weight(transfer));
    assert!((5.5..6.5).contains(&per_weight(recover)), "{}", per_weight(recover));
    for stage in &plan.stages {
        let m = stage.memory;
        assert_eq!(m.weights, 4 * 8_030_261_248);
        assert_eq!(m.total, m.weights + m.optimizer + m.inputs + m.working);
    }
    assert_eq!(plan.verify.weights, 3 * transfer.memory.weights, "student, export, teacher");
    assert_eq!(transfer.memory.optimizer, 20 * transfer.trainable);
    assert_eq!(recover.memory.optimizer, 20 * recover.trainable + 4 * transfer.trainable, "maps rest");
}

/// Stages of a list of one's own: what each trains, what rests from those before, and what is merged in the end.
#[test]
fn a_list_of_stages() {
    let align = Stage {
        train: ["mixer", "q_proj", "o_proj"].map(String::from).into(),
        loss: Loss { hidden_l2: 1.0, ..Loss::default() },
        ..Stage::default()
    };
    let distill = Stage {
        train: ["lora", "o_proj"].map(String::from).into(),
        loss: Loss { logit_kl: 1.0, ..Loss::default() },
        ..Stage::default()
    };
    let skipped = Stage { tokens: 0, train: vec!["up_proj".into()], ..Stage::recover() };
    let recipe = Recipe {
        layers: Layers::Only(vec![0, 2]),
        stages: ["align", "skipped", "distill"].map(String::from).into(),
        stage: [("align", align), ("distill", distill), ("skipped", skipped), ("unused", Stage::recover())]
            .map(|(name, stage)| (name.to_string(), stage))
            .into(),
        ..Recipe::default()
    };
    let plan = planned(&described(&tiny()), recipe.clone()).unwrap();
    let [align, distill] = &plan.stages[..] else { panic!("{:?}", plan.stages) };
    assert_eq!((align.name.as_str(), distill.name.as_str()), ("align", "distill"));
    // Two layers of hidden size 32: q and o have 1024 elements each, the mixer 2 x 4 x 8 x 8 + 4.
    let (q, o, mixer) = (2 * 1024, 2 * 1024, 2 * 516);
    let lora = 3 * 8 * (64 + 48 + 48 + 64);
    assert_eq!(align.trainable, q + o + mixer);
    assert_eq!(distill.trainable, o + lora);
    assert_eq!(align.memory.optimizer, 20 * align.trainable);
    assert_eq!(distill.memory.optimizer, 20 * distill.trainable + 4 * (q + mixer), "q and the mixers rest");
    let why = |name: &str| {
        let tensor = plan.tensors.iter().find(|t| t.name == format!("model.layers.{name}.weight")).unwrap();
        (tensor.fate, tensor.note.as_deref())
    };
    assert_eq!(why("0.self_attn.q_proj"), (Fate::Merged, Some("trained, LoRA of rank 8")));
    assert_eq!(why("1.self_attn.q_proj"), (Fate::Merged, Some("LoRA of rank 8")));
    assert_eq!(why("0.mlp.up_proj"), (Fate::Kept, None));

    // Norms of converted layers and all that is in no layer, the embedding once more where it was changed before.
    let mut more = recipe.clone();
    stage(&mut more, "distill").train = ["input_layernorm", "norm", "embed_tokens", "lm_head"].map(String::from).into();
    more.stages.push("again".into());
    let again = Stage {
        train: vec!["embed_tokens".into()],
        loss: Loss { next_token: 1.0, ..Loss::default() },
        ..Stage::default()
    };
    more.stage.insert("again".into(), again);
    let vocab = tiny()["vocab_size"].as_u64().unwrap();
    for tied in [false, true] {
        let named = planned(&described(&with(tiny(), "tie_word_embeddings", json!(tied))), more.clone()).unwrap();
        let tables = 32 * vocab * if tied { 1 } else { 2 };
        assert_eq!(named.stages[1].trainable, 3 * 32 + tables);
        assert_eq!(named.stages[2].trainable, 32 * vocab);
        assert_eq!(
            named.stages[2].memory.optimizer,
            20 * 32 * vocab + 4 * (q + o + mixer + 3 * 32 + tables - 32 * vocab)
        );
        let fate = |name: &str| named.tensors.iter().find(|t| t.name == name).map(|t| (t.fate, t.note.as_deref()));
        let trained = Some((Fate::Merged, Some("trained")));
        assert_eq!(fate("model.embed_tokens.weight"), trained);
        assert_eq!(fate("lm_head.weight"), if tied { None } else { trained });
        assert_eq!(fate("model.norm.weight"), trained);
        assert_eq!(fate("model.layers.0.input_layernorm.weight"), trained);
        assert_eq!(fate("model.layers.1.input_layernorm.weight"), Some((Fate::Kept, None)));
    }

    let refusal = |change: &dyn Fn(&mut Stage), name: &str| {
        let mut recipe = recipe.clone();
        change(stage(&mut recipe, name));
        let error = planned(&described(&tiny()), recipe).unwrap_err();
        assert_eq!(error.kind, Kind::Recipe);
        error.message
    };
    let message = refusal(&|s| s.loss.next_token = 1.0, "align");
    assert!(message.contains("`stage.align.loss` mixes"), "{message}");
    let message = refusal(&|s| s.loss = Loss { output_mse: 1.0, ..Loss::default() }, "align");
    assert!(message.contains("`stage.align.train` names `o_proj`, which learns nothing"), "{message}");
    let message = refusal(&|s| s.train.push("norm".into()), "align");
    assert!(message.contains("`stage.align.train` names `norm`, which trains at the end"), "{message}");
    let message = refusal(&|s| s.train.push("ln_f".into()), "distill");
    assert!(
        message
            .contains("names `ln_f`, which this model has not; beside projections it has embed_tokens, norm, lm_head"),
        "{message}"
    );
    let message = refusal(&|s| s.loss = Loss::default(), "distill");
    assert!(message.contains("`stage.distill.loss` has no weight"), "{message}");
}

#[test]
fn every_shipped_recipe_plans() {
    let shipped = margay::recipe::list();
    assert!(!shipped.is_empty());
    for recipe in shipped {
        let model = match recipe.name.split('/').next() {
            Some("mistral") => with(tiny(), "architectures", json!(["MistralForCausalLM"])),
            _ => tiny(),
        };
        let loaded = Recipe::load(&recipe.name, &[]).unwrap();
        let plan = Plan::of(&described(&model), &loaded, PlanDevice::Cpu, None);
        let plan = plan.unwrap_or_else(|e| panic!("{}: {e}", recipe.name));
        assert!(!plan.stages.is_empty() && !plan.fates.is_empty(), "{}", recipe.name);
    }
}

#[test]
fn a_405b_config_plans_to_one_page() {
    let dir = TempDir::new().unwrap();
    let config = llama(126, 16_384, 128, 53_248);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let headers = open(dir.path());
    let plan = planned(&headers, Recipe::default()).unwrap();
    assert!(!plan.model.weights);
    assert_eq!(plan.model.parameters, 405_853_388_800);
    assert_eq!(plan.tensors.len(), 126 * 12 + 3);
    let sections = plan.sections();
    assert!(sections.iter().map(|s| s.rows.len()).sum::<usize>() < 60);
    for section in &sections {
        let width = if section.columns.is_empty() { 2 } else { section.columns.len() };
        assert!(section.rows.iter().all(|row| row.len() == width), "{}", section.title);
    }
    let cells: Vec<&String> = sections.iter().flat_map(|s| &s.rows).flatten().collect();
    assert!(cells.contains(&&"model.layers.{0..125}.self_attn.q_proj.weight".to_string()));
    Inspection::of(&headers).unwrap();
}

#[test]
fn a_folder_with_broken_weights_is_not_taken_for_one_without() {
    let dir = checkpoint(&tiny(), &[], &[]);
    std::fs::write(dir.path().join("model.safetensors"), b"short").unwrap();
    assert_eq!(plan::open(dir.path().to_str().unwrap()).unwrap_err().kind, Kind::Checkpoint);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), b"").unwrap();
    assert_eq!(plan::open(dir.path().to_str().unwrap()).unwrap_err().kind, Kind::Checkpoint);
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn json_keys_are_stable() {
    let plan = json!(planned(&described(&tiny()), Recipe::default()).unwrap());
    let top = ["model", "recipe", "device", "layers", "tensors", "fates", "stages", "verify", "disk", "warnings"];
    assert_eq!(keys(&plan), top);
    assert_eq!(
        keys(&plan["model"]),
        ["id", "revision", "family", "layers", "parameters", "bytes", "dtypes", "weights"]
    );
    assert_eq!(keys(&plan["tensors"][0]), ["name", "dtype", "shape", "bytes", "fate"]);
    assert_eq!(keys(&plan["fates"]), ["kept", "merged", "new"]);
    assert_eq!(keys(&plan["fates"]["new"]), ["tensors", "bytes"]);
    let stage = [
        "name",
        "layer_wise",
        "trainable",
        "tokens",
        "steps",
        "tokens_per_step",
        "seq_len",
        "batch",
        "micro_batch",
        "kept",
        "flops",
        "memory",
    ];
    assert_eq!(keys(&plan["stages"][0]), stage);
    assert_eq!(keys(&plan["stages"][1]["memory"]), ["weights", "optimizer", "inputs", "working", "total"]);
    assert_eq!(keys(&plan["disk"]), ["export", "run", "download"]);
    assert_eq!((&plan["device"], &plan["model"]["dtypes"]), (&json!("cpu"), &json!(["BF16"])));
    assert_eq!(plan["recipe"]["mixer"]["kind"], "lolcats");
}

/// Llama-3-8B with every layer converted, as its `config.json` would say.
fn converted_8b() -> Value {
    with(
        llama(32, 4096, 32, 14_336),
        "linearization",
        json!({
            "format_version": 1, "base_model_type": "llama", "base_architectures": ["LlamaForCausalLM"],
            "layers": (0..32).collect::<Vec<_>>(), "mixer": {"kind": "lolcats"}, "teacher": "org/model",
            "teacher_revision": null,
        }),
    )
}

#[test]
fn inspection_of_a_converted_model() {
    let found = Inspection::of(&described(&converted_8b())).unwrap();
    let p = &found.parameters;
    assert_eq!((p.total, p.mixers), (8_030_261_248 + 16_778_240, 16_778_240));
    assert_eq!(p.total, p.embedding + p.head + 32 * p.block + 4096 + p.mixers);
    assert!(found.mixers.iter().all(|m| *m == "lolcats"));
    assert_eq!((found.context, found.ropes[0].theta), (131_072, 500_000.0));

    // S and z in f32: 32 · 128 · 129 · 4 B = 2.1 MB per layer; the ring 0.26 MB; the cache 131 KB per token.
    let state = &found.state;
    assert!(state.converted);
    assert_eq!(state.fixed_per_layer, 2_113_536);
    assert_eq!(state.cache_per_token, 131_072);
    let ring = 2 * 64 * 8 * 128 * 2;
    assert!(state.sizes.iter().all(|s| s.state == 32 * (2_113_536 + ring)), "the same at every context");
    let contexts: Vec<_> = state.sizes.iter().map(|s| (s.context, s.cache)).collect();
    assert_eq!(contexts, [1024, 8192, 32_768, 131_072].map(|n| (n, n * 131_072)));
    assert_eq!(state.break_even, Some(32 * (2_113_536 + ring) / 131_072 + 1), "near 580 tokens");
    for section in found.sections() {
        assert!(!section.rows.is_empty());
    }
}

#[test]
fn inspection_of_an_ordinary_model() {
    let found = Inspection::of(&described(&llama(32, 4096, 32, 14_336))).unwrap();
    assert!(found.mixers.iter().all(|m| *m == "softmax") && !found.state.converted && found.linearization.is_none());
    assert_eq!(found.parameters.total, 8_030_261_248);

    // A teacher that slides over fewer keys than the state costs never loses to it.
    let mistral = with(llama(32, 4096, 32, 14_336), "architectures", json!(["MistralForCausalLM"]));
    let found = Inspection::of(&described(&with(mistral, "sliding_window", json!(256)))).unwrap();
    assert_eq!((found.sliding_window, found.state.break_even), (Some(256), None));
}

#[test]
fn converted_models_are_not_converted_again() {
    let error = planned(&described(&converted_8b()), Recipe::default()).unwrap_err();
    assert_eq!(error.kind, Kind::Config);
    assert!(error.message.contains("org/model") && error.hint.is_some(), "{error}");
}

#[test]
fn config_types_are_named_when_wrong() {
    let config = parsed(&with(tiny(), "torch_dtype", json!("int8")));
    let error = plan::described(config, Source::default()).unwrap_err();
    assert!(error.kind == Kind::Config && error.message.contains("torch_dtype"), "{error}");
    let config = parsed(&with(with(tiny(), "torch_dtype", Value::Null), "dtype", json!("float16")));
    let headers = plan::described(config, Source::default()).unwrap();
    assert!(headers.tensors.values().all(|t| t.dtype == Dtype::F16));
}

/// Published models by what their `config.json` says, and the number of parameters that their pages tell.
#[test]
fn sizes_of_published_models() {
    let model = |architecture: &str, parts: Value| {
        let mut config = json!({"architectures": [architecture], "model_type": "any"});
        config.as_object_mut().unwrap().extend(parts.as_object().unwrap().clone());
        config
    };
    let sizes = |hidden, inner, layers, heads, kv, vocab| {
        json!({"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab})
    };
    let and = |mut config: Value, more: Value| {
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let gpt2 = json!({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257});
    let (qwen, gemma, wide) = (151_936, 256_000, json!({"head_dim": 256}));
    let tied = json!({"tie_word_embeddings": true});
    let experts = json!({"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768});
    let eight = json!({"num_local_experts": 8, "num_experts_per_tok": 2});
    let cases = [
        ("Qwen2ForCausalLM", and(sizes(896, 4864, 24, 14, 2, qwen), tied.clone()), 494_032_768),
        ("SmolLM3ForCausalLM", sizes(2048, 11_008, 36, 16, 4, 128_256), 3_075_098_624),
        ("Olmo2ForCausalLM", sizes(4096, 11_008, 32, 32, 32, 100_352), 7_298_617_344),
        ("Gemma2ForCausalLM", and(sizes(2304, 9216, 26, 8, 4, gemma), wide.clone()), 2_614_341_888),
        ("Gemma3ForCausalLM", and(sizes(1152, 6912, 26, 4, 1, 262_144), wide), 999_885_952),
        ("Phi3ForCausalLM", sizes(3072, 8192, 32, 32, 32, 32_064), 3_821_079_552),
        ("MixtralForCausalLM", and(sizes(4096, 14_336, 32, 32, 8, 32_000), eight), 46_702_792_704u64),
        ("Qwen3MoeForCausalLM", and(sizes(2048, 6144, 48, 32, 4, qwen), experts), 30_532_122_624),
        ("GPTNeoXForCausalLM", sizes(768, 3072, 12, 12, 12, 50_304), 162_322_944),
        ("GPT2LMHeadModel", gpt2, 124_439_808),
    ];
    for (architecture, parts, count) in cases {
        let headers = described(&model(architecture, parts));
        let found = Inspection::of(&headers).unwrap();
        assert_eq!(found.parameters.total, count, "{architecture}");
        assert!(found.sections().iter().all(|s| !s.rows.is_empty()), "{architecture}");
        let plan = planned(&headers, Recipe::default()).unwrap();
        let rows: usize = plan.sections().iter().map(|s| s.rows.len()).sum();
        assert!(rows < 60, "{architecture} plans to {rows} rows");
    }
}

fn family(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/families/{name}.json"));
    serde_json::from_slice::<Value>(&std::fs::read(file).unwrap()).unwrap()["config"].clone()
}

#[test]
fn layers_with_a_window_need_no_converting() {
    let plan = |model: &str, recipe: &str| {
        Plan::of(&described(&family(model)), &Recipe::load(recipe, &[]).unwrap(), PlanDevice::Cpu, None).unwrap()
    };
    let global = plan("gemma2", "gemma2/lolcats");
    assert_eq!((&global.layers.converted, &global.layers.kept), (&vec![1, 3], &vec![0, 2]));
    assert_eq!((global.layers.cache_per_token, global.layers.windowed, global.layers.window), (0, 2, Some(40)));
    let line = global.hybrid().unwrap();
    assert!(line.contains("2 of 4 layers, 0 B of cache per token (2 of them see 40 keys and stop there)"), "{line}");
    assert!(!global.warnings.iter().any(|w| w.contains("need converting")), "{:?}", global.warnings);

    let all = plan("gemma2", "llama/lolcats");
    assert_eq!(all.layers.converted, [0, 1, 2, 3]);
    let warned =
        all.warnings.iter().any(|w| w.contains("sees 40 keys in layers 0, 2") && w.contains("layers 1, 3 need"));
    assert!(warned, "{:?}", all.warnings);
    let state = Inspection::of(&described(&family("gemma2"))).unwrap().state;
    let (kept, linear) = (2 * 2 * 40 * 2 * 12 * 2, 2 * (state.fixed_per_layer + 2 * 64 * 2 * 12 * 2));
    assert_eq!(state.sizes[3].state, kept + linear, "two layers of either kind");
    // Where every layer sees a window, nobody is told to leave them all.
    assert!(!plan("mistral", "llama/lolcats").warnings.iter().any(|w| w.contains("need converting")));
}

#[test]
fn what_a_family_cannot_serve_is_refused_with_the_reason() {
    let refused = |model: &str, recipe: &str| {
        let loaded = Recipe::load(recipe, &[]).unwrap();
        let error = Plan::of(&described(&family(model)), &loaded, PlanDevice::Cpu, None).unwrap_err();
        assert_eq!(error.kind, Kind::Recipe, "{error}");
        error.message
    };
    let slots = refused("gemma2", "llama/gsa");
    assert!(slots.contains("bends its scores to ±5"), "{slots}");
    let experts = refused("mixtral", "llama/radlads");
    assert!(
        experts.contains("trains `gate_proj` of layer 0, which is made of experts that stay as they are"),
        "{experts}"
    );
    let gate = refused("gpt2", "llama/radlads");
    assert!(gate.contains("trains `gate_proj` of layer 0, which has none"), "{gate}");
}
