//! From a [`Decoder`] to the [`Spec`] with every layer.

use super::decoder::{Decoder, Experts};
use crate::spec::{
    AttnSpec, DenseMlp, EmbedSpec, HeadNormOver, HeadNormSpec, HeadSpec, LayerSpec, LinearSpec,
    MlpSpec, MoeSpec, NormSpec, PositionsSpec, SharedExpert,
};
use crate::{Result, Spec};

impl Decoder {
    /// Writes out the layers.
    pub(super) fn spec(self) -> Result<Spec> {
        let s = &self.sizes;
        let at = |name: &str| format!("{}{name}", self.prefix);
        Ok(Spec {
            architecture: self.architecture.clone(),
            family: self.family,
            towers: self.towers,
            vocab: s.vocab,
            hidden: s.hidden,
            max_context: self.max_context,
            context: self.context,
            embed: EmbedSpec {
                key: at("model.embed_tokens"),
                scale: self.embed_scale,
                positions: self.positions.map(|count| PositionsSpec {
                    key: at("model.wpe"),
                    count,
                }),
            },
            layers: (0..s.layers).map(|i| self.layer(i)).collect(),
            final_norm: self.norm_at(&at("model.norm")),
            head: HeadSpec {
                linear: linear(&at("lm_head"), (s.hidden, s.vocab), false),
                tied: self.tied,
                scale: self.logit_scale,
                softcap: self.final_softcap,
            },
            ropes: self.ropes.clone(),
        })
    }

    fn layer(&self, index: usize) -> LayerSpec {
        let at = format!("{}model.layers.{index}", self.prefix);
        let norm = |name: Option<&str>| name.map(|n| self.norm_at(&format!("{at}.{n}")));
        LayerSpec {
            attn_norm: norm(self.names.attn_norm),
            attn: self.attention(&format!("{at}.self_attn"), index),
            attn_post: norm(self.names.attn_post),
            mlp_norm: norm(self.names.mlp_norm).filter(|_| !self.parallel),
            mlp: self.mlp(&at, index),
            mlp_post: norm(self.names.mlp_post),
            parallel: self.parallel,
            residual_scale: self.residual_scale,
        }
    }

    fn attention(&self, at: &str, index: usize) -> AttnSpec {
        let s = &self.sizes;
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let part = |name: &str, outputs| {
            linear(&format!("{at}.{name}"), (s.hidden, outputs), self.qkv_bias)
        };
        let head_norm = |name: &str, heads: usize| {
            let (kind, over) = self.head_norm?;
            let dim = match over {
                HeadNormOver::Row => heads * s.head_dim,
                HeadNormOver::Head | HeadNormOver::EachHead => s.head_dim,
            };
            let norm = NormSpec {
                key: format!("{at}.{name}"),
                dim,
                eps: self.eps,
                kind,
            };
            Some(HeadNormSpec { norm, over })
        };
        AttnSpec {
            key: at.to_owned(),
            q: part("q_proj", q),
            k: part("k_proj", kv),
            v: part("v_proj", kv),
            o: linear(&format!("{at}.o_proj"), (q, s.hidden), self.o_bias),
            q_norm: head_norm("q_norm", s.heads),
            k_norm: head_norm("k_norm", s.kv_heads),
            clip: self.clip,
            heads: s.heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            scale: self.scale,
            softcap: self.softcap,
            window: self.windows.get(index).copied().unwrap_or(0),
            rope: self.layer_ropes.get(index).copied().unwrap_or(Some(0)),
            style: self.style,
        }
    }

    fn mlp(&self, at: &str, index: usize) -> MlpSpec {
        let dense = |e: &Experts| e.dense.get(index).copied().unwrap_or(false);
        match self.experts.as_ref().filter(|e| !dense(e)) {
            Some(experts) => MlpSpec::Moe(Box::new(self.moe(at, experts))),
            None => {
                let n = &self.names;
                let key = format!("{at}.{}", n.mlp);
                let branches = (n.gate, n.up, n.down);
                MlpSpec::Dense(self.dense(key, branches, self.sizes.inner))
            }
        }
    }

    fn moe(&self, at: &str, experts: &Experts) -> MoeSpec {
        let hidden = self.sizes.hidden;
        let key = format!("{at}.{}", experts.block);
        let [gate, up, down] = experts.names;
        let expert = |e: usize| {
            let key = format!("{key}.experts.{e}");
            self.dense(key, (Some(gate), up, down), experts.inner)
        };
        let shared = |inner: usize| {
            let names = (Some("gate_proj"), "up_proj", "down_proj");
            SharedExpert {
                mlp: self.dense(format!("{key}.shared_expert"), names, inner),
                gate: Some(linear(
                    &format!("{key}.shared_expert_gate"),
                    (hidden, 1),
                    false,
                )),
            }
        };
        MoeSpec {
            router: linear(&format!("{key}.gate"), (hidden, experts.count), false),
            experts: (0..experts.count).map(expert).collect(),
            top_k: experts.top_k,
            norm: experts.norm,
            shared: experts.shared.map(shared),
            key,
        }
    }

    fn dense(
        &self,
        key: String,
        (gate, up, down): (Option<&str>, &str, &str),
        inner: usize,
    ) -> DenseMlp {
        let hidden = self.sizes.hidden;
        let part = |name: &str, sizes| linear(&format!("{key}.{name}"), sizes, self.mlp_bias);
        DenseMlp {
            gate: gate.map(|name| part(name, (hidden, inner))),
            up: part(up, (hidden, inner)),
            down: part(down, (inner, hidden)),
            act: self.act,
            key,
        }
    }

    /// A norm of a row of the residual stream.
    fn norm_at(&self, key: &str) -> NormSpec {
        NormSpec {
            key: key.to_owned(),
            dim: self.sizes.hidden,
            eps: self.eps,
            kind: self.norm,
        }
    }
}

fn linear(key: &str, (inputs, outputs): (usize, usize), bias: bool) -> LinearSpec {
    LinearSpec {
        key: key.to_owned(),
        inputs,
        outputs,
        bias,
    }
}
