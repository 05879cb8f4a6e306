//! Adapters.

use clap::Args;
use std::path::PathBuf;

/// What every generating command can add to a model.
#[derive(Clone, Debug, Args)]
pub(crate) struct LoraArgs {
    /// A low-rank adapter in PEFT's files, and how much of it is added [default: 1]; may be given
    /// several times
    #[arg(long, value_name = "DIR[=SCALE]", value_parser = lora)]
    pub(crate) lora: Vec<Lora>,
}

/// An adapter and its share.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Lora {
    pub(crate) dir: PathBuf,
    pub(crate) scale: f32,
}

/// What is behind the last `=` is a scale only if it is a number: names of folders may have one.
fn lora(text: &str) -> Result<Lora, String> {
    let split = text.rsplit_once('=');
    let split = split.and_then(|(dir, scale)| Some((dir, scale.parse::<f32>().ok()?)));
    let (dir, scale) = split.unwrap_or((text, 1.0));
    if dir.is_empty() || !scale.is_finite() {
        return Err("must be a folder, or a folder, `=` and a number".to_owned());
    }
    let dir = PathBuf::from(dir);
    Ok(Lora { dir, scale })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_stand_behind_the_last_sign() {
        let parsed = |text: &str| lora(text).map(|l| (l.dir.display().to_string(), l.scale));
        let found = |dir: &str, scale| Ok((dir.to_owned(), scale));
        assert_eq!(parsed("a/b"), found("a/b", 1.0));
        assert_eq!(parsed("a/b=0.5"), found("a/b", 0.5));
        assert_eq!(parsed("r=8=-2"), found("r=8", -2.0));
        assert_eq!(parsed("r=new"), found("r=new", 1.0));
        assert!(parsed("=1").is_err() && parsed("a=inf").is_err());
    }
}
