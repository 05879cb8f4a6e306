//! Which tokenizer a model comes with.

use exl_gen::Tokenizer;
use exl_models::ModelSource;
use serde::Serialize;

/// The tokenizer that texts are encoded with, or why there is none.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Words {
    Known {
        /// Names of the files it was read from.
        files: Vec<String>,
        /// How they are written.
        format: String,
        tokens: usize,
        /// Tokens that the model has no embedding for.
        without_row: usize,
    },
    Unknown {
        problem: String,
    },
}

impl Words {
    pub(super) fn new(source: &ModelSource) -> Self {
        match Tokenizer::open(source.files().dir()) {
            Ok(tokenizer) => Self::of(&tokenizer, source.spec().vocab),
            Err(error) => Self::Unknown {
                problem: error.to_string(),
            },
        }
    }

    fn of(tokenizer: &Tokenizer, rows: usize) -> Self {
        let tokens = tokenizer.vocab_size();
        let lost = rows..tokens;
        let files = tokenizer.files().iter().filter_map(|path| path.file_name());
        Self::Known {
            files: files
                .map(|name| name.to_string_lossy().into_owned())
                .collect(),
            format: tokenizer.format().to_string(),
            tokens,
            without_row: lost
                .filter(|&id| tokenizer.token_bytes(id as u32).is_some())
                .count(),
        }
    }

    pub(super) fn text(&self) -> String {
        match self {
            Self::Known {
                files,
                format,
                tokens,
                without_row,
            } => {
                let lost = match without_row {
                    0 => String::new(),
                    lost => format!(", {lost} of them without a row in the model"),
                };
                format!("{} ({format}), {tokens} tokens{lost}", files.join(" and "))
            }
            Self::Unknown { problem } => format!("none that can be used: {problem}"),
        }
    }
}
