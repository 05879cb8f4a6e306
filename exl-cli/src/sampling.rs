//! Sampling settings: flags over the model's generation_config.json over built-in defaults.

use crate::args::SamplingArgs;
use crate::failure::Usage;
use anyhow::{Context, Result};
use exl_format::{ConfigFile, ModelFiles};
use exl_gen::SamplerSettings;

/// Defaults of Hugging Face transformers, which a generation_config.json builds on.
const HUB_TOP_K: usize = 50;

/// The settings for a run.
pub(crate) fn settings(args: &SamplingArgs, files: &ModelFiles) -> Result<SamplerSettings> {
    let base = match files.generation_config()? {
        Some(config) => from_config(&config)?,
        None => SamplerSettings::default(),
    };
    base.check().with_context(|| {
        files
            .dir()
            .join("generation_config.json")
            .display()
            .to_string()
    })?;
    let settings = apply(args, base);
    // What the file says is in range: a flag is not.
    settings.check().map_err(|e| Usage(e.to_string()))?;
    Ok(settings)
}

/// What the file says; built-in defaults when it says nothing about sampling.
fn from_config(config: &ConfigFile) -> Result<SamplerSettings> {
    let number = |key: &'static str| -> Result<Option<f32>> {
        Ok(config.key(&[key]).number()?.map(|v| v as f32))
    };
    let temperature = number("temperature")?;
    let (top_p, min_p) = (number("top_p")?, number("min_p")?);
    let repetition = number("repetition_penalty")?;
    let top_k = config.key(&["top_k"]).integer()?;
    match config.key(&["do_sample"]).flag()? {
        Some(false) => {
            return Ok(SamplerSettings {
                repetition_penalty: repetition.unwrap_or(1.0),
                ..SamplerSettings::greedy()
            });
        }
        None if temperature.is_none() && top_p.is_none() && top_k.is_none() => {
            return Ok(SamplerSettings {
                repetition_penalty: repetition.unwrap_or(1.0),
                min_p: min_p.unwrap_or(0.0),
                ..SamplerSettings::default()
            });
        }
        _ => {}
    }
    Ok(SamplerSettings {
        temperature: temperature.unwrap_or(1.0),
        top_k: top_k.unwrap_or(HUB_TOP_K),
        top_p: top_p.unwrap_or(1.0),
        min_p: min_p.unwrap_or(0.0),
        repetition_penalty: repetition.unwrap_or(1.0),
        ..SamplerSettings::neutral()
    })
}

/// Flags win over whatever was there.
fn apply(args: &SamplingArgs, base: SamplerSettings) -> SamplerSettings {
    // A temperature asks for sampling, even of a model whose file says greedy.
    let greedy_base = base.is_greedy() && args.temperature.is_some_and(|t| t > 0.0);
    let base = match (args.greedy, greedy_base) {
        (true, _) => SamplerSettings {
            temperature: 0.0,
            ..base
        },
        (_, true) => SamplerSettings {
            repetition_penalty: base.repetition_penalty,
            ..SamplerSettings::default()
        },
        _ => base,
    };
    SamplerSettings {
        temperature: args.temperature.unwrap_or(base.temperature),
        top_k: args.top_k.map_or(base.top_k, |k| k as usize),
        top_p: args.top_p.unwrap_or(base.top_p),
        min_p: args.min_p.unwrap_or(base.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(base.repetition_penalty),
        frequency_penalty: args.frequency_penalty.unwrap_or(base.frequency_penalty),
        presence_penalty: args.presence_penalty.unwrap_or(base.presence_penalty),
        seed: args.seed.or(base.seed),
        ..base
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn config(value: Value) -> SamplerSettings {
        from_config(&ConfigFile::from_value(Path::new("generation_config.json"), value).unwrap())
            .unwrap()
    }

    #[test]
    fn a_silent_file_leaves_the_built_in_defaults() {
        assert_eq!(
            config(json!({"eos_token_id": 1})),
            SamplerSettings::default()
        );
    }

    #[test]
    fn a_file_builds_on_the_hub_s_defaults() {
        let settings = config(json!({"do_sample": true, "temperature": 0.6}));
        assert_eq!(
            (settings.temperature, settings.top_k, settings.top_p),
            (0.6, 50, 1.0)
        );
        assert!(config(json!({"do_sample": false, "temperature": 0.6})).is_greedy());
    }

    #[test]
    fn flags_win() {
        let base = config(json!({"temperature": 0.6, "top_p": 0.9}));
        let args = SamplingArgs {
            top_p: Some(0.5),
            seed: Some(3),
            ..SamplingArgs::default()
        };
        let settings = apply(&args, base.clone());
        assert_eq!(
            (settings.temperature, settings.top_p, settings.seed),
            (0.6, 0.5, Some(3))
        );
        let greedy = SamplingArgs {
            greedy: true,
            ..SamplingArgs::default()
        };
        assert!(apply(&greedy, base).is_greedy());
        let warm = SamplingArgs {
            temperature: Some(1.2),
            ..SamplingArgs::default()
        };
        assert!(!apply(&warm, SamplerSettings::greedy()).is_greedy());
    }
}
