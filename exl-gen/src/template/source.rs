//! Rewrites what minijinja reads differently from Jinja2, before it is compiled.
//!
//! - `{% generation %}` only marks text for training: it becomes a plain scope.
//! - `{% for x in y %}` gets a filter on `y`, because Python refuses to iterate over `none`.
//! - `{{ a|safe + b }}` becomes a call, because Python escapes what is added to a safe string.
//!
//! Line numbers stay, so that errors point into the original.

use super::filters::{ADD, ITERATED};

/// Rewrites a template; comments and raw blocks are left alone.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find('{') {
        let (text, tail) = rest.split_at(open);
        out.push_str(text);
        let length = match tail.as_bytes().get(1) {
            Some(b'#') => tail.find("#}").map(|end| end + 2),
            Some(b'{') => closing(tail, "}}"),
            Some(b'%') => closing(tail, "%}"),
            _ => Some(1),
        };
        let Some(length) = length else {
            // An unterminated tag is the parser's to report.
            out.push_str(tail);
            return out;
        };
        let (tag, mut after) = tail.split_at(length);
        out.push_str(&rewrite_tag(tag));
        if tag.starts_with("{%") && inner(tag).trim() == "raw" {
            let (raw, next) = after.split_at(raw_end(after));
            out.push_str(raw);
            after = next;
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn rewrite_tag(tag: &str) -> String {
    let content = inner(tag);
    let replaced = if tag.starts_with("{{") {
        add_call(content)
    } else if tag.starts_with("{%") {
        match content.trim() {
            "generation" => Some(content.replacen("generation", "with", 1)),
            "endgeneration" => Some(content.replacen("endgeneration", "endwith", 1)),
            _ => for_loop(content),
        }
    } else {
        None
    };
    match replaced {
        // The content is a sub-slice of the tag without its two-sided markers.
        Some(new) => tag.replacen(content, &new, 1),
        None => tag.to_owned(),
    }
}

/// Length of a tag up to and with `end`, which does not count inside string literals.
fn closing(tag: &str, end: &str) -> Option<usize> {
    let bytes = tag.as_bytes();
    let mut quote = None;
    let mut at = 2;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[at..].starts_with(end.as_bytes()) => return Some(at + end.len()),
            _ => {}
        }
        at += 1;
    }
    None
}

/// The content of a tag without delimiters and whitespace markers.
fn inner(tag: &str) -> &str {
    let content = tag.get(2..tag.len().saturating_sub(2)).unwrap_or("");
    let content = content.strip_prefix(['-', '+']).unwrap_or(content);
    content.strip_suffix(['-', '+']).unwrap_or(content)
}

/// Words and operators of an expression outside brackets and strings, with their offsets.
fn top_level(expression: &str) -> Vec<(usize, &str)> {
    let bytes = expression.as_bytes();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii();
    let (mut tokens, mut depth, mut at) = (Vec::new(), 0usize, 0);
    while at < bytes.len() {
        let start = at;
        at += 1;
        match bytes[start] {
            quote @ (b'"' | b'\'') => {
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            byte if is_word(byte) => {
                while at < bytes.len() && is_word(bytes[at]) {
                    at += 1;
                }
                if depth == 0 {
                    tokens.push((start, &expression[start..at]));
                }
            }
            byte if depth == 0 && !byte.is_ascii_whitespace() => {
                tokens.push((start, &expression[start..at]));
            }
            _ => {}
        }
    }
    tokens
}

/// ` for x in y if z ` with the filter on `y`.
fn for_loop(content: &str) -> Option<String> {
    let tokens = top_level(content);
    if tokens.first()?.1 != "for" {
        return None;
    }
    let within = tokens.iter().position(|&(_, token)| token == "in")?;
    let start = tokens[within].0 + 2;
    let end = tokens[within + 1..]
        .iter()
        .find(|&&(_, token)| token == "if" || token == "recursive")
        .map_or(content.len(), |&(at, _)| at);
    let (head, iterated, tail) = (&content[..start], &content[start..end], &content[end..]);
    Some(format!("{head} ({iterated})|{ITERATED} {tail}"))
}

/// `a|safe + b` as a call; only where `+` is the sole operator, so precedence cannot change.
fn add_call(content: &str) -> Option<String> {
    let tokens = top_level(content);
    let safe = tokens
        .windows(2)
        .any(|pair| pair[0].1 == "|" && pair[1].1 == "safe");
    let plain = tokens.iter().all(|&(_, token)| {
        let keyword = ["if", "else", "and", "or", "not", "in", "is"].contains(&token);
        let word = token.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        !keyword && (word || matches!(token, "+" | "|" | "."))
    });
    let pluses: Vec<usize> = tokens.iter().filter(|t| t.1 == "+").map(|t| t.0).collect();
    if !safe || !plain || pluses.is_empty() {
        return None;
    }
    let mut parts = Vec::new();
    let mut from = 0;
    for at in pluses.into_iter().chain([content.len()]) {
        parts.push(&content[from..at]);
        from = at + 1;
    }
    Some(format!(" {ADD}({}) ", parts.join(",")))
}

/// Where the text of a raw block ends: at its `endraw` tag.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(open) = text[from..].find("{%") {
        let open = from + open;
        match text[open..].find("%}") {
            Some(end) if inner(&text[open..open + end + 2]).trim() == "endraw" => return open,
            Some(_) => from = open + 2,
            None => break,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn only_what_differs_changes() {
        let same = [
            "{#{% generation %}#}",
            "{{ '{% generation %}' }}",
            "{{ \"\\\"}}{% generation %}\" }}",
            "{% raw %}{% for x in y %}{% endraw %}",
            "{% set generation = 1 %}",
            "{ {% generation",
            "é{",
            "{{ a|safe ~ b }}",
            "{{ a + b }}",
            "{{ a|safe + b if c }}",
            "{{}}{%%}{{-}}{%-%}{%",
            "{% for x %}",
        ];
        for source in same {
            assert_eq!(rewrite(source), source);
        }
        let cases = [
            (
                "a{%- generation -%}b{%+ endgeneration %}",
                "a{%- with -%}b{%+ endwith %}",
            ),
            (
                "{%- for a, b in x['in'] if b -%}",
                "{%- for a, b in ( x['in'] )|exl_iterated if b -%}",
            ),
            ("{% for x in y%}", "{% for x in ( y)|exl_iterated %}"),
            (
                "{{- 'a+'|safe + b.c(1 + 2) }}",
                "{{- exl_add( 'a+'|safe , b.c(1 + 2) ) }}",
            ),
        ];
        for (source, expected) in cases {
            assert_eq!(rewrite(source), expected);
        }
    }
}
