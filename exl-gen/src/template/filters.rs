//! Filters and tests whose Jinja2 behaviour differs from minijinja's.

use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, filters};

use super::json::tojson;

/// Filter on everything a `for` iterates over.
pub(super) const ITERATED: &str = "exl_iterated";
/// Function that stands for `+` where safe strings are involved.
pub(super) const ADD: &str = "exl_add";

/// Installs all of them.
pub(super) fn register(env: &mut Environment<'static>) {
    env.add_filter("tojson", tojson);
    env.add_filter("length", length);
    env.add_filter("count", length);
    env.add_filter("default", default);
    env.add_filter("d", default);
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_filter("indent", indent);
    env.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    env.add_filter(ITERATED, iterated);
    env.add_function(ADD, add);
    env.add_test("sequence", is_sequence);
    env.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    env.add_test("callable", |value: &Value| {
        value.kind() == ValueKind::Plain && value.as_object().is_some()
    });
    // In Python these give generators: always true, without length or JSON.
    let generators = [
        ("map", Value::from_function(filters::map)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
    ];
    for (name, builtin) in generators {
        env.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            let items = builtin.call(state, &args)?.try_iter()?.collect();
            Ok::<_, Error>(Value::from_object(Generator(items)))
        });
    }
    let join = Value::from_function(filters::join);
    env.add_filter(
        "join",
        move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            if let Some(items) = args.first() {
                iterated(items.clone())?;
            }
            join.call(state, &args)
        },
    );
}

/// Iterated like a list, but otherwise opaque.
#[derive(Debug)]
struct Generator(Vec<Value>);

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Iter(Box::new(self.0.clone().into_iter().filter(|_| true)))
    }
}

/// What a `for` loop may run over: not `none`, which minijinja takes for an empty list.
pub(super) fn iterated(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None => Err(not_iterable(&value)),
        _ => Ok(value),
    }
}

fn not_iterable(value: &Value) -> Error {
    invalid(format!(
        "a value of type {} cannot be iterated over",
        value.kind()
    ))
}

/// Jinja2 asks for a length and an index operator, which strings and mappings have as well.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
    )
}

/// Undefined values are empty.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value
        .len()
        .ok_or_else(|| invalid(format!("a value of type {} has no length", value.kind())))
}

fn default(
    value: &Value,
    other: Option<Value>,
    lax: Option<bool>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let other = match other {
        Some(other) => Some(other),
        None => kwargs.get("default_value")?,
    };
    let lax = match lax {
        Some(lax) => lax,
        None => kwargs.get::<Option<bool>>("boolean")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    if value.is_undefined() || (lax && !value.is_true()) {
        return Ok(other.unwrap_or_else(|| Value::from("")));
    }
    Ok(value.clone())
}

/// Never fails: what is no number gives the default.
fn int(
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let default = match default {
        Some(default) => Some(default),
        None => kwargs.get("default")?,
    };
    let base = match base {
        Some(base) => base,
        None => kwargs.get::<Option<u32>>("base")?.unwrap_or(10),
    };
    kwargs.assert_all_used()?;
    let parsed = match value.as_str() {
        Some(text) => parse_int(text.trim(), base.clamp(2, 36)),
        None if value.kind() == ValueKind::Bool => Some(i64::from(value.is_true())),
        None => as_float(value).map(|number| number.trunc() as i64),
    };
    Ok(match parsed {
        Some(number) => Value::from(number),
        None => default.unwrap_or_else(|| Value::from(0)),
    })
}

fn parse_int(text: &str, base: u32) -> Option<i64> {
    let digits = text.replace('_', "");
    let digits = match base {
        16 => digits.trim_start_matches("0x"),
        8 => digits.trim_start_matches("0o"),
        2 => digits.trim_start_matches("0b"),
        _ => digits.as_str(),
    };
    i64::from_str_radix(digits, base)
        .ok()
        .or_else(|| text.parse::<f64>().ok().map(|number| number as i64))
}

fn float(value: &Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = match default {
        Some(default) => Some(default),
        None => kwargs.get("default")?,
    };
    kwargs.assert_all_used()?;
    let parsed = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => as_float(value),
    };
    Ok(match parsed {
        Some(number) => Value::from(number),
        None => default.unwrap_or_else(|| Value::from(0.0)),
    })
}

fn as_float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        _ => None,
    }
}

/// `text|indent(width=4, first=false, blank=false)`, where the width may be a string.
fn indent(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let get = |index: usize, name: &str| -> Result<Value, Error> {
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(named
            .or_else(|| args.get(index).cloned())
            .unwrap_or_default())
    };
    let width = get(0, "width")?;
    let (first, blank) = (get(1, "first")?.is_true(), get(2, "blank")?.is_true());
    kwargs.assert_all_used()?;
    let prefix = match (width.as_str(), width.is_undefined()) {
        (Some(prefix), _) => prefix.to_owned(),
        (None, true) => " ".repeat(4),
        (None, false) => " ".repeat(usize::try_from(width)?.min(256)),
    };
    let text = value.to_string();
    let mut out = String::new();
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let wanted = if index == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if wanted {
            out.push_str(&prefix);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Left to right; a safe string makes the other one be escaped, as Python's Markup does.
fn add(args: Rest<Value>) -> Result<Value, Error> {
    let mut parts = args.iter();
    let first = parts.next().cloned().unwrap_or_default();
    parts.try_fold(first, |left, right| {
        let (Some(a), Some(b)) = (left.as_str(), right.as_str()) else {
            return Err(invalid(format!(
                "cannot add {} and {} next to a safe string",
                left.kind(),
                right.kind()
            )));
        };
        Ok(match (left.is_safe(), right.is_safe()) {
            (false, false) => Value::from(format!("{a}{b}")),
            (true, true) => Value::from_safe_string(format!("{a}{b}")),
            (true, false) => Value::from_safe_string(format!("{a}{}", escape(b))),
            (false, true) => Value::from_safe_string(format!("{}{b}", escape(a))),
        })
    })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('>', "&gt;")
        .replace('<', "&lt;")
        .replace('\'', "&#39;")
        .replace('"', "&#34;")
}

/// Writes a value into the text.
pub(super) fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if value.kind() == ValueKind::Number {
        return out.write_str(&number(value)).map_err(Error::from);
    }
    minijinja::escape_formatter(out, state, value)
}

/// Python's `repr` of a number.
pub(super) fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(number) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !number.is_finite() {
        return number.to_string().to_lowercase();
    }
    // Rust and Python agree on the shortest digits, not on when to use an exponent.
    let text = format!("{number:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = number.to_string();
    if plain.contains('.') {
        plain
    } else {
        format!("{plain}.0")
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
