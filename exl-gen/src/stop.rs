//! Stop strings over a stream of text.

/// Texts that end an answer. They are looked for across token boundaries, case-sensitive.
///
/// The full hit that begins first wins, whichever string it is; where two begin at one place, the
/// one given first. Text that may still become a stop string is held back until that is decided.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

/// What is known after a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopText {
    /// Text that can be shown.
    pub text: String,
    /// The stop string that ended the answer; nothing may follow.
    pub hit: Option<String>,
}

impl StopStrings {
    /// Empty strings are ignored: they would end every answer before it begins.
    pub fn new(strings: impl IntoIterator<Item = String>) -> Self {
        Self {
            strings: strings.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopText {
        self.held.push_str(text);
        if let Some((at, hit)) = self.first_hit() {
            let hit = hit.to_owned();
            let text = self.held[..at].to_owned();
            self.held.clear();
            return StopText {
                text,
                hit: Some(hit),
            };
        }
        let keep = self.partial();
        let rest = self.held.split_off(self.held.len() - keep);
        StopText {
            text: std::mem::replace(&mut self.held, rest),
            hit: None,
        }
    }

    /// Ends the text without a hit and gives what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Text held back at the moment.
    pub fn held(&self) -> &str {
        &self.held
    }

    fn first_hit(&self) -> Option<(usize, &str)> {
        self.strings
            .iter()
            .enumerate()
            .filter_map(|(order, string)| Some((self.held.find(string.as_str())?, order, string)))
            .min_by_key(|&(at, order, _)| (at, order))
            .map(|(at, _, string)| (at, string.as_str()))
    }

    /// Bytes at the end that begin a stop string; the longest such end.
    fn partial(&self) -> usize {
        self.strings
            .iter()
            .map(|string| {
                let longest = self.held.len().min(string.len() - 1);
                (1..=longest)
                    .rev()
                    .find(|&n| string.is_char_boundary(n) && self.held.ends_with(&string[..n]))
                    .unwrap_or(0)
            })
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(strings: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut stop = StopStrings::new(strings.iter().map(|s| (*s).to_owned()));
        let mut out = Vec::new();
        for piece in pieces {
            let step = stop.push(piece);
            out.push(step.text);
            if step.hit.is_some() {
                return (out, step.hit);
            }
        }
        out.push(stop.finish());
        (out, None)
    }

    #[test]
    fn hits_across_pieces() {
        let (out, hit) = run(&["STOP"], &["abS", "TO", "Pcd"]);
        assert_eq!(
            (out.concat().as_str(), hit.as_deref()),
            ("ab", Some("STOP"))
        );
        assert_eq!(out, ["ab", "", ""]);
    }

    #[test]
    fn a_dissolved_prefix_is_released() {
        let (out, hit) = run(&["STOP"], &["abST", "ST", "x"]);
        assert_eq!(out, ["ab", "ST", "STx", ""]);
        assert_eq!(hit, None);
    }

    #[test]
    fn the_earliest_full_hit_wins() {
        // A partial hit of one string does not hide a full hit of another.
        let (out, hit) = run(&["abcd", "bc"], &["xabc"]);
        assert_eq!((out.concat().as_str(), hit.as_deref()), ("xa", Some("bc")));
        let (out, hit) = run(&["two", "one"], &["say one and two"]);
        assert_eq!(
            (out.concat().as_str(), hit.as_deref()),
            ("say ", Some("one"))
        );
        let (_, hit) = run(&["ab", "abc"], &["abc"]);
        assert_eq!(hit.as_deref(), Some("ab"));
        let (_, hit) = run(&["abc", "ab"], &["abc"]);
        assert_eq!(hit.as_deref(), Some("abc"));
    }

    #[test]
    fn many_byte_characters_are_never_cut() {
        let (out, hit) = run(&["é🦀"], &["aé", "ü", "é", "🦀"]);
        assert_eq!(out, ["a", "éü", "", ""]);
        assert_eq!(hit.as_deref(), Some("é🦀"));
    }

    #[test]
    fn empty_strings_are_ignored() {
        let (out, hit) = run(&[""], &["a"]);
        assert_eq!((out.concat().as_str(), hit), ("a", None));
    }

    proptest! {
        #[test]
        fn streaming_equals_searching_the_whole(
            strings in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
        ) {
            let names: Vec<&str> = strings.iter().map(String::as_str).collect();
            let parts: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (out, hit) = run(&names, &parts);
            let whole = pieces.concat();
            match hit {
                None => {
                    prop_assert!(strings.iter().all(|s| !whole.contains(s.as_str())));
                    prop_assert_eq!(out.concat(), whole);
                }
                Some(hit) => {
                    let shown = out.concat();
                    let at = whole[shown.len()..].starts_with(hit.as_str());
                    prop_assert!(at, "{shown:?} and {hit:?} in {whole:?}");
                    // A hit that ends earlier may end the stream before one that begins earlier.
                    let seen = &whole[..shown.len()];
                    prop_assert!(strings.iter().all(|s| !seen.contains(s.as_str())));
                }
            }
        }
    }
}
