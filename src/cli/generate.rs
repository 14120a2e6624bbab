//! `lrc generate`.

use anyhow::Result;
use clap::{Arg, Args};

use super::arguments::{DeviceArgs, GateArgs, ReferenceArgs, SourceArgs, at_least_1};
use super::options::{Options, Selection};
use super::streams::{print, write_error};
use super::terminal::{Bars, fixed};
use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::error::Failure;
use crate::generate::{GenerateSettings, Sampling, generate};
use crate::report::gate;
use crate::report::schema::{Field, fields_at};
use crate::report::{GenerateReport, GeneratedRecord, LRC_VERSION, SCHEMA_VERSION, Stop, peak_memory_bytes};
use crate::text::Prompt;

/// Continue a prompt, to read what a compressed model says
///
/// Reads plain checkpoints and every output of `lrc compress`. The text goes to
/// stdout as it comes, without the prompt. All weights are in memory, in 32 bits.
///
/// Examples:
///   lrc generate OUT --prompt 'Once upon a time'
///   lrc generate OUT --prompt 'Once upon a time' --reference MODEL
///   lrc generate OUT --prompt 'Name three rivers.' --chat --temperature 0.7 --top-p 0.9
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    model: SourceArgs,

    /// What the text continues
    #[arg(long, value_name = "TEXT", help_heading = "Text")]
    prompt: String,

    /// The prompt is a message, which the model answers
    ///
    /// It is put into the model's chat template.
    #[arg(long, help_heading = "Text")]
    chat: bool,

    #[command(flatten)]
    reference: ReferenceArgs,

    /// The most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_1, help_heading = "Text")]
    max_new_tokens: usize,

    /// Divide logits by this; 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = not_negative, help_heading = "Text")]
    temperature: f64,

    /// Draw from so many of the likeliest tokens
    #[arg(long, value_name = "N", value_parser = at_least_1, help_heading = "Text")]
    top_k: Option<usize>,

    /// Probability mass to draw from (nucleus)
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability, help_heading = "Text")]
    top_p: f64,

    #[command(flatten)]
    options: Options<Drawing>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    gates: GateArgs,
}

/// How tokens are drawn.
#[derive(Debug)]
struct Drawing;

impl Selection for Drawing {
    fn takes(id: &str) -> bool {
        id == "seed"
    }

    fn adapt(flag: Arg) -> Arg {
        flag.help_heading("Text").help("Seed of the draw [default: 0]")
    }
}

fn number(text: &str, range: &str, is_in: impl Fn(f64) -> bool) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&number| is_in(number));
    number.ok_or_else(|| format!("`{text}` is not a number {range}"))
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "from 0 up", |number| number >= 0.0 && number.is_finite())
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, "in (0, 1]", |number| number > 0.0 && number <= 1.0)
}

pub(super) fn run(args: &GenerateArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let absent = [(of_reference(), "`--reference MODEL` measures it")];
    gate::expect_fields::<GenerateReport>(
        &args.gates.fail_if,
        if args.reference.reference.is_none() { &absent } else { &[] },
    )?;
    let seed = args.options.values.seed;
    let is_drawn = args.top_k.is_some() || args.top_p < 1.0 || seed.is_some();
    if args.temperature == 0.0 && is_drawn {
        return Err(Failure::usage("`--top-k`, `--top-p` and `--seed` have no effect with `--temperature 0`")
            .hint("add `--temperature 0.7`, or leave them out for the likeliest tokens")
            .into());
    }
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: seed.unwrap_or(0) };
    let device = args.device.open()?;
    let checkpoint = args.model.open(progress)?;
    let reference = args.reference.open(progress)?;
    let run = Run { args, sampling, device, quiet, progress };
    let generated = run.text(args.model.model(), &checkpoint)?;
    let reference = reference.map(|(name, checkpoint)| run.text(name, &checkpoint)).transpose()?;
    let report = GenerateReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        prompt: args.prompt.clone(),
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        seed: sampling.seed,
        same_tokens: reference.as_ref().map(|other| generated.same_tokens(other)),
        generated,
        reference,
        peak_memory_bytes: peak_memory_bytes(),
    };
    if !quiet {
        write_error(&show(&report));
    }
    args.gates.conclude(&report, |_| String::new())
}

/// The fields that a reference fills.
fn of_reference() -> Vec<Field> {
    ["reference", "same_tokens"].into_iter().flat_map(fields_at::<GenerateReport>).collect()
}

struct Run<'a> {
    args: &'a GenerateArgs,
    sampling: Sampling,
    device: Device,
    quiet: bool,
    progress: &'a Bars,
}

impl Run<'_> {
    /// Generates the text of one model, and prints it meanwhile.
    fn text(&self, name: &str, checkpoint: &Checkpoint) -> Result<GeneratedRecord> {
        let args = self.args;
        let is_shown = !args.gates.json.json;
        if is_shown && args.reference.reference.is_some() && !self.quiet {
            print(&format!("[{name}]\n"))?;
        }
        let prompt = args.prompt.clone();
        let settings = GenerateSettings {
            model: name.into(),
            prompt: if args.chat { Prompt::Message(prompt) } else { Prompt::Text(prompt) },
            max_new_tokens: args.max_new_tokens,
            sampling: self.sampling,
            device: self.device.clone(),
        };
        let mut say = |piece: &str| if is_shown { print(piece) } else { Ok(()) };
        let generated = generate(checkpoint, &settings, self.progress, &mut say)?;
        if is_shown {
            print(if args.reference.reference.is_some() { "\n\n" } else { "\n" })?;
        }
        Ok(generated)
    }
}

/// What there is to say of the texts.
fn show(report: &GenerateReport) -> String {
    let line = |record: &GeneratedRecord| {
        let speed = record.tokens_per_second().map_or(String::new(), |speed| format!(", {} tokens/s", fixed(speed, 1)));
        let end = match record.stop {
            Stop::End => "ended by the model",
            Stop::Length => "the most that were asked for",
            Stop::Context => "the context is full",
        };
        let (n, name) = (record.tokens.len(), &record.model);
        format!("{name}: {n} tokens, {end}; {} of the prompt{speed}\n", record.prompt_tokens)
    };
    let lines: String = std::iter::once(&report.generated).chain(&report.reference).map(line).collect();
    let same = report.same_tokens.map_or(String::new(), |same| format!("the first {same} tokens are the same\n"));
    lines + &same
}
