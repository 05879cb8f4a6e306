//! Sampling settings: flags over a preset over the model's generation_config.json over built-in
//! defaults.

use crate::args::SamplingArgs;
use crate::failure::Usage;
use anyhow::{Context, Result, bail};
use exl_format::{ConfigFile, ModelFiles};
use exl_gen::{Mirostat, SamplerSettings};
use std::path::Path;

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
    let base = match &args.preset {
        Some(path) => {
            let whole = || format!("--preset {}", path.display());
            let settings = apply(&preset(path).with_context(whole)?, base);
            settings.check().with_context(whole)?;
            settings
        }
        None => base,
    };
    let settings = apply(args, base);
    // What the files say is in range: a flag is not.
    settings.check().map_err(|e| Usage(e.to_string()))?;
    Ok(settings)
}

/// Reads a preset. Unknown keys are errors.
pub(crate) fn preset(path: &Path) -> Result<SamplingArgs> {
    let text = std::fs::read_to_string(path).context("the file cannot be read")?;
    let preset: SamplingArgs = match path.extension().and_then(|e| e.to_str()) {
        Some("json") => serde_json::from_str(&text)?,
        Some("toml") => toml::from_str(&text)?,
        _ => return Err(Usage("its name must end in .json or .toml".to_owned()).into()),
    };
    if preset.greedy && preset.temperature.is_some() {
        bail!("`greedy` and `temperature` exclude each other");
    }
    Ok(preset)
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
    let wide = |n: Option<u32>| n.map(|n| n as usize);
    let mirostat = args.mirostat.map(|version| match version {
        0 => Mirostat::Off,
        1 => Mirostat::V1,
        _ => Mirostat::V2,
    });
    let mut settings = SamplerSettings {
        top_k: wide(args.top_k).unwrap_or(base.top_k),
        penalty_range: wide(args.penalty_range).or(base.penalty_range),
        penalty_decay: wide(args.penalty_decay).unwrap_or(base.penalty_decay),
        mirostat: mirostat.unwrap_or(base.mirostat),
        dry_allowed_length: wide(args.dry_allowed_length).unwrap_or(base.dry_allowed_length),
        dry_max_ngram: wide(args.dry_max_ngram).unwrap_or(base.dry_max_ngram),
        dry_range: wide(args.dry_range).or(base.dry_range),
        temperature_last: args.temperature_last.unwrap_or(base.temperature_last),
        seed: args.seed.or(base.seed),
        ..base
    };
    set_numbers(&mut settings, args);
    set_lists(&mut settings, args);
    settings
}

fn set_numbers(settings: &mut SamplerSettings, args: &SamplingArgs) {
    macro_rules! set {
        ($($name:ident)*) => { $(
            if let Some(value) = args.$name {
                settings.$name = value;
            }
        )* };
    }
    set! {
        temperature min_temperature max_temperature temperature_exponent smoothing_factor
        top_p top_a min_p tfs typical_p mirostat_tau mirostat_eta xtc_probability xtc_threshold
        skew repetition_penalty frequency_penalty presence_penalty dry_multiplier dry_base
    }
}

fn set_lists(settings: &mut SamplerSettings, args: &SamplingArgs) {
    macro_rules! set {
        ($($name:ident)*) => { $(
            if args.$name.is_some() {
                settings.$name.clone_from(&args.$name);
            }
        )* };
    }
    set! { xtc_protected_tokens dry_sequence_breakers allowed_tokens }
    if !args.logit_bias.is_empty() {
        settings.logit_bias.clone_from(&args.logit_bias);
    }
    if !args.banned_tokens.is_empty() {
        settings.banned_tokens.clone_from(&args.banned_tokens);
    }
    if !args.sampler_order.is_empty() {
        settings.order.clone_from(&args.sampler_order);
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

    /// Every key of a preset, in both languages, arrives; a flag wins over it.
    #[test]
    fn presets_say_what_flags_say() {
        let json = json!({
            "temperature": 0.9, "top_k": 30, "top_p": 0.7, "min_p": 0.05,
            "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": -0.1, "seed": 7,
            "penalty_range": 64, "penalty_decay": 32, "temperature_last": true,
            "min_temperature": 0.5, "max_temperature": 1.5, "temperature_exponent": 2.0,
            "smoothing_factor": 0.3, "top_a": 0.2, "tfs": 0.95, "typical_p": 0.9, "mirostat": 1,
            "mirostat_tau": 3.0, "mirostat_eta": 0.2, "xtc_probability": 0.5,
            "xtc_threshold": 0.2, "xtc_protected_tokens": [5], "skew": -0.5,
            "dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_max_ngram": 12,
            "dry_range": 512, "dry_sequence_breakers": ["\n", "*"],
            "logit_bias": {"11": 2.5, "12": -100.0}, "allowed_tokens": [1, 2],
            "banned_tokens": [3], "sampler_order": ["min-p", "top_k"],
        });
        let read = |name: &str, text: &str| {
            let path = std::env::temp_dir().join(format!("exl-{}-{name}", std::process::id()));
            std::fs::write(&path, text).unwrap();
            let preset = preset(&path);
            std::fs::remove_file(&path).unwrap();
            preset
        };
        let from_json = read("a.json", &json.to_string()).unwrap();
        let mut text = String::new();
        for (key, value) in json.as_object().unwrap() {
            match value.as_object() {
                Some(table) => {
                    for (id, bias) in table {
                        text.insert_str(0, &format!("{key}.{id} = {bias}\n"));
                    }
                }
                None => text.push_str(&format!("{key} = {value}\n")),
            }
        }
        let from_toml = read("b.toml", &text).unwrap();
        let settings = apply(&from_json, SamplerSettings::default());
        assert_eq!(settings, apply(&from_toml, SamplerSettings::default()));
        // Nothing kept its default: what differs from it is every setting.
        let (plain, changed) = (
            format!("{:#?}", SamplerSettings::default()),
            format!("{settings:#?}"),
        );
        for line in plain
            .lines()
            .filter(|line| line.contains(": ") && line.ends_with(','))
        {
            assert!(
                !changed.lines().any(|other| other == line),
                "{line} is not set"
            );
        }
        let flags = SamplingArgs {
            mirostat: Some(0),
            dry_range: Some(9),
            ..SamplingArgs::default()
        };
        let settings = apply(&flags, settings);
        assert_eq!(
            (settings.mirostat, settings.dry_range),
            (Mirostat::Off, Some(9))
        );
        assert_eq!(settings.typical_p, 0.9);

        for (name, text, word) in [
            ("c.json", "{\"temprature\": 1}", "`temprature`"),
            ("d.toml", "topk = 3", "`topk`"),
            ("e.json", "{\"preset\": \"x.json\"}", "`preset`"),
            ("f.json", "{\"logit_bias\": {\"a\": 1}}", "`a`"),
            ("g.toml", "sampler_order = [\"top-q\"]", "`top-q`"),
            ("h.yaml", "", ".json or .toml"),
            (
                "i.json",
                "{\"greedy\": true, \"temperature\": 1}",
                "exclude",
            ),
        ] {
            let error = format!("{:#}", read(name, text).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
    }
}
