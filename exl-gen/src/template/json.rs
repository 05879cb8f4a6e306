//! `tojson` as Python's `json.dumps` writes it.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::filters::number;

/// `value|tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    if args.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let get = |index: usize, name: &str| -> Result<Value, Error> {
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(named
            .or_else(|| args.get(index).cloned())
            .unwrap_or_default())
    };
    let ascii = get(0, "ensure_ascii")?.is_true();
    let indent = indent_text(&get(1, "indent")?)?;
    let (item, key) = separators(&get(2, "separators")?, indent.is_some())?;
    let sort = get(3, "sort_keys")?.is_true();
    kwargs.assert_all_used()?;
    let mut writer = Writer {
        out: String::new(),
        ascii,
        indent,
        item,
        key,
        sort,
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

fn indent_text(value: &Value) -> Result<Option<String>, Error> {
    if value.is_none() || value.is_undefined() {
        return Ok(None);
    }
    if let Some(text) = value.as_str() {
        return Ok(Some(text.to_owned()));
    }
    let width = i64::try_from(value.clone())?;
    Ok(Some(" ".repeat(width.clamp(0, 64) as usize)))
}

fn separators(value: &Value, indented: bool) -> Result<(String, String), Error> {
    if value.is_none() || value.is_undefined() {
        let item = if indented { "," } else { ", " };
        return Ok((item.to_owned(), ": ".to_owned()));
    }
    let parts: Vec<Value> = value.try_iter()?.collect();
    match parts.as_slice() {
        [item, key] => Ok((item.to_string(), key.to_string())),
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson separators must be a pair of strings",
        )),
    }
}

struct Writer {
    out: String,
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
}

/// Deeper values are refused, as Python's recursion limit would.
const MAX_DEPTH: usize = 200;

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refuse("a value nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(refuse(&kind.to_string())),
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        // Python's JSON spells these three in its own way.
        let text = number(value);
        self.out.push_str(match text.as_str() {
            "nan" => "NaN",
            "inf" => "Infinity",
            "-inf" => "-Infinity",
            text => text,
        });
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !c.is_ascii()) => self.escape(c),
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, c: char) {
        for unit in c.encode_utf16(&mut [0; 2]) {
            self.out.push_str(&format!("\\u{unit:04x}"));
        }
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut first = true;
        self.out.push('[');
        for item in value.try_iter()? {
            self.separate(&mut first, depth);
            self.value(&item, depth + 1)?;
        }
        self.close(first, depth);
        self.out.push(']');
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort {
            keys.sort();
        }
        let mut first = true;
        self.out.push('{');
        for key in keys {
            self.separate(&mut first, depth);
            match key.kind() {
                ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                ValueKind::None => self.string("null"),
                ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" }),
                ValueKind::Number => self.string(&number(&key)),
                kind => return Err(refuse(&format!("{kind} as a key"))),
            }
            self.out.push_str(&self.key);
            self.value(&value.get_item(&key)?, depth + 1)?;
        }
        self.close(first, depth);
        self.out.push('}');
        Ok(())
    }

    fn separate(&mut self, first: &mut bool, depth: usize) {
        if !std::mem::take(first) {
            self.out.push_str(&self.item);
        }
        self.line(depth + 1);
    }

    fn close(&mut self, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }
}

fn refuse(what: &str) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("tojson cannot write {what}"),
    )
}
