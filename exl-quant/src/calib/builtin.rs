//! The built-in calibration text: books, languages, code, structured text and dialogues.

use super::{Calibration, Encode};
use crate::{Error, Result};

const BOOKS: &str = include_str!("../../calibration/books.txt");
const LANGUAGES: &str = include_str!("../../calibration/udhr.txt");
const CODE: &str = include_str!("../../calibration/code.txt");
const STRUCTURED: &str = include_str!("../../calibration/structured.txt");

/// One turn of a dialogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTurn {
    /// `user` or `assistant`.
    pub role: &'static str,
    /// What is said.
    pub content: String,
}

/// Renders a dialogue by a model's chat template and encodes it, special tokens included.
pub type Chat<'a> = dyn Fn(&[ChatTurn]) -> std::result::Result<Vec<u32>, String> + 'a;

/// `rows` rows of `length` tokens from the built-in text. The sources take turns so that any
/// number of first rows, and the hold-out rows, are a fair mix; each source contributes in
/// proportion to its tokens. With `chat`, dialogues formatted by the model's own template are a
/// source too.
///
/// # Errors
/// [`Error::Calibration`] when the text is too short for what is asked, or cannot be encoded.
pub fn builtin(
    encode: &Encode<'_>,
    chat: Option<&Chat<'_>>,
    rows: usize,
    length: usize,
) -> Result<Calibration> {
    let refuse = |what: String| Error::Calibration {
        file: "(built-in)".into(),
        what,
    };
    let mut streams = Vec::new();
    for text in [BOOKS, LANGUAGES, CODE, STRUCTURED] {
        streams.push(encode(text).map_err(refuse)?);
    }
    if let Some(chat) = chat {
        let mut tokens = Vec::new();
        for dialogue in dialogues(STRUCTURED) {
            tokens.extend(chat(&dialogue).map_err(refuse)?);
        }
        streams.push(tokens);
    }
    let available: Vec<usize> = streams.iter().map(|s| s.len() / length.max(1)).collect();
    let total: usize = available.iter().sum();
    if total < rows {
        return Err(refuse(format!(
            "gives {total} rows of {length} tokens with this tokenizer, {rows} were asked for; \
             lower --rows or --length, or give a text with --cal"
        )));
    }
    let mut taken = vec![0usize; streams.len()];
    let mut out = Vec::with_capacity(rows);
    while out.len() < rows {
        // The source that is furthest behind its share comes next.
        let next = (0..streams.len())
            .filter(|&s| taken[s] < available[s])
            .min_by_key(|&s| ((taken[s] * 2 + 1) * total / available[s], s))
            .expect("fewer rows are taken than there are");
        let start = taken[next] * length;
        out.push(streams[next][start..start + length].to_vec());
        taken[next] += 1;
    }
    Ok(Calibration {
        dataset: "(default)".into(),
        rows: out,
    })
}

/// Runs of `User:` and `Assistant:` paragraphs.
fn dialogues(text: &str) -> Vec<Vec<ChatTurn>> {
    let mut all: Vec<Vec<ChatTurn>> = Vec::new();
    let mut open = false;
    for line in text.lines() {
        let turn = [("user", "User: "), ("assistant", "Assistant: ")]
            .into_iter()
            .find_map(|(role, mark)| Some((role, line.strip_prefix(mark)?)));
        match (turn, open) {
            (Some((role, content)), _) => {
                let turn = ChatTurn {
                    role,
                    content: content.to_owned(),
                };
                let follows = all
                    .last()
                    .and_then(|d| d.last())
                    .is_some_and(|t| t.role != role);
                if open && follows {
                    all.last_mut().expect("a dialogue is open").push(turn);
                } else if role == "user" {
                    all.push(vec![turn]);
                    open = true;
                } else {
                    open = false;
                }
            }
            (None, true) if !line.trim().is_empty() => {
                let turn = all
                    .last_mut()
                    .and_then(|d| d.last_mut())
                    .expect("a dialogue is open");
                turn.content.push('\n');
                turn.content.push_str(line);
            }
            (None, _) => open = false,
        }
    }
    // A dialogue that ends with a question has nothing for the model to say.
    all.retain_mut(|d| {
        if d.last().is_some_and(|t| t.role == "user") {
            d.pop();
        }
        !d.is_empty()
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> std::result::Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    #[test]
    fn sources_take_turns_in_proportion() {
        let set = builtin(&bytes, None, 64, 512).unwrap();
        assert_eq!((set.rows.len(), set.length()), (64, 512));
        let text = |row: &[u32]| row.iter().map(|&b| b as u8).collect::<Vec<u8>>();
        let from = |source: &str| {
            let source = source.as_bytes();
            set.rows
                .iter()
                .filter(|r| source.windows(512).any(|w| w == text(r).as_slice()))
                .count()
        };
        let books = from(BOOKS);
        assert!((20..44).contains(&books), "{books} rows of books");
        assert!(from(CODE) >= 3 && from(STRUCTURED) >= 3 && from(LANGUAGES) >= 10);
        // Prefixes agree: fewer rows are a prefix of more rows.
        assert_eq!(builtin(&bytes, None, 8, 512).unwrap().rows, set.rows[..8]);
    }

    #[test]
    fn dialogues_alternate_and_end_with_an_answer() {
        let found = dialogues(STRUCTURED);
        assert!(found.len() >= 5, "{} dialogues", found.len());
        for dialogue in &found {
            assert!(dialogue.len().is_multiple_of(2));
            for (i, turn) in dialogue.iter().enumerate() {
                assert_eq!(turn.role, ["user", "assistant"][i % 2]);
                assert!(!turn.content.trim().is_empty());
            }
        }
        let render = |turns: &[ChatTurn]| {
            bytes(
                &turns
                    .iter()
                    .map(|t| format!("<{}>{}", t.role, t.content))
                    .collect::<String>(),
            )
        };
        let set = builtin(&bytes, Some(&render), 100, 256).unwrap();
        let with_template = |row: &Vec<u32>| {
            let text: String = row.iter().map(|&b| b as u8 as char).collect();
            text.contains("<user>") || text.contains("<assistant>")
        };
        assert!(set.rows.iter().any(with_template));
    }

    #[test]
    fn asking_for_too_much_says_how_much_there_is() {
        let error = builtin(&bytes, None, 100_000, 512).unwrap_err().to_string();
        assert!(
            error.contains("100000") && error.contains("--cal"),
            "{error}"
        );
    }
}
