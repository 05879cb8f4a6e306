//! JSON schemas made at random, all of them satisfiable by short texts.

use serde_json::{Map, Value as Json, json};

use crate::Philox;

/// Random choices that repeat for a seed.
struct Dice {
    philox: Philox,
    next: u64,
}

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        (self.philox.uniform(self.next, 0) * n as f64) as usize
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }
}

const NAMES: [&str; 12] = [
    "name",
    "id",
    "tags",
    "größe",
    "with space",
    "quote\"d",
    "a/b",
    "x",
    "deeply-nested",
    "émoji🦀",
    "back\\slash",
    "true",
];
const PATTERNS: [&str; 6] = [
    "^[a-z]{1,6}$",
    "^(foo|bar)+-[0-9]{2}$",
    "^[A-Z][a-z]{0,4}( [A-Z][a-z]{0,4})?$",
    "^\\d{3}-\\d{4}$",
    "^[^\"\\\\]{2,5}$",
    "^é{1,3}$",
];
/// Without times: the engine lets a second 60 through at any minute, the validator at midnight only.
const FORMATS: [&str; 3] = ["date", "uuid", "ipv4"];

/// Schema number `seed` of the corpus.
pub(super) fn schema(seed: u64) -> Json {
    let philox = Philox::new(seed);
    let mut dice = Dice { philox, next: 0 };
    // Some refer to definitions of their own.
    if dice.below(5) > 0 {
        return any(&mut dice, 3);
    }
    let mut root = object(&mut dice, 2);
    let part = any(&mut dice, 1);
    root["properties"]["item"] = json!({"$ref": "#/$defs/part"});
    root["required"] = json!(["item"]);
    root["$defs"] = json!({ "part": part });
    root
}

fn any(dice: &mut Dice, depth: usize) -> Json {
    match dice.below(if depth == 0 { 7 } else { 11 }) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => integer(dice),
        3 => number(dice),
        4 => string(dice),
        5 => json!({"enum": ["one", 2, null, [true], {"k": "v"}, "sp ace\n"]}),
        6 => json!({"const": {"a": [1, "b", NAMES[dice.below(NAMES.len())]]}}),
        7 => array(dice, depth - 1),
        8 => {
            let (a, b) = (any(dice, depth - 1), any(dice, depth - 1));
            json!({ "anyOf": [a, b] })
        }
        9 => {
            json!({"type": ["string", "integer", "null"], "maxLength": 5, "minimum": -9, "maximum": 99})
        }
        _ => object(dice, depth - 1),
    }
}

fn integer(dice: &mut Dice) -> Json {
    let low = dice.below(2000) as i64 - 1000;
    let high = low + dice.below(500) as i64 + 7;
    match dice.below(3) {
        0 => json!({"type": "integer", "minimum": low, "maximum": high}),
        1 => json!({"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high}),
        _ => json!({"type": "integer", "minimum": low, "maximum": high, "multipleOf": 7}),
    }
}

fn number(dice: &mut Dice) -> Json {
    let low = dice.below(200) as f64 / 4.0 - 25.0;
    json!({"type": "number", "minimum": low, "maximum": low + 10.5})
}

fn string(dice: &mut Dice) -> Json {
    match dice.below(4) {
        0 => json!({"type": "string", "minLength": dice.below(3), "maxLength": 3 + dice.below(9)}),
        1 => json!({"type": "string", "pattern": dice.pick(&PATTERNS)}),
        2 => json!({"type": "string", "format": dice.pick(&FORMATS)}),
        _ => json!({"type": "string", "enum": [dice.pick(&NAMES), "other", ""]}),
    }
}

fn array(dice: &mut Dice, depth: usize) -> Json {
    let least = dice.below(3);
    match dice.below(3) {
        0 => {
            let (a, b) = (any(dice, depth), any(dice, depth));
            json!({"type": "array", "prefixItems": [a, b], "minItems": 2, "items": false})
        }
        _ => json!({"type": "array", "items": any(dice, depth), "minItems": least,
            "maxItems": least + dice.below(3)}),
    }
}

fn object(dice: &mut Dice, depth: usize) -> Json {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for _ in 0..1 + dice.below(4) {
        let name = dice.pick(&NAMES);
        if properties
            .insert(name.to_owned(), any(dice, depth))
            .is_none()
            && dice.below(3) > 0
        {
            required.push(name);
        }
    }
    // Open objects could go on for ever.
    json!({"type": "object", "properties": properties, "required": required,
        "additionalProperties": false})
}

/// What people write and what breaks engines.
pub(super) fn hard() -> Vec<Json> {
    let tree = json!({
        "$ref": "#/$defs/node",
        "$defs": {"node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
            },
            "required": ["value", "next"],
            "additionalProperties": false
        }}
    });
    let long: Vec<String> = (0..60)
        .map(|i| format!("option number {i} of many"))
        .collect();
    let wide: Map<String, Json> = (0..40)
        .map(|i| (format!("property_{i}"), json!({"type": "boolean"})))
        .collect();
    vec![
        json!({"type": "object", "properties": {}, "additionalProperties": false}),
        json!({"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 5},
            "maxProperties": 2}),
        tree,
        json!({ "enum": long }),
        json!({"type": "object", "properties": wide, "required": ["property_0", "property_39"],
            "additionalProperties": false}),
        json!({"allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"minimum": 3, "maximum": 5}}}],
            "additionalProperties": false, "properties": {"a": {}}}),
        json!({"type": "string", "minLength": 20, "maxLength": 24}),
        json!({"type": "array", "items": {"type": "array", "items": {"type": "array",
            "items": {"const": 0}, "maxItems": 2}, "maxItems": 2}, "maxItems": 2}),
        json!({"type": "number", "minimum": 0.001, "maximum": 1e-2}),
        json!({"type": "integer", "minimum": -3, "maximum": 3}),
        json!({"const": "</s>"}),
        json!({"const": "\u{1}\u{7f}\"\\/\u{2028}"}),
        json!({"type": "object", "properties": {"": {"const": ""}}, "required": [""],
            "additionalProperties": false}),
        json!({"type": "string", "pattern": "^(a|ab)(c|bcd)(d*)$", "maxLength": 9}),
        json!({"type": "string", "format": "email", "maxLength": 30}),
    ]
}
