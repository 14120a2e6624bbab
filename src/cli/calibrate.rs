//! `lrc calibrate`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use clap::{Arg, Args};

use super::arguments::{DequantizeArgs, DeviceArgs, JsonArgs, MemoryArgs, OpenArgs};
use super::options::{Options, Selection};
use super::streams::{print, print_json};
use super::terminal::{Bars, grouped, table};
use crate::calibrate::{self, Header, Needs, Observation, Statistics, Windows};
use crate::checkpoint::{Existing, create_folder_of, expect_apart, folder_of};
use crate::compress::presets::Method;
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
#[command(verbatim_doc_comment)]
pub(super) struct CalibrateArgs {
    /// Folder, file (`.safetensors`, `.gguf`, `.bin`) or hub id (`org/name`)
    #[arg(required_unless_present = "merge")]
    model: Option<String>,

    #[command(flatten)]
    opening: OpenArgs,

    #[command(flatten)]
    dequantize: DequantizeArgs,

    /// Text to measure on (`.txt`, `.jsonl`, `.json`, `.parquet`)
    ///
    /// Prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`.
    #[arg(long, value_name = "FILE", required_unless_present = "merge", help_heading = "Text")]
    text: Option<PathBuf>,

    #[command(flatten)]
    options: Options<Measured>,

    /// Measure only the I-th of N equal parts of the windows
    #[arg(long, value_name = "I/N", value_parser = part, help_heading = "Text")]
    part: Option<(usize, usize)>,

    /// Methods to measure for [default: all]
    #[arg(long, value_enum, num_args = 1, help_heading = "Statistics")]
    method: Vec<Method>,

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

    /// Output file, ending in `.safetensors`
    #[arg(short, long, value_name = "STATISTICS", help_heading = "Output")]
    output: PathBuf,

    /// Replace the output file
    #[arg(long, help_heading = "Output")]
    force: bool,

    #[command(flatten)]
    json: JsonArgs,
}

/// The windows, and what is measured of them.
#[derive(Debug)]
struct Measured;

impl Selection for Measured {
    fn takes(id: &str) -> bool {
        ["field", "samples", "gradient_samples", "seq_len", "seed", "clip_gradients"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        let heading = if flag.get_id() == "clip_gradients" { "Statistics" } else { "Text" };
        let is_seldom = flag.get_id() == "gradient_samples";
        flag.help_heading(heading).hide_short_help(is_seldom)
    }
}

fn part(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parsed.filter(|&(i, n)| 1 <= i && i <= n).ok_or_else(|| "expected I/N with 1 ≤ I ≤ N, such as `1/4`".into())
}

pub(super) fn run(args: &CalibrateArgs, quiet: bool, progress: &Bars) -> Result<()> {
    calibrate::check_output(&args.output, Existing::of(args.force))?;
    let (header, seconds, source_quantization) = match (&args.model, &args.text) {
        (Some(model), Some(text)) => measure(args, model, text, progress)?,
        _ => (merge(args)?, calibrate::Seconds::default(), None),
    };
    let report = CalibrateReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source_quantization,
        size_bytes: std::fs::metadata(&args.output).map_or(0, |m| m.len()),
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

fn measure(
    args: &CalibrateArgs,
    model: &str,
    text: &std::path::Path,
    progress: &Bars,
) -> Result<(Header, calibrate::Seconds, Option<String>)> {
    let options = &args.options.values;
    let device = args.device.open()?;
    let checkpoint = args.dequantize.apply(args.opening.open(model, progress)?)?;
    let read = checkpoint.read_files();
    expect_apart(&args.output, read.iter().map(PathBuf::as_path).chain([text]))?;
    let decoder = Decoder::open(&checkpoint)?.on(&device);
    let needs = args.method.iter().map(|m| m.preset().needs()).reduce(Needs::union).unwrap_or(Needs::ALL);
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
    create_folder_of(&args.output)?;
    let folder = folder_of(&args.output).to_path_buf();
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
    statistics.write(&args.output, Existing::of(args.force))?;
    Ok((header, seconds, checkpoint.source_quantization()))
}

fn merge(args: &CalibrateArgs) -> Result<Header> {
    expect_apart(&args.output, args.merge.iter().map(PathBuf::as_path))?;
    let open = |path: &PathBuf| Ok((path.display().to_string(), Statistics::open(path)?));
    let files = args.merge.iter().map(open).collect::<Result<Vec<_>>>()?;
    Statistics::merge(&files, &args.output, Existing::of(args.force))
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
    format!("{}wrote `{}`\n", table(&["measure", "value"], rows), args.output.display())
}
