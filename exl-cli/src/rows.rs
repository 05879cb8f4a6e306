//! The tokens that models are evaluated on.

use crate::failure::Usage;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use exl_format::{SafetensorsFile, TensorSource};
use exl_gen::{Encode, Tokenizer};
use exl_models::ModelSource;
use exl_quant::token_ids;
use std::path::Path;

/// Rows of `--text` when the user does not say.
const TEXT_ROWS: usize = 20;
/// Tokens per row of `--text` when the user does not say.
const TEXT_LENGTH: usize = 2048;

/// Text as it stands: what looks like a special token is text, and nothing is added.
const PLAIN: Encode = Encode {
    parse_special: false,
    add_special: false,
};

/// The tokens of a plain text, all of which the model knows.
///
/// # Errors
/// A text that cannot be encoded, a token that was added to the tokenizer but not to the model.
pub(crate) fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    source: &ModelSource,
) -> exl_gen::Result<Vec<u32>> {
    let tokens = tokenizer.encode(text, PLAIN)?;
    tokenizer.check(&tokens, source.spec().vocab)?;
    Ok(tokens)
}

/// Where rows come from, as the flags name it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct From<'a> {
    /// `--tokens`.
    pub(crate) tokens: Option<&'a Path>,
    /// `--text`.
    pub(crate) text: Option<&'a Path>,
    /// `--rows`.
    pub(crate) rows: Option<u32>,
    /// `--length`.
    pub(crate) length: Option<u32>,
}

/// The rows that the flags ask for, all of one length and within the vocabulary.
pub(crate) fn rows(from: &From<'_>, source: &ModelSource, ui: &Ui) -> Result<Vec<Vec<u32>>> {
    let (asked, length) = (
        from.rows.map(|n| n as usize),
        from.length.map(|n| n as usize),
    );
    let max = source.spec().max_context;
    if let Some(length) = length.filter(|n| *n > max) {
        let why = format!("--length {length}: the model takes at most {max} tokens");
        return Err(Usage(why).into());
    }
    let (path, rows) = match (from.tokens, from.text) {
        (Some(path), _) => (path, token_rows(path, asked, length)?),
        (None, Some(path)) => {
            let length = length.unwrap_or(TEXT_LENGTH.min(max));
            (path, text_rows(path, source, (asked, length), ui)?)
        }
        (None, None) => bail!("nothing to evaluate: give --tokens or --text"),
    };
    let length = rows.first().map_or(0, Vec::len);
    if length < 2 || length > max {
        bail!(
            "{}: rows of {length} tokens cannot be evaluated (the model takes 2 to {max}; see --length)",
            path.display()
        );
    }
    let vocab = source.spec().vocab as u32;
    if let Some(token) = rows.iter().flatten().find(|t| **t >= vocab) {
        bail!(
            "{}: token {token} is outside the model's vocabulary of {vocab} (made with another tokenizer?)",
            path.display()
        );
    }
    Ok(rows)
}

/// `input_ids` of a safetensors file.
fn token_rows(path: &Path, rows: Option<usize>, length: Option<usize>) -> Result<Vec<Vec<u32>>> {
    let file = SafetensorsFile::open(path)?;
    let ids = file.tensor("input_ids")?;
    let &[have, width] = &ids.shape[..] else {
        bail!(
            "{}: input_ids has shape {:?}, expected [rows, length]",
            path.display(),
            ids.shape
        );
    };
    if have == 0 || width == 0 {
        bail!(
            "{}: input_ids has shape {:?}: there is nothing to evaluate",
            path.display(),
            ids.shape
        );
    }
    let (rows, length) = (rows.unwrap_or(have), length.unwrap_or(width));
    if rows > have || length > width {
        bail!(
            "{}: holds {have} rows of {width} tokens, {rows} of {length} were asked for (see --rows and --length)",
            path.display()
        );
    }
    let tokens = token_ids(&ids.data, ids.dtype).with_context(|| {
        format!(
            "{}: input_ids must be I32 or I64 and not negative",
            path.display()
        )
    })?;
    Ok(tokens
        .chunks(width)
        .take(rows)
        .map(|row| row[..length].to_vec())
        .collect())
}

/// A text in consecutive rows, without special tokens: as many as asked for, else up to
/// [`TEXT_ROWS`].
fn text_rows(
    path: &Path,
    source: &ModelSource,
    (asked, length): (Option<usize>, usize),
    ui: &Ui,
) -> Result<Vec<Vec<u32>>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?;
    let tokenizer = Tokenizer::open(source.files().dir())?;
    let tokens =
        encode(&tokenizer, &text, source).with_context(|| format!("{}", path.display()))?;
    let whole = tokens.len() / length;
    let rows = asked.unwrap_or(TEXT_ROWS.min(whole.max(1)));
    if asked.is_none() && rows < TEXT_ROWS && whole > 0 {
        ui.note(&format!(
            "{}: the text fills {rows} rows of {length} tokens",
            path.display()
        ));
    }
    if whole < rows {
        bail!(
            "{}: the text has {} tokens, {rows} rows of {length} need {} (use fewer --rows or a smaller --length)",
            path.display(),
            tokens.len(),
            rows * length
        );
    }
    Ok(tokens
        .chunks(length)
        .take(rows)
        .map(<[u32]>::to_vec)
        .collect())
}
