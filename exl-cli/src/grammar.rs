//! The form of an answer: flags to a checked grammar.

use crate::args::GrammarArgs;
use crate::failure::Usage;
use anyhow::{Context, Result};
use exl_gen::{Grammar, Guide, Tokenizer};
use std::path::Path;

/// The grammar that the flags name. It is compiled once, so that a wrong one shows before a model
/// is loaded.
pub(crate) fn grammar(args: &GrammarArgs, tokenizer: &Tokenizer) -> Result<Option<Grammar>> {
    let Some((grammar, flag)) = named(args)? else {
        return Ok(None);
    };
    let found = Guide::new(&grammar, tokenizer).map(drop);
    let found = match grammar {
        // All of it is on the command line.
        Grammar::Regex(_) | Grammar::Choices(_) => found.map_err(|e| Usage(e.to_string()).into()),
        _ => found.map_err(anyhow::Error::from),
    };
    found.context(flag)?;
    Ok(Some(grammar))
}

/// The grammar and the flag it came from.
fn named(args: &GrammarArgs) -> Result<Option<(Grammar, String)>> {
    if let Some(path) = &args.json_schema {
        let flag = format!("--json-schema {}", path.display());
        let text = read(path, &flag)?;
        let schema = serde_json::from_str(&text).with_context(|| format!("{flag}: no JSON"))?;
        return Ok(Some((Grammar::JsonSchema(schema), flag)));
    }
    if let Some(path) = &args.grammar {
        let flag = format!("--grammar {}", path.display());
        return Ok(Some((Grammar::Lark(read(path, &flag)?), flag)));
    }
    if let Some(regex) = &args.regex {
        return Ok(Some((Grammar::Regex(regex.clone()), "--regex".to_owned())));
    }
    let choices = || {
        (
            Grammar::Choices(args.choices.clone()),
            "--choices".to_owned(),
        )
    };
    Ok((!args.choices.is_empty()).then(choices))
}

fn read(path: &Path, flag: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{flag}: the file cannot be read"))
}
