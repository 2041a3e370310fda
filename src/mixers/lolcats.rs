//! LoLCATs.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Keys of `[mixer]` with `kind = "lolcats"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Softmax keys beside the linear part; 0 is linear only.
    pub window: usize,
    /// `sliding`: the last `window` keys; `terraced`: own block and the whole previous one.
    pub window_kind: WindowKind,
    pub feature_map: FeatureMap,
    /// Columns of each feature-map weight; 0 takes `min(64, head_dim)`. Two-sided maps give twice as many features.
    pub feature_dim: usize,
    /// Start of the window factor before the sigmoid (-2.197 is sigmoid 0.1).
    pub window_factor: f64,
    /// The linear part weighs 1 - sigmoid(window factor) instead of 1.
    pub affine: bool,
    /// One map for queries and keys.
    pub tie_qk: bool,
    /// Identity start; otherwise Kaiming uniform.
    pub identity_init: bool,
    /// Features see x + xW with W started at 0 (needs `feature_dim` = head_dim).
    pub skip_connection: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WindowKind {
    Sliding,
    Terraced,
}

/// Feature maps by the names of section 2 of the method papers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// softmax(xW) and softmax(-xW) side by side.
    SoftmaxDim,
    /// exp(u - max u) and exp(min u - u) side by side, u = xW.
    ExpDim,
    /// relu(xW + b), the map of T2R.
    Relu,
    /// elu(x) + 1, without parameters.
    Elu,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            window: 64,
            window_kind: WindowKind::Sliding,
            feature_map: FeatureMap::SoftmaxDim,
            feature_dim: 0,
            window_factor: -2.197_224_577_336_219_6,
            affine: false,
            tie_qk: false,
            identity_init: true,
            skip_connection: false,
        }
    }
}
