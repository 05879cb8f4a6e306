//! GBNF, the grammars of llama.cpp, as Lark.

use std::collections::HashMap;

/// Whether a grammar is one: nothing in Lark is spelled like its definitions.
pub(super) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let (name, rest) = line.split_once("::=").unwrap_or_default();
        !rest.is_empty() && !name.trim().is_empty() && name.trim().chars().all(is_name)
    })
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

enum Token {
    Name(String),
    Define,
    /// What both languages write alike: `|`, parentheses, repetitions.
    Same(String),
    Literal(String),
    /// Characters, or all others.
    Class(bool, Vec<(char, char)>),
    Any,
}

/// The same grammar in Lark.
pub(super) fn to_lark(text: &str) -> Result<String, String> {
    let tokens = tokens(text)?;
    let mut names = Names::default();
    let mut lark = String::new();
    let mut at = tokens.iter().peekable();
    while let Some(token) = at.next() {
        match token {
            Token::Name(name) if matches!(at.peek(), Some(Token::Define)) => {
                at.next();
                lark.push_str(&format!("\n{}:", names.lark(name)));
                continue;
            }
            _ if lark.is_empty() => return Err("it does not begin with a rule".to_owned()),
            Token::Define => return Err("`::=` without the name of a rule".to_owned()),
            Token::Name(name) => lark.push_str(&format!(" {}", names.lark(name))),
            Token::Same(text) if text.starts_with(['*', '+', '?', '{']) => lark.push_str(text),
            Token::Same(text) => lark.push_str(&format!(" {text}")),
            Token::Literal(text) => lark.push_str(&format!(" {}", serde_json::json!(text))),
            Token::Class(not, ranges) => lark.push_str(&format!(" {}", class(*not, ranges))),
            Token::Any => lark.push_str(" /(?s:.)/"),
        }
    }
    lark.push('\n');
    Ok(lark)
}

fn class(not: bool, ranges: &[(char, char)]) -> String {
    let hex = |c: char| format!("\\x{{{:x}}}", u32::from(c));
    let ranges: Vec<String> = ranges
        .iter()
        .map(|&(a, b)| hex(a) + "-" + &hex(b))
        .collect();
    format!("/[{}{}]/", if not { "^" } else { "" }, ranges.concat())
}

/// Lark's rules are lower case and know no `-`.
#[derive(Default)]
struct Names {
    known: HashMap<String, String>,
}

impl Names {
    fn lark(&mut self, name: &str) -> &str {
        let number = self.known.len();
        self.known.entry(name.to_owned()).or_insert_with(|| {
            let plain = name.to_ascii_lowercase().replace('-', "_");
            match name {
                "root" => "start".to_owned(),
                _ => format!("rule{number}_{plain}"),
            }
        })
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let chars: Vec<char> = text.chars().collect();
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(&c) = chars.get(at) {
        let rest = &chars[at..];
        let (token, length) = match c {
            '#' => {
                at += rest.iter().take_while(|&&c| c != '\n').count();
                continue;
            }
            c if c.is_whitespace() => {
                at += 1;
                continue;
            }
            ':' if rest.starts_with(&[':', ':', '=']) => (Token::Define, 3),
            '|' | '(' | ')' | '*' | '+' | '?' => (Token::Same(c.to_string()), 1),
            '{' => {
                let length = until(rest, '}').ok_or("a `{` is not closed")?;
                (Token::Same(rest[..length].iter().collect()), length)
            }
            '"' => literal(rest)?,
            '[' => ranges(rest)?,
            '.' => (Token::Any, 1),
            c if is_name(c) => {
                let name: String = rest.iter().take_while(|&&c| is_name(c)).collect();
                let length = name.len();
                (Token::Name(name), length)
            }
            c => {
                let line = chars[..at].iter().filter(|&&c| c == '\n').count() + 1;
                return Err(format!("line {line}: `{c}` means nothing here"));
            }
        };
        found.push(token);
        at += length;
    }
    Ok(found)
}

fn until(chars: &[char], end: char) -> Option<usize> {
    chars.iter().position(|&c| c == end).map(|at| at + 1)
}

fn literal(chars: &[char]) -> Result<(Token, usize), String> {
    let (mut text, mut at) = (String::new(), 1);
    while let Some(&c) = chars.get(at) {
        if c == '"' {
            return Ok((Token::Literal(text), at + 1));
        }
        let (c, length) = character(&chars[at..])?;
        text.push(c);
        at += length;
    }
    Err("a text is not closed by `\"`".to_owned())
}

fn ranges(chars: &[char]) -> Result<(Token, usize), String> {
    let not = chars.get(1) == Some(&'^');
    let (mut ranges, mut at) = (Vec::new(), 1 + usize::from(not));
    while let Some(&c) = chars.get(at) {
        if c == ']' {
            return Ok((Token::Class(not, ranges), at + 1));
        }
        let (low, length) = character(&chars[at..])?;
        at += length;
        let mut high = low;
        if chars.get(at) == Some(&'-') && chars.get(at + 1).is_some_and(|&c| c != ']') {
            let (c, length) = character(&chars[at + 1..])?;
            (high, at) = (c, at + 1 + length);
        }
        ranges.push((low, high));
    }
    Err("a `[` is not closed".to_owned())
}

/// One character, escaped or not, and how many it is written with.
fn character(chars: &[char]) -> Result<(char, usize), String> {
    let wrong = || "an escape (`\\`) is wrong".to_owned();
    if chars[0] != '\\' {
        return Ok((chars[0], 1));
    }
    let digits = match chars.get(1).ok_or_else(wrong)? {
        'n' => return Ok(('\n', 2)),
        'r' => return Ok(('\r', 2)),
        't' => return Ok(('\t', 2)),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        &c if c.is_ascii_punctuation() => return Ok((c, 2)),
        _ => return Err(wrong()),
    };
    let text: String = chars.iter().skip(2).take(digits).collect();
    let code = u32::from_str_radix(&text, 16)
        .ok()
        .filter(|_| text.len() == digits);
    let c = code.and_then(char::from_u32).ok_or_else(wrong)?;
    Ok((c, 2 + digits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_lark() {
        let text = "# a list\nroot ::= \"- \" Item (\"\\n- \" item-b)*\nItem ::= [a-z\\]]+ |\n  [^\\x41\"/-] . {2,3}\nitem-b ::= \"é\\\"\"?\n";
        assert!(is_gbnf(text));
        let lark = to_lark(text).unwrap();
        assert_eq!(
            lark,
            "\nstart: \"- \" rule1_item ( \"\\n- \" rule2_item_b )*\
             \nrule1_item: /[\\x{61}-\\x{7a}\\x{5d}-\\x{5d}]/+ | \
             /[^\\x{41}-\\x{41}\\x{22}-\\x{22}\\x{2f}-\\x{2f}\\x{2d}-\\x{2d}]/ /(?s:.)/{2,3}\
             \nrule2_item_b: \"é\\\"\"?\n"
        );
        assert!(!is_gbnf("start: \"::=\" name\nname: /[a-z]/"));
    }

    #[test]
    fn mistakes_are_told() {
        for (text, word) in [
            ("root ::= \"a", "not closed"),
            ("root ::= [a", "not closed"),
            ("root ::= \"\\q\"", "escape"),
            ("root ::= \"\\x4\"", "escape"),
            ("root ::= a\n& ", "line 2: `&`"),
            ("\"a\"", "begin with a rule"),
            ("root ::= ::=", "without the name"),
            ("root ::= a{2", "not closed"),
        ] {
            let error = to_lark(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
