use std::path::PathBuf;

use super::*;

fn golden(name: &str) -> Json {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// FNV-1a, as in templates.py.
fn fnv(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn render(template: &str, data: &Json, case: &Json, prompt: bool) -> Result<String> {
    let mut variables = data["variables"].as_object().unwrap().clone();
    if let Some(more) = case["variables"].as_object() {
        variables.extend(more.clone());
    }
    let seconds = 1_772_600_767;
    ChatTemplate::new(template)?.render(&ChatInput {
        messages: case["messages"].as_array().unwrap(),
        tools: case["tools"].as_array().map(Vec::as_slice),
        documents: case["documents"].as_array().map(Vec::as_slice),
        add_generation_prompt: prompt,
        continue_final_message: case["continue"].as_bool().unwrap_or(false),
        variables: Some(&variables),
        now: Some(LocalTime::from_unix(seconds)),
    })
}

/// Renderings of one template in the order of templates.py.
fn renderings(template: &str, data: &Json) -> Vec<(String, Result<String>)> {
    let cases = data["cases"].as_array().unwrap().iter();
    cases
        .flat_map(|case| [false, true].map(|prompt| (case, prompt)))
        .map(|(case, prompt)| {
            let name = format!("{} prompt={prompt}", case["name"].as_str().unwrap());
            (name, render(template, data, case, prompt))
        })
        .collect()
}

/// Says whether a rendering is what Python gave; null stands for a refusal.
fn differs(got: &Result<String>, expected: &Json) -> Option<String> {
    match (got, expected.as_str()) {
        (Ok(got), Some(expected)) if got == expected => None,
        (Err(_), None) => None,
        (Ok(got), _) => Some(format!("got      {got:?}\nexpected {expected}")),
        (Err(error), _) => Some(format!("error    {error}\nexpected {expected}")),
    }
}

#[test]
fn fragments_render_as_in_python() {
    let (data, fragments) = (golden("conversations.json"), golden("fragments.json"));
    let expected = golden("own-templates.json");
    let mut case = data["cases"][2].clone();
    case["variables"] = serde_json::json!({"x": {"a": 1}});
    let expected = expected["fragments"].as_array().unwrap();
    let fragments = fragments.as_array().unwrap();
    assert_eq!(fragments.len(), expected.len());
    let mut wrong = 0;
    for (fragment, expected) in fragments.iter().zip(expected) {
        let fragment = fragment.as_str().unwrap();
        if let Some(difference) = differs(&render(fragment, &data, &case, true), expected) {
            println!("{fragment}\n{difference}\n");
            wrong += 1;
        }
    }
    assert_eq!(wrong, 0, "fragments differ");
}

#[test]
fn own_templates_render_as_in_python() {
    let data = golden("conversations.json");
    let expected = golden("own-templates.json");
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/templates");
    for (name, expected) in expected["templates"].as_object().unwrap() {
        let template = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let got = renderings(&template, &data);
        let expected = expected.as_array().unwrap();
        assert_eq!(got.len(), expected.len());
        for ((case, got), expected) in got.iter().zip(expected) {
            let difference = differs(got, expected);
            assert!(
                difference.is_none(),
                "{name}, {case}:\n{}",
                difference.unwrap()
            );
        }
    }
}

#[test]
fn shared_templates() {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../shared/data/chat-templates"
    );
    if !std::path::Path::new(folder).is_dir() {
        println!("skipped: no folder {folder} with published templates");
        return;
    }
    let data = golden("conversations.json");
    let expected = golden("shared-templates.json");
    let expected = expected.as_object().unwrap();
    let mut identical = 0;
    for (name, hashes) in expected {
        let template = std::fs::read_to_string(format!("{folder}/{name}.jinja")).unwrap();
        let hashes = hashes.as_str().unwrap().split(' ');
        let got = renderings(&template, &data);
        assert_eq!(hashes.clone().count(), got.len());
        let mut wrong = Vec::new();
        for ((case, got), expected) in got.iter().zip(hashes) {
            let same = match got {
                Ok(text) => fnv(text) == expected,
                Err(_) => expected == "-",
            };
            if !same {
                let got = got.as_ref().map(String::len).map_err(ToString::to_string);
                wrong.push(format!("  {case}: {got:?}, expected {expected}"));
            }
        }
        identical += usize::from(wrong.is_empty());
        if !wrong.is_empty() {
            println!(
                "{name}: {} of {} differ\n{}",
                wrong.len(),
                got.len(),
                wrong[0]
            );
            if std::env::var_os("EXL_TEMPLATE_VERBOSE").is_some() {
                println!("{}", wrong.join("\n"));
            }
        }
    }
    println!(
        "{identical} of {} templates are identical in all cases",
        expected.len()
    );
    assert_eq!(
        identical,
        expected.len(),
        "published templates render differently"
    );
}

#[test]
fn errors_name_the_construct_and_the_line() {
    let error = ChatTemplate::new("a\n{% nonsense %}")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("line 2") && error.contains("nonsense"),
        "{error}"
    );
    let messages = [serde_json::json!({"role": "user", "content": "hi"})];
    let input = ChatInput {
        messages: &messages,
        ..ChatInput::default()
    };
    let refuse = |source: &str| {
        ChatTemplate::new(source)
            .unwrap()
            .render(&input)
            .unwrap_err()
            .to_string()
    };
    let error = refuse("\n\n{{ raise_exception('roles must alternate') }}");
    assert!(
        error.contains("roles must alternate") && error.contains("line 3"),
        "{error}"
    );
    let error = refuse("a\n{{ x|nofilter }}");
    assert!(
        error.contains("nofilter") && error.contains("line 2"),
        "{error}"
    );
    let error = refuse("{% set l = [] %}{% set _ = l.append(1) %}");
    assert!(error.contains("append()"), "{error}");
    let error = refuse("{{ 'a%s' % 1 }}");
    assert!(error.contains("|format"), "{error}");
}

#[test]
fn sets_pick_by_name() {
    let set = ChatTemplates::from_json(&serde_json::json!([
        {"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}
    ]))
    .unwrap();
    assert_eq!(set.select(true).unwrap().source(), "T");
    assert_eq!(set.select(false).unwrap().source(), "D");
    let set = ChatTemplates::from_json(&serde_json::json!([
        {"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}
    ]))
    .unwrap();
    assert!(
        set.select(false)
            .unwrap_err()
            .to_string()
            .contains("rag, tool_use")
    );
    assert!(ChatTemplates::from_json(&serde_json::json!(3)).is_err());
    let broken = serde_json::json!([{"name": "bad", "template": "{% if %}"}]);
    assert!(
        ChatTemplates::from_json(&broken)
            .unwrap_err()
            .to_string()
            .contains("`bad`")
    );
}

proptest::proptest! {
    #[test]
    fn any_source_compiles_or_is_refused(source in "[{}%# '\"\\\\a-]{0,40}|\\PC{0,20}") {
        let messages = [serde_json::json!({"role": "user", "content": "hi"})];
        let input = ChatInput { messages: &messages, ..ChatInput::default() };
        if let Ok(template) = ChatTemplate::new(&source) {
            let _ = template.render(&input);
        }
    }
}
