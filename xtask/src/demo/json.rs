//! Just enough JSON for one flat object of numbers: `exl eval --json` prints nothing else.

/// The number under `key`, `None` when the key is absent or its value is no number.
pub(crate) fn number(object: &str, key: &str) -> Option<f64> {
    let quoted = format!("\"{key}\"");
    let after = object.match_indices(&quoted).find_map(|(at, _)| {
        object[at + quoted.len()..]
            .trim_start()
            .strip_prefix(':')
            .map(str::trim_start)
    })?;
    let end = after
        .find(|c: char| c == ',' || c == '}' || c.is_whitespace())
        .unwrap_or(after.len());
    after[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_numbers_of_every_shape() {
        let text = "{ \"a\": 1, \"kl_p99\":0.5,\n\"kl\" : 7.21e-2 ,\"z\":-3}";
        assert_eq!(number(text, "a"), Some(1.0));
        assert_eq!(number(text, "kl"), Some(0.0721));
        assert_eq!(number(text, "z"), Some(-3.0));
    }

    #[test]
    fn nulls_and_absent_keys_are_none() {
        assert_eq!(number("{\"kl\":null}", "kl"), None);
        assert_eq!(number("{\"kl\":1}", "ppl"), None);
        assert_eq!(number("{\"name\":\"kl\"}", "kl"), None);
    }
}
