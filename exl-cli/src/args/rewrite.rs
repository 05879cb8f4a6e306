//! ExLlamaV2's two-letter short flags, which clap has no notion of.

use std::ffi::OsString;

const PAIRS: [(&str, &str); 7] = [
    ("-hb", "--head-bits"),
    ("-mr", "--measure-rows"),
    ("-ml", "--measure-length"),
    ("-om", "--save-measurement"),
    ("-ss", "--shard-size"),
    ("-rs", "--rope-scale"),
    ("-ra", "--rope-alpha"),
];

/// Replaces two-letter short flags after `convert` by their long names (`-hb 6` and `-hb=6`).
pub(crate) fn exllama_short_flags(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut converting = false;
    let mut ended = false;
    args.enumerate()
        .map(|(at, arg)| {
            let Some(text) = arg.to_str() else { return arg };
            if !converting {
                converting = at > 0 && text == "convert";
                return arg;
            }
            ended |= text == "--";
            if ended {
                arg
            } else {
                long_form(text).map_or(arg, OsString::from)
            }
        })
        .collect()
}

fn long_form(text: &str) -> Option<String> {
    PAIRS.iter().find_map(|(short, long)| {
        let rest = text.strip_prefix(short)?;
        (rest.is_empty() || rest.starts_with('=')).then(|| format!("{long}{rest}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewrite(line: &str) -> Vec<String> {
        exllama_short_flags(line.split(' ').map(OsString::from))
            .into_iter()
            .map(|a| a.into_string().unwrap())
            .collect()
    }

    #[test]
    fn two_letter_flags_become_long_ones_in_convert() {
        assert_eq!(
            rewrite("exl convert src -hb 6 -mr=4 -b 4.0"),
            [
                "exl",
                "convert",
                "src",
                "--head-bits",
                "6",
                "--measure-rows=4",
                "-b",
                "4.0"
            ]
        );
    }

    #[test]
    fn other_commands_and_values_after_the_end_marker_stay() {
        assert_eq!(
            rewrite("exl generate -ss 1"),
            ["exl", "generate", "-ss", "1"]
        );
        assert_eq!(
            rewrite("exl convert -- -hb"),
            ["exl", "convert", "--", "-hb"]
        );
        assert_eq!(rewrite("exl convert -hbx"), ["exl", "convert", "-hbx"]);
    }
}
