//! What the compiler says about kernels, and how it is told.

use std::collections::BTreeMap;
use std::fmt::Write;

/// A function of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Registers of a thread. None for PTX, and for functions that kernels call.
    pub(super) registers: Option<u32>,
    /// Bytes of static shared memory of a block.
    pub(super) shared: u32,
    /// Bytes of local memory of a thread, spilled registers included.
    pub(super) stack: u32,
    /// Bytes that a thread stores to and loads from where registers were spilled.
    pub(super) spill: u32,
}

/// Reads the remarks of `ptxas -v`: kernels, and functions that were not inlined into them.
pub(super) fn entries(log: &str) -> Vec<Entry> {
    let mut list: Vec<Entry> = Vec::new();
    // The kernel that is compiled, and what the next properties are of.
    let (mut kernel, mut subject) = (None, None);
    for line in log.lines() {
        if let Some(name) = between(line, "Compiling entry function '", "'") {
            kernel = Some(entry_of(&mut list, name));
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            subject = Some(entry_of(&mut list, name.trim()));
        } else if let (Some(at), Some(stack)) = (subject, number(line, " bytes stack frame")) {
            let spill = |what| number(line, what).unwrap_or(0);
            list[at].stack = stack;
            list[at].spill = spill(" bytes spill stores") + spill(" bytes spill loads");
        } else if let (Some(at), Some(registers)) = (kernel, number(line, " registers")) {
            list[at].registers = Some(registers);
            list[at].shared = number(line, " bytes smem").unwrap_or(0);
        }
    }
    list
}

fn entry_of(list: &mut Vec<Entry>, name: &str) -> usize {
    if let Some(at) = list.iter().position(|e| e.name == name) {
        return at;
    }
    list.push(Entry {
        name: name.to_owned(),
        ..Entry::default()
    });
    list.len() - 1
}

/// The kernels of PTX.
pub(super) fn ptx_entries(ptx: &str) -> Vec<Entry> {
    ptx.lines()
        .filter_map(|line| line.split_once(".entry ")?.1.split('(').next())
        .map(|name| Entry {
            name: name.trim().to_owned(),
            ..Entry::default()
        })
        .collect()
}

fn between<'a>(line: &'a str, before: &str, after: &str) -> Option<&'a str> {
    line.split_once(before)?.1.split_once(after).map(|p| p.0)
}

fn number(line: &str, what: &str) -> Option<u32> {
    let before = line.split_once(what)?.0;
    before.rsplit([' ', ',']).next()?.parse().ok()
}

/// Warnings of both halves of the compiler, and what it says about instructions it had to put in
/// sequence that could have overlapped.
pub(super) fn warnings(log: &str) -> impl Iterator<Item = &str> {
    let marks = ["warning #", "ptxas warning", "Potential Performance Loss"];
    log.lines()
        .filter(move |line| marks.iter().any(|mark| line.contains(mark)))
        .map(str::trim)
}

/// A line per function; `rows` are units, architectures and functions.
pub(super) fn table<'a>(rows: impl Iterator<Item = (&'a str, &'a str, &'a Entry)>) -> String {
    let mut out = format!(
        "{:20} {:12} {:44} {:>9} {:>7} {:>6} {:>6}\n",
        "unit", "architecture", "kernel", "registers", "shared", "stack", "spill"
    );
    for (unit, architecture, e) in rows {
        let registers = e
            .registers
            .map_or_else(|| "-".to_owned(), |n| n.to_string());
        writeln!(
            out,
            "{unit:20} {architecture:12} {:44} {registers:>9} {:>7} {:>6} {:>6}",
            e.name, e.shared, e.stack, e.spill
        )
        .expect("writing to a string cannot fail");
    }
    out
}

/// Texts with what they came from, each text once.
pub(super) fn grouped<'a>(
    rows: impl Iterator<Item = (&'a str, &'a str)>,
) -> BTreeMap<&'a str, Vec<&'a str>> {
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, text) in rows {
        let group = groups.entry(text).or_default();
        if !group.contains(&from) {
            group.push(from);
        }
    }
    groups
}

/// A string in JSON.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => {
                write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a string cannot fail");
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Kernels in JSON.
pub(super) fn json(entries: &[Entry]) -> String {
    let one = |e: &Entry| {
        let name = quote(&e.name);
        let Some(registers) = e.registers else {
            return format!("{{\"name\":{name}}}");
        };
        format!(
            "{{\"name\":{name},\"registers\":{registers},\"shared\":{},\"stack\":{},\"spill\":{}}}",
            e.shared, e.stack, e.spill
        )
    };
    let list: Vec<String> = entries.iter().map(one).collect();
    format!("[{}]", list.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As NVRTC 12.9 writes it, shortened.
    const LOG: &str = "\
exl-kernels/cuda/a/b.cu(3): warning #177-D: variable \"unused\" was declared but never referenced
  int unused;
      ^

Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"

ptxas info    : 24 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'exl_b' for 'sm_80'
ptxas info    : Function properties for exl_b
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 1.250 ms
ptxas info    : Compiling entry function 'exl_a' for 'sm_80'
ptxas info    : Function properties for exl_a
ptxas         .     10496 bytes stack frame, 644 bytes spill stores, 596 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 10496 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 1245.205 ms
ptxas info    : Function properties for _Z6helperfPf
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
";

    #[test]
    fn remarks_are_read() {
        let entry = |name: &str, registers, shared, stack, spill| Entry {
            name: name.to_owned(),
            registers,
            shared,
            stack,
            spill,
        };
        assert_eq!(
            entries(LOG),
            [
                entry("exl_b", Some(8), 0, 0, 0),
                entry("exl_a", Some(32), 1024, 10496, 1240),
                entry("_Z6helperfPf", None, 0, 16, 12),
            ]
        );
        assert!(entries("").is_empty());
    }

    #[test]
    fn remarks_that_make_no_sense_are_passed_over() {
        let log = "ptxas info : Used many registers\nptxas . 8 bytes stack frame\n\
                   ptxas info : Used 99999999999999999999 registers\n";
        assert!(entries(log).is_empty());
    }

    #[test]
    fn kernels_of_ptx_are_found() {
        let ptx =
            ".version 8.8\n.visible .entry exl_a(\n.param .u64 p\n)\n.entry exl_b (\n.func x(\n";
        let names: Vec<String> = ptx_entries(ptx).into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["exl_a", "exl_b"]);
    }

    #[test]
    fn warnings_are_found_and_told_once() {
        let found: Vec<&str> = warnings(LOG).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("#177-D"));
        assert!(found[1].contains("wgmma"));
        let rows = [
            ("sm_80", "x"),
            ("sm_90a", "x"),
            ("sm_80", "x"),
            ("sm_80", "y"),
        ];
        let groups = grouped(rows.into_iter());
        assert_eq!(groups["x"], ["sm_80", "sm_90a"]);
        assert_eq!(groups["y"], ["sm_80"]);
    }

    #[test]
    fn the_table_has_a_line_per_function() {
        let entries = entries(LOG);
        let table = table(entries.iter().map(|e| ("a/b", "sm_80", e)));
        assert_eq!(table.lines().count(), 4, "{table}");
        assert!(table.contains("  1240\n"), "{table}");
    }

    #[test]
    fn json_is_quoted() {
        assert_eq!(quote("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
        assert_eq!(
            json(&entries(LOG)[..1]),
            "[{\"name\":\"exl_b\",\"registers\":8,\"shared\":0,\"stack\":0,\"spill\":0}]"
        );
        assert_eq!(
            json(&ptx_entries(".entry exl_a(")),
            "[{\"name\":\"exl_a\"}]"
        );
    }
}
