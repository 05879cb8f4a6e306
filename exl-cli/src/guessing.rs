//! Speculation: from flags and presets to what guesses the next tokens.

use crate::args::SamplingArgs;
use crate::failure::Usage;
use crate::sampling;
use anyhow::{Result, bail};
use exl_gen::{Done, Speculation};
use std::path::PathBuf;

/// What guesses, if anything does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Guessing {
    pub(crate) speculation: Option<Speculation>,
    /// Directory of the draft model.
    pub(crate) draft: Option<PathBuf>,
}

impl Guessing {
    /// Flags over the preset.
    pub(crate) fn new(args: &SamplingArgs) -> Result<Self> {
        let preset = match &args.preset {
            Some(path) => sampling::preset(path)?,
            None => SamplingArgs::default(),
        };
        // A draft model of a preset lies where the preset says, seen from the preset.
        let folder = args.preset.as_deref().and_then(|path| path.parent());
        let beside = |draft: PathBuf| folder.map_or_else(|| draft.clone(), |f| f.join(&draft));
        let draft = args.draft.clone().or(preset.draft.map(beside));
        let ngram = args.ngram.or(preset.ngram).map(|n| n as usize);
        let most = args.draft_tokens.or(preset.draft_tokens);
        let rejection = args.draft_rejection || preset.draft_rejection;
        if args.draft_rejection && draft.is_none() {
            let why = "--draft-rejection needs --draft, whose guesses it keeps";
            return Err(Usage(why.to_owned()).into());
        }
        if draft.is_none() && ngram.is_none() {
            if args.draft_tokens.is_some() {
                let why = "--draft-tokens needs --draft or --ngram, which say how to guess";
                return Err(Usage(why.to_owned()).into());
            }
            if most.is_some() {
                bail!("the preset has `draft_tokens`, but neither `draft` nor `ngram`");
            }
            return Ok(Self::default());
        }
        let base = match draft.is_some() {
            true => Speculation::model(),
            false => Speculation::ngrams(),
        };
        let speculation = Speculation {
            ngram,
            rejection,
            most: most.map_or(base.most, |n| n as usize),
            ..base
        };
        Ok(Self {
            speculation: Some(speculation),
            draft,
        })
    }

    /// Most tokens guessed for one step of a sequence.
    pub(crate) fn most(&self) -> usize {
        self.speculation.as_ref().map_or(0, |s| s.most)
    }
}

/// What came of guesses, for people; nothing where there were none.
pub(crate) fn told(done: &Done) -> String {
    match done.drafted_tokens {
        0 => String::new(),
        drafted => format!(
            ", {:.2} a step ({} of {drafted} guesses right)",
            done.new_tokens as f64 / done.steps.max(1) as f64,
            done.accepted_tokens,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(args: SamplingArgs) -> Guessing {
        Guessing::new(&args).unwrap()
    }

    #[test]
    fn flags_say_what_guesses() {
        let none = SamplingArgs::default();
        assert_eq!(of(none.clone()), Guessing::default());
        let ngrams = SamplingArgs {
            ngram: Some(4),
            ..none.clone()
        };
        let expected = Speculation {
            ngram: Some(4),
            ..Speculation::ngrams()
        };
        assert_eq!(of(ngrams.clone()).speculation, Some(expected));
        let both = SamplingArgs {
            draft: Some("small".into()),
            draft_tokens: Some(5),
            draft_rejection: true,
            ..ngrams
        };
        let found = of(both);
        assert_eq!((found.most(), found.draft), (5, Some("small".into())));
        let speculation = found.speculation.unwrap();
        assert!(speculation.model && speculation.rejection && speculation.ngram == Some(4));
        let alone = SamplingArgs {
            draft_tokens: Some(5),
            ..none.clone()
        };
        let without = SamplingArgs {
            draft_rejection: true,
            ngram: Some(3),
            ..none
        };
        for args in [alone, without] {
            let error = Guessing::new(&args).unwrap_err();
            assert!(error.is::<Usage>(), "{error}");
        }
    }

    #[test]
    fn a_preset_names_its_draft_model_from_where_it_lies() {
        let folder = std::env::temp_dir().join(format!("exl-guessing-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("p.toml");
        std::fs::write(&path, "draft = \"small\"\nngram = 2\ndraft_tokens = 6\n").unwrap();
        let preset = SamplingArgs {
            preset: Some(path.clone()),
            ..SamplingArgs::default()
        };
        let found = of(preset.clone());
        assert_eq!(found.draft, Some(folder.join("small")));
        assert_eq!(found.speculation.unwrap().ngram, Some(2));
        let flag = SamplingArgs {
            draft: Some("other".into()),
            ..preset.clone()
        };
        assert_eq!(of(flag).draft, Some("other".into()));
        std::fs::write(&path, "draft_tokens = 6\n").unwrap();
        let error = Guessing::new(&preset).unwrap_err().to_string();
        assert!(error.contains("`draft_tokens`"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
