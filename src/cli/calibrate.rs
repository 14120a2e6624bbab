//! `lrc calibrate`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bytesize::ByteSize;
use clap::{Arg, Args};

use super::arguments::{
    DequantizeArgs, DeviceArgs, ForceArgs, JsonArgs, MemoryArgs, ModelArgs, OpenArgs, OutputArgs, TextArgs,
};
use super::options::{Options, Selection, repeated};
use super::streams::{print, print_json};
use super::terminal::{Bars, grouped, table};
use crate::calibrate::{self, Header, Needs, Observation, Statistics, Windows};
use crate::checkpoint::{create_folder_of, expect_apart, folder_of};
use crate::compress::recipe;
use crate::error::Failure;
use crate::model::coverage::{CompressedHints, expect_uncompressed};
use crate::model::{Decoder, WalkLimits, fingerprint, inventory};
use crate::report::{CalibrateReport, LRC_VERSION, SCHEMA_VERSION, peak_memory_bytes};
use crate::store::Journal;

/// Measure calibration statistics once and save them
///
/// Statistics are sums over tokens. Parts of a text can be measured on several
/// machines and merged.
///
/// Examples:
///   lrc calibrate MODEL --text text.txt -o stats.safetensors
///   lrc calibrate MODEL --text text.txt --part 1/2 -o a.safetensors
///   lrc calibrate --merge a.safetensors b.safetensors -o stats.safetensors
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    mut_arg("model", |model| model.required(false).required_unless_present("merge")),
    mut_arg("text", |text| text.required(false).required_unless_present("merge").help_heading("Text")),
    mut_arg("output", |output| output.value_name("STATISTICS").help("Output file, ending in `.safetensors`")),
)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    source: Option<ModelArgs>,

    #[command(flatten)]
    opening: OpenArgs,

    #[command(flatten)]
    dequantize: DequantizeArgs,

    #[command(flatten)]
    text: Option<TextArgs>,

    #[command(flatten)]
    options: Options<Measured>,

    /// Measure only the I-th of N equal parts of the windows
    #[arg(long, value_name = "I/N", value_parser = part, help_heading = "Text")]
    part: Option<(usize, usize)>,

    /// Add up files of statistics instead of measuring
    #[arg(
        long,
        value_name = "FILE",
        num_args = 2..,
        conflicts_with_all = [
            "model", "adapter", "revision", "text", "field", "method", "samples", "gradient_samples", "seq_len", "seed",
            "part", "clip_gradients", "memory", "device", "dequantize",
        ],
        help_heading = "Statistics"
    )]
    merge: Vec<PathBuf>,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    force: ForceArgs,

    #[command(flatten)]
    json: JsonArgs,
}

/// The windows, and what is measured of them, for several methods.
#[derive(Debug)]
struct Measured;

impl Selection for Measured {
    fn takes(id: &str) -> bool {
        ["field", "samples", "gradient_samples", "seq_len", "seed", "method", "clip_gradients"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        const METHODS: &str = "Methods to measure for [default: all]";
        match flag.get_id().as_str() {
            "method" => repeated(flag).help(METHODS).long_help(METHODS).help_heading("Statistics"),
            "clip_gradients" => flag.help_heading("Statistics").hide_short_help(false),
            "gradient_samples" => flag.help_heading("Text"),
            _ => flag.help_heading("Text").hide_short_help(false),
        }
    }
}

fn part(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parsed.filter(|&(i, n)| 1 <= i && i <= n).ok_or_else(|| "expected I/N with 1 ≤ I ≤ N, such as `1/4`".into())
}

pub(super) fn run(args: &CalibrateArgs, quiet: bool, progress: &Bars) -> Result<()> {
    calibrate::check_output(&args.output.output, args.force.existing())?;
    let (header, seconds, source_quantization) = match (&args.source, &args.text) {
        (Some(source), Some(file)) => measure(args, &source.model, &file.text, progress)?,
        _ => (merge(args)?, calibrate::Seconds::default(), None),
    };
    let report = CalibrateReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source_quantization,
        size_bytes: std::fs::metadata(&args.output.output).map_or(0, |m| m.len()),
        windows: header.n_windows(),
        tokens: header.n_tokens(),
        gradient_windows: header.gradient_windows(),
        texts: header.texts.iter().map(|p| format!("{}/{} of {}", p.part.0, p.part.1, &p.text_sha256[..12])).collect(),
        forward_seconds: seconds.forward,
        backward_seconds: seconds.backward,
        peak_memory_bytes: peak_memory_bytes(),
    };
    match (args.json.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show(args, &report)),
    }
}

/// With the gradients of a method, those at embeddings and logits cost nothing, and `--target-size` needs them.
fn needs(args: &CalibrateArgs) -> Needs {
    let methods = args.options.repeated.methods.iter();
    let needs = methods.map(|m| m.preset().needs()).reduce(Needs::union).unwrap_or(Needs::ALL);
    Needs { vocabulary: needs.output_gram, ..needs }
}

fn measure(
    args: &CalibrateArgs,
    model: &str,
    text: &Path,
    progress: &Bars,
) -> Result<(Header, calibrate::Seconds, Option<String>)> {
    let options = &args.options.values;
    let device = args.device.open()?;
    let checkpoint = args.dequantize.apply(args.opening.open(model, progress)?)?;
    let read = checkpoint.read_files();
    expect_apart(&args.output.output, read.iter().map(PathBuf::as_path).chain([text]))?;
    let decoder = Decoder::open(&checkpoint)?.on(&device);
    let needs = needs(args);
    if needs == Needs::default() {
        return Err(Failure::usage("`--method svd` uses no statistics")
            .hint("name another method, or leave `--method` out to collect for all")
            .into());
    }
    if options.clip_gradients == Some(true) && !needs.output_gram {
        return Err(Failure::usage(
            "`--clip-gradients` has no effect: no Gram of gradients is measured for this method",
        )
        .hint("remove it; `--method kfac`, or no `--method`, measures one")
        .into());
    }
    let linears = inventory::linears(&checkpoint);
    let hints = CompressedHints {
        quantized: "calibrate its source, or dequantize this one with `lrc export MODEL --format dense -o OUT`",
        low_rank: "calibrate its source: `lrc compress` does not compress this one again",
    };
    expect_uncompressed(&checkpoint, linears.iter().filter(|linear| linear.id.is_some()), hints)?;
    // Sums of inputs cost next to nothing, and `--center` needs them with any method.
    let needs = Needs { input_sum: true, ..needs };
    let observation = Observation { needs, clip_gradients: options.clip_gradients.unwrap_or(false) };
    let settings = recipe::windows(options, text)?;
    let windows = Windows::load(&checkpoint, &settings, needs, args.part.unwrap_or((1, 1)))?;
    // Statistics of large models need much space: they are spooled to the disk of the output.
    create_folder_of(&args.output.output)?;
    let folder = folder_of(&args.output.output).to_path_buf();
    let limits = WalkLimits::new(args.memory.bytes(), folder.clone());
    let header = Header::new(fingerprint(&checkpoint)?, observation, vec![windows.part.clone()]);
    let mut statistics = Statistics::new(header.clone(), limits.activation_bytes, &folder);
    let seconds = calibrate::observe(
        &decoder,
        windows.targeted(),
        observation,
        &limits,
        &Journal::default(),
        progress,
        &mut |sums| statistics.keep(sums),
    )
    .with_context(|| format!("calibrating on `{}`", windows.text))?;
    statistics.write(&args.output.output, args.force.existing())?;
    Ok((header, seconds, checkpoint.source_quantization()))
}

fn merge(args: &CalibrateArgs) -> Result<Header> {
    expect_apart(&args.output.output, args.merge.iter().map(PathBuf::as_path))?;
    let open = |path: &PathBuf| Ok((path.display().to_string(), Statistics::open(path)?));
    let files = args.merge.iter().map(open).collect::<Result<Vec<_>>>()?;
    Statistics::merge(&files, &args.output.output, args.force.existing())
}

fn show(args: &CalibrateArgs, report: &CalibrateReport) -> String {
    let mut rows = vec![
        ("windows", report.windows.to_string()),
        ("tokens", grouped(report.tokens as u64)),
        ("text parts", report.texts.join(", ")),
        ("size", ByteSize(report.size_bytes).to_string()),
    ];
    rows.extend(report.gradient_windows.map(|n| ("windows with gradients", n.to_string())));
    if args.merge.is_empty() {
        rows.push(("forward", format!("{:.1} s", report.forward_seconds)));
        rows.push(("backward", format!("{:.1} s", report.backward_seconds)));
    }
    let rows = rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
    format!("{}wrote `{}`\n", table(&["measure", "value"], rows), args.output.output.display())
}
