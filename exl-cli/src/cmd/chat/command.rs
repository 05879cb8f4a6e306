//! What an entered line means.

/// A line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Nothing was entered.
    Empty,
    /// Text for the model.
    Say(String),
    Help,
    Reset,
    /// A new system message; empty removes it.
    System(String),
    Save(String),
    Load(String),
    /// A new text for the last message; empty opens it for editing.
    Edit(String),
    Regen,
    Stats,
    Quit,
    /// A command that cannot be followed, with the reason.
    Wrong(String),
}

pub(super) const HELP: &str = "\
/help         this list
/reset        forget the conversation (the system message stays)
/system TEXT  set the system message and forget the conversation; without TEXT remove it
/save FILE    write the conversation as JSON
/load FILE    go on with a saved conversation
/edit [TEXT]  change your last message and answer it again
/regen        answer your last message again
/stats        tokens and speed
/quit         leave (as Ctrl-D)
\"\"\"           on a line of its own starts and ends a message of several lines
Ctrl-C        stops a reply
";

impl Line {
    /// Understands a line; a slash at the start makes a command, two say a slash.
    pub(super) fn parse(text: &str) -> Self {
        let text = text.trim();
        if text.is_empty() {
            return Self::Empty;
        }
        let Some(rest) = text.strip_prefix('/') else {
            return Self::Say(text.to_owned());
        };
        if rest.starts_with('/') {
            return Self::Say(rest.to_owned());
        }
        let (name, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let argument = argument.trim().to_owned();
        let file = |make: fn(String) -> Self| {
            if argument.is_empty() {
                return Self::Wrong(format!("/{name} needs the name of a file"));
            }
            make(argument.clone())
        };
        match name {
            "help" | "?" => Self::Help,
            "reset" => Self::Reset,
            "system" => Self::System(argument),
            "save" => file(Self::Save),
            "load" => file(Self::Load),
            "edit" => Self::Edit(argument),
            "regen" => Self::Regen,
            "stats" => Self::Stats,
            "quit" | "exit" => Self::Quit,
            _ => Self::Wrong(format!(
                "there is no command /{name} (see /help; // says a slash)"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_text_or_commands() {
        assert_eq!(Line::parse("  "), Line::Empty);
        assert_eq!(Line::parse(" hello "), Line::Say("hello".into()));
        assert_eq!(Line::parse("//etc/hosts"), Line::Say("/etc/hosts".into()));
        assert_eq!(
            Line::parse("/save  my chat.json"),
            Line::Save("my chat.json".into())
        );
        assert_eq!(Line::parse("/edit"), Line::Edit(String::new()));
        assert_eq!(
            Line::parse("/system Be brief."),
            Line::System("Be brief.".into())
        );
        assert!(matches!(Line::parse("/save"), Line::Wrong(_)));
        assert!(matches!(Line::parse("/sing"), Line::Wrong(_)));
    }
}
