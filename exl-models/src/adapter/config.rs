//! `adapter_config.json`.

use std::path::{Path, PathBuf};

use exl_format::read_json;
use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::{config_path, refuse};
use crate::Result;

/// Settings that change what an adapter computes and must be off.
const OFF: [&str; 14] = [
    "fan_in_fan_out",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
];
/// Ways to begin that leave the base model as it is; others (such as pissa) train against changed
/// weights that are not in the adapter.
const STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What the scale of a linear's adapter follows from.
pub(super) struct Config {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    /// By the square root of the rank.
    stabilized: bool,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
}

impl Config {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = config_path(dir);
        let json: Option<Map<String, Value>> = read_json(&path)?;
        let json = json.ok_or_else(|| refuse(&path, "there is no such file"))?;
        let kind = json.get("peft_type").and_then(Value::as_str);
        if kind != Some("LORA") {
            let what = format!(
                "peft_type: expected \"LORA\", found {}",
                shown(&json, "peft_type")
            );
            return Err(refuse(&path, &what));
        }
        for key in OFF {
            if !is_off(json.get(key)) {
                let what = format!("{key}: {} is not supported", shown(&json, key));
                return Err(refuse(&path, &what));
            }
        }
        if !matches!(
            json.get("bias").map(Value::as_str),
            None | Some(Some("none"))
        ) {
            let what = format!("bias: {} is not supported", shown(&json, "bias"));
            return Err(refuse(&path, &what));
        }
        if let Some(Value::String(start)) = json.get("init_lora_weights")
            && !STARTS.contains(&start.as_str())
        {
            let what = format!(
                "init_lora_weights: {start:?} changes the weights of the base model; convert the \
                 adapter to a plain one"
            );
            return Err(refuse(&path, &what));
        }
        let number = |key: &str| {
            let found = json
                .get(key)
                .and_then(Value::as_f64)
                .filter(|v| v.is_finite());
            found.ok_or_else(|| {
                let what = format!("{key}: expected a number, found {}", shown(&json, key));
                refuse(&path, &what)
            })
        };
        Ok(Self {
            rank: match number("r")? {
                r if r >= 1.0 && r.fract() == 0.0 => r as usize,
                _ => {
                    let what = format!(
                        "r: expected a whole number from 1 on, found {}",
                        shown(&json, "r")
                    );
                    return Err(refuse(&path, &what));
                }
            },
            alpha: number("lora_alpha")?,
            stabilized: match json.get("use_rslora") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(on)) => *on,
                Some(_) => {
                    let found = shown(&json, "use_rslora");
                    let what = format!("use_rslora: expected true or false, found {found}");
                    return Err(refuse(&path, &what));
                }
            },
            ranks: patterns(&path, &json, "rank_pattern")?,
            alphas: patterns(&path, &json, "alpha_pattern")?,
            path,
        })
    }

    /// What multiplies the product of a linear's matrices of this rank.
    pub(super) fn factor(&self, linear: &str, rank: usize, weights: &Path) -> Result<f32> {
        let of = |patterns: &[(Regex, f64)], default: f64| {
            let found = patterns
                .iter()
                .find(|(pattern, _)| pattern.is_match(linear));
            found.map_or(default, |(_, value)| *value)
        };
        let wanted = of(&self.ranks, self.rank as f64);
        if wanted != rank as f64 {
            let what = format!(
                "{linear} has rank {rank}, {} says {wanted}",
                self.path.display()
            );
            return Err(refuse(weights, &what));
        }
        let by = if self.stabilized {
            wanted.sqrt()
        } else {
            wanted
        };
        let factor = (of(&self.alphas, self.alpha) / by) as f32;
        if !factor.is_finite() {
            let what = format!("{linear}: lora_alpha over the rank is beyond 32-bit numbers");
            return Err(refuse(&self.path, &what));
        }
        Ok(factor)
    }
}

/// Patterns of one kind, and bytes that a compiled one takes, at most.
const MOST_PATTERNS: usize = 4096;
const PATTERN_BYTES: usize = 64 << 10;

/// Values by patterns of names: as a whole, or from a dot on.
fn patterns(path: &Path, json: &Map<String, Value>, key: &str) -> Result<Vec<(Regex, f64)>> {
    let wrong = |what: String| refuse(path, &format!("{key}: {what}"));
    let map = match json.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(format!("expected an object, found {other}"))),
    };
    let pair = |(pattern, value): (&String, &Value)| {
        // By itself first: an error then shows the pattern as it is in the file.
        let regex = compiled(pattern).and_then(|_| compiled(&format!(r"^(?:.*\.)?(?:{pattern})$")));
        let regex = regex.map_err(|error| wrong(error.to_string()))?;
        let value = value.as_f64().filter(|v| v.is_finite());
        let value = value.ok_or_else(|| wrong(format!("{pattern} has no number")))?;
        Ok((regex, value))
    };
    if map.len() > MOST_PATTERNS {
        return Err(wrong(format!(
            "{} patterns, more than {MOST_PATTERNS}",
            map.len()
        )));
    }
    map.iter().map(pair).collect()
}

/// A pattern that takes little memory: names of linears are simple.
fn compiled(pattern: &str) -> std::result::Result<Regex, regex::Error> {
    RegexBuilder::new(pattern).size_limit(PATTERN_BYTES).build()
}

fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}

fn shown(json: &Map<String, Value>, key: &str) -> String {
    json.get(key).map_or("nothing".to_owned(), Value::to_string)
}
