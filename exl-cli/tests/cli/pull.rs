//! `exl pull` against a hub of our own on a local port.

use crate::support::{Outcome, TempDir, exl, run};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one model; remembers what it was asked.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

/// Files of the model: name, contents.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (
            "config.json",
            b"{\"architectures\":[\"LlamaForCausalLM\"]}".to_vec(),
        ),
        (
            "model.safetensors",
            (0..50_000u32).map(|i| (i * 7 % 251) as u8).collect(),
        ),
        ("pytorch_model.bin", vec![1; 64]),
        ("original/params.json", vec![2; 64]),
        ("README.md", vec![3; 64]),
    ]
}

fn etag(name: &str) -> String {
    format!("etag-of-{}", name.replace(['/', '.'], "-"))
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &log);
            }
        });
        Self { endpoint, requests }
    }

    fn pull(&self, home: &TempDir, args: &[&str]) -> Outcome {
        let mut command = exl(["pull"]);
        run(command
            .args(args)
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &self.endpoint))
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while reader.read_line(&mut head).unwrap_or(0) > 2 {}
    let path = head.split(' ').nth(1).unwrap_or("").to_owned();
    let range = head.lines().find_map(|l| {
        l.to_ascii_lowercase()
            .strip_prefix("range: bytes=")
            .map(str::to_owned)
    });
    let token = head
        .lines()
        .any(|l| l.eq_ignore_ascii_case("authorization: Bearer secret"));
    log.lock()
        .unwrap()
        .push(format!("{path} {}", range.as_deref().unwrap_or("-")));
    let reply = reply(&path, range.as_deref(), token);
    let _ = stream.write_all(&reply);
}

fn reply(path: &str, range: Option<&str>, token: bool) -> Vec<u8> {
    let all = files();
    if path.starts_with("/api/models/org/gated/") && !token {
        return response("401 Unauthorized", &[], b"");
    }
    if path.starts_with("/api/models/org/tiny/") || path.starts_with("/api/models/org/gated/") {
        let names: Vec<String> = all
            .iter()
            .map(|(name, _)| format!("{{\"rfilename\":\"{name}\"}}"))
            .collect();
        let body = format!(
            "{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}",
            names.join(",")
        );
        return response("200 OK", &[], body.as_bytes());
    }
    let name = path
        .split_once(&format!("/resolve/{COMMIT}/"))
        .map_or("", |(_, name)| name);
    let Some((name, body)) = all.iter().find(|(known, _)| *known == name) else {
        return response("404 Not Found", &[], b"");
    };
    let (first, last) = range.and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let first: usize = first.parse().unwrap();
    if first >= body.len() {
        return response("416 Range Not Satisfiable", &[], b"");
    }
    let last = last.parse().unwrap_or(body.len() - 1);
    let headers = [
        format!("ETag: \"{}\"", etag(name)),
        format!("X-Repo-Commit: {COMMIT}"),
        format!("Content-Range: bytes {first}-{last}/{}", body.len()),
    ];
    response("206 Partial Content", &headers, &body[first..=last])
}

fn response(status: &str, headers: &[String], body: &[u8]) -> Vec<u8> {
    let mut text = format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n",
        body.len()
    );
    for header in headers {
        text.push_str(&format!("{header}\r\n"));
    }
    text.push_str("\r\n");
    [text.as_bytes(), body].concat()
}

fn blobs(home: &TempDir) -> PathBuf {
    home.join("hub/models--org--tiny/blobs")
}

#[test]
fn a_model_lands_in_the_standard_cache_without_what_it_does_not_need() {
    let (hub, home) = (Hub::start(), TempDir::new());
    let outcome = hub.pull(&home, &["org/tiny"]).success();
    let dir = home.join(&format!("hub/models--org--tiny/snapshots/{COMMIT}"));
    assert_eq!(outcome.stdout.trim(), dir.to_str().unwrap());
    for (name, body) in files() {
        let needed = ["config.json", "model.safetensors"].contains(&name);
        assert_eq!(dir.join(name).exists(), needed, "{name}");
        if needed {
            assert_eq!(std::fs::read(dir.join(name)).unwrap(), body);
        }
    }
    let main = std::fs::read_to_string(home.join("hub/models--org--tiny/refs/main")).unwrap();
    assert_eq!(main, COMMIT);
}

#[test]
fn a_second_pull_downloads_nothing() {
    let (hub, home) = (Hub::start(), TempDir::new());
    hub.pull(&home, &["org/tiny"]).success();
    let before = hub.requests().len();
    let json = hub.pull(&home, &["org/tiny", "--json"]).success().json();
    assert_eq!(json["downloaded_bytes"], 0);
    assert_eq!(json["files"], 2);
    assert_eq!(json["commit"], COMMIT);
    assert_eq!(
        hub.requests().len(),
        before + 1,
        "only the list of files is asked for"
    );
}

#[test]
fn a_part_is_continued_where_it_ends() {
    let (hub, home) = (Hub::start(), TempDir::new());
    let (name, body) = files().swap_remove(1);
    std::fs::create_dir_all(blobs(&home)).unwrap();
    let part = blobs(&home).join(format!("{}.part", etag(name)));
    std::fs::write(&part, &body[..20_000]).unwrap();
    hub.pull(&home, &["org/tiny"]).success();
    let asked = hub.requests();
    assert!(
        asked
            .iter()
            .any(|r| r.ends_with("model.safetensors 20000-")),
        "{asked:?}"
    );
    assert_eq!(std::fs::read(blobs(&home).join(etag(name))).unwrap(), body);
}

#[test]
fn a_part_that_is_complete_is_finished() {
    let (hub, home) = (Hub::start(), TempDir::new());
    let (name, body) = files().swap_remove(1);
    std::fs::create_dir_all(blobs(&home)).unwrap();
    std::fs::write(blobs(&home).join(format!("{}.part", etag(name))), &body).unwrap();
    hub.pull(&home, &["org/tiny"]).success();
    assert_eq!(std::fs::read(blobs(&home).join(etag(name))).unwrap(), body);
}

#[test]
fn refusals_say_what_to_do() {
    let (hub, home) = (Hub::start(), TempDir::new());
    hub.pull(&home, &["org/absent"])
        .failure(1, &["org/absent", "not found", "--revision"]);
    hub.pull(&home, &["org/gated"])
        .failure(1, &["org/gated", "HF_TOKEN"]);
    let mut command = exl(["pull", "org/gated"]);
    command
        .env("HF_HOME", home.path())
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_TOKEN", "secret");
    // The token opens the list; the files of this repository do not exist under its name's path.
    run(&mut command).success();
}

#[test]
fn no_network_is_one_clear_line() {
    let home = TempDir::new();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut command = exl(["pull", "org/tiny"]);
    command
        .env("HF_HOME", home.path())
        .env("HF_ENDPOINT", format!("http://127.0.0.1:{port}"));
    run(&mut command).failure(1, &["org/tiny", "cannot be reached", "HF_ENDPOINT"]);
    let mut command = exl(["pull", "org/tiny"]);
    run(command
        .env("HF_HOME", home.path())
        .env("HF_HUB_OFFLINE", "1"))
    .failure(1, &["HF_HUB_OFFLINE"]);
}
