//! `lrc heal`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::arguments::{
    DeviceArgs, FolderArgs, GateArgs, MemoryArgs, ModelArgs, RestartArgs, RevisionArgs, TextArgs, at_least_1, open,
};
use super::options::{Options, Selection};
use super::terminal::{Bars, table};
use crate::compress::recipe;
use crate::error::Failure;
use crate::heal::{Distance, HealJob, HealStage, SAVE_STEPS, Train, WeightedText, heal};
use crate::report::schema::{Field, fields_at};
use crate::report::{CompressReport, HealRecord, HealedPart, gate};
use crate::train::Settings;

/// Train a compressed model to do what its source does
///
/// Block after block, the floats of the compressed model learn to give the
/// states that the source has there. Shapes, ranks, codes and sizes stay. Some
/// windows of the texts are held out: they choose the epoch whose values are kept.
///
/// Examples:
///   lrc heal COMPRESSED --teacher MODEL --text text.txt -o OUT
///   lrc heal COMPRESSED --teacher MODEL --text a.txt:0.7 --text b.jsonl:0.3 -o OUT
///   lrc heal COMPRESSED --teacher MODEL --text text.txt --statistics stats.safetensors -o OUT
///   lrc heal COMPRESSED --teacher MODEL --text text.txt -o OUT --fail-if 'healed.perplexity.after > 12'
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, mut_arg("model", |model| model.help("Compressed folder or hub id")))]
pub(super) struct HealArgs {
    #[command(flatten)]
    source: ModelArgs,

    #[command(flatten)]
    revision: RevisionArgs,

    /// The model that was compressed
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    teacher: String,

    #[command(flatten)]
    texts: Texts,

    /// Text of the held-out windows
    ///
    /// A text that the compression was not calibrated on chooses better. Without it, every eighth window of the texts is
    /// held out.
    #[arg(long, value_name = "FILE", help_heading = "Text")]
    held_out: Option<PathBuf>,

    #[command(flatten)]
    options: Options<Drawn>,

    /// Stages of training [default: blocks,model]
    ///
    /// They follow one another: `--stage blocks,model`.
    #[arg(
        long,
        value_enum,
        value_name = "STAGE",
        value_delimiter = ',',
        num_args = 1,
        default_values = ["blocks", "model"],
        hide_default_value = true,
        help_heading = "Training"
    )]
    stage: Vec<HealStage>,

    /// Tensors that are trained
    #[arg(long, value_enum, default_value_t, value_name = "WHAT", help_heading = "Training")]
    train: Train,

    /// Distance of states in the stage `blocks`
    ///
    /// Unless it is given, `fisher` with `--statistics` and `output` without.
    #[arg(long, value_enum, value_name = "DISTANCE", help_heading = "Training")]
    loss: Option<Distance>,

    /// Share of the texts in the loss
    ///
    /// In the stage `model`, this share of the loss is the negative log-likelihood of the texts' own tokens, and the rest
    /// the divergence from the source. So a model also learns to predict this kind of text, as in a fine-tuning: its
    /// perplexity there can fall below the source's while it goes away from the source.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, help_heading = "Training")]
    labels: f64,

    /// Most passes over the windows
    #[arg(long, value_name = "N", value_parser = at_least_1, default_value_t = Settings::default().epochs, help_heading = "Training")]
    epochs: usize,

    /// Largest learning rate, by stage unless given
    ///
    /// The stage `model` takes a tenth of it. Unless it is given, it is 2e-4 in the stage `blocks`; in `model` it is
    /// 1.5e-4 times the divergence of the held-out windows before it, 1e-4 at most and 4e-5 times `--labels` at least.
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    learning_rate: Option<f64>,

    /// Windows of a step
    #[arg(long, value_name = "N", value_parser = at_least_1, default_value_t = Settings::default().batch, help_heading = "Training")]
    batch: usize,

    /// Steps of the stage `model` after which its state is kept
    ///
    /// A run that was killed goes on from there. A state takes 16 bytes a trained parameter, and its predecessor is
    /// removed once it is whole.
    #[arg(long, value_name = "N", value_parser = at_least_1, default_value_t = SAVE_STEPS, help_heading = "Training", hide_short_help = true)]
    save_steps: usize,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    restart: RestartArgs,

    #[command(flatten)]
    gates: GateArgs,
}

/// The windows, and the metric of the errors.
#[derive(Debug)]
struct Drawn;

impl Selection for Drawn {
    fn takes(id: &str) -> bool {
        ["field", "samples", "seq_len", "seed", "statistics"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        const STATISTICS: &str = "Statistics of the source: errors in their metric";
        match flag.get_id().as_str() {
            "statistics" => flag.help(STATISTICS).long_help(format!(
                "{STATISTICS}\n\nA file of `lrc calibrate --method kfac`. Errors of states are measured in the metric of the gradients there; without it, they are squared errors."
            )),
            _ => flag.help_heading("Text").hide_short_help(false),
        }
    }
}

/// `--text`, any number of times.
#[derive(Debug)]
struct Texts(Vec<PathBuf>);

impl Args for Texts {
    fn augment_args(command: Command) -> Command {
        const TEXT: &str = "File of text (`.txt`, `.jsonl`, `.parquet`)";
        TextArgs::augment_args(command).mut_arg("text", |text| {
            text.action(ArgAction::Append).help_heading("Text").help(TEXT).long_help(format!(
                "{TEXT}\n\nMay be repeated: texts share `--samples` by the weights behind their names, `a.txt:0.7` and `b.jsonl:0.3`."
            ))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Texts {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(matches.get_many("text").into_iter().flatten().cloned().collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(super) fn run(args: &HealArgs, quiet: bool, progress: &Bars) -> Result<()> {
    gate::expect_fields::<CompressReport>(&args.gates.fail_if, &absent(args))?;
    if let Some(rate) = args.learning_rate.filter(|&rate| !(rate > 0.0 && rate < 1.0)) {
        return Err(Failure::usage(format!("`--learning-rate {rate}` is outside (0, 1)"))
            .hint("give a rate, for example 2e-4")
            .into());
    }
    if let Some(loss) = args.loss.filter(|_| !args.stage.contains(&HealStage::Blocks)) {
        return Err(Failure::usage(format!("`--loss {}` has no effect without the stage `blocks`", loss.name()))
            .hint("the other stages compare distributions of the next token")
            .into());
    }
    if !(0.0..=1.0).contains(&args.labels) {
        return Err(Failure::usage(format!("`--labels {}` is outside [0, 1]", args.labels))
            .hint("give a share of the loss, for example 0.5")
            .into());
    }
    if args.labels > 0.0 && !args.stage.contains(&HealStage::Model) {
        return Err(Failure::usage(format!("`--labels {}` has no effect without the stage `model`", args.labels))
            .hint("the other stages learn from the source alone")
            .into());
    }
    let parse = |path: &PathBuf| {
        let text = path.to_string_lossy();
        text.parse().map_err(|reason: String| Failure::usage(format!("`--text {text}`: {reason}")).into())
    };
    let texts: Vec<WeightedText> = args.texts.0.iter().map(parse).collect::<Result<_>>()?;
    let options = &args.options.values;
    let windows = recipe::windows(options, &texts[0].path)?;
    args.folder.check()?;
    let device = args.device.open()?;
    let checkpoint = args.revision.open(&args.source.model, progress)?;
    let teacher = open(&args.teacher, None, progress)?;
    let job = HealJob {
        checkpoint: &checkpoint,
        teacher: &teacher,
        teacher_name: &args.teacher,
        stages: &args.stage,
        texts: &texts,
        held_out: args.held_out.as_deref(),
        train: args.train,
        epochs: args.epochs,
        batch: args.batch,
        labels: args.labels,
        learning_rate: args.learning_rate,
        windows,
        statistics: options.statistics.as_deref(),
        loss: args.loss,
        save_steps: args.save_steps,
        output: args.folder.path(),
        existing: args.folder.existing(),
        earlier: args.restart.earlier(),
        memory_bytes: args.memory.bytes(),
        device,
    };
    let report = heal(&job, progress)?;
    let show = |report: &CompressReport| if quiet { String::new() } else { show(report, args) };
    args.gates.conclude(&report, show)
}

/// Fields that this healing does not fill, and what would.
fn absent(args: &HealArgs) -> Vec<(Vec<Field>, &'static str)> {
    let fields = [
        ("healed.parts", "`--stage blocks` fills it", args.stage.contains(&HealStage::Blocks)),
        ("healed.model", "`--stage model` fills it", args.stage.contains(&HealStage::Model)),
        ("healed.closed", "`--stage closed` fills it", args.stage.contains(&HealStage::Closed)),
        ("healed.held_out_text", "`--held-out FILE` fills it", args.held_out.is_some()),
        ("healed.learning_rate", "`--learning-rate` fills it", args.learning_rate.is_some()),
    ];
    let absent = fields.into_iter().filter(|(.., is_filled)| !is_filled);
    absent.map(|(name, hint, _)| (fields_at::<CompressReport>(name), hint)).collect()
}

fn show(report: &CompressReport, args: &HealArgs) -> String {
    let healing = report.healed.as_ref().map_or(String::new(), healing);
    format!("{healing}wrote `{}` in {:.1} s\n", args.folder.path().display(), report.elapsed_seconds)
}

/// The halves that were trained, and what became of the model.
pub(super) fn healing(healed: &HealRecord) -> String {
    let row = |part: &HealedPart| {
        vec![
            part.block.to_string(),
            part.half.name().to_string(),
            format!("{:.4e}", part.error_before),
            format!("{:.4e}", part.error_after),
            format!("{:.3}", part.error_after / part.error_before.max(f64::MIN_POSITIVE)),
            format!("{} of {}", part.best_epoch, part.trained.len()),
        ]
    };
    let columns = ["block", "half", "held-out error", "healed", "ratio", "epoch"];
    let halves = match healed.parts.is_empty() {
        true => String::new(),
        false => table(&columns, healed.parts.iter().map(row).collect()),
    };
    halves + &healed.lines().join("\n") + "\n"
}
