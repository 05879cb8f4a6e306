//! Methods of Python's `str`, `dict` and `list` that templates call.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Methods that change their object: transformers' sandbox refuses them as well.
const MUTATING: [&str; 14] = [
    "append",
    "add",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
    "discard",
    "difference_update",
];

/// Called for every method minijinja does not know.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let result = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => string(text, method, args),
        (ValueKind::Seq, _) => list(value, method, args),
        (ValueKind::Map, _) if method == "copy" => from_args(args).map(|()| Some(value.clone())),
        _ => Ok(None),
    };
    match result? {
        Some(value) => Ok(value),
        None if MUTATING.contains(&method) && value.kind() != ValueKind::String => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!(
                "{}.{method}() changes its object, which templates may not do; build a new \
                     one (`l + [x]`, `dict(d, k=v)`) in a namespace",
                value.kind()
            ),
        )),
        None => unknown_method_callback(state, value, method, args),
    }
}

fn string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "split" | "rsplit" => {
            let (separator, limit) = split_args(args)?;
            let parts = split(text, separator.as_deref(), limit, method == "rsplit")?;
            Value::from(parts)
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            Value::from(split_lines(text, keep.unwrap_or(false)))
        }
        "strip" | "lstrip" | "rstrip" => {
            let (set,): (Option<Value>,) = from_args(args)?;
            let set = set.filter(|set| !set.is_none());
            let strip = |c: char| match set.as_ref().and_then(Value::as_str) {
                Some(set) => set.contains(c),
                None => is_space(c),
            };
            Value::from(match method {
                "strip" => text.trim_matches(strip),
                "lstrip" => text.trim_start_matches(strip),
                _ => text.trim_end_matches(strip),
            })
        }
        "join" => {
            let (items,): (Value,) = from_args(args)?;
            let mut parts = Vec::new();
            for item in super::filters::iterated(items)?.try_iter()? {
                let part = item.as_str().map(str::to_owned);
                parts.push(part.ok_or_else(|| invalid("join takes strings only"))?);
            }
            Value::from(parts.join(text))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            partition(text, separator, method == "rpartition")
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let found = if method == "index" {
                text.find(what)
            } else {
                text.rfind(what)
            };
            let at = found.ok_or_else(|| invalid("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "zfill" | "ljust" | "rjust" | "center" => pad(text, method, args)?,
        _ => return Ok(None),
    }))
}

fn list(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match method {
        "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        "index" => {
            let (what,): (Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == what);
            Some(Value::from(at.ok_or_else(|| invalid("item not in list"))?))
        }
        _ => None,
    })
}

/// What Python's `str.isspace` says: Unicode white space and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn split_args(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, limit, kwargs): (Option<Value>, Option<i64>, minijinja::value::Kwargs) =
        from_args(args)?;
    let separator = match separator {
        Some(value) => Some(value),
        None => kwargs.get::<Option<Value>>("sep")?,
    };
    let limit = match limit {
        Some(limit) => Some(limit),
        None => kwargs.get::<Option<i64>>("maxsplit")?,
    };
    kwargs.assert_all_used()?;
    let separator = match separator.filter(|value| !value.is_none()) {
        Some(value) => Some(
            value
                .as_str()
                .ok_or_else(|| invalid("the separator of split must be a string"))?
                .to_owned(),
        ),
        None => None,
    };
    Ok((
        separator,
        limit.and_then(|limit| usize::try_from(limit).ok()),
    ))
}

fn split(
    text: &str,
    separator: Option<&str>,
    limit: Option<usize>,
    right: bool,
) -> Result<Vec<String>, Error> {
    let own = |parts: Vec<&str>| parts.into_iter().map(str::to_owned).collect();
    let Some(separator) = separator else {
        return Ok(own(split_spaces(text, limit, right)));
    };
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let parts = match (limit, right) {
        (None, _) => text.split(separator).collect(),
        (Some(limit), false) => text.splitn(limit + 1, separator).collect(),
        (Some(limit), true) => {
            let mut parts: Vec<&str> = text.rsplitn(limit + 1, separator).collect();
            parts.reverse();
            parts
        }
    };
    Ok(own(parts))
}

/// Runs of white space separate; the last part keeps its far end when the limit cuts it off.
fn split_spaces(text: &str, limit: Option<usize>, right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = if right {
            rest.trim_end_matches(is_space)
        } else {
            rest.trim_start_matches(is_space)
        };
        if rest.is_empty() {
            break;
        }
        let cut = match limit {
            Some(limit) if parts.len() >= limit => None,
            _ if right => rest
                .char_indices()
                .rfind(|&(_, c)| is_space(c))
                .map(|(at, c)| at + c.len_utf8()),
            _ => rest.find(is_space),
        };
        let Some(cut) = cut else {
            parts.push(rest);
            break;
        };
        let (before, after) = rest.split_at(cut);
        parts.push(if right { after } else { before });
        rest = if right { before } else { after };
    }
    if right {
        parts.reverse();
    }
    parts
}

fn split_lines(text: &str, keep: bool) -> Vec<String> {
    let is_break = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_break).unwrap_or(rest.len());
        let tail = &rest[end..];
        let width = if tail.starts_with("\r\n") {
            2
        } else {
            tail.chars().next().map_or(0, char::len_utf8)
        };
        lines.push(rest[..if keep { end + width } else { end }].to_owned());
        rest = &rest[end + width..];
    }
    lines
}

fn partition(text: &str, separator: &str, right: bool) -> Value {
    let found = if right {
        text.rsplit_once(separator)
    } else {
        text.split_once(separator)
    };
    let parts = match (found, right) {
        (Some((before, after)), _) => [before, separator, after],
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
    };
    Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
}

fn pad(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<char>) = from_args(args)?;
    let fill = if method == "zfill" {
        '0'
    } else {
        fill.unwrap_or(' ')
    };
    let missing = width.min(1 << 16).saturating_sub(text.chars().count());
    let fill = |count: usize| fill.to_string().repeat(count);
    Ok(Value::from(match method {
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        "zfill" => {
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            format!("{sign}{}{digits}", fill(missing))
        }
        _ => {
            // CPython puts the odd blank left only when the width is odd as well.
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fill(left), fill(missing - left))
        }
    }))
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
