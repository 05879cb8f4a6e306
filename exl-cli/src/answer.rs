//! From flags to what a request asks of its answer.

use crate::args::AnswerArgs;
use anyhow::Result;
use exl_gen::{Encode, Tokenizer};

/// Tokens of `--begin`: a text that goes on from the prompt, so nothing is added around it.
pub(crate) fn begin(args: &AnswerArgs, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let how = Encode {
        parse_special: true,
        add_special: false,
    };
    let text = args.begin.as_deref().unwrap_or_default();
    Ok(tokenizer.encode(text, how)?)
}
