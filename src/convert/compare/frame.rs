//! What variants share: text, sequences, steps and seed are the first recipe's, because all meet the same stream.

use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::families::Architecture;
use crate::recipe::{Loaded, Recipe, Stage};

/// Recipes reduced to a first stage that they can run together.
pub struct Framed {
    /// The name that this stage has in all of them: the first one's.
    pub stage: String,
    /// Never empty.
    pub recipes: Vec<Named>,
    /// What of a recipe is not used.
    pub warnings: Vec<String>,
}

/// A recipe under the name it has among the others.
pub struct Named {
    pub name: String,
    /// With its first stage alone, fitted to the model.
    pub loaded: Loaded,
    stage: Stage,
}

impl Named {
    /// The stage that is compared.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }
}

/// Frames `recipes` for a model; `tokens` instead of the first one's.
///
/// Errors: no recipe; two of one name; a first stage that is not layer by layer, unless there is nothing to train in it.
pub fn frame(recipes: &[Loaded], a: &Architecture, tokens: Option<u64>) -> Result<Framed> {
    let Some(first) = recipes.first() else {
        return Err(Error::new(Kind::Usage, "there is no recipe to compare").hint("`--recipes llama/lolcats,own.toml`"));
    };
    let lead = first.recipe.within(a.max_positions);
    let (name, mut shared) = first_stage(first, a)?.unwrap_or_else(|| ("transfer".into(), Stage::transfer()));
    shared.seq_len = shared.seq_len.min(a.max_positions);
    shared.tokens = tokens.unwrap_or(shared.tokens);
    if shared.tokens == 0 {
        return Err(Error::new(Kind::Usage, format!("`stage.{name}.tokens` of `{}` is 0", first.origin))
            .hint("say how much text to compare on: `--tokens 1000000`"));
    }
    let mut framed = Framed { stage: name, recipes: Vec::with_capacity(recipes.len()), warnings: Vec::new() };
    for loaded in recipes {
        let own = short(&loaded.origin);
        if framed.recipes.iter().any(|known| known.name == own) {
            return Err(Error::new(Kind::Usage, format!("two of the recipes are called `{own}`"))
                .hint("variants are told apart by the names of their files: rename one"));
        }
        let plain = || Stage { loss: Stage::transfer().loss, ..shared.clone() };
        let stage = first_stage(loaded, a)?.map_or_else(plain, |(_, stage)| stage);
        // What makes a variant stays; all else is the first one's.
        let mut together = Stage {
            train: stage.train.clone(),
            lr: stage.lr,
            lr_mixer: stage.lr_mixer,
            lr_scalars: stage.lr_scalars,
            lr_lora: stage.lr_lora,
            lr_projections: stage.lr_projections,
            loss: stage.loss.clone(),
            kl: stage.kl,
            lora: stage.lora.clone(),
            optimizer: stage.optimizer.clone(),
            schedule: stage.schedule.clone(),
            ..shared.clone()
        };
        let mut recipe =
            Recipe { seed: lead.seed, data: lead.data.clone(), verify: lead.verify.clone(), ..loaded.recipe.clone() };
        let asked = Stage { tokens: tokens.unwrap_or(stage.tokens), ..stage };
        let mut differ = differences(&asked, &together, &format!("stage.{}.", framed.stage));
        differ.extend(differences(&json!({"seed": loaded.recipe.seed}), &json!({"seed": lead.seed}), ""));
        if loaded.recipe.data != lead.data {
            differ.push("`data`".into());
        }
        if !differ.is_empty() {
            let lead = &framed.recipes.first().map_or(own.as_str(), |lead| &lead.name);
            framed.warnings.push(format!(
                "`{own}` is trained as `{lead}` in what all share, not by its own {}",
                differ.join(", ")
            ));
        }
        // A budget of passes over the text is one of tokens, once these are given.
        together.epochs = together.epochs.filter(|_| tokens.is_none());
        recipe.stages = vec![framed.stage.clone()];
        recipe.stage = [(framed.stage.clone(), together.clone())].into();
        let loaded = Loaded { text: recipe.to_toml(), recipe, origin: loaded.origin.clone() };
        framed.recipes.push(Named { name: own, loaded, stage: together });
    }
    Ok(framed)
}

/// Name and settings of a recipe's first stage, fitted to the model; `None` where the recipe has no layer-wise one because
/// its mixer has no parameters.
fn first_stage(loaded: &Loaded, a: &Architecture) -> Result<Option<(String, Stage)>> {
    let recipe = loaded.recipe.within(a.max_positions);
    match recipe.in_order().next() {
        Some((name, stage)) if stage.loss.layer_wise() => Ok(Some((name.into(), stage.clone()))),
        _ if recipe.mixer.design().specs(a).is_empty() => Ok(None),
        _ => {
            let message = format!("the first stage of recipe `{}` is not learnt layer by layer", loaded.origin);
            let hint = "leave it out, or put a stage first with a loss of single layers, such as \
                        `loss = { output_mse = 1000 }`";
            Err(Error::new(Kind::Recipe, message).hint(hint))
        }
    }
}

/// Keys whose values are not the same, with both.
fn differences(own: &impl Serialize, shared: &impl Serialize, prefix: &str) -> Vec<String> {
    let (own, shared) = (json!(own), json!(shared));
    let keys = own.as_object().into_iter().flatten().filter(|(key, value)| shared[key.as_str()] != **value);
    let told = |value: &Value| match value {
        Value::Null => "nothing".into(),
        Value::Object(_) => "a table".into(),
        value => value.to_string(),
    };
    keys.map(|(key, value)| format!("`{prefix}{key}` = {}", told(value))).collect()
}

/// A file's stem, or a shipped recipe's name.
fn short(origin: &str) -> String {
    let path = Path::new(origin);
    match path.extension() {
        Some(end) if end == "toml" => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        _ => origin.into(),
    }
}
