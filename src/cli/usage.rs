//! Errors of the command line, in the form of all other errors.

use std::error::Error;
use std::num::{ParseFloatError, ParseIntError};

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::error::Failure;

/// The failure for what clap refuses; its hint names the help of the command.
pub(super) fn failure(error: &clap::Error, lrc: &Command) -> Failure {
    let flag = plain(&context(error, ContextKind::InvalidArg).join(" "));
    let help = help_command(lrc);
    match error.kind() {
        ErrorKind::InvalidValue => {
            let message = invalid_value(error, &flag);
            suggest(error, ContextKind::SuggestedValue, message, format!("`{help}` explains `{flag}`"))
        }
        ErrorKind::ValueValidation => {
            Failure::usage(refused_value(error, &flag)).hint(format!("`{help}` explains `{flag}`"))
        }
        ErrorKind::UnknownArgument => {
            let kind = if flag.starts_with('-') { "there is no flag" } else { "unexpected argument" };
            let otherwise = match flag_before(lrc, &flag) {
                Some(before) => format!("did you mean `{before}={flag}`?"),
                None => format!("`{help}` lists all flags"),
            };
            suggest(error, ContextKind::SuggestedArg, format!("{kind} `{flag}`"), otherwise)
        }
        ErrorKind::InvalidSubcommand => {
            let message = format!("there is no command `{}`", context(error, ContextKind::InvalidSubcommand).join(" "));
            suggest(error, ContextKind::SuggestedSubcommand, message, "`lrc --help` lists all commands".into())
        }
        ErrorKind::MissingRequiredArgument => missing(error, &help),
        ErrorKind::ArgumentConflict => conflict(error, &flag),
        _ => {
            let text = error.render().to_string();
            let line = text.lines().next().unwrap_or_default().replace('\'', "`");
            Failure::usage(line.trim_start_matches("error: ")).hint(format!("see `{help}`"))
        }
    }
}

/// A failure whose hint is the word that was probably meant, the last of those that clap suggests.
fn suggest(error: &clap::Error, kind: ContextKind, message: String, otherwise: String) -> Failure {
    let suggested = context(error, kind);
    Failure::usage(message).hint(suggested.last().map_or(otherwise, |word| format!("did you mean `{word}`?")))
}

/// The strings of one kind of context.
fn context(error: &clap::Error, kind: ContextKind) -> Vec<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => vec![text.clone()],
        Some(ContextValue::Strings(texts)) => texts.clone(),
        Some(ContextValue::StyledStr(text)) => vec![text.to_string()],
        _ => Vec::new(),
    }
}

/// An argument by its name: `--keep` instead of `--keep <SHARE>`, `MODEL` instead of `<MODEL>` or `[MODEL]`.
fn plain(argument: &str) -> String {
    match argument.strip_prefix(['<', '[']) {
        Some(name) => name.split(['>', ']']).next().unwrap_or_default().into(),
        None => argument.split([' ', '[', '=']).next().unwrap_or_default().into(),
    }
}

/// The names of an argument, or of all of a group of which one is required: `<--keep <SHARE>|--rank <RANK>>`.
fn one_of(argument: &str) -> String {
    let group = argument.strip_prefix('<').and_then(|rest| rest.strip_suffix('>')).filter(|rest| rest.contains('|'));
    let names = group.unwrap_or(argument).split('|').map(|name| format!("`{}`", plain(name)));
    match names.collect::<Vec<_>>().as_slice() {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        names => names.concat(),
    }
}

/// A value with its flag, or alone if it has its place.
fn given(flag: &str, value: &str) -> String {
    if flag.starts_with('-') { format!("{flag} {value}") } else { value.into() }
}

/// A value that is none of a list.
fn invalid_value(error: &clap::Error, flag: &str) -> String {
    let value = context(error, ContextKind::InvalidValue).join(" ");
    let valid = context(error, ContextKind::ValidValue).join(", ");
    match (value.is_empty(), valid.is_empty()) {
        (true, true) => format!("`{flag}` needs a value"),
        (true, false) => format!("`{flag}` needs a value: one of {valid}"),
        (false, _) => format!("`{}` is not one of {valid}", given(flag, &value)),
    }
}

/// A value that its parser refused.
fn refused_value(error: &clap::Error, flag: &str) -> String {
    let value = context(error, ContextKind::InvalidValue).join(" ");
    let given = given(flag, &value);
    let Some(cause) = error.source() else { return format!("`{given}` is not possible") };
    let reason = if cause.is::<ParseFloatError>() {
        "expected a number".into()
    } else if cause.is::<ParseIntError>() {
        "expected a whole number, at least 0".into()
    } else {
        cause.to_string()
    };
    // Messages about names begin with the name.
    match reason.strip_prefix(&format!("`{value}` ")) {
        Some(rest) => format!("`{given}` {rest}"),
        None => format!("`{given}`: {reason}"),
    }
}

/// Required arguments that are absent.
fn missing(error: &clap::Error, help: &str) -> Failure {
    let names: Vec<String> = context(error, ContextKind::InvalidArg).iter().map(|name| one_of(name)).collect();
    let verb = if names.len() == 1 { "is" } else { "are" };
    let usage = context(error, ContextKind::Usage).join(" ");
    let hint = usage.strip_prefix("Usage: ").map_or_else(|| format!("see `{help}`"), |line| format!("usage: {line}"));
    Failure::usage(format!("{} {verb} missing", names.join(", "))).hint(hint)
}

/// Arguments that exclude each other, or one that is given twice.
fn conflict(error: &clap::Error, flag: &str) -> Failure {
    let others: Vec<String> = context(error, ContextKind::PriorArg).iter().map(|other| plain(other)).collect();
    match others.as_slice() {
        [other] if other == flag => Failure::usage(format!("`{flag}` is given twice")).hint("remove one of the two"),
        [] => Failure::usage(format!("`{flag}` cannot be combined with other arguments")).hint("remove the others"),
        others => Failure::usage(format!("`{flag}` cannot be combined with `{}`", others.join("`, `")))
            .hint("remove one of the two"),
    }
}

/// The words of the command line that are text.
fn words() -> impl Iterator<Item = String> {
    std::env::args_os().skip(1).filter_map(|word| word.into_string().ok())
}

/// The flag before `word` on the command line, if it takes a value after `=` only.
fn flag_before(lrc: &Command, word: &str) -> Option<String> {
    let flag = words().zip(words().skip(1)).find(|(_, next)| next == word)?.0;
    let command = words().find_map(|word| lrc.find_subcommand(word))?;
    let mut flags = command.get_arguments().filter(|arg| arg.is_require_equals_set());
    flags.any(|arg| arg.get_long() == flag.strip_prefix("--")).then_some(flag)
}

/// The command that prints the help of the command that was given.
fn help_command(lrc: &Command) -> String {
    let given = words().find(|word| lrc.get_subcommands().any(|command| command.get_name() == word));
    given.map_or_else(|| "lrc --help".into(), |command| format!("lrc {command} --help"))
}
