//! `margay plan` and `margay inspect`: what a conversion would do and what a model is, from headers alone.

use clap::Args;
use margay::convert::inspect::Inspection;
use margay::convert::plan;
use margay::error::Result;
use margay::progress::Progress;
use serde_json::json;

use super::output::Output;
use super::{DeviceArg, RecipeArgs};

#[derive(Args)]
pub struct Plan {
    /// A local Hugging Face folder, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Plan {
    pub fn run(&self, out: &Output) -> Result<()> {
        let recipe = self.recipe.load(&self.model)?;
        let plan = plan::Plan::of(&plan::open(&self.model)?, &recipe, self.device.planned()?, None)?;
        if self.json {
            return out.json(&json!(plan));
        }
        out.tables(&plan.sections())?;
        plan.warnings.iter().for_each(|warning| out.warn(warning));
        Ok(())
    }
}

#[derive(Args)]
pub struct Inspect {
    /// A local Hugging Face folder, or a hub id `org/name[@revision]`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub fn run(&self, out: &Output) -> Result<()> {
        let inspection = Inspection::of(&plan::open(&self.model)?)?;
        if self.json { out.json(&json!(inspection)) } else { out.tables(&inspection.sections()) }
    }
}
