//! Options of a recipe as flags. [`RecipeOptions`] declares them, once; a command selects those that it takes.

use std::marker::PhantomData;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::compress::compensate::Compensate;
use crate::compress::presets::Method;
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::error::Failure;

/// The order of headings in the help.
const HEADINGS: [&str; 10] = [
    "Model",
    "Text",
    "Training",
    "Evaluation",
    "Budget",
    "Method",
    "Quantization",
    "Calibration",
    "Statistics",
    "Output",
];

/// The options that a command takes.
pub(super) trait Selection {
    /// Whether the command takes the option with this id.
    fn takes(id: &str) -> bool;

    /// The flag as this command has it.
    fn adapt(flag: Arg) -> Arg {
        flag
    }
}

/// Selected options of a recipe, sorted by heading; their own order is the order of recipe files.
#[derive(Debug)]
pub(super) struct Options<S> {
    pub values: RecipeOptions,
    pub repeated: Repeated,
    selection: PhantomData<S>,
}

/// All values of the options that a recipe has once and some command several times.
#[derive(Debug)]
pub(super) struct Repeated {
    pub keeps: Vec<f64>,
    pub bits: Vec<f64>,
    pub methods: Vec<Method>,
}

impl Repeated {
    fn given(matches: &ArgMatches) -> Self {
        fn values<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, id: &str) -> Vec<T> {
            matches.try_get_many(id).ok().flatten().into_iter().flatten().cloned().collect()
        }
        Self { keeps: values(matches, "keep"), bits: values(matches, "bits"), methods: values(matches, "method") }
    }
}

/// The flag with any number of values.
pub(super) fn repeated(flag: Arg) -> Arg {
    flag.action(ArgAction::Append).num_args(1)
}

/// All options.
#[derive(Debug)]
pub(super) struct All;

impl Selection for All {
    fn takes(_: &str) -> bool {
        true
    }
}

impl<S: Selection> Args for Options<S> {
    fn augment_args(command: Command) -> Command {
        let options = RecipeOptions::augment_args(Command::new("options"));
        let taken = options.get_arguments().filter(|flag| S::takes(flag.get_id().as_str()));
        let mut flags: Vec<Arg> = taken.cloned().map(S::adapt).collect();
        flags.sort_by_key(|flag| HEADINGS.iter().position(|h| flag.get_help_heading() == Some(h)));
        command.args(flags)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: Selection> FromArgMatches for Options<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let repeated = Repeated::given(matches);
        Ok(Self { values: RecipeOptions::given(matches), repeated, selection: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The file that completes the flags.
#[derive(Debug, Args)]
pub(super) struct RecipeFile {
    /// Read options from a TOML file; flags override it
    #[arg(long, value_name = "FILE", help_heading = "Model", display_order = 0)]
    recipe: Option<PathBuf>,
}

impl RecipeFile {
    /// The flags, completed from the file.
    pub fn complete(&self, flags: &RecipeOptions) -> Result<RecipeOptions> {
        let file = self.recipe.as_deref().map(RecipeOptions::read).transpose()?.unwrap_or_default();
        Ok(flags.clone().or(file))
    }

    /// The recipe of `options`. An error about an option that is not a flag of this command, so that the
    /// file has it, names the file.
    pub fn check(&self, flags: &RecipeOptions, options: &RecipeOptions) -> Result<Recipe> {
        let recipe = Recipe::new(options).map_err(|error| match (&self.recipe, error.downcast::<Failure>()) {
            (Some(file), Ok(failure)) if !is_named(flags, &failure.message) && is_named(options, &failure.message) => {
                let message = format!("recipe `{}`: {}", file.display(), failure.message);
                Failure { message, ..failure }.into()
            }
            (_, Ok(failure)) => failure.into(),
            (_, Err(error)) => error,
        })?;
        // Recipe files of earlier versions have a layout whether there are factors or not.
        match flags.layout {
            Some(layout) if !recipe.quant().is_empty() && recipe.compensate() == Compensate::None => {
                let message = format!("`--layout {}` has no effect on quantized bases without factors", layout.name());
                Err(Failure::usage(message).hint("remove it, or add factors with `--compensate`").into())
            }
            _ => Ok(recipe),
        }
    }
}

/// Whether the first flag in `message` is among `options`.
fn is_named(options: &RecipeOptions, message: &str) -> bool {
    let flag = message.split_once("`--").and_then(|(_, rest)| rest.split([' ', '`']).next());
    let given = toml::Table::try_from(options).unwrap_or_default();
    flag.is_some_and(|flag| given.contains_key(flag))
}
