//! The options of a recipe as flags.

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use crate::compress::recipe::RecipeOptions;

/// The order of headings in the help.
const HEADINGS: [&str; 6] = ["Model", "Budget", "Method", "Quantization", "Calibration", "Output"];

/// [`RecipeOptions`], sorted by heading; its own order is that of recipe files.
#[derive(Debug)]
pub(super) struct RecipeArgs(pub RecipeOptions);

impl Args for RecipeArgs {
    fn augment_args(command: Command) -> Command {
        let options = RecipeOptions::augment_args(Command::new("options"));
        let mut arguments: Vec<Arg> = options.get_arguments().cloned().collect();
        arguments.sort_by_key(|argument| HEADINGS.iter().position(|h| argument.get_help_heading() == Some(h)));
        command.groups(options.get_groups().cloned()).args(arguments)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RecipeArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        RecipeOptions::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}
