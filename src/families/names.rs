//! What tensors are to the decoder, and what checkpoints call them.

/// What a tensor of the checkpoint is to the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// [V, N]
    Embedding,
    /// Learned positions, [P, N].
    Positions,
    FinalNorm(Part),
    /// [V, N]
    Head,
    Norm(usize, Place, Part),
    /// The norm of queries or of keys: `[D]` for each head, or the width of all of them.
    HeadNorm(usize, Projection),
    /// A projection's weight `[out, in]` or bias `[out]`; where several share a tensor, the first of them stands for it.
    Weight(usize, Projection),
    Bias(usize, Projection),
    /// Scores of experts, [E, N].
    Router(usize),
    /// A projection of one expert.
    Expert(usize, usize, Projection),
}

impl Role {
    /// The block it belongs to; embeddings, final norm and head belong to none.
    pub fn layer(self) -> Option<usize> {
        match self {
            Role::Embedding | Role::Positions | Role::FinalNorm(_) | Role::Head => None,
            Role::Norm(l, ..) | Role::HeadNorm(l, _) | Role::Weight(l, _) | Role::Bias(l, _) => Some(l),
            Role::Router(l) | Role::Expert(l, ..) => Some(l),
        }
    }
}

/// Scale or shift of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Weight,
    Bias,
}

impl Part {
    pub const ALL: [Part; 2] = [Part::Weight, Part::Bias];

    fn end(self) -> &'static str {
        match self {
            Part::Weight => "weight",
            Part::Bias => "bias",
        }
    }
}

/// Where a norm stands in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    BeforeAttention,
    /// Of what attention adds to the stream.
    AfterAttention,
    BeforeMlp,
    /// Of what the MLP adds.
    AfterMlp,
}

impl Place {
    pub const ALL: [Place; 4] = [Place::BeforeAttention, Place::AfterAttention, Place::BeforeMlp, Place::AfterMlp];
}

/// The projections of a block, in checkpoint spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub const ALL: [Projection; 7] = {
        use Projection::*;
        [Q, K, V, O, Gate, Up, Down]
    };

    /// `q_proj`, as LoRA targets and checkpoints spell it.
    pub fn name(self) -> &'static str {
        match self {
            Projection::Q => "q_proj",
            Projection::K => "k_proj",
            Projection::V => "v_proj",
            Projection::O => "o_proj",
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }

    /// `self_attn.q_proj`, `mlp.up_proj`.
    pub fn path(self) -> String {
        let module = if self.is_attention() { "self_attn" } else { "mlp" };
        format!("{module}.{}", self.name())
    }

    pub fn is_attention(self) -> bool {
        matches!(self, Projection::Q | Projection::K | Projection::V | Projection::O)
    }
}

/// How checkpoints of a family spell their tensors. Modules of a block stand without its prefix; an empty one is not
/// there. Projections of one name share a tensor.
#[derive(Debug, PartialEq)]
pub struct Names {
    pub embedding: &'static str,
    pub positions: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
    /// Before the number of a block.
    pub blocks: &'static str,
    /// In the order of [`Place`].
    pub norms: [&'static str; 4],
    /// Of queries and keys.
    pub head_norms: [&'static str; 2],
    /// In the order of [`Projection`].
    pub projections: [&'static str; 7],
    pub router: &'static str,
    /// Before the number of an expert.
    pub experts: &'static str,
    /// Gate, up and down of an expert.
    pub expert: [&'static str; 3],
}

impl Names {
    /// Llama's, from which most families differ little.
    pub const LLAMA: Names = Names {
        embedding: "model.embed_tokens.weight",
        positions: "",
        final_norm: "model.norm",
        head: "lm_head.weight",
        blocks: "model.layers",
        norms: ["input_layernorm", "", "post_attention_layernorm", ""],
        head_norms: ["", ""],
        projections: [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ],
        router: "",
        experts: "",
        expert: ["", "", ""],
    };

    /// Llama's with a norm of the queries and keys.
    pub const WITH_HEAD_NORMS: Names = Names { head_norms: ["self_attn.q_norm", "self_attn.k_norm"], ..Names::LLAMA };

    /// The module of a projection, empty where there is none.
    pub fn module(&self, p: Projection) -> &'static str {
        self.projections[p as usize]
    }

    /// The module of a block's attention.
    pub fn attention(&self) -> &'static str {
        self.module(Projection::O).split_once('.').map_or("", |(attention, _)| attention)
    }

    /// The projections that share the tensor of `p`, in the order of their rows.
    pub fn beside(&self, p: Projection) -> impl Iterator<Item = Projection> {
        let module = self.module(p);
        Projection::ALL.into_iter().filter(move |other| self.module(*other) == module)
    }

    /// The projection that stands for the tensor of `p`.
    pub fn leader(&self, p: Projection) -> Projection {
        self.beside(p).next().unwrap_or(p)
    }

    /// Whether `p` stands for the tensor it is in.
    pub fn leads(&self, p: Projection) -> bool {
        !self.module(p).is_empty() && self.leader(p) == p
    }

    /// The modules beside the projections: embeddings, norms and head, by the last word of their names, which is what a
    /// stage calls them.
    pub fn words(&self) -> impl Iterator<Item = &'static str> {
        let ends = [self.embedding, self.positions, self.final_norm, self.head];
        ends.into_iter().chain(self.norms).chain(self.head_norms).map(last_word).filter(|word| !word.is_empty())
    }

    /// The word of [`Names::words`] for the module of a role; `None` for what belongs to projections and experts.
    pub fn word(&self, role: Role) -> Option<&'static str> {
        let module = match role {
            Role::Embedding => self.embedding,
            Role::Positions => self.positions,
            Role::FinalNorm(_) => self.final_norm,
            Role::Head => self.head,
            Role::Norm(_, place, _) => self.norms[place as usize],
            Role::HeadNorm(_, p) => self.head_norms[(p == Projection::K) as usize],
            Role::Weight(..) | Role::Bias(..) | Role::Router(_) | Role::Expert(..) => return None,
        };
        Some(last_word(module))
    }

    /// The checkpoint name of a role.
    pub fn of(&self, role: Role) -> String {
        let block = |l: usize, module: &str, end: &str| format!("{}.{l}.{module}.{end}", self.blocks);
        match role {
            Role::Embedding => self.embedding.into(),
            Role::Positions => self.positions.into(),
            Role::FinalNorm(part) => format!("{}.{}", self.final_norm, part.end()),
            Role::Head => self.head.into(),
            Role::Norm(l, place, part) => block(l, self.norms[place as usize], part.end()),
            Role::HeadNorm(l, p) => block(l, self.head_norms[(p == Projection::K) as usize], "weight"),
            Role::Weight(l, p) => block(l, self.module(p), "weight"),
            Role::Bias(l, p) => block(l, self.module(p), "bias"),
            Role::Router(l) => block(l, self.router, "weight"),
            Role::Expert(l, e, p) => {
                let part = self.expert[p as usize - Projection::Gate as usize];
                block(l, &format!("{}.{e}.{part}", self.experts), "weight")
            }
        }
    }
}

/// `norm` of `model.norm`, `lm_head` of `lm_head.weight`.
fn last_word(module: &'static str) -> &'static str {
    let module = module.strip_suffix(".weight").unwrap_or(module);
    module.rsplit('.').next().unwrap_or(module)
}
