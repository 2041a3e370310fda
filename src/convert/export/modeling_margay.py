"""A model converted by Margay: its family's own transformers model, the attention of some layers replaced by a mixer
whose memory does not grow with the text.

Everything is written to be read, in plain PyTorch and in float32: each mixer is one function over a `Pass`, which holds
the queries, keys and values of some positions and the state that earlier positions left. The same code prefills,
decodes and trains. Time is linear: recurrences run in chunks, windows in pieces.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Rows of a batch may be padded on the left, as `generate` does.
"""

import copy
import sys
from functools import cache, cached_property

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_margay import MargayConfig

PIECE = 128  # rows of a window handled at once
PLAIN_MAPS = {  # feature maps without weights
    "elu": lambda x: F.elu(x) + 1,
    "softmax": lambda x: x.softmax(-1),
    "silu": F.silu,
    "identity": lambda x: x,
}
LOWEST = -128.0  # smallest log decay: its exponential is 0 in float32
MIN_DENOMINATOR = 1e-12
ATTENTION = ("self_attn", "attention", "attn")  # what families call the attention of a block


class MixerState(CacheLayerMixin):
    """The cache of a converted layer: named tensors of fixed size, batch first."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.tensors = {}
        self.length = 0  # positions seen, padding included
        self.is_initialized = False

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("a converted layer keeps a state, no keys and values of all positions")

    def get_seq_length(self):
        return self.length

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_max_length(self):
        return -1

    def crop(self, tokens_to_remove):
        if tokens_to_remove != 0:
            raise NotImplementedError("a state cannot forget its last tokens")

    def every(self, change):
        self.tensors = {name: change(x) for name, x in self.tensors.items()}

    def reorder_cache(self, beam_idx):
        self.every(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self.every(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self.every(lambda x: x[indices])

    def offload(self):
        self.every(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        pass  # tensors move to the layer's device when they are read

    @staticmethod
    def install(cache, layers):
        """Puts states in the place of a cache's empty layers."""
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= max(layers):
            cache.layers.append(cache.layer_class_to_replicate())
        for layer in layers:
            if not isinstance(cache.layers[layer], MixerState):
                cache.layers[layer] = MixerState()


class Pass:
    """Some positions of a layer and what a mixer computes of them.

    Shapes: B rows, T positions, H query heads, G key heads, D channels; everything is [B, heads, T, channels].
    """

    def __init__(self, attention, x, q, k, v, rotated, real, state, softcap):
        self.attention = attention
        self.settings = attention.settings
        self.x = x.float()  # the layer's input, [B, T, N]
        self.q, self.k, self.v = q.float(), k.float(), v.float()  # not rotated; q has H heads, k and v have G
        self.rotated = tuple(t.float() for t in rotated)
        self.real = real  # [B, T], 0 where a row is padded
        self.state = state
        self.softcap = softcap  # scores s of softmax are bent to softcap tanh(s / softcap)
        self.seen = self.past("seen", (), torch.long)  # real positions before, [B]
        state.tensors["seen"] = self.seen + real.sum(1)

    def past(self, name, shape, dtype=torch.float32, fill=0):
        """A tensor of the state, where there is none yet one filled with `fill`."""
        if name not in self.state.tensors:
            return torch.full((self.x.shape[0], *shape), fill, dtype=dtype, device=self.x.device)
        return self.state.tensors[name].to(self.x.device)

    @cached_property
    def mask(self):
        """`real` as [B, 1, T, 1] in float32."""
        return self.real[:, None, :, None].float()

    @cached_property
    def counts(self):
        """Real positions up to each, itself included: [B, T]."""
        return self.seen[:, None] + self.real.cumsum(1)

    def weight(self, name):
        """A tensor of the mixer, None where this one has no such tensor."""
        return self.attention.get_parameter(name).float() if name in self.attention.tensors else None

    def repeat(self, x):
        """[B, G, ..] -> [B, H, ..]: query head h reads key head h // (H / G)."""
        return x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1)

    def by_head(self, x):
        """A number or vector per head to stand beside [B, H, T, D]."""
        return x.reshape(1, self.q.shape[1], 1, -1)

    def project(self, weight, bias=None):
        return F.linear(self.x, self.weight(weight), None if bias is None else self.weight(bias))

    def behind(self, name, x, rows):
        """`x` [B, heads, T, ..] behind the `rows` positions before it; zeros where there was nothing."""
        if rows == 0:
            return x
        before = self.past(name, (x.shape[1], rows, x.shape[3]))
        x = torch.cat([before, x * self.mask], 2)
        self.state.tensors[name] = x[:, :, -rows:]
        return x

    def running_sum(self, name, x):
        """Σ over all positions so far of x [B, heads, T, ..]."""
        x = self.past(name, (x.shape[1], 1, x.shape[3])) + (x * self.mask).cumsum(2)
        self.state.tensors[name] = x[:, :, -1:]
        return x

    def recent(self, name, x, rows):
        """Σ over the last `rows` positions, the own one included: by doubling, nothing is lost in a long sum."""
        time = x.shape[2]
        run = self.behind(name, x, rows - 1)
        total, span, covered = torch.zeros_like(run), 1, 0
        shifted = lambda t, by: F.pad(t, (0, 0, by, 0))[:, :, : t.shape[2]]
        while covered < rows:
            if rows & span:
                total = total + shifted(run, covered)
                covered += span
            run = run + shifted(run, span)
            span *= 2
        return total[:, :, -time:]

    def scores(self, q, k):
        """Scores of softmax [B, H, n, m] of queries [B, H, n, D] and keys [B, H, m, D]."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap

    # Recurrences.

    def gated(self, name, q, k, v, log_decay, scale=1.0, values=False):
        """S <- e^g S + k vᵀ, y = scale Sᵀ q (arXiv 2312.06635): [B, H, T, V].

        `log_decay` is [B, H, T] or [B, H, T, K], with `values` [B, H, T, V]: a decay of the state's other side.
        """
        k, log_decay = k * self.mask, self.decay_channels(log_decay)
        state = self.past(name, (k.shape[1], k.shape[3], v.shape[3]))
        out = []
        for q, k, v, g in chunks(q * scale, k, v, log_decay):
            sums = g.cumsum(2)
            last = sums[:, :, -1:]
            if values:
                pairs = (q @ k.mT)[..., None] * decay_between(sums)  # [B, H, n, n, V]
                out.append((pairs * v[:, :, None]).sum(3) + (q @ state) * sums.exp())
                state = state * last.exp() + k.mT @ (v * (last - sums).exp())
            else:
                out.append(products(q, k, sums) @ v + (q * sums.exp()) @ state)
                state = state * last.exp().mT + (k * (last - sums).exp()).mT @ v
        self.state.tensors[name] = state
        return torch.cat(out, 2)

    def delta(self, name, q, k, v, beta, log_decay, scale):
        """The delta rule behind a decay (arXiv 2406.06484, 2412.06464, 2510.26692): S <- e^g S,
        u = β (v - Sᵀ k), S <- S + k uᵀ, y = scale Sᵀ q, with q and k of unit length. β is [B, H, T]."""
        unit = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        q, k, beta = unit(q) * scale, unit(k), beta[..., None] * self.mask
        log_decay = self.decay_channels(log_decay)
        state = self.past(name, (k.shape[1], k.shape[3], v.shape[3]))
        out = []
        for q, k, v, beta, g in chunks(q, k, v, beta, log_decay):
            sums = g.cumsum(2)
            last = sums[:, :, -1:]
            # What is written depends on what was written before it: a triangular system.
            system = beta * products(k, k, sums, strict=True)
            known = beta * (v - (k * sums.exp()) @ state)
            written = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
            out.append(products(q, k, sums) @ written + (q * sums.exp()) @ state)
            state = state * last.exp().mT + (k * (last - sums).exp()).mT @ written
        self.state.tensors[name] = state
        return torch.cat(out, 2)

    def decay_channels(self, g):
        g = g[..., None] if g.dim() == 3 else g
        return (g * self.mask).clamp(min=LOWEST)

    def counted(self, name, q, k, v, log_decay):
        """Σ a_ij v_j [B, H, T, V] and Σ a_ij [B, H, T, 1], a_ij = e^{G_i - G_j} q_i·k_j."""
        y = self.gated(name, q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), log_decay)
        return y[..., :-1], y[..., -1:]

    def normalised(self, name, q, k, v, log_decay):
        total, count = self.counted(name, q, k, v, log_decay)
        return total / count.clamp(min=MIN_DENOMINATOR)

    # Parts.

    def window(self, size, rotated=True):
        """Softmax over the last `size` keys, self included: y [B, H, T, D]; the largest score and the sum of
        exp(score - largest) [B, H, T, 1]; key and value [B, G, T, D] that left the window at each position, and whether
        one did."""
        q, k = self.rotated if rotated else (self.q, self.k)
        time = q.shape[2]
        keys, values = self.behind("k", k, size), self.behind("v", self.v, size)
        real = self.behind("real", torch.ones_like(self.mask), size)  # [B, 1, size + T, 1]
        rows = []
        for start in range(0, time, PIECE):
            n = min(PIECE, time - start)
            cut = slice(start, start + size + n)
            i, j = torch.arange(n, device=q.device)[:, None], torch.arange(size + n, device=q.device)
            inside = (j > i) & (j <= i + size) & real[:, :, cut].mT.bool()
            scores = self.scores(q[:, :, start : start + n], self.repeat(keys[:, :, cut]))
            scores = scores.masked_fill(~inside, -torch.inf)
            top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
            weights = (scores - top).exp()
            mass = weights.sum(-1, keepdim=True)
            rows.append((weights @ self.repeat(values[:, :, cut]) / mass.clamp(min=1e-30), top, mass))
        y, top, mass = (torch.cat(part, 2) for part in zip(*rows))
        return y, top, mass, keys[:, :, :time], values[:, :, :time], real[:, :, :time]

    def beside(self, linear):
        """A softmax window whose output is added to that of the linear branch [B, H, T, D]."""
        settings = self.settings["window"]
        if settings["size"] == 0:
            return linear
        weights = [self.weight("mix_window"), self.weight("mix_linear")]
        if weights[0] is None:
            weights = [linear.new_full((linear.shape[1],), settings[key]) for key in ("weight", "linear_weight")]
        window = self.window(settings["size"])[0]
        if settings["gate"]:
            factors = 2 * self.project("mix_gate.weight").sigmoid().mT[..., None]  # [B, 2 H, T, 1]
            window, linear = (y * f for y, f in zip((window, linear), factors.chunk(2, 1)))
        return window * self.by_head(weights[0]) + linear * self.by_head(weights[1])

    def shared(self, phi_q, log_decay, keys, sinks=None):
        """A softmax window and a decaying linear branch under one denominator: a key joins the state when it leaves the
        window, with the decay it met there. `keys` gives φk [B, H, T, F] of rotated keys [B, G, T, D]."""
        settings = self.settings
        size = settings["window"]
        if size == 0:
            return self.normalised("s", phi_q, keys(self.rotated[1]), self.repeat(self.v), log_decay)
        y, top, mass, left_k, left_v, left = self.window(size)
        log_decay = log_decay[..., None] if log_decay.dim() == 3 else log_decay
        phi_k = keys(left_k) * self.recent("gates", log_decay, size).exp() * left
        total, count = self.counted("s", phi_q, phi_k, self.repeat(left_v), log_decay)
        sigma = self.by_head(self.weight("window_factors")).sigmoid()
        highest = top if sinks is None else top.maximum(sinks.max())
        mass = sigma * mass * (top - highest).exp()
        sunk = 0.0 if sinks is None else sigma * (sinks - highest).exp().sum(-1, keepdim=True)
        share = 1 - sigma if settings["affine"] else 1.0
        return (mass * y + share * total) / (mass + share * count + sunk).clamp(min=1e-30)

    def conv(self, name, x):
        """A short causal convolution of x [B, heads, T, D], one filter per channel; the last tap is the token's own."""
        weight = self.weight(name)
        if weight is None:
            return x
        heads, time, taps = x.shape[1], x.shape[2], weight.shape[-1]
        weight, rows = weight.reshape(heads, 1, -1, taps), self.behind(name, x, taps - 1)
        return sum(rows[:, :, tap : tap + time] * weight[..., tap] for tap in range(taps))

    def features(self, x, which, kind=None):
        """φ [B, H, T, F] of queries or keys, by one map per query head."""
        kind, x = kind or self.settings["feature_map"], self.repeat(x)
        if kind in PLAIN_MAPS:
            return PLAIN_MAPS[kind](x)
        tied = which == "k" and self.weight("feature_map_k.mlp.layer") is None
        name = f"feature_map_{'q' if tied else which}.mlp"
        weight, bias = self.weight(f"{name}.layer"), self.weight(f"{name}.bias")
        if self.settings.get("skip_connection"):
            weight = weight + torch.eye(weight.shape[-1], device=weight.device)
        z = x @ weight if bias is None else x @ weight + self.by_head(bias)
        if kind == "softmax_dim":
            return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(min=1e-12)
        if kind == "exp_dim":
            return torch.cat([z - z.amax(-1, keepdim=True), z.amin(-1, keepdim=True) - z], -1).exp().clamp(min=1e-12)
        if kind == "exp":
            return torch.cat([z, -z], -1).exp().clamp(min=1e-12)
        if kind == "relu":
            return z.relu()
        if kind == "taylor":
            # 1, u, u_i u_j, so that products are 1 + s + s²/2 with s = u·u' / sqrt(columns).
            i, j = torch.triu_indices(z.shape[-1], z.shape[-1], device=z.device)
            root = z.shape[-1] ** 0.5
            pairs = z[..., i] * z[..., j] * torch.where(i == j, 0.5**0.5, 1.0) / root
            return torch.cat([torch.ones_like(z[..., :1]), z / root**0.5, pairs], -1)
        raise ValueError(f"feature map `{kind}` is not known here; this file is older than the model")

    def log_decay(self, width):
        """What a state forgets: [B, H, T], or [B, H, T, width] of the kinds with a number per channel."""
        g = self.unbounded_decay(width)
        return g.clamp(min=-1) if self.settings.get("exponents") == "recentred" else g

    def unbounded_decay(self, width):
        gate = self.settings["gate"]
        kind, (rows, heads, time, _) = gate["kind"], self.q.shape
        log_sigmoid = lambda x: F.logsigmoid(x) / gate["normaliser"]
        channels = lambda x: self.repeat(x.reshape(rows, time, -1, width).transpose(1, 2))
        head = torch.arange(heads, device=self.x.device, dtype=torch.float32)
        if kind in ("scalar_token", "scalar_head"):
            g = log_sigmoid(self.project("g_proj_decay.weight", "g_proj_decay.bias"))
            return g.mT.expand(rows, heads, time)
        if kind == "mamba2":
            step = F.softplus(self.project("a_proj.weight") + self.weight("dt_bias"))
            return (-self.weight("A_log").exp() * step).mT
        if kind == "low_rank":
            narrow = self.project("gk_proj.0.weight")
            logits = F.linear(narrow, self.weight("gk_proj.1.weight"), self.weight("gk_proj.1.bias"))
            return channels(log_sigmoid(logits))
        if kind == "pooled":
            k = self.k.transpose(1, 2)
            return channels(log_sigmoid(F.adaptive_avg_pool1d(k.flatten(2), k.shape[2] * width)))
        if kind == "retention":
            g = torch.log1p(-torch.exp2(-5 - head))
        elif kind == "lightning":
            g = -8 / heads * (1 - self.attention.layer_idx / self.attention.config.num_hidden_layers) * head
        elif kind == "none":
            g = torch.zeros_like(head)
        else:
            raise ValueError(f"gate `{kind}` is not known here; this file is older than the model")
        return g[:, None].expand(rows, heads, time)

    def finish(self, y):
        """Norm and gate of the output [B, H, T, D]."""
        norm = self.weight("o_norm.weight")
        if norm is not None:
            y = y * (y.square().mean(-1, keepdim=True) + self.attention.norm_eps).rsqrt() * self.by_head(norm)
        if "g_proj.weight" in self.attention.tensors:
            gate = self.project("g_proj.weight", "g_proj.bias")
            gate = F.silu(gate) if self.settings["output"]["gate"] == "silu" else gate.sigmoid()
            y = y * gate.unflatten(-1, (y.shape[1], -1)).transpose(1, 2)
        return y


def chunks(*tensors):
    """Slices along time; decays per channel, the last of the tensors, need pairs of rows by channels: shorter ones."""
    n = 64 if tensors[-1].shape[-1] == 1 else 16
    return zip(*(t.split(n, dim=2) for t in tensors))


def decay_between(sums, strict=False):
    """exp(G_i - G_j) for j <= i (`strict`: j < i), else 0: [B, H, n, n, channels]."""
    n = sums.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool, device=sums.device).tril(-1 if strict else 0)
    return (sums[:, :, :, None] - sums[:, :, None]).masked_fill(~keep[..., None], -torch.inf).exp()


def products(a, b, sums, strict=False):
    """Σ_d a_i[d] b_j[d] exp(G_i[d] - G_j[d]) for j <= i (`strict`: j < i), else 0: [B, H, n, n]."""
    decay = decay_between(sums, strict)
    if decay.shape[-1] == 1:
        return a @ b.mT * decay[..., 0]
    return torch.einsum("bhid,bhjd,bhijd->bhij", a, b, decay)


# Mixers: [B, H, T, D] of a pass.


def lolcats(p):
    """Learned features beside a softmax window, one denominator (arXiv 2410.10254)."""
    size, terraced = p.settings["window"], p.settings["window_kind"] == "terraced" and p.settings["window"] > 0
    held = 2 * size if terraced else size
    (q, k), time = p.rotated, p.q.shape[2]
    place = (p.counts * p.real)[:, None, :, None]  # position + 1; 0 for padding and for what the state holds
    keys, values = p.behind("k", k, held), p.behind("v", p.v, held)
    places = torch.cat([p.past("places", (1, held, 1), torch.long), place], 2)
    # Keys at places up to this are linear.
    before = lambda at: ((at - 1) // size - 1).clamp(min=0) * size if terraced else (at - size).clamp(min=0)
    factors = p.weight("window_factors")
    sigma = 0.5 if factors is None else p.by_head(factors).sigmoid()
    share = 1 - sigma if p.settings["affine"] else 1.0
    phi_q = p.features(q, "q")
    state = p.past("s", (*phi_q.shape[1:2], phi_q.shape[3], p.v.shape[3] + 1))
    out = []
    for start in range(0, time, PIECE):
        n = min(PIECE, time - start)
        cut, rows = slice(start, start + held + n), slice(start, start + n)
        k, v = p.repeat(keys[:, :, cut]), p.repeat(values[:, :, cut])
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column counts
        at, of = place[:, :, rows], places[:, :, cut].mT  # [B, 1, n, 1], [B, 1, 1, held + n]
        seen = (of > 0) & (of <= at)
        inside, linear = seen & (of > before(at)), seen & (of <= before(at))
        scores = p.scores(q[:, :, rows], k).masked_fill(~inside, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        phi_k = p.features(keys[:, :, cut], "k")
        weights = sigma * (scores - top).exp() + share * (phi_q[:, :, rows] @ phi_k.mT).masked_fill(~linear, 0)
        y = weights @ v + share * (phi_q[:, :, rows] @ state)
        out.append(y[..., :-1] / y[..., -1:].clamp(min=MIN_DENOMINATOR))
        # What the next position's window no longer holds joins the state.
        leaving = (of > 0) & (of <= before(at.amax(2, keepdim=True) + 1))
        state = state + (phi_k * leaving.mT).mT @ v
        places = places.clone()
        places[:, :, cut] = places[:, :, cut].masked_fill(leaving.mT, 0)
    p.state.tensors["s"] = state
    p.state.tensors["places"] = places[:, :, time:]
    return torch.cat(out, 2)


def lizard(p):
    """A softmax window with sinks, gated linear attention behind it, one denominator (after arXiv 2507.09025)."""
    phi_q = p.features(p.rotated[0], "q")
    keys = lambda k: p.features(k, "k")
    return p.shared(phi_q, p.log_decay(phi_q.shape[-1]), keys, p.weight("lizard.sinks"))


def lizard_paper(p):
    """Gated linear attention plus a softmax window with sinks or meta tokens, each normalised alone, as published
    (arXiv 2507.09025)."""
    rotary = p.settings["rotary"]
    phi_q, phi_k = p.features(p.q, "q"), p.features(p.k, "k")
    gated = p.normalised("s", phi_q, phi_k, p.repeat(p.v), p.log_decay(phi_q.shape[-1]))
    y, top, mass, *_ = p.window(p.settings["window"], rotary)
    total, count = y * mass, mass
    sinks, meta_k = p.weight("lizard.sinks"), p.weight("lizard.meta_k")
    if sinks is not None:
        count = count + (sinks - top).clamp(max=80).exp().sum(-1, keepdim=True)
    if meta_k is not None:
        meta = lambda x: p.repeat(x.transpose(0, 1)[None])  # [1, H, m, D]
        scores = (p.rotated[0] if rotary else p.q) @ meta(meta_k).mT * p.q.shape[-1] ** -0.5
        weights = (scores - top).clamp(max=80).exp()
        total, count = total + weights @ meta(p.weight("lizard.meta_v")), count + weights.sum(-1, keepdim=True)
    return gated + p.weight("lizard.alpha").reshape(1, -1, 1, 1) * total / count.clamp(min=1e-30)


def lawcat(p):
    """Short convolutions, features, gated decay, normalised (arXiv 2509.18467)."""
    time, size = p.q.shape[2], p.settings["window"]
    phi_q = p.features(p.conv("q_conv1d.weight", p.q), "q")
    own = p.conv("k_conv1d.weight", p.repeat(p.k))
    # The keys behind the window are those of before, convolved then.
    keys = lambda _: p.features(p.behind("left", own, size)[:, :, :time], "k")
    return p.shared(phi_q, p.log_decay(phi_q.shape[-1]), keys)


def gla(p):
    """Gated linear attention and its kin: GLA, simple GLA, RetNet, lightning, Liger-GLA (arXiv 2312.06635)."""
    q, k = p.rotated if p.settings["rotary"] else (p.q, p.k)
    q, k, v = p.features(q, "q"), p.features(k, "k"), p.repeat(p.v)
    g = p.log_decay(q.shape[-1])
    if p.settings["normalise"] == "sum":
        y = p.normalised("s", q, k, v, g)
    else:
        y = p.gated("s", q, k, v, g, p.settings["scale"])
    return p.beside(p.finish(y))


def hgrn2(p):
    """Gated linear attention whose key is what its gate lets go (arXiv 2404.07904)."""
    f, lower = p.repeat(p.k), p.weight("lower_bound")
    q = p.q.softmax(-1) if p.settings["query_map"] == "softmax" else F.silu(p.q)
    if lower is None:
        g, k = F.logsigmoid(f), (-f).sigmoid()
    else:
        bound = p.by_head(lower).sigmoid()
        g, k = (bound + (1 - bound) * f.sigmoid()).log(), (1 - bound) * (-f).sigmoid()
    return p.beside(p.finish(p.gated("s", q, k, p.repeat(p.v), g)))


def gsa(p):
    """Keys and values in a few gated slots, read by a softmax (arXiv 2409.07146)."""
    g = p.log_decay(p.settings["slots"] or p.q.shape[-1])
    written = 1 - g.exp()
    logits = p.gated(
        "slot_keys", p.features(p.q, "q"), p.features(p.k, "k"), written, g, p.settings["scale"], values=True
    )
    return p.beside(p.finish(p.gated("slot_values", logits.softmax(-1), written, p.repeat(p.v), g)))


def delta(p):
    """The delta rule: DeltaNet, gated DeltaNet, Kimi delta attention by their gates."""
    settings = p.settings
    silu = lambda x, on: F.silu(x) if on else x
    q, k = p.rotated if settings["rotary"] else (p.q, p.k)
    q = silu(p.conv("q_conv1d.weight", q), settings["silu"])
    k = p.repeat(silu(p.conv("k_conv1d.weight", k), settings["silu"]))
    v = p.repeat(silu(p.conv("v_conv1d.weight", p.v), settings["silu"] and settings["conv"] > 0))
    beta = p.project("b_proj.weight", "b_proj.bias").sigmoid().mT
    return p.beside(p.finish(p.delta("s", q, k, v, beta, p.log_decay(k.shape[-1]), settings["scale"])))


def mamba2(p):
    """Mamba-2 started from attention: values, keys, queries as x, B, C (arXiv 2405.21060)."""
    settings = p.settings
    silu = F.silu if settings["silu"] and settings["conv"] > 0 else lambda x: x
    unit = lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if settings["bc_norm"] else x
    x = p.repeat(silu(p.conv("x_conv1d.weight", p.v)))
    b = p.repeat(unit(silu(p.conv("B_conv1d.weight", p.k))))
    c = unit(silu(p.conv("C_conv1d.weight", p.q)))
    step = F.softplus(p.project("dt_proj.weight", "dt_bias")).mT  # [B, H, T]
    if settings["layout"] == "mamba_in_llama":
        written, g = x * step[..., None], -p.weight("A_log").exp()[:, None] * step
    else:
        written, g = x, -step
    scale = c.shape[-1] ** 0.5 if settings["bc_norm"] else 1.0
    return p.beside(p.finish(p.gated("s", c, b, written, g, scale) + p.by_head(p.weight("D")) * x))


def mala(p):
    """Magnitude-aware linear attention, causal (arXiv 2507.00698)."""
    q, k = p.rotated if p.settings["rotary"] else (p.q, p.k)
    q, k, v = p.features(q, "q"), p.features(k, "k"), p.repeat(p.v)
    scale, n = q.shape[-1] ** -0.5, p.counts.clamp(min=1)[:, None, :, None]
    total, count = p.counted("s", q, k, v, torch.zeros_like(q[..., 0]))
    z = scale * count / n
    return p.beside(scale * total / n * (1 + 1 / (z + 1e-6)) - z * p.running_sum("sum", v) / n)


def rala(p):
    """Rank-augmented linear attention, causal: a key is weighed by the queries before it (arXiv 2411.07635)."""
    q, k = p.rotated if p.settings["rotary"] else (p.q, p.k)
    q, k = p.features(q, "q"), p.features(k, "k")
    mean = p.running_sum("queries", q) / p.counts.clamp(min=1)[:, None, :, None]
    exponent = ((mean * k).sum(-1) * q.shape[-1] ** -0.5).masked_fill(~p.real[:, None].bool(), -1e30)
    # The largest exponent so far leaves the state as a decay; it cancels, so no gradient goes through it.
    past = p.past("top", (q.shape[1], 1), fill=-1e30)
    top = torch.cat([past, exponent.detach()], -1).cummax(-1).values
    p.state.tensors["top"] = top[..., -1:]
    k = k * (exponent - top[..., 1:]).exp()[..., None]
    return p.beside(p.finish(p.normalised("s", q, k, p.repeat(p.v), top[..., :-1] - top[..., 1:])))


MIXERS = {
    "lolcats": lolcats,
    "lizard": lizard,
    "lizard-paper": lizard_paper,
    "lawcat": lawcat,
    "gla": gla,
    "hgrn2": hgrn2,
    "gsa": gsa,
    "delta": delta,
    "mamba2": mamba2,
    "mala": mala,
    "rala": rala,
}


class Attention:
    """A converted layer's attention as a change of the family's own: its projections, biases and norms of queries and
    keys run as they are, without a rotation and with a mixer in the place of softmax."""

    def add_mixer(self, linearization):
        self.settings = linearization["mixer"]
        self.tensors = linearization["tensors"]  # name -> shape
        self.norm_eps = linearization["norm_eps"]
        self.config = copy.copy(self.config)
        self.config._attn_implementation_internal = "margay"
        for name, shape in self.tensors.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        real = kwargs.pop("margay_real", None)
        if real is None:
            real = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        cache = kwargs.pop("layer_past", past_key_values)
        state = MixerState() if cache is None else cache.layers[self.layer_idx]
        if position_embeddings is not None:
            cos, sin = position_embeddings
            kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        parts = (hidden_states, position_embeddings, real, state)
        return super().forward(hidden_states, attention_mask=None, margay=parts, **kwargs)


def mix(attention, query, key, value, attention_mask, scaling=None, softcap=None, margay=None, **kwargs):
    """The mixer as an attention function of transformers: query [B, H, T, D], key and value [B, G, T, D] before
    position encoding -> [B, T, H, D]."""
    x, turn, real, state = margay
    # Mixers know of the root of the width alone: another scale of scores is the queries'.
    root = query.shape[-1] ** -0.5
    if scaling is not None and scaling != root:
        query = (query.float() * (scaling / root)).to(query.dtype)
    rotated = (query, key)
    if turn is not None and getattr(attention, "use_rope", True):
        rotated = sys.modules[attention.family.__module__].apply_rotary_pos_emb(query, key, *turn)
    p = Pass(attention, x, query, key, value, rotated, real, state, softcap)
    y = MIXERS[attention.settings["kind"]](p)
    state.length += x.shape[1]
    return y.transpose(1, 2).to(x.dtype).contiguous(), None


AttentionInterface.register("margay", mix)


@cache
def attention_class(family):
    return type(f"Margay{family.__name__}", (Attention, family), {"family": family})


class Linearized:
    """The part of a converted model that is not its family's."""

    _is_stateful = True  # a state cannot be rolled back, so what would need it is refused
    _can_compile_fullgraph = False

    @classmethod
    def from_pretrained(cls, *args, config, **kwargs):
        if getattr(config, "attn_logit_softcapping", None) is not None:
            kwargs.setdefault("attn_implementation", "eager")  # sdpa does not bend the scores of layers that stay
        return super().from_pretrained(*args, config=config, **kwargs)

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        blocks = next(child for child in self.get_decoder().children() if isinstance(child, nn.ModuleList))
        for index in config.linearization["layers"]:
            name = next(name for name in ATTENTION if hasattr(blocks[index], name))
            attention = attention_class(type(getattr(blocks[index], name)))(config=self.config, layer_idx=index)
            attention.add_mixer(config.linearization)
            setattr(blocks[index], name, attention)

    # `generate` and trainers look for the names of these arguments.
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        time = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            MixerState.install(past_key_values, self.config.linearization["layers"])
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask.long()
            if past_key_values is not None and time > 1 and bool((real[:, 1:] < real[:, :-1]).any()):
                raise ValueError("rows must be padded on the left: set `tokenizer.padding_side = 'left'`")
            if position_ids is None:
                position_ids = (real.cumsum(1) - 1).clamp(min=0)[:, -time:]
            kwargs["margay_real"] = real[:, -time:]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


@cache
def of_family(config_class, architecture, names):
    """`MargayForCausalLM` as a subclass of a family's model, whose mixers have tensors of these names."""
    family = getattr(transformers, architecture)
    wide = {f"{place}.{name}" for place in ATTENTION for name in names}
    wide |= set(family._keep_in_fp32_modules_strict or ())
    body = {
        "config_class": config_class,
        "_auto_class": "AutoModelForCausalLM",
        "_keep_in_fp32_modules_strict": wide,
        "__module__": __name__,
    }
    return type("MargayForCausalLM", (Linearized, family), body)


class MargayForCausalLM(PreTrainedModel, GenerationMixin):
    """What `config.json` names: loading it gives the family's own model with the converted layers replaced."""

    config_class = MargayConfig

    @staticmethod
    def of(config):
        linearization = config.linearization
        names = tuple(sorted(linearization["tensors"]))
        architecture = linearization["base_architectures"][0]
        # Where the family's tensors have other names in files, or lie there apart, as experts do.
        known = map(get_checkpoint_conversion_mapping, (architecture, linearization["base_model_type"]))
        stored = next((found for found in known if found is not None), [])
        register_checkpoint_conversion_mapping(MargayConfig.model_type, stored, overwrite=True)
        return of_family(type(config), architecture, names)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if config is None:
            config = MargayConfig.from_pretrained(pretrained_model_name_or_path)
        return cls.of(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls.of(config)._from_config(config, **kwargs)

    @classmethod
    def from_adapter(cls, folder, base=None, **kwargs):
        """The model of an adapter folder: the weights of `base`, by default the model it was made from, with the mixers
        of the folder. Its LoRA, where it has one, is added by `peft.PeftModel.from_pretrained(model, folder)`."""
        config = MargayConfig.from_pretrained(folder)
        model = cls.of(config).from_pretrained(base or config.linearization["teacher"], config=config, **kwargs)
        own, tensors = model.state_dict(), load_file(f"{folder}/mixers.safetensors")
        rules = get_checkpoint_conversion_mapping(MargayConfig.model_type) or []

        def spelled(name):
            """A checkpoint's name as the class has it: some words differ, and what the class puts first may be left out."""
            if name in own:
                return name
            for rule in rules:
                name = rule.rename_source_key(name)[0]
            return name if name in own else f"{model.base_model_prefix}.{name}"

        tensors = {spelled(name): x for name, x in tensors.items()}
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"`{folder}` has tensors that the model lacks: {unknown}")
        return model
